"""Errors fed forward from one group of a layer's inputs to the next, so that later weights make up for earlier errors.

A layer gives W x. Where its inputs x have second moments H, errors E of W cost tr(E H E'). With H = F D F', F unit
upper triangular in the order in which inputs are coded, that is the sum over inputs j of

    d_j |e_j + sum over i < j of F[i, j] e_i|^2            e_j: the errors of all weights of input j

so the weights of an input are best coded as if they were what they are plus the errors fed forward to them (GPTQ, LDLQ;
by groups GPTVQ, arXiv 2402.15319). What an error costs then is d_j, less than its own mean square: the inputs after it
make up for the rest.

Shapes: weights (inputs, outputs) float32 with inputs in coded order; moments (inputs, inputs); groups are runs of
inputs. Products of matrices are BLAS's: the caller sees to it that BLAS has one thread, or results depend on how many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from pqcli.core import progress
from pqcli.core.importance import Importance
from pqcli.core.trellis.feedback import LEAST_MOMENT, triangle

Matrix = NDArray[np.float32]

_TOGETHER = 128
"""Inputs whose errors reach each other one by one; beyond, they are added by one product of matrices for all."""


@dataclass(frozen=True)
class Inputs:
    """Second moments of a layer's inputs; `shrinkage` is the share of what is off their diagonal that is not believed.

    That some inputs hardly matter other data may refute: `doubt`, in units of the geometric mean of all mean squares,
    is added to each. Inputs far above the others stay far above.

    Inputs belong to the columns of the matrix, `axis` 1, or where weights are stored transposed to its rows, 0.
    """

    moments: Matrix
    shrinkage: float
    axis: int = 1
    doubt: float = 0.0

    @property
    def mean_squares(self) -> NDArray[np.float64]:
        """Of every input, relative to the mean of all, with the share that is added."""
        diagonal = np.maximum(np.diag(self.moments).astype(np.float64), 0.0)
        relative = np.maximum(diagonal / max(float(diagonal.mean()), 1e-30), LEAST_MOMENT)
        return np.asarray(relative + self.doubt * math.exp(float(np.log(relative).mean())))

    def believed(self) -> Matrix:
        """The moments as they are minimised: shrunk, on the scale of `mean_squares`."""
        mean = max(float(np.diag(self.moments).mean(dtype=np.float64)), 1e-30)
        found: Matrix = self.moments * np.float32((1 - self.shrinkage) / mean)
        np.fill_diagonal(found, self.mean_squares)
        return found

    def importance(self, shape: tuple[int, int]) -> Importance:
        """What their mean squares alone say of a matrix of that shape."""
        factors = self.mean_squares.astype(np.float32)
        return Importance.of_columns(factors, shape[0]) if self.axis == 1 else Importance.of_rows(factors, shape[1])


def groups_of(n_inputs: int, width: int) -> list[slice]:
    """Runs of `width` inputs, the last one maybe shorter."""
    return [slice(start, min(start + width, n_inputs)) for start in range(0, n_inputs, width)]


def coded_order(mean_squares: NDArray[np.float64], width: int) -> NDArray[np.int64]:
    """The order of groups: of large mean square first, for the others make up for their errors. A short one is last."""
    sums = np.add.reduceat(mean_squares, np.arange(0, len(mean_squares), width))
    if len(mean_squares) % width:
        sums[-1] = -1.0
    order: NDArray[np.int64] = np.argsort(-sums, kind="stable")
    return order


def places_of(order: NDArray[np.int64], width: int, n_inputs: int) -> NDArray[np.int64]:
    """The inputs in coded order, where `order` is that of groups."""
    places: NDArray[np.int64] = (order[:, None] * width + np.arange(width)).reshape(-1)[:n_inputs]
    return places


def bundles(groups: Sequence[slice]) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Runs of inputs that are worth a product of matrices, each with its groups by number."""
    run: list[tuple[int, slice]] = []
    for i, group in enumerate(groups):
        run.append((i, group))
        if group.stop - run[0][1].start >= _TOGETHER or i + 1 == len(groups):
            yield slice(run[0][1].start, group.stop), run
            run = []


Code = Callable[[int, slice, Matrix], Matrix]
"""`code(i, group, reached)`: what group i decodes to (group, outputs) once it is coded.

`reached` (group, outputs) are the errors of earlier groups that its inputs meet; the group is best coded as if its
weights were what they are plus inv(own') reached, where own is its part of F.
"""


def factored(moments: Matrix) -> tuple[Matrix, NDArray[np.float64]]:
    """(F, d) of moments in coded order: F D F'."""
    factor, pivots = triangle(moments, np.arange(len(moments)), 0.0)
    return np.ascontiguousarray(factor), pivots


def fed_forward(weights: Matrix, factor: Matrix, groups: Sequence[slice], code: Code) -> None:
    """Code group after group, each with the errors of those before fed forward to it."""
    fed = np.zeros_like(weights)
    errors = np.empty_like(weights)
    for together, run in bundles(groups):
        for i, group in run:
            before = slice(together.start, group.start)
            reached = fed[group] + factor[before, group].T @ errors[before]
            np.subtract(weights[group], code(i, group, reached), out=errors[group])
        fed[together.stop :] += factor[together, together.stop :].T @ errors[together]
        progress.tell(together.stop / len(weights))


def within(factor: Matrix, groups: Sequence[slice]) -> list[Matrix]:
    """The part of F that is each group's own, (group, group), unit upper triangular."""
    found: list[Matrix] = []
    for width, run in groupby(groups, key=lambda group: group.stop - group.start):
        places = np.array([group.start for group in run])[:, None] + np.arange(width)
        own = np.triu(factor[places[:, :, None], places[:, None, :]], 1) + np.eye(width, dtype=np.float32)
        found.extend(own)
    return found
