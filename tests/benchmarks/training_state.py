"""Training goes on after a checkpoint was compressed with its training state: spacings, bytes, loss curves.

usage: training_state.py [--folder OUT] [--only {spacing,bytes,curves} ...] [--tasks NAME ...] [--steps 150]
                         [--after 100]

Three runs of small real networks: ResNet-20 on the kit's 1,500 CIFAR-10 images with AdamW and with SGD and momentum,
and a transformer on bytes of WikiText-2 with AdamW. Each trains for `--steps` steps and saves a whole checkpoint:
model, optimizer, schedule, generator state. Then

    spacing   what spacings of eight bits do to moments, and to the step that AdamW takes with them, and their entropy
    bytes     what the training state takes: raw, without loss, in eight bits, and as bitsandbytes has eight bits
    curves    `pqcli compress`, `pqcli decode`, and `--after` more steps with the same data in the same order: losses
              beside those of the run that was never interrupted, of one whose optimizer starts anew, and of one whose
              weights were off by a millionth (training is chaotic: so much separates runs at any rate)

Ends with 1 where a run from a file without loss differs from the uninterrupted one in any loss, or where one from
eight bits is further from it, over the first 25 steps, than a tenth of what starting anew is.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import pqcli

KIT = Path(os.environ.get("PQCLI_KIT", Path(__file__).parents[3] / "shared" / "kit"))
BATCH, CONTEXT = 64, 128
BLOCK = 128
WINDOW = 25
"""Steps over which losses are averaged, and compared."""


# --- tasks ------------------------------------------------------------------------------------------------------------


class Images:
    """ResNet-20 on the kit's training images, flipped and shifted at random."""

    def __init__(self) -> None:
        spec = importlib.util.spec_from_file_location("eval_resnet_cifar10", KIT / "eval_resnet_cifar10.py")
        self._kit = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._kit)
        with np.load(KIT / "data" / "cifar10_train1500.npz") as data:
            images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).float() / 255
            self._labels = torch.from_numpy(data["y"]).long()
        self._images = functional.pad(
            (images - images.mean((0, 2, 3), True)) / images.std((0, 2, 3), keepdim=True), [4] * 4
        )

    def model(self) -> nn.Module:
        return self._kit.ResNet(3)

    def loss(self, model: nn.Module) -> torch.Tensor:
        chosen = torch.randint(len(self._images), (BATCH,))
        y, x = torch.randint(9, (2,)).tolist()
        batch = self._images[chosen, :, y : y + 32, x : x + 32]
        batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
        return functional.cross_entropy(model(batch), self._labels[chosen])


class Transformer(nn.Module):
    """A causal transformer on bytes."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        hidden = self.embed(text) + self.place(torch.arange(text.shape[1]))
        return self.head(self.norm(self.layers(hidden, mask, is_causal=True)))


class Text:
    """The transformer on windows of WikiText-2."""

    def __init__(self) -> None:
        self._text = torch.frombuffer(
            bytearray((KIT / "data" / "wikitext2_calibration.txt").read_bytes()), dtype=torch.uint8
        )

    def model(self) -> nn.Module:
        return Transformer()

    def loss(self, model: nn.Module) -> torch.Tensor:
        starts = torch.randint(len(self._text) - CONTEXT - 1, (16,))
        windows = torch.stack([self._text[start : start + CONTEXT + 1] for start in starts]).long()
        logits = model(windows[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


TASKS = {
    "ResNet-20, AdamW": (Images, lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)),
    "ResNet-20, SGD": (Images, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)),
    "transformer, AdamW": (Text, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)),
}


@dataclass
class Run:
    """A training run: all that a checkpoint of it holds."""

    task: Any
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any

    @classmethod
    def of(cls, name: str) -> "Run":
        made, optimizer_of = TASKS[name]
        torch.manual_seed(0)
        task = made()
        model = task.model()
        optimizer = optimizer_of(model.parameters())
        return cls(task, model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1000))

    def steps(self, n: int) -> list[float]:
        losses = []
        for _ in range(n):
            loss = self.task.loss(self.model)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.item())
        return losses

    def save(self, path: Path) -> None:
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "rng_state": torch.get_rng_state(),
            },
            path,
        )

    def load(self, path: Path, *, with_state: bool = True) -> None:
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        if with_state:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["rng_state"])


def trained(folder: Path, names: list[str], steps: int) -> dict[str, Path]:
    """A checkpoint of every run."""
    files = {}
    for name in names:
        files[name] = folder / (re.sub(r"\W+", "-", name) + f"-{steps}.pt")
        if not files[name].exists():
            run = Run.of(name)
            run.steps(steps)
            run.save(files[name])
    return files


def moments_of(path: Path) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """AdamW's first and second moments of more than a thousand values, and its step."""
    state = torch.load(path, weights_only=True)["optimizer"]["state"].values()
    large = [one for one in state if "exp_avg_sq" in one and one["exp_avg"].numel() > 1024]
    first, second = ([one[word].double().numpy().ravel() for one in large] for word in ("exp_avg", "exp_avg_sq"))
    return first, second, int(large[0]["step"]) if large else 0


