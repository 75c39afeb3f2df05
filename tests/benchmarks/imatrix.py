"""An importance matrix as llama.cpp's `llama-imatrix` writes it, made of the statistics of a Llama: diagonals alone.

usage: imatrix.py STATS OUT.gguf
Sums of squares and counts of every layer, under llama.cpp's names; no embedding, no gradients. What it is worth:
`second_order.py smollm2 OUT.gguf --smollm2 FOLDER --bytes N --plain`.
"""

import argparse

import gguf
import numpy as np

import pqcli.stats

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stats")
    parser.add_argument("out")
    args = parser.parse_args()
    stats = pqcli.stats.open(args.stats)
    writer = gguf.GGUFWriter(args.out, arch="", use_temp_file=False)
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", [args.stats])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name in stats:
        if not name.startswith("model.layers."):
            continue
        _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
        seen = stats.moments(name)
        theirs = f"blk.{layer}.{NAMES[rest]}.weight"
        writer.add_tensor(f"{theirs}.in_sum2", (seen.diagonal * seen.n_samples).astype(np.float32)[None])
        writer.add_tensor(f"{theirs}.counts", np.array([[seen.n_samples]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
