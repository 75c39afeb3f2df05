"""Bytes against perplexity of SmolLM2-135M: llama.cpp's own quantizations of the same weights, and pqcli's files.

usage: llama_cpp.py GGUF SMOLLM2 [--types Q2_K ...] [--bits 2.5 ...] [--stats FILE] [--codec trellis]
GGUF is the file that the kit's `smollm2.py build` made the folder SMOLLM2 from. Needs `llama-cpp-python` and `gguf`.

llama.cpp quantizes an F32 file of the same weights, without an importance matrix. Its tensors are dequantized and given
to the same forward pass that scores what pqcli's files decode to: 8,184 tokens of WikiText-2 in windows of 1,024. Bytes
are those of all tensors; a GGUF file holds another 1.8 MB of vocabulary. Types of the K family need widths that are
multiples of 256, so that most layers of this model (576 wide) fall back to larger types: the bytes say so.
"""

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

from second_order import KIT, SmolLM2, script

import pqcli

TYPES = ("Q2_K", "IQ3_S", "Q3_K_M", "Q4_0", "Q4_K_M", "Q8_0")


def quantized(source, target, kind):
    """Write `source` in llama.cpp's type `kind`."""
    here = sys.path.pop(0)  # this file's folder, where this file would be found as `llama_cpp`
    llama = importlib.import_module("llama_cpp.llama_cpp")
    sys.path.insert(0, here)
    params = llama.llama_model_quantize_default_params()
    params.ftype = getattr(llama, "LLAMA_FTYPE_ALL_F32" if kind == "F32" else f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.allow_requantize = True
    params.nthread = 1
    if llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), params):
        raise SystemExit(f"llama.cpp could not write {kind}")


def of_llama_cpp(model, gguf, kinds):
    from gguf import GGUFReader
    from safetensors.torch import load_file

    build = script("smollm2").build
    with tempfile.TemporaryDirectory() as folder:
        full = Path(folder) / "full.gguf"
        quantized(gguf, full, "F32")
        for kind in kinds:
            file = Path(folder) / f"{kind}.gguf"
            quantized(full, file, kind)
            n_bytes = sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)
            build(str(file), Path(folder) / "dense")
            state = load_file(Path(folder) / "dense" / "model.safetensors")
            line(f"llama.cpp {kind}", n_bytes, model, state)
            file.unlink()


def of_pqcli(model, checkpoint, stats, bits, codec):
    with tempfile.TemporaryDirectory() as folder:
        for wanted in bits:
            file = Path(folder) / "model.pq.safetensors"
            recipe = pqcli.Recipe(codec=codec, target_bits=wanted, stats=stats)
            report = pqcli.compress(checkpoint, file, recipe, force=True)
            line(f"pqcli {codec} {wanted:g} bits", report.compressed_bytes, model, pqcli.load(file))


def line(name, n_bytes, model, state):
    bits = 8 * n_bytes / sum(weight.numel() for weight in model.state.values())
    print(f"| {name} | {n_bytes:,} | {bits:.2f} | {model.score({**model.state, **state}).split()[-1]} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("smollm2", type=Path)
    parser.add_argument("--types", nargs="*", default=TYPES)
    parser.add_argument("--bits", type=float, nargs="*", default=[2.5, 3.0, 4.0])
    parser.add_argument("--codec", default="trellis")
    parser.add_argument("--stats")
    args = parser.parse_args()
    if not KIT.exists():
        raise SystemExit(f"{KIT}: set PQCLI_KIT")
    model = SmolLM2(args.smollm2)
    print("| file | bytes | bits per weight | perplexity |\n|---|--:|--:|--:|", flush=True)
    line("dense float32", sum(weight.nbytes for weight in model.state.values()), model, model.state)
    of_llama_cpp(model, args.gguf, args.types)
    of_pqcli(model, args.smollm2 / "model.safetensors", args.stats, args.bits, args.codec)


if __name__ == "__main__":
    main()