# --- spacings ---------------------------------------------------------------------------------------------------------


def dynamic(*, signed: bool) -> np.ndarray:
    """The positive values of bitsandbytes' dynamic map of eight bits: seven decades, finer near the largest."""
    values = [1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + (0 if signed else 1)) + 1)
        values += list(10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2)
    return np.sort(values)


def powers(power: float, *, signed: bool) -> np.ndarray:
    n = 127 if signed else 255
    return (np.arange(1, n + 1) / n) ** power


def octaves(per_octave: int, *, signed: bool) -> np.ndarray:
    return np.sort(2.0 ** (-np.arange(127 if signed else 255) / per_octave))


def spaced(values: np.ndarray, steps: np.ndarray, *, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Values in blocks with the nearest of these steps times the largest of the block, and their codes."""
    blocks = np.zeros(-(-values.size // BLOCK) * BLOCK)
    blocks[: values.size] = np.abs(values)
    blocks = blocks.reshape(-1, BLOCK)
    scale = blocks.max(1, keepdims=True)
    share = blocks / np.where(scale == 0, 1, scale)
    steps = np.concatenate([[0.0], steps])
    codes = np.searchsorted((steps[1:] + steps[:-1]) / 2, share)
    if not signed:
        codes = np.where((share > 0) & (codes == 0), 1, codes)
    found = (steps[codes] * scale).ravel()[: values.size] * np.sign(values)
    return found, codes.ravel()[: values.size] * np.sign(values).astype(int)


def entropy(codes: np.ndarray) -> float:
    counts = np.bincount(codes - codes.min())
    shares = counts[counts > 0] / codes.size
    return float(-(shares * np.log2(shares)).sum())


def steps_of(first: np.ndarray, second: np.ndarray, t: int) -> np.ndarray:
    """The step of AdamW, in units of the learning rate."""
    return (first / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)


def spacings(files: dict[str, Path]) -> None:
    """A line a spacing: its own error, that of AdamW's step, its entropy, and what it does to small values."""
    for name, path in files.items():
        first, second, t = moments_of(path)
        if not first:
            continue
        print(f"\n{name}: {sum(part.size for part in first):,} moments of each form, blocks of {BLOCK}")
        print(f"{'':30}{'rel. MSE':>10}{'of the step':>13}{'bits':>7}  small values")
        exact = steps_of(np.concatenate(first), np.concatenate(second), t)
        for form, parts in (("first", first), ("second", second)):
            signed = form == "first"
            for label, steps in (
                ("linear", powers(1, signed=signed)),
                ("squares", powers(2, signed=signed)),
                ("cubes", powers(3, signed=signed)),
                ("fourth powers", powers(4, signed=signed)),
                ("dynamic (bitsandbytes)", dynamic(signed=signed)),
                ("8 steps an octave", octaves(8, signed=signed)),
                ("16 steps an octave", octaves(16, signed=signed)),
            ):
                coded = [spaced(part, steps, signed=signed) for part in parts]
                found, whole = np.concatenate([values for values, _ in coded]), np.concatenate(parts)
                bits = sum(entropy(codes) * codes.size for _, codes in coded) / whole.size
                both = (found, np.concatenate(second)) if signed else (np.concatenate(first), found)
                error = np.square(steps_of(*both, t) - exact).sum() / np.square(exact).sum()
                own = np.square(found - whole).sum() / np.square(whole).sum()
                if signed:
                    small = f"{np.mean((found == 0) & (whole != 0)):.2%} become zero"
                else:
                    off = np.abs(np.log(found[whole > 0] / whole[whole > 0])).max()
                    small = f"off by a factor of {np.exp(off):.3g} at most"
                print(f"  {form:8}{label:22}{own:8.1e}{error:13.1e}{bits:7.2f}  {small}")


# --- bytes ------------------------------------------------------------------------------------------------------------


def bitsandbytes_bytes(path: Path) -> int:
    """What its optimizers hold: a byte a value and a float32 for 256 of them; float32 for fewer than 4,096 values."""
    total = 0
    for state in torch.load(path, weights_only=True)["optimizer"]["state"].values():
        for tensor in state.values():
            if isinstance(tensor, torch.Tensor):
                n = tensor.numel()
                total += tensor.nbytes if n < 4096 else n + 4 * -(-n // 256)
    return total


def compressed(path: Path, target: Path, recipe: pqcli.Recipe) -> tuple[pqcli.Report, float]:
    """The report, and the seconds of CPU that it took."""
    started = time.process_time()
    report = pqcli.compress(path, target, recipe, force=True)
    return report, time.process_time() - started


def sizes(files: dict[str, Path], folder: Path) -> None:
    """A line a run: bytes of the training state, and seconds."""
    columns = f"{'raw':>12}{'keep':>12}{'8bit':>12}{'bitsandbytes':>14}"
    print(f"\n{'bytes of the training state':27}{columns}   CPU s of keep, 8bit, drop")
    for name, path in files.items():
        reports = {
            state: compressed(path, folder / "sizes.pq.safetensors", pqcli.Recipe(training_state=state))
            for state in ("keep", "8bit", "drop")
        }
        keep, eight = (reports[state][0].state for state in ("keep", "8bit"))
        seconds = "  ".join(f"{one[1]:.1f}" for one in reports.values())
        taken = (keep.original_bytes, keep.bytes, eight.bytes)
        print(f"{name:27}" + "".join(f"{n:12,}" for n in taken) + f"{bitsandbytes_bytes(path):14,}   {seconds}")
        whole = {state: one[0].compressed_bytes for state, one in reports.items()}
        print(f"  the file, plain PQ: {path.stat().st_size:,} -> " + ", ".join(f"{s} {n:,}" for s, n in whole.items()))


# --- curves -----------------------------------------------------------------------------------------------------------

EXACT = ("--exclude", "*")
WAYS = {
    "keep": (*EXACT, "--training-state", "keep"),
    "8bit": (*EXACT, "--training-state", "8bit"),
    "trellis, 8bit": ("--codec", "trellis", "--quality", "near-lossless", "--training-state", "8bit"),
}


def through_files(path: Path, folder: Path, options: tuple[str, ...]) -> tuple[Path, int]:
    """The checkpoint as the command line gives it back, and the size of the file between."""
    file, back = folder / "curves.pq.safetensors", folder / "curves.pt"
    for command in (("compress", path, "-o", file, *options), ("decode", file, "-o", back)):
        subprocess.run([sys.executable, "-m", "pqcli", *map(str, command), "--force", "--quiet"], check=True)
    return back, file.stat().st_size


def resumed(
    name: str, path: Path, steps: int, *, with_state: bool = True, noise: float = 0.0
) -> tuple[list[float], Any]:
    """The losses of a run that goes on from a checkpoint, and the weights at its end."""
    run = Run.of(name)
    run.load(path, with_state=with_state)
    state = torch.get_rng_state()
    with torch.no_grad():
        for weight in run.model.parameters() if noise else ():
            weight *= 1 + noise * torch.randn_like(weight)
    torch.set_rng_state(state)
    losses = run.steps(steps)
    return losses, torch.cat([weight.detach().reshape(-1) for weight in run.model.parameters()])


def curves(files: dict[str, Path], folder: Path, start_step: int, steps: int) -> bool:
    """A column a way: mean losses; then how far losses and weights are from those of the uninterrupted run."""
    good = True
    for name, path in files.items():
        found = {"uninterrupted": resumed(name, path, steps)}
        n_bytes = {}
        for way, options in WAYS.items():
            back, n_bytes[way] = through_files(path, folder, options)
            found[way] = resumed(name, back, steps)
        found["off by 1e-6"] = resumed(name, path, steps, noise=1e-6)
        found["anew"] = resumed(name, path, steps, with_state=False)
        expected, weights = found["uninterrupted"]
        start = torch.cat([w.reshape(-1) for w in (lambda run: run.load(path) or run.model.parameters())(Run.of(name))])
        moved = (weights - start.detach()).norm()
        print(
            f"\n{name}, steps {start_step} to {start_step + steps}: mean loss" + "".join(f"{way:>15}" for way in found)
        )
        for at in range(0, steps, WINDOW):
            means = "".join(f"{np.mean(losses[at : at + WINDOW]):15.4f}" for losses, _ in found.values())
            print(f"{f'  {at} to {at + WINDOW}':46}{means}")

        every = {way: np.array(losses) for way, (losses, _) in found.items()}
        apart = {way: np.square(losses - every["uninterrupted"]) for way, losses in every.items()}
        early, late = ({way: np.sqrt(np.mean(d[:n])) for way, d in apart.items()} for n in (WINDOW, steps))

        for label, figures in (
            (f"  rms difference of losses, first {WINDOW}", early.values()),
            ("  rms difference of losses, all", late.values()),
            ("  weights at the end, part of the way", [float((w - weights).norm() / moved) for _, w in found.values()]),
        ):
            print(f"{label:46}" + "".join(f"{figure:15.5f}" for figure in figures))
        print(f"{'  bytes of the file':46}{path.stat().st_size:15,}" + "".join(f"{n:15,}" for n in n_bytes.values()))
        if found["keep"][0] != expected or early["8bit"] > 0.1 * early["anew"]:
            print(f"FAILED: {name} does not go on as before")
            good = False
        sys.stdout.flush()
    return good


def main() -> None:
    """What was asked for, or all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", nargs="*", choices=["spacing", "bytes", "curves"])
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--after", type=int, default=100)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parts = asked.only or ["spacing", "bytes", "curves"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        files = trained(folder, asked.tasks, asked.steps)
        if "spacing" in parts:
            spacings(files)
        if "bytes" in parts:
            sizes(files, folder)
        good = curves(files, folder, asked.steps, asked.after) if "curves" in parts else True
    sys.exit(not good)


if __name__ == "__main__":
    main()
