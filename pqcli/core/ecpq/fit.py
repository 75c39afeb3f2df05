"""Learning what the tensors of a file share: entropy-constrained EM over a sample of all of them (Chou et al. 1989).

    start   points of the best lattice at this rate weight, the most populated first
    E-step  every vector takes the orbit that minimises squared error + rate_weight * bits
    M-step  every orbit becomes the mean of its vectors; orbits that starve are dropped; a coordinate becomes 0
            where the sign bit it saves is worth more than the error it adds
    end     lengths rounded to the grid, probabilities fitted by slopes per class and corrections

All lengths are in grid units (`GRID_PER_RATE` per square root of the rate weight), so the rate weight itself is always
`RATE_WEIGHT` here and a fit does not depend on the scale of the weights.

Shapes: vectors (n, d) magnitudes, orbits (k, d), counts (n_classes, k).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.core import kernels
from pqcli.core.ecpq import lattice
from pqcli.core.ecpq.model import GRID_PER_RATE, MAX_CLASSES, Codebook, features
from pqcli.core.ecpq.search import HIGHEST_SCALE, choose, weighed

RATE_WEIGHT = float(GRID_PER_RATE**2)
MOST_ORBITS = {1: 255, 2: 1023, 4: 2047, 8: 2047}
MOST_VECTORS = {1: 1 << 17, 2: 1 << 18, 4: 3 << 18, 8: 1 << 19}
"""Vectors of the sample that EM looks at."""
COVERAGE = 0.97
"""Share of the vectors that the most populated lattice points must take for a block size to be worth a codebook."""
LOWEST_CLASS = 4
"""A scale an octave above the grid, a third of the smallest magnitude: all zeros from there on."""
STRAY = 1e-4
"""Share of the vectors that may lie above the highest class."""
N_ITER = 4
"""From a lattice, EM is within 0.01 dB after so many iterations."""
ENOUGH = 2.0
"""Vectors of the sample below which an orbit is dropped."""
PRIOR = 8.0
"""Vectors' worth of the overall frequencies added to each class's."""
CORRECTION_BITS = 6.0
"""About what a correction costs; one that saves less stays 0."""


@dataclass(frozen=True)
class Vectors:
    """A sample of equally long vectors: magnitudes in grid units, their scales, and how many each stands for.

    `importance` (n, d) is what squared errors count (None: all alike); EM takes the mean of a vector's.
    """

    values: NDArray[np.float32]
    scales: NDArray[np.int16]
    weights: NDArray[np.float32]
    importance: NDArray[np.float32] | None = None

    def pick(self, chosen: slice | NDArray[np.int64], share: float = 1.0) -> Vectors:
        """Some of them, each standing for so many times more."""
        importance = None if self.importance is None else self.importance[chosen]
        weights = self.weights[chosen] * np.float32(share)
        return Vectors(self.values[chosen], self.scales[chosen], weights, importance)


def fit_codebook(sample: Vectors, start: Codebook | None = None, n_iter: int = N_ITER) -> Codebook | None:
    """The codebook that EM learns for `sample`, starting from `start` if given; None where no bounded one would do."""
    step = -(-len(sample.values) // MOST_VECTORS[sample.values.shape[1]])
    sample = sample.pick(slice(None, None, step), step)
    if sample.importance is not None:
        sample = replace(sample, importance=sample.importance.mean(1, keepdims=True))
    low, n_classes = _classes(sample)
    classes = np.clip(sample.scales.astype(np.int64) - low, 0, n_classes - 1).astype(np.uint8)
    order = np.argsort(classes, kind="stable")
    classes = classes[order]
    data = sample.pick(order)
    groups = _Groups(data, np.bincount(classes, minlength=n_classes))
    if start is None:
        first = _initial(data)
        if first is None:
            return None
        orbits, prior = first
        probabilities = np.tile(prior, (n_classes, 1))
    else:
        orbits = torch.from_numpy(start.magnitudes.astype(np.float32))
        known = start.tables.frequencies[start.classes(np.arange(low, low + n_classes)), 1:]
        probabilities = known / known.sum(1, keepdims=True).clip(1)
    counts = np.zeros((n_classes, len(orbits)))
    for _ in range(n_iter):
        sums, masses, counts = groups.sweep(orbits, probabilities)
        alive = counts.sum(0) >= ENOUGH * groups.mean_weight
        alive[counts.sum(0).argmax()] = True
        counts = counts[:, alive]
        orbits = _means(sums[alive], masses[alive])
        share = counts.sum(0) / counts.sum()
        evidence = counts / groups.mean_weight
        probabilities = (evidence + PRIOR * share) / (evidence.sum(1, keepdims=True) + PRIOR)
    magnitudes = _rounded(orbits)
    codebook = _tabulate(magnitudes, low, _assigned(groups, magnitudes, n_classes), groups.mean_weight)
    for _ in range(2):
        chosen = choose(data.values, classes, codebook, RATE_WEIGHT, data.importance)
        flat = classes.astype(np.int64) * (codebook.n_orbits + 1) + chosen.symbols
        flat_table = np.bincount(flat, weights=data.weights, minlength=n_classes * (codebook.n_orbits + 1))
        table = flat_table.astype(np.float64).reshape(n_classes, -1)
        alive = table[:, 1:].sum(0) >= ENOUGH * groups.mean_weight
        alive[table[:, 1:].sum(0).argmax()] = True
        kept = np.concatenate([[True], alive])
        codebook = _tabulate(codebook.magnitudes[alive], low, table[:, kept], groups.mean_weight)
    return codebook


# --- EM --------------------------------------------------------------------------------------------------------------


class _Groups:
    """The vectors class by class."""

    def __init__(self, data: Vectors, sizes: NDArray[np.int64]) -> None:
        self.values = torch.split(torch.from_numpy(data.values), sizes.tolist())
        self.weights = torch.split(torch.from_numpy(data.weights), sizes.tolist())
        self.importance = None if data.importance is None else np.split(data.importance, np.cumsum(sizes)[:-1])
        self.mean_weight = float(data.weights.mean(dtype=np.float64))

    def sweep(
        self, orbits: torch.Tensor, probabilities: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Of the best orbits: sums (k, d) of their vectors times importance, that importance (k,), and counts.

        Counts are (n_classes, k); where all vectors are alike importance is the count.
        """
        exact = orbits.double()
        n_signs = (orbits > 0).sum(1)
        d = orbits.shape[1]
        sums, masses = np.zeros(tuple(orbits.shape)), np.zeros(len(orbits))
        counts = np.zeros((len(self.values), len(orbits)))
        for c, (values, weights) in enumerate(zip(self.values, self.weights, strict=True)):
            if not len(values):
                continue
            log2_p = torch.from_numpy(np.log2(np.maximum(probabilities[c], 1e-9)))
            bias = 0.5 * RATE_WEIGHT * (log2_p - n_signs)
            if self.importance is None:
                bias += -0.5 * exact.square().sum(1)
                features, codewords = values, orbits
            else:
                features, codewords = weighed(values.numpy(), self.importance[c], orbits.numpy())
            found = kernels.sweep(features, codewords, bias.float(), weights=weights, backend="cpu")
            if found.sums is None or found.counts is None:
                raise ValueError("the kernel returned no sums")
            counts[c] = found.counts.numpy()
            sums += found.sums[:, :d].numpy()
            masses += counts[c] if self.importance is None else found.sums[:, d].numpy()
        return sums, masses, counts


