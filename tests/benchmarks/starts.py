"""Where EM starts from, and whether a better start pays: the error of several starts after the same iterations.

    python tests/benchmarks/starts.py model.safetensors resnet20.th --block-size 8 4

Each line is a way to start, over a dozen weights of the checkpoints (the largest left out: it shows the same and takes
long): the mean change of relative MSE against random vectors, the worst and the best, and what starting and
iterating cost, in full iterations over all vectors by CPU time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pqcli import checkpoint as checkpoints
from pqcli.core.pq import blocks, em
from pqcli.core.pq.blocks import Blocks

OPTIONS = em.Options(n_centroids=256, n_iter=20, relaxation=em.RELAXATION)
LARGEST = 1 << 20
AT_MOST = 12


def random_start(cut: Blocks, seed: int) -> torch.Tensor:
    """Vectors drawn at random."""
    return cut.body[torch.randperm(len(cut.body), generator=torch.Generator().manual_seed(seed))[: OPTIONS.n_centroids]]


def far_apart(cut: Blocks, seed: int) -> torch.Tensor:
    """k-means++ by many draws at a time: what `em.fit` does."""
    return em.initial_codebook(cut, OPTIONS.n_centroids, torch.Generator().manual_seed(seed)).codebook


def plus_plus(cut: Blocks, seed: int) -> torch.Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007) on 32 vectors per centroid: each drawn by its squared distance."""
    generator = torch.Generator().manual_seed(seed)
    vectors = em.spread_sample(cut, 32 * OPTIONS.n_centroids, generator).body
    chosen = [int(torch.randint(len(vectors), (), generator=generator))]
    distance = torch.full((len(vectors),), torch.inf)
    for _ in range(OPTIONS.n_centroids - 1):
        distance = torch.minimum(distance, (vectors - vectors[chosen[-1]]).square().sum(1))
        chosen.append(int(torch.multinomial(distance.clamp(min=1e-30), 1, generator=generator)))
    return vectors[chosen]


def splitting(cut: Blocks, seed: int) -> torch.Tensor:
    """Linde, Buzo and Gray 1980: from the mean, every centroid in two along a random direction, two iterations each."""
    generator = torch.Generator().manual_seed(seed)
    codebook = cut.body.mean(0, keepdim=True)
    while len(codebook) < OPTIONS.n_centroids:
        hair = 0.01 * cut.body.std() * torch.randn(codebook.shape, generator=generator)
        grown = replace(OPTIONS, n_centroids=2 * len(codebook), n_iter=2)
        codebook = em.lloyd(cut, torch.cat([codebook + hair, codebook - hair]), grown, generator).codebook
    return codebook


STARTS: dict[str, tuple[Callable[[Blocks, int], torch.Tensor], int]] = {
    "random": (random_start, 1),
    "k-means++": (plus_plus, 1),
    "pqcli": (far_apart, 1),
    "splitting": (splitting, 1),
    "3 random, the best": (random_start, 3),
    "3 of pqcli, the best": (far_apart, 3),
}


def weights(path: Path) -> list[torch.Tensor]:
    """Matrices of some size, spread evenly over the checkpoint."""
    with checkpoints.open(path) as checkpoint:
        fit = [t for t in checkpoint.tensors if len(t.shape) > 1 and "float" in t.dtype and 1 << 12 < t.numel < LARGEST]
        return [checkpoint.read(info.name).flatten(1).float() for info in fit[:: -(-len(fit) // AT_MOST)]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--block-size", nargs="+", type=int, default=[8, 4])
    arguments = parser.parse_args()
    matrices = [(path, weight) for path in arguments.checkpoints for weight in weights(path)]
    for path in arguments.checkpoints:
        for block_size in arguments.block_size:
            cuts = [blocks.cut(weight, block_size) for source, weight in matrices if source == path]
            cuts = [cut for cut in cuts if len(cut.body) > 4 * OPTIONS.n_centroids]
            print(f"\n{path.name}, blocks of {block_size}, {len(cuts)} weights")
            print(f"{'':22}{'mean':>9}{'best':>9}{'worst':>9}{'iterations':>12}")
            em.fit(cuts[0], OPTIONS)  # compiles
            first: list[float] = []
            unit = 0.0
            for name, (start, n) in STARTS.items():
                began = time.process_time()
                errors = [
                    min(em.fit(cut, OPTIONS, start(cut, seed)).objective[-1] for seed in range(n)) for cut in cuts
                ]
                spent = time.process_time() - began
                first, unit = first or errors, unit or spent / OPTIONS.n_iter
                change = [error / reference - 1 for error, reference in zip(errors, first, strict=True)]
                print(
                    f"{name:22}{sum(change) / len(change):+9.2%}{min(change):+9.2%}{max(change):+9.2%}"
                    f"{spent / unit:12.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
