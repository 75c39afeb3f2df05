"""Plain PQ that minimises the error of a layer's outputs, not that of its weights.

A layer gives W x. Where its inputs x have second moments H, errors E of W cost tr(E H E'): errors in inputs that vary
together can make up for each other. So blocks are not assigned one by one:

    start      EM that weighs the errors of every input by its mean square (done by the caller)
    feedback   the blocks of a row in order, the errors of blocks before fed forward, and a choice charged for what the
               blocks after cannot make up for (GPTQ; in blocks: GPTVQ, arXiv 2402.15319); then once more, with the
               centroids that serve the blocks of the first time best
    rounds     the codebook that serves these assignments best, by least squares in H; then every block anew, given all
               others. Neither makes the error larger (where the codebook is fitted to all outputs).

The nearest centroid is that in the metric A of a block's own inputs: x is spelt by the c that maximises (A x) . c less
c' A c / 2, so the search is that of any other EM, with biases of each block's own. Where weights are stored transposed
(`axis` 0), vectors run along the outputs, a block has a single input, and all else is the same.

Inputs are taken in groups: those of a block, or single ones. Within `Layer` they lie in the order in which they are
coded, the group of the largest mean square first.

Shapes: weights (inputs, outputs) float32; moments (inputs, inputs); codebook (k, d); vectors (n, d); assignments
(groups, n). Products of matrices are BLAS's: they are the same on every run because BLAS gets one thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from pqcli.core import progress
from pqcli.core.feeding import (
    Inputs,
    bundles,
    coded_order,
    factored,
    fed_forward,
    groups_of,
    places_of,
    within,
)
from pqcli.core.kernels.repeated import Repeated

Matrix = NDArray[np.float32]
Assignments = NDArray[np.int32]

SOLVER_STEPS: Final = 2
"""Steps of conjugate gradients that fit a codebook; each fit starts from the one before."""
FITTED_VECTORS: Final = 128
"""A codebook is fitted to so many vectors a centroid at most, those of evenly spread outputs."""
_RIDGE: Final = 1e-6
_LEARNED_RIDGE: Final = 1e-4
"""How much of a typical centroid's vectors say that a centroid stays where it is, in feedback's own fit."""


def suits(inputs: Inputs, shape: tuple[int, ...], block_size: int) -> bool:
    """Whether a matrix can be assigned under these moments: but for short vectors along the outputs."""
    return inputs.axis == 1 or shape[1] % block_size == 0


@dataclass(frozen=True)
class Assigned:
    """A codebook, and assignments into it; see `Layer.in_order` for those of the matrix."""

    codebook: Matrix
    assignments: Assignments


@dataclass(frozen=True)
class Layer:
    """A matrix whose blocks are assigned under the moments of its inputs.

    `weights` and `moments` have the inputs in coded order, `groups` are runs of them, and `order[i]` is the place that
    group i has in the matrix. `is_across`: vectors run along the outputs.
    """

    weights: Matrix
    moments: Matrix
    block_size: int
    groups: tuple[slice, ...]
    order: NDArray[np.int64]
    is_across: bool

    @classmethod
    def of(cls, matrix: Matrix, block_size: int, inputs: Inputs) -> Layer:
        """The layer of a matrix (rows, columns). Raises ValueError for what `suits` rules out."""
        if not suits(inputs, matrix.shape, block_size):
            raise ValueError(f"blocks of {block_size} do not divide {matrix.shape[1]} outputs")
        is_across = inputs.axis == 0
        weights = matrix if is_across else matrix.T
        n_inputs = len(weights)
        width = 1 if is_across else block_size
        order = coded_order(inputs.mean_squares, width)
        places = places_of(order, width, n_inputs)
        moments = inputs.believed().take(places, 0).take(places, 1)
        groups = tuple(groups_of(n_inputs, width))
        return cls(np.ascontiguousarray(weights[places]), moments, block_size, groups, order, is_across)

    def refined(self, codebook: Matrix) -> Assigned:
        """A codebook and assignments that serve the outputs better than `codebook` does by nearest centroids.

        What is left to do once the codebook is rounded is `descended`.
        """
        with progress.within(0.0, 0.3):
            learned = self.learned(codebook)
        with progress.within(0.3, 0.6):
            found = self.fed_forward(learned)
        found = self.descended(self.fitted(found))
        progress.tell(0.9)
        return self.fitted(found)

    def in_order(self, found: Assigned) -> Assignments:
        """The assignments in the matrix's own order, row by row, (rows * blocks_per_row,)."""
        own = np.empty_like(found.assignments)
        own[self.order] = found.assignments
        return np.ascontiguousarray(own if self.is_across else own.T).reshape(-1)

    def damage(self, found: Assigned) -> float:
        """tr(E H E') of the believed moments, relative to that of losing all weights."""
        errors = self.weights - self._decoded(found.codebook, found.assignments)
        lost = float(np.einsum("ij,ij->", self.moments @ self.weights, self.weights, dtype=np.float64))
        return float(np.einsum("ij,ij->", self.moments @ errors, errors, dtype=np.float64)) / max(lost, 1e-300)

    # --- the ways to better ones ---

    def fed_forward(self, codebook: Matrix) -> Assigned:
        """Assignments made group after group, each with the errors of those before fed forward to it."""
        search = _Search(self, codebook, self._fed.metrics)
        self._feed(search)
        return Assigned(codebook, search.assignments)

    def learned(self, codebook: Matrix) -> Matrix:
        """The codebook that serves best what the blocks turned out to need when errors were fed forward.

        What they would need with the new one is a little different, so nothing is promised; the search pays for it all.
        """
        search = _Search(self, codebook, self._fed.metrics, is_counting=True)
        self._feed(search)
        cost = search.cost()
        ridge = _LEARNED_RIDGE * np.trace(cost, axis1=1, axis2=2)[:, None, None]
        ridge = np.maximum(ridge, 1e-2 * ridge.mean()) / self.block_size * np.eye(self.block_size)
        wanted = search.sums() + np.einsum("kij,kj->ki", ridge, codebook.astype(np.float64))
        found: Matrix = np.linalg.solve(cost + ridge, wanted[:, :, None])[:, :, 0].astype(np.float32)
        return found if np.isfinite(found).all() else codebook

    def _feed(self, search: _Search) -> None:
        fed = self._fed

        def code(i: int, group: slice, reached: Matrix) -> Matrix:
            return search.spelt(i, fed.metrics[i] @ self.weights[group] + fed.reaches[i] @ reached)

        fed_forward(self.weights, fed.factor, self.groups, code)

    @cached_property
    def _fed(self) -> _Fed:
        return _Fed.of(self.moments, self.groups)

    def fitted(self, found: Assigned) -> Assigned:
        """The codebook that least squares find for these assignments, with them."""
        layer, assignments = self._sampled(found.assignments, len(found.codebook))
        return Assigned(layer.solved(found.codebook, assignments), found.assignments)

    def solved(self, codebook: Matrix, assignments: Assignments) -> Matrix:
        """`SOLVER_STEPS` of conjugate gradients from a codebook to the best one for the assignments."""
        k = len(codebook)
        inverse = self._preconditioner(assignments, k)
        residual = self._gathered(self.moments @ (self.weights - self._decoded(codebook, assignments)), assignments, k)
        direction = scaled = np.einsum("kij,kj->ki", inverse, residual)
        slope = float(np.sum(residual * scaled))
        best = codebook.astype(np.float64)
        for _ in range(SOLVER_STEPS):
            changed = self._decoded(direction.astype(np.float32), assignments)
            image = self._gathered(self.moments @ changed, assignments, k)
            curvature = float(np.sum(direction * image))
            if not slope > 0 or not curvature > 0:
                break
            best += slope / curvature * direction
            residual -= slope / curvature * image
            scaled = np.einsum("kij,kj->ki", inverse, residual)
            before, slope = slope, float(np.sum(residual * scaled))
            direction = scaled + slope / before * direction
        return best.astype(np.float32)

    def descended(self, found: Assigned) -> Assigned:
        """Every group assigned anew, given all others."""
        before = self._decoded(found.codebook, found.assignments)
        metrics = [np.ascontiguousarray(self.moments[group, group]) for group in self.groups]
        search = _Search(self, found.codebook, metrics)
        pull = self.moments @ (self.weights - before)
        for together, groups in bundles(self.groups):
            shift = np.empty((together.stop - together.start, self.weights.shape[1]), np.float32)
            for i, group in groups:
                done = group.start - together.start
                near = self.moments[together.start : group.start, group].T @ shift[:done]
                after = search.spelt(i, pull[group] + near + metrics[i] @ before[group])
                np.subtract(before[group], after, out=shift[done : done + len(after)])
            pull[together.stop :] += self.moments[together, together.stop :].T @ shift
        return Assigned(found.codebook, search.assignments)

    # --- between inputs and vectors ---

    def vectors_of(self, rows: Matrix) -> Matrix:
        """A group's rows (group, outputs) as vectors (n, group or d)."""
        return np.ascontiguousarray(rows.reshape(-1, self.block_size) if self.is_across else rows.T)

    def looked_up(self, codebook: Matrix, assignments: NDArray[np.int32], width: int) -> Matrix:
        """What a group's assignments spell, (group, outputs)."""
        vectors = codebook.take(assignments, 0)
        return vectors.reshape(1, -1) if self.is_across else vectors[:, :width].T

    def _decoded(self, codebook: Matrix, assignments: Assignments) -> Matrix:
        """All of it (inputs, outputs)."""
        vectors = codebook.take(assignments, 0)
        if self.is_across:
            return vectors.reshape(len(assignments), -1)
        spelt = np.ascontiguousarray(vectors.transpose(0, 2, 1)).reshape(-1, assignments.shape[1])
        return spelt[: len(self.weights)]

    def _gathered(self, values: Matrix, assignments: Assignments, k: int) -> NDArray[np.float64]:
        """The sums (k, d) of values (inputs, outputs) over each centroid's vectors."""
        if self.is_across:
            vectors = values.reshape(-1, self.block_size).T
        else:
            missing = len(assignments) * self.block_size - len(values)
            padded = np.pad(values, ((0, missing), (0, 0))) if missing else values
            vectors = padded.reshape(len(assignments), self.block_size, -1).swapaxes(0, 1).reshape(self.block_size, -1)
        flat = assignments.reshape(-1)
        return np.stack([np.bincount(flat, of, minlength=k) for of in vectors], axis=1)

    def _preconditioner(self, assignments: Assignments, k: int) -> NDArray[np.float64]:
        """The inverse (k, d, d) of what a centroid's squared shifts cost if blocks did not interact."""
        counts = np.stack([np.bincount(row, minlength=k) for row in assignments]).astype(np.float64)
        cost = self.costs(counts, [self.moments[group, group] for group in self.groups])
        ridge = _RIDGE * max(float(np.trace(cost.sum(0))) / (self.block_size * k), 1e-30)
        return np.asarray(np.linalg.inv(cost + ridge * np.eye(self.block_size)))

    def costs(self, counts: NDArray[np.float64], metrics: list[Matrix]) -> NDArray[np.float64]:
        """Each centroid's metric (k, d, d), summed over its vectors: counts (groups, k), metrics by group."""
        d = self.block_size
        if self.is_across:
            return np.asarray((counts.T @ np.array([metric[0, 0] for metric in metrics]))[:, None, None] * np.eye(d))
        own = np.zeros((len(metrics), d, d))
        for padded, metric in zip(own, metrics, strict=True):
            padded[: len(metric), : len(metric)] = metric
        return np.asarray((counts.T @ own.reshape(len(own), -1)).reshape(-1, d, d))

    def _sampled(self, assignments: Assignments, k: int) -> tuple[Layer, Assignments]:
        """The layer with some of its outputs, and their assignments; itself where it has few."""
        step = max(1, assignments.size // (FITTED_VECTORS * k))
        if step == 1:
            return self, assignments
        n_inputs, n_outputs = self.weights.shape
        unit = self.block_size if self.is_across else 1
        weights = self.weights.reshape(n_inputs, n_outputs // unit, unit)[:, ::step].reshape(n_inputs, -1)
        return replace(self, weights=weights), np.ascontiguousarray(assignments[:, ::step])


@dataclass(frozen=True)
class _Fed:
    """What feeding errors forward takes: F, and of every group the metric of its errors and what it meets times it.

    With own the group's part of F and D its pivots, the metric is A = own D own'; a group that meets errors r is to
    spell w + inv(own') r, and A times that is A w + own D r.
    """

    factor: Matrix
    metrics: list[Matrix]
    reaches: list[Matrix]

    @classmethod
    def of(cls, moments: Matrix, groups: tuple[slice, ...]) -> _Fed:
        factor, pivots = factored(moments)
        metrics, reaches = [], []
        for group, own in zip(groups, within(factor, groups), strict=True):
            reach = own * pivots[group].astype(np.float32)
            metrics.append(reach @ own.T)
            reaches.append(reach)
        return cls(factor, metrics, reaches)


class _Search:
    """Assigns a layer's groups in their turn, and remembers it all; with `is_counting` how often and for what, too."""

    def __init__(self, layer: Layer, codebook: Matrix, metrics: list[Matrix], *, is_counting: bool = False) -> None:
        n = layer.weights.shape[1] // (layer.block_size if layer.is_across else 1)
        self.layer, self.codebook, self.metrics = layer, codebook, metrics
        self.assignments = np.empty((len(layer.groups), n), np.int32)
        self.counts = np.zeros((len(layer.groups), len(codebook))) if is_counting else None
        widths = {layer.block_size} if layer.is_across else {group.stop - group.start for group in layer.groups}
        self.by_width = {width: Repeated(codebook[:, :width], self.assignments.size) for width in sorted(widths)}
        self.biases = self._biases()

    def spelt(self, i: int, rows: Matrix) -> Matrix:
        """What group i becomes, (group, outputs); rows are its targets times its metric."""
        vectors = self.layer.vectors_of(rows)
        counts = None if self.counts is None else self.counts[i]
        self.assignments[i] = self.by_width[vectors.shape[1]].assigned(vectors, self.biases[i], counts)
        return self.layer.looked_up(self.codebook, self.assignments[i], len(rows))

    def cost(self) -> NDArray[np.float64]:
        """What the squared shifts of every centroid cost, (k, d, d)."""
        if self.counts is None:
            raise ValueError("nothing was counted")
        return self.layer.costs(self.counts, self.metrics)

    def sums(self) -> NDArray[np.float64]:
        """The targets of every centroid times their metrics, summed, (k, d)."""
        total = np.zeros(self.codebook.shape)
        for width, search in self.by_width.items():
            total[:, :width] += search.sums
        return total

    def _biases(self) -> Matrix:
        """-c' A c / 2 of every group and centroid (groups, k)."""
        exact = self.codebook.astype(np.float64)
        if self.layer.is_across:
            scale = np.array([metric[0, 0] for metric in self.metrics])
            return np.asarray(-0.5 * np.outer(scale, np.square(exact).sum(1)), np.float32)
        k, d = exact.shape
        products = (exact[:, :, None] * exact[:, None, :]).reshape(k, d * d)
        own = np.zeros((len(self.metrics), d, d))
        for padded, metric in zip(own, self.metrics, strict=True):
            padded[: len(metric), : len(metric)] = metric
        return np.asarray(-0.5 * own.reshape(len(own), -1) @ products.T, np.float32)