def _classes(sample: Vectors) -> tuple[int, int]:
    """The lowest class and the number of classes."""
    values, inverse = np.unique(sample.scales, return_inverse=True)
    above = 1 - np.cumsum(np.bincount(inverse, weights=sample.weights)) / sample.weights.sum(dtype=np.float64)
    high = min(int(values[int(np.argmax(above <= STRAY))]), HIGHEST_SCALE)
    low = max(int(values[0]), LOWEST_CLASS, high - MAX_CLASSES + 1)
    return low, max(high - low + 1, 1)


def _initial(data: Vectors) -> tuple[torch.Tensor, NDArray[np.float64]] | None:
    """The most populated lattice points and their shares; None if too many would be needed."""
    d = data.values.shape[1]
    scale = lattice.scale(d, RATE_WEIGHT)
    far = float(np.quantile(data.values.max(axis=1), 0.9999)) if len(data.values) else 0.0
    points = lattice.nearest(torch.from_numpy(np.minimum(data.values, np.float32(far)) / np.float32(scale))).abs()
    distinct, inverse = _distinct(points.numpy())
    population = np.bincount(inverse, weights=data.weights, minlength=len(distinct))
    top = np.argsort(-population, kind="stable")[: MOST_ORBITS[d]]
    if d > 1 and population[top].sum() < COVERAGE * population.sum():
        return None
    return torch.from_numpy((distinct[top] * scale).astype(np.float32)), population[top] / population[top].sum()


