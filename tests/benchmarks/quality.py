"""What the names of `--quality` cost and keep: bytes, bits, error and task metric of real checkpoints.

    python tests/benchmarks/quality.py resnet20.th --scorer 'python eval_resnet_cifar10.py {}' --metric top1
    python tests/benchmarks/quality.py resnet20.th --quality balanced --steps 0.3,0.35 ...

Prints a Markdown table with a line for each name, and how much of the uncompressed checkpoint's metric is lost.
`--steps` tries other steps in place of those behind the names: they are relative to the root mean square weight, and
become `budget.QUALITY_STEPS` once chosen.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import rate_distortion

import pqcli
from pqcli.codecs.rate.budget import QUALITY_STEPS
from pqcli.codecs.rate.steps import RATE_WEIGHT
from pqcli.recipe.recipe import Recipe


@dataclass(frozen=True)
class Row:
    """One compressed file, and what it kept of the task."""

    name: str
    n_bytes: int
    ratio: float
    bits: float | None
    relative_mse: float | None
    seconds: float
    metric: float
    lost_percent: float

    def __str__(self) -> str:
        return (
            f"| {self.name} | {self.n_bytes:,} | {self.ratio:.1f} | {self.bits:.3f} | {self.relative_mse:.5f} "
            f"| {self.metric:.3f} | {self.lost_percent:+.2f} % | {self.seconds:.1f} |"
        )


def measured(model: rate_distortion.Model, metric: str, recipes: dict[str, Recipe]) -> Iterator[Row]:
    """A row for each recipe."""
    dense = model.score(model.tensors)[metric]
    file = model.folder / "compressed.pq.safetensors"
    for name, recipe in recipes.items():
        started = time.perf_counter()
        report = pqcli.compress(model.path, file, recipe, force=True)
        seconds = time.perf_counter() - started
        found = model.score(pqcli.load(file))[metric]
        yield Row(
            name,
            report.compressed_bytes,
            report.ratio,
            report.bits_per_weight,
            report.relative_mse,
            seconds,
            found,
            100 * (1 - found / dense),
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--scorer", required=True, help="command with {} for the decoded file; prints JSON")
    parser.add_argument("--metric", required=True, help="the number to take from what it prints, such as top1")
    parser.add_argument("--codec", choices=["trellis", "pq"], default="trellis")
    parser.add_argument("--quality", type=lambda text: text.split(","), default=list(QUALITY_STEPS))
    parser.add_argument("--steps", type=lambda text: [float(word) for word in text.split(",")], default=[])
    options = parser.parse_args()
    recipes = {name: Recipe(codec=options.codec, quality=name) for name in options.quality}
    if options.steps:
        weights = {f"step {step:g}": RATE_WEIGHT * step**2 for step in options.steps}
        recipes = {name: Recipe(codec=options.codec, rate_weight=weight) for name, weight in weights.items()}
    print(
        "| quality | bytes | ratio | bits | relative MSE | metric | lost | seconds |\n|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        tensors = rate_distortion.read(options.checkpoint)
        model = rate_distortion.Model(options.checkpoint, tensors, options.scorer, Path(folder), ())
        for row in measured(model, options.metric, recipes):
            print(row, flush=True)


if __name__ == "__main__":
    main()
