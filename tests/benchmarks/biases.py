"""What biases would give that take up the mean of their layer's error, b + (W - W_hat) E[x]: MiniLM.

usage: biases.py STATS [--bytes 2330828]
STATS is what `kit_stats.py minilm` wrote. Files are made by `pqcli.compress` without and with the statistics, decoded
and scored, once as they are and once with corrected biases.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from second_order import MiniLM

import pqcli
import pqcli.stats


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stats")
    parser.add_argument("--bytes", type=int, nargs="+", default=[2330828])
    args = parser.parse_args()
    model, stats = MiniLM(None), pqcli.stats.open(args.stats)
    for size in args.bytes:
        for given in (None, args.stats):
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.pq.safetensors"
                recipe = pqcli.Recipe(codec="trellis", target_bytes=size, stats=given)
                report = pqcli.compress(model.checkpoint, file, recipe)
                decoded = {**model.state, **pqcli.load(file)}
            corrected, n = dict(decoded), 0
            for name in stats:
                seen, bias = stats.moments(name), name.removesuffix("weight") + "bias"
                if seen.mean is not None and seen.axis == 1 and bias in decoded:
                    error = (model.state[name] - decoded[name]).double()
                    corrected[bias] = decoded[bias] + (error @ torch.from_numpy(seen.mean)).float()
                    n += 1
            print(f"{report.compressed_bytes:,} B, statistics {given}: {model.score(decoded)}", flush=True)
            print(f"  {n} biases corrected: {model.score(corrected)}", flush=True)


if __name__ == "__main__":
    main()