def _distinct(points: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The distinct rows of lattice `points` (n, d), and each row's index among them; by hash, one sort of integers.

    Coordinates are halves of integers, or multiples of sqrt(3) / 2, which are told apart in 1024ths as well.
    """
    multipliers = np.random.default_rng(1).integers(1 << 62, size=points.shape[1], dtype=np.int64) | 1
    hashes = np.rint(1024 * points).astype(np.int64) @ multipliers
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    return points[first], inverse


def _means(sums: NDArray[np.float64], masses: NDArray[np.float64]) -> torch.Tensor:
    means = sums / masses[:, None]
    means[means * means < RATE_WEIGHT] = 0
    return torch.from_numpy(means.astype(np.float32))


def _rounded(orbits: torch.Tensor) -> NDArray[np.uint16]:
    """The distinct orbits in grid units, shortest first."""
    whole = np.unique(np.minimum(np.rint(orbits.numpy()), 65535).astype(np.uint16), axis=0)
    return whole[np.argsort((whole.astype(np.int64) ** 2).sum(1), kind="stable")]


# --- tables ----------------------------------------------------------------------------------------------------------


def _assigned(groups: _Groups, magnitudes: NDArray[np.uint16], n_classes: int) -> NDArray[np.float64]:
    """Counts (n_classes, 1 + k) by squared error and signs alone: a first guess for the tables."""
    uniform = np.ones((n_classes, len(magnitudes)))
    _, _, counts = groups.sweep(torch.from_numpy(magnitudes.astype(np.float32)), uniform)
    return np.concatenate([np.zeros((n_classes, 1)), counts], axis=1)


def _tabulate(magnitudes: NDArray[np.uint16], low: int, table: NDArray[np.float64], mean_weight: float) -> Codebook:
    """The codebook whose tables fit the counts `table` (n_classes, 1 + k), the escape first."""
    n_classes = len(table)
    counts = table[:, 1:] / mean_weight
    shape = features(magnitudes) / 65536.0
    n_signs = (magnitudes > 0).sum(1)
    slopes, offsets = _tilts(magnitudes, low, counts, shape, n_signs)
    whole_slopes = np.clip(np.rint(slopes / np.log(2) * 16), -32767, 32767).astype(np.int16)
    levels = np.clip(np.rint(offsets / np.log(2) * 4), -2000, 2000).astype(np.int16)
    logits = np.log(2) * (whole_slopes / 16.0 @ shape.T + levels / 4.0 + n_signs)
    top = logits.max(axis=1, keepdims=True)
    log_total = np.log(np.exp(logits - top).sum(axis=1, keepdims=True)) + top
    expected = counts.sum(1, keepdims=True) * np.exp(logits - log_total)
    corrections = np.clip(np.rint(4 * np.log2((counts + 2) / (expected + 2))), -40, 40)
    ratio = corrections / 4
    saved = mean_weight * (counts * ratio - expected * (2.0**ratio - 1) / np.log(2))
    corrections[saved < CORRECTION_BITS] = 0
    escape = (table[:, 0] / mean_weight + 0.05) / (table.sum(1) / mean_weight + 100)
    escapes = np.rint(4 * (np.log2(np.maximum(escape, 2.0**-15)) + log_total[:, 0] / np.log(2)))
    return Codebook(
        magnitudes=magnitudes,
        low=low,
        slopes=whole_slopes,
        escapes=np.clip(escapes, -32767, 32767).astype(np.int16).reshape(n_classes),
        levels=levels,
        corrections=corrections.astype(np.int16),
    )


def _tilts(
    magnitudes: NDArray[np.uint16],
    low: int,
    counts: NDArray[np.float64],
    shape: NDArray[np.float64],
    n_signs: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Slopes (n_classes, 2) and offsets (k,), in nats: the most likely logits `offset + slope . shape + signs ln 2`.

    Starts from the Gaussian of each class's scale, whose slope over |c|^2 is -1 / (2 sigma^2), and keeps a little of
    it.
    """
    n_classes = len(counts)
    variance = 2.0 ** ((low + np.arange(n_classes)) / 2.0)
    largest = float((magnitudes.astype(np.float64) ** 2).sum(1).max(initial=1))
    slopes = np.stack([-largest / (2 * variance), np.zeros(n_classes)], axis=1)
    offsets = np.zeros(len(magnitudes))
    signs = n_signs * np.log(2)

    def softmax() -> NDArray[np.float64]:
        logits = offsets + signs + slopes @ shape.T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        return np.asarray(p / p.sum(axis=1, keepdims=True))

    counts = counts + 4 * softmax()
    totals = counts.sum(1, keepdims=True)
    target = counts @ shape
    for _ in range(40):
        p = softmax()
        mean = p @ shape
        second = np.einsum("ck,kf,kg->cfg", p, shape, shape) - mean[:, :, None] * mean[:, None, :]
        hessian = totals[:, :, None] * second + 1e-9 * np.eye(2)
        step = np.linalg.solve(hessian, (target - totals * mean)[:, :, None])[:, :, 0]
        reach = np.abs(step @ shape.T).max(axis=1, keepdims=True)
        slopes = slopes + step * np.minimum(1.0, 2.0 / np.maximum(reach, 1e-12))
        p = softmax()
        offsets = offsets + np.log((counts.sum(0) + 0.5) / ((totals * p).sum(0) + 0.5))
    plane = np.concatenate([shape, np.ones((len(shape), 1))], axis=1)
    weight = np.sqrt(counts.sum(0))[:, None]
    gauge = np.linalg.lstsq(plane * weight, offsets[:, None] * weight, rcond=None)[0][:, 0]
    return slopes + gauge[:2], offsets - plane @ gauge
