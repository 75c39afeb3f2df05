"""Quantization that knows which errors matter: steps by row, and errors fed forward to rows not yet coded.

A layer's output is W x. Where the inputs x have second moments H = E[x x'], errors E of the weights cost tr(E H E').
With H = F D F', F unit upper triangular in the order in which inputs are coded, that is

    sum over inputs j of d_j |e_j + sum over i < j of F[i, j] e_i|^2       e_j: the errors of all weights of input j

so the weights of input j are best quantized as if they were what they are plus the errors fed forward, and with a step
proportional to d_j^(-1/2), all inputs add the same to the damage: at high rates that is within the space-filling gain
of the rate-distortion limit (WaterSIC, arXiv 2603.04956; the feedback is that of GPTQ and LDLQ). The coded matrix is
therefore the transpose: a row holds the weights of one input, the trellis runs along the outputs, and every row is a
run of its own, so that rows can be coded in any order. Row steps are side information, feedback is none: a decoder
need not know of it.

Shapes: weights (rows, columns) of the coded matrix; order (rows,); factor (rows, rows) float32; row_steps (rows,).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pqcli.core import progress
from pqcli.core.trellis.cholesky import factor
from pqcli.core.trellis.row_search import RowSearch, Searched
from pqcli.core.trellis.rows import RowKind, exponents_of
from pqcli.core.trellis.viterbi import Costs

Matrix = NDArray[np.float32]

_BLOCK_ROWS = 128
"""Rows whose errors reach later rows one by one; beyond, they are added by one product of matrices for all."""
_PRODUCT_ROWS = 1024
"""Rows that such a product is for, to bound the memory that it takes."""
_COLUMN_GRAIN = 2
"""Steps of columns are told to half an octave."""
LEAST_MOMENT = 1e-6
"""Second moments below this share of their mean are taken for this: inputs that a sample happens not to use."""
LEAST_BELIEVED = 0.05
"""Likewise where layers are coded: what samples hardly use, other data may. (It costs nothing where they do not: such
inputs get next to no bits either way.)"""
_LEAST_REPAIR = 0.01
"""The least shrinkage of moments that turned out not to be positive definite."""


@dataclass(frozen=True, eq=False)
class Blocks:
    """Square blocks along the diagonal of a matrix that is zero elsewhere."""

    parts: tuple[Matrix, ...]


@dataclass(frozen=True)
class RowSteps:
    """Steps of the rows of a source's coded matrix, relative to the source's step; nothing is fed forward.

    They are rounded to multiples of 2^grain eighths of an octave.
    """

    steps: NDArray[np.float64]
    grain: int


@dataclass(frozen=True)
class Feedback(RowSteps):
    """How the rows of a source's coded matrix feed their errors forward.

    `order[i]` is the row coded in place i. `known` are the second moments H (rows, rows), which sources may share, or
    blocks of them: then errors are fed forward within a block only, and the order goes block by block. `shrinkage` is
    the share of what is off their diagonal that is not believed. The coded matrix is the transpose of
    the source's, so that its rows belong to inputs, unless these already do (not `is_transposed`). `column_steps`
    (columns,) multiply with the rows' where outputs do not count alike; errors of one column never reach another.
    """

    order: NDArray[np.int64]
    known: Matrix | Blocks
    shrinkage: float
    is_transposed: bool = True
    column_steps: NDArray[np.float64] | None = None

    @property
    def moments(self) -> Matrix:
        """The moments as one matrix. Raises TypeError where only blocks are known."""
        return one_matrix(self.known)

    @property
    def n_known(self) -> int:
        """How many moments there are."""
        return sum(part.size for part in self.known.parts) if isinstance(self.known, Blocks) else self.known.size

    def feeding(self) -> tuple[Feeding, ...]:
        """What is fed forward, block by block; takes rows^3 / 3 multiplications, and as much memory as they twice."""
        return tuple(
            Feeding(self.order[start : start + len(block)], triangle(block, order, self.shrinkage, LEAST_BELIEVED)[0])
            for start, block, order in by_block(self.known, self.order)
        )


@dataclass(frozen=True)
class Feeding:
    """`factor[i, j]`, i < j, is how much of the error of the row in place i of the order is added to that in place j.

    What is on and below the diagonal does not matter.
    """

    order: NDArray[np.int64]
    factor: Matrix


def one_matrix(known: Matrix | Blocks) -> Matrix:
    """Moments that are known as one matrix. Raises TypeError for others."""
    if isinstance(known, Blocks):
        raise TypeError(f"moments of {len(known.parts)} blocks of inputs where one matrix is wanted")
    return known


def by_block(known: Matrix | Blocks, order: NDArray[np.int64]) -> Iterator[tuple[int, Matrix, NDArray[np.int64]]]:
    """Each block with the place where it begins, and its part of the order, counted within it."""
    start = 0
    for block in known.parts if isinstance(known, Blocks) else (known,):
        yield start, block, order[start : start + len(block)] - start
        start += len(block)


def kind_of(given: RowSteps | None) -> RowKind:
    """What the rows of a source have of their own that this is known of."""
    if given is None:
        return RowKind.PLAIN
    if not isinstance(given, Feedback):
        return RowKind.STEPS
    return RowKind.LONE if given.column_steps is None else RowKind.CROSSED


def column_exponents(given: RowSteps | None) -> NDArray[np.int64]:
    """The exponents of columns, as `rows.Rows` has them."""
    if not isinstance(given, Feedback) or given.column_steps is None:
        return np.zeros(0, np.int64)
    return exponents_of(given.column_steps, _COLUMN_GRAIN)


def fill(
    weights: Matrix,
    steps: Matrix,
    feedback: Sequence[Feeding],
    column_scale: Matrix,
    costs: Costs,
    next_state: NDArray[np.int64],
    found: Searched,
) -> None:
    """Quantize the rows of `weights` in order, each with its step, feeding errors forward; fills the arrays of `found`.

    Every row is in the order of one part of the feedback.

    column_scale (columns,) in quarter octaves, as `search.Block` has it. Products of matrices are BLAS's: the caller
    sees to it that BLAS has one thread, or results depend on how many.
    """
    row_search = RowSearch(costs, next_state, column_scale)
    for i, part in enumerate(feedback):
        with progress.within(i / len(feedback), (i + 1) / len(feedback)):
            _fill_part(weights, steps, part, row_search, found)


def _fill_part(weights: Matrix, steps: Matrix, part: Feeding, row_search: RowSearch, found: Searched) -> None:
    n_rows, n_columns = len(part.order), weights.shape[1]
    fed = np.zeros((n_rows, n_columns), np.float32)  # by place, not by row
    errors = np.empty((_BLOCK_ROWS, n_columns), np.float32)
    for first in range(0, n_rows, _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, n_rows)
        near = np.ascontiguousarray(part.factor[first:last, first:last].T)
        row_search.fill(weights, steps, part.order, slice(first, last), fed, near, errors, found)
        for start in range(last, n_rows, _PRODUCT_ROWS):
            later = slice(start, start + _PRODUCT_ROWS)
            fed[later] += part.factor[first:last, later].T @ errors[: last - first]
        progress.tell(last / n_rows)


def triangle(
    moments: Matrix, order: NDArray[np.int64], shrinkage: float, least: float = LEAST_MOMENT
) -> tuple[Matrix, NDArray[np.float64]]:
    """(F, d) with F diag(d) F' = the moments, shrunk towards their diagonal, in that order; F unit upper triangular.

    They are factored in float32, on the scale of correlations. What stands on and below F's diagonal has no meaning.
    Inputs that are always zero count as `least` of the mean. Where rounding has left the moments short of positive
    definite, they are shrunk more, until they are.
    Raises numpy.linalg.LinAlgError where they are not finite.
    """
    diagonal = np.maximum(np.diag(moments).astype(np.float64), 0.0)
    scale = np.sqrt(np.maximum(diagonal, max(float(diagonal.mean()), 1e-30) * least))[order[::-1]]
    while True:
        correlations = _correlations(moments, order[::-1], scale, shrinkage)
        try:
            pivots = factor(correlations)
        except np.linalg.LinAlgError:
            if shrinkage >= 1:
                raise
            shrinkage = min(max(4 * shrinkage, _LEAST_REPAIR), 1.0)
        else:
            break
    correlations *= scale.astype(np.float32)[:, None]
    correlations *= (1 / (pivots * scale)).astype(np.float32)
    return correlations[::-1, ::-1], ((pivots * scale) ** 2)[::-1]


def _correlations(moments: Matrix, order: NDArray[np.int64], scale: NDArray[np.float64], shrinkage: float) -> Matrix:
    """The moments over the scale (by place in the order) of either input, shrunk towards ones on the diagonal."""
    correlations = moments.take(order, 0).take(order, 1)
    correlations *= ((1 - shrinkage) / scale).astype(np.float32)[:, None]
    correlations *= (1 / scale).astype(np.float32)
    np.fill_diagonal(correlations, 1.0)
    return correlations
