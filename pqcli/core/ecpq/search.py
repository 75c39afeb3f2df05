"""Which orbit a vector takes: the E-step of entropy-constrained PQ, and the scales that decide its table.

A vector's scale is the expected root mean square of its values, in quarter-octaves above the model's grid. It is the
sum of a tensor's own scale, its row's and its block-column's: weights differ in size from row to row and from column to
column, and a table for each size saves 0.1 to 0.7 dB.

Shapes: matrix (rows, columns), vectors (n, d) as magnitudes in grid units, classes (n,), symbols (n,).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.core import kernels
from pqcli.core.ecpq.model import ESCAPE_STEP, Codebook
from pqcli.core.ecpq.payload import Scales

CHUNK = 1 << 21
"""Elements looked at in one go: a few temporaries of 8 or 16 MiB."""
FARTHEST = 1024.0
"""Vectors are cut off at this multiple of the largest magnitude before the sweep, so that its scores stay finite."""
OUTLIER = 0.25
"""Share of a row's energy above which a single weight is an outlier."""
ENOUGH_FOR_A_MEDIAN = 16
MEDIAN_OF_SQUARES = 0.4549
"""Of a standard normal variable."""
LOWEST_SCALE = -127
HIGHEST_SCALE = 127


@dataclass(frozen=True)
class Choice:
    """What vectors became: symbols (0 the escape, j + 1 orbit j), their bits and squared error (grid units)."""

    symbols: NDArray[np.uint16]
    bits: float
    squared_error: float

    def cost(self, rate_weight: float) -> float:
        """Squared error plus what the bits are worth."""
        return self.squared_error + rate_weight * self.bits


def choose(
    vectors: NDArray[np.float32],
    classes: NDArray[np.uint8],
    codebook: Codebook,
    rate_weight: float,
    importance: NDArray[np.float32] | None = None,
) -> Choice:
    """The cheapest symbol of every vector in squared error + `rate_weight` * bits, sign bits and escapes included.

    Squared errors count times their importance, (n, d) or (n, 1), where it is given, also in what comes back.
    """
    from pqcli.core.ecpq import loops

    order = np.argsort(classes, kind="stable")
    limit = FARTHEST * float(codebook.magnitudes.max(initial=1))
    near = np.minimum(vectors[order], np.float32(limit))
    magnitudes = codebook.magnitudes.astype(np.float32)
    bias = -0.5 * rate_weight * codebook.bits[:, 1:]
    if importance is None:
        bias = bias - 0.5 * (codebook.magnitudes.astype(np.float64) ** 2).sum(1)
        grouped, orbits = torch.from_numpy(near), torch.from_numpy(magnitudes)
    else:
        grouped, orbits = weighed(near, importance[order], magnitudes)
    found = np.zeros(len(vectors), np.uint16)
    ends = np.cumsum(np.bincount(classes, minlength=codebook.n_classes))
    for c, (start, stop) in enumerate(zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)):
        present = np.flatnonzero(codebook.tables.frequencies[c, 1:])
        if start == stop or not present.size:
            continue
        subset = torch.from_numpy(present)
        best = kernels.sweep(
            grouped[start:stop],
            orbits[subset],
            torch.from_numpy(bias[c, present].astype(np.float32)),
            accumulate=False,
            backend="cpu",
        )
        found[start:stop] = present[best.assignments.numpy()] + 1
    symbols = np.empty(len(vectors), np.uint16)
    symbols[order] = found
    bits, error = loops.settle(
        vectors,
        np.ones((1, 1), np.float32) if importance is None else _spread(importance, vectors.shape),
        classes,
        codebook.magnitudes,
        codebook.bits,
        rate_weight,
        float(ESCAPE_STEP),
        symbols,
    )
    return Choice(symbols, bits, error)


def _spread(importance: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.ascontiguousarray(np.broadcast_to(importance, shape))


def weighed(
    vectors: NDArray[np.float32], importance: NDArray[np.float32], orbits: NDArray[np.float32]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of vectors and of orbits whose products are what weighed squared errors fall by, halved.

    q (x - c)^2 = q x^2 - 2 ((q x) c + q (-c^2 / 2)). Where q is the same for all of a vector one feature holds it.
    """
    squares = -0.5 * np.square(orbits)
    if importance.shape[1] == 1:
        squares = squares.sum(1, keepdims=True)
    features = np.concatenate([importance * vectors, importance], axis=1)
    return torch.from_numpy(features), torch.from_numpy(np.concatenate([orbits, squares], axis=1))


def in_grid_units(values: NDArray[np.float32], grid: float) -> NDArray[np.float32]:
    """Magnitudes of `values` in grid units; infinite where float32 ends, which becomes an escape."""
    with np.errstate(over="ignore"):
        return np.asarray(np.abs(values) * np.float32(1 / grid), np.float32)


@dataclass(frozen=True)
class Moments:
    """Mean squares of a matrix: per row (rows,), and per column (columns,) relative to the rows' own.

    A row whose energy is mostly that of a single weight counts by the median of its squares instead: an outlier must
    not make its whole row look large.
    """

    rows: NDArray[np.float64]
    columns: NDArray[np.float64]


def moments(matrix: NDArray[np.float32]) -> Moments:
    """The moments of `matrix` (rows, columns), in float64 over bounded chunks."""
    n_rows, n_columns = matrix.shape
    step = max(1, CHUNK // max(n_columns, 1))
    rows = np.zeros(n_rows)
    columns = np.zeros(n_columns)
    for start in range(0, n_rows, step):
        squares = np.square(matrix[start : start + step], dtype=np.float64)
        means = squares.mean(axis=1, keepdims=True)
        columns += np.divide(squares, means, out=np.zeros_like(squares), where=means > 0).sum(axis=0)
        rows[start : start + step] = means[:, 0]
        if n_columns >= ENOUGH_FOR_A_MEDIAN:
            spoilt = np.flatnonzero(squares.max(axis=1) > OUTLIER * n_columns * means[:, 0])
            rows[start + spoilt] = np.median(squares[spoilt], axis=1) / MEDIAN_OF_SQUARES
    return Moments(rows, columns / max(n_rows, 1))


def scales(of: Moments, block_size: int, grid: float) -> Scales:
    """The scales of a matrix with these moments, for blocks of the given size (the last one may be short)."""
    n_columns = of.columns.size
    starts = np.arange(0, n_columns, block_size)
    lengths = np.diff(np.append(starts, n_columns))
    blocks = np.add.reduceat(of.columns, starts) / lengths if n_columns else np.zeros(0)
    rows = quarter_octaves(of.rows / grid / grid)
    base = int(np.median(rows)) if rows.size else 0
    return Scales(base, np.clip(rows - base, LOWEST_SCALE, HIGHEST_SCALE).astype(np.int16), quarter_octaves(blocks))


def quarter_octaves(mean_squares: NDArray[np.float64]) -> NDArray[np.int16]:
    """round(4 log2(root)) within a byte; the lowest for zero."""
    with np.errstate(divide="ignore"):
        return np.asarray(np.clip(np.rint(2 * np.log2(mean_squares)), LOWEST_SCALE, HIGHEST_SCALE), np.int16)
