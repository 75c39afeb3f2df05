"""Plain PQ that minimises the error of a layer's outputs, not that of its weights.

A layer gives W x. Where its inputs x have second moments H, errors E of W cost tr(E H E'): errors in inputs that vary
together can make up for each other. So blocks are not assigned one by one:

    start      EM that weighs the errors of every input by its mean square (done by the caller)
    feedback   the blocks of a row in order, the errors of blocks before fed forward, and a choice charged for what the
               blocks after cannot make up for (GPTQ; in blocks: GPTVQ, arXiv 2402.15319)
    rounds     the codebook that serves these assignments best, by least squares in H; then every block anew, given all
               others. Neither makes the error larger (where the codebook is fitted to all outputs).

The nearest centroid is that in the metric of a block's own inputs: with moments H_bb = M M' the distance of vectors
times M is an ordinary one, so the search is that of any other EM. Where weights are stored transposed (`axis` 0),
vectors run along the outputs, a block has a single input, and all else is the same.

Inputs are taken in groups: those of a block, or single ones. Within `Layer` they lie in the order in which they are
coded, the group of the largest mean square first.

Shapes: weights (outputs, inputs) float32; moments (inputs, inputs); codebook (k, d); vectors (n, d); assignments
(groups, n). Products of matrices are BLAS's: they are the same on every run because BLAS gets one thread.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.core import kernels
from pqcli.core.feeding import Inputs, bundles, coded_order, factored, fed_forward, groups_of, places_of

Matrix = NDArray[np.float32]
Assignments = NDArray[np.int32]

ROUNDS: Final = 2
"""Codebooks fitted to assignments, each with new assignments after it: a third gains 0.05 dB."""
SOLVER_STEPS: Final = 4
"""Steps of conjugate gradients that fit a codebook; each starts from the one before."""
FITTED_WEIGHTS: Final = 1 << 20
"""A codebook is fitted to so many weights at most, those of evenly spread outputs."""
_RIDGE: Final = 1e-6


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
        weights = matrix.T if is_across else matrix
        n_inputs = weights.shape[1]
        width = 1 if is_across else block_size
        order = coded_order(inputs.mean_squares, width)
        places = places_of(order, width, n_inputs)
        moments = inputs.believed()[np.ix_(places, places)]
        groups = tuple(groups_of(n_inputs, width))
        return cls(np.ascontiguousarray(weights[:, places]), moments, block_size, groups, order, is_across)

    def refined(self, codebook: Matrix) -> Assigned:
        """A codebook and assignments that serve the outputs better than `codebook` does by nearest centroids."""
        found = Assigned(codebook, self.fed_forward(codebook))
        for _ in range(ROUNDS):
            found = self.descended(self.fitted(found))
        return found

    def in_order(self, found: Assigned) -> Assignments:
        """The assignments in the matrix's own order, row by row, (rows * blocks_per_row,)."""
        own = np.empty_like(found.assignments)
        own[self.order] = found.assignments
        return np.ascontiguousarray(own if self.is_across else own.T).reshape(-1)

    def damage(self, found: Assigned) -> float:
        """tr(E H E') of the believed moments, relative to that of losing all weights."""
        errors = self.weights - self._decoded(found.codebook, found.assignments)
        lost = float(np.einsum("ij,ij->", self.weights @ self.moments, self.weights, dtype=np.float64))
        return float(np.einsum("ij,ij->", errors @ self.moments, errors, dtype=np.float64)) / max(lost, 1e-300)

    # --- the three ways to better ones ---

    def fed_forward(self, codebook: Matrix) -> Assignments:
        """Assignments made group after group, each with the errors of those before fed forward to it."""
        found = self._none()

        def code(i: int, group: slice, target: Matrix, metric: Matrix) -> Matrix:
            found[i] = self._nearest(target, metric, codebook)
            return self._looked_up(codebook, found[i], group)

        fed_forward(self.weights, *factored(self.moments), self.groups, code)
        return found

    def fitted(self, found: Assigned) -> Assigned:
        """The codebook that least squares find for these assignments, with them."""
        layer, assignments = self._sampled(found.assignments)
        return Assigned(layer.solved(found.codebook, assignments), found.assignments)

    def solved(self, codebook: Matrix, assignments: Assignments) -> Matrix:
        """`SOLVER_STEPS` of conjugate gradients from a codebook to the best one for the assignments."""
        k = len(codebook)
        inverse = self._preconditioner(assignments, k)
        residual = self._gathered((self.weights - self._decoded(codebook, assignments)) @ self.moments, assignments, k)
        direction = scaled = np.einsum("kij,kj->ki", inverse, residual)
        slope = float(np.sum(residual * scaled))
        best = codebook.astype(np.float64)
        for _ in range(SOLVER_STEPS):
            changed = self._decoded(direction.astype(np.float32), assignments)
            image = self._gathered(changed @ self.moments, assignments, k)
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
        errors = self.weights - self._decoded(found.codebook, found.assignments)
        felt = errors @ self.moments
        assignments = found.assignments.copy()
        for together, groups in bundles(self.groups):
            shift = np.zeros((len(errors), together.stop - together.start), np.float32)
            for i, group in groups:
                inside = slice(group.start - together.start, group.stop - together.start)
                own = self.moments[group, group].astype(np.float64)
                pull = felt[:, group] + shift @ self.moments[together, group] - errors[:, group] @ own
                target = self.weights[:, group] + np.linalg.solve(own, pull.T).T
                metric = np.linalg.cholesky(own).astype(np.float32)
                before = self._looked_up(found.codebook, assignments[i], group)
                assignments[i] = self._nearest(target.astype(np.float32), metric, found.codebook)
                shift[:, inside] = before - self._looked_up(found.codebook, assignments[i], group)
                errors[:, group] += shift[:, inside]
            felt[:, together.stop :] += shift @ self.moments[together, together.stop :]
        return Assigned(found.codebook, assignments)

    # --- between inputs and vectors ---

    def _none(self) -> Assignments:
        n = self.weights.shape[0] // (self.block_size if self.is_across else 1)
        return np.zeros((len(self.groups), n), np.int32)

    def _nearest(self, target: Matrix, metric: Matrix, codebook: Matrix) -> Assignments:
        """The centroids nearest to a group's targets (outputs, group)."""
        if self.is_across:
            vectors, centroids = target.reshape(-1, self.block_size) * metric[0, 0], codebook * metric[0, 0]
        else:
            vectors, centroids = target @ metric, codebook[:, : target.shape[1]] @ metric
        bias = -0.5 * np.square(centroids, dtype=np.float64).sum(1)
        found = kernels.sweep(
            torch.from_numpy(np.ascontiguousarray(vectors, np.float32)),
            torch.from_numpy(np.ascontiguousarray(centroids, np.float32)),
            torch.from_numpy(bias.astype(np.float32)),
            accumulate=False,
        )
        return np.asarray(found.assignments.numpy(), np.int32)

    def _looked_up(self, codebook: Matrix, assignments: Assignments, group: slice) -> Matrix:
        """What a group's assignments spell, (outputs, group)."""
        if self.is_across:
            return codebook[assignments].reshape(-1, 1)
        return codebook[assignments, : group.stop - group.start]

    def _decoded(self, codebook: Matrix, assignments: Assignments) -> Matrix:
        """All of it (outputs, inputs)."""
        if self.is_across:
            return np.ascontiguousarray(codebook[assignments].reshape(len(assignments), -1).T)
        spelt = codebook[assignments.T].reshape(assignments.shape[1], -1)
        return np.ascontiguousarray(spelt[:, : self.weights.shape[1]])

    def _gathered(self, values: NDArray[Any], assignments: Assignments, k: int) -> NDArray[np.float64]:
        """The sums (k, d) of values (outputs, inputs) over each centroid's vectors."""
        if self.is_across:
            vectors = values.T.reshape(-1, self.block_size)
        else:
            missing = len(assignments) * self.block_size - values.shape[1]
            padded = np.pad(values, ((0, 0), (0, missing))) if missing else values
            vectors, assignments = padded.reshape(-1, self.block_size), assignments.T
        flat = assignments.reshape(-1)
        return np.stack([np.bincount(flat, vectors[:, t], minlength=k) for t in range(self.block_size)], axis=1)

    def _preconditioner(self, assignments: Assignments, k: int) -> NDArray[np.float64]:
        """The inverse (k, d, d) of what a centroid's squared shifts cost if blocks did not interact."""
        d = self.block_size
        counts = np.stack([np.bincount(row, minlength=k) for row in assignments], axis=1).astype(np.float64)
        if self.is_across:
            cost = (counts @ np.diag(self.moments))[:, None, None] * np.eye(d)
        else:
            own = np.zeros((len(self.groups), d, d))
            for i, group in enumerate(self.groups):
                own[i, : group.stop - group.start, : group.stop - group.start] = self.moments[group, group]
            cost = np.tensordot(counts, own, axes=1)
        ridge = _RIDGE * max(float(np.trace(cost.sum(0))) / (d * k), 1e-30)
        return np.asarray(np.linalg.inv(cost + ridge * np.eye(d)))

    def _sampled(self, assignments: Assignments) -> tuple[Layer, Assignments]:
        """The layer with some of its outputs, and their assignments; itself where it has few."""
        n_outputs, n_inputs = self.weights.shape
        step = max(1, n_outputs * n_inputs // FITTED_WEIGHTS)
        if step == 1:
            return self, assignments
        unit = self.block_size if self.is_across else 1
        weights = self.weights.reshape(n_outputs // unit, unit, n_inputs)[::step].reshape(-1, n_inputs)
        some = replace(self, weights=weights)
        return some, np.ascontiguousarray(assignments[:, ::step])
