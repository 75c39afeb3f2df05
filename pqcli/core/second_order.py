"""Statistics of inputs become steps and feedback: which errors a network feels, in one unit for all of its layers.

What is minimised over all tensors is damage + price * bits. A layer with weights W, second moments H of its inputs and
gradient number g (mean squared gradient at one of its outputs) does damage N g tr(E H E') in N samples if weights are
off by E; an embedding whose row v was looked up n_v times does g sum over v of n_v |e_v|^2. At one price all of them
are to have the same damage, so with H = F D F' (`trellis.feedback`)

    step of input j of a layer ~ (N g d_j)^(-1/2),     step of row v of an embedding ~ (g n_v)^(-1/2)

and one number, the level, moves all of them together. Between tensors that is believed in part only, by `TRUST`: the
gradient numbers hold for small errors, a step that is large for its weights makes errors that are not small, and other
data would have other gradients. Statistics are samples and perhaps of other data than the network
will meet, so moments are believed in part only: they are shrunk towards their diagonal, by as much as serves one half
of the samples when the other half is what the encoder knew.

Shapes: moments (columns, columns) float32, the mean of x x' over samples; importance (rows,).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pqcli.core.trellis.feedback import (
    LEAST_BELIEVED,
    LEAST_MOMENT,
    Blocks,
    Feedback,
    RowSteps,
    by_block,
    one_matrix,
    triangle,
)
from pqcli.core.trellis.rotation import Reader, Rotations, fit_rotations
from pqcli.core.trellis.rows import OCTAVE_STEPS
from pqcli.core.trellis.sources import Source

Matrix = NDArray[np.float32]

SHRINKAGES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares of what is off the diagonal of moments that may not be believed."""
LEAST_SHRINKAGE = 0.05
"""The share where there are no two halves to find out, and the least where there are: halves may agree and still be of
other data than the network will meet."""
TRUST = 0.5
"""How far a tensor's typical step goes, in octaves, from the one without data (0) to the one of least damage (1)."""
FEWEST_LOOKUPS = (0.05, 0.5)
"""An embedding's row that was never seen counts as seen so many times, as the number of those seen once suggests."""
FEWEST_DRAWS = (0.01, 0.5)
"""Likewise a row of an output layer that was never drawn as a label."""
_LEAST_FELT = 1e-6
"""No row of an output layer is felt less than so, against the mean."""
_MET = 0.1
"""Counts of no more than this are of rows that were not met: squared probabilities of labels that were not drawn."""
MOST_ROW_STEP, LEAST_ROW_STEP = 2.0, 0.125
"""Bounds of a row's step relative to the typical row: frequencies of rare words are guesses."""
_ROW_GRAIN = 2
_BEST_GRAIN = 3.5
_COARSEST_GRAIN = 3
_MAX_TRIED_INPUTS = 1024
"""Wider moments are judged by so many of their inputs."""


@dataclass(frozen=True)
class Moments:
    """What is known of the inputs of a layer: second moments of `n_samples` inputs, all or blocks along the diagonal.

    `gradient` is the mean squared gradient at one output, None where only the forward pass was watched. How far the
    moments can be believed is found from those of two `halves` of the samples, or else is told by `noise`, the share of
    the squared correlations that is sampling error.
    """

    known: Matrix | Blocks
    n_samples: float = 1.0
    gradient: float | None = None
    halves: tuple[Matrix, Matrix] | None = None
    noise: float | None = None

    @property
    def matrix(self) -> Matrix:
        """The moments as one matrix. Raises TypeError where only blocks are known."""
        return one_matrix(self.known)

    def shrinkage(self) -> float:
        """The share of what is off the diagonal that is not believed."""
        if self.halves:
            return best_shrinkage(self.halves)
        return min(max(self.noise or 0.0, LEAST_SHRINKAGE), SHRINKAGES[-1])


@dataclass(frozen=True)
class RowImportance:
    """What is known of an embedding: the damage that a squared error of 1 in a weight does, by row.

    Where the embedding is the output layer too, columns do not count alike either: errors e of a row do damage in
    proportion to e `columns` e', about; `shrinkage` is the share of what is off its diagonal that is not believed.
    Without gradients rows are comparable with each other, and not with other tensors.
    """

    rows: NDArray[np.float64]
    columns: Matrix | None = None
    shrinkage: float = 0.0
    has_gradient: bool = True

    @classmethod
    def of(
        cls,
        lookups: NDArray[np.float64],
        lookup_gradient: float | None,
        head: Moments | None = None,
        row_gradient: NDArray[np.float64] | None = None,
    ) -> RowImportance:
        """From how often each row was looked up, and the mean squared gradient there if it is known.

        Where the embedding is the output layer too (tied), `head` are the moments of that layer's inputs, and
        `row_gradient` (rows,) the mean squared gradients at its outputs.
        """
        # a lookup of a rare row is felt more than one of a common row: by the inverse root of the frequency
        expected = lookups + _unseen(lookups, FEWEST_LOOKUPS)
        rows = np.sqrt(expected) * (expected.sum() / np.sqrt(expected).sum()) * (lookup_gradient or 1.0)
        if lookup_gradient is None:
            return cls(rows, has_gradient=False)
        if head is None or row_gradient is None or not np.any(head.matrix):
            return cls(rows)
        felt = head.n_samples * row_gradient
        if felt.max() >= 1 and felt.min() <= _MET:
            # labels were drawn from predictions: a row that was not drawn shows nothing of what it will be felt
            felt = felt + _unseen(felt, FEWEST_DRAWS)
        felt = np.maximum(felt, _LEAST_FELT * felt.mean())
        mean_square = float(np.mean(np.diag(head.matrix)))
        # a row's errors e do damage rows |e|^2 + felt e H e'; the typical ratio of the two makes it one matrix for all
        ratio = float(np.exp(np.mean(np.log(rows / felt))))
        columns = head.matrix + np.float32(ratio) * np.eye(len(head.matrix), dtype=np.float32)
        return cls(rows + felt * mean_square, columns, head.shrinkage())


def _unseen(counts: NDArray[np.float64], bounds: tuple[float, float]) -> float:
    """How often a row that was never met would be in as many samples again (Good and Turing), within bounds."""
    once = int(np.count_nonzero((counts > _MET) & (counts <= 1)))
    never = int(np.count_nonzero(counts <= _MET))
    return min(max(once / max(never, 1), bounds[0]), bounds[1])


@dataclass(frozen=True)
class Weights:
    """What must be known of a tensor's weights: their number and their step without data, relative to others'."""

    size: int
    plain_step: float


@dataclass(frozen=True)
class SecondOrder:
    """The step of every tensor, relative to a level that means what it does without data; and rows by tensor.

    `shrinkage` tells, for reports, how much of the moments was not believed.
    """

    steps: Mapping[str, float]
    rows: Mapping[str, RowSteps]
    shrinkage: Mapping[str, float]

    def rotations(
        self, sources: Sequence[Source], read: Reader, steps: Mapping[str, float], n_threads: int = 2
    ) -> Rotations:
        """`fit_rotations` for these steps. Where errors are fed forward none is fitted."""
        rotated = [source for source in sources if not isinstance(self.rows.get(source.key), Feedback)]
        own = {source.key: self.rows[source.key].steps for source in rotated if source.key in self.rows}
        return fit_rotations(rotated, read, steps, n_threads, own)


def prepare(
    tensors: Mapping[str, Weights],
    known: Mapping[str, Moments | RowImportance],
) -> SecondOrder:
    """Steps and feedback for all tensors, from what is known of the inputs of some.

    Tensors of which nothing is known get their step without data times a factor that makes the typical step of the
    known ones what it was. So do those of which no gradient is known, for their typical step: what a layer's inputs are
    says how its bits are best spent within it, and next to nothing about how many it should have. (Asking all layers
    for the same relative error of their outputs was twice as far from what gradients ask for, on three models.)
    """
    rows: dict[str, RowSteps] = {}
    exact: dict[str, float] = {}  # of those that can be compared
    shrinkage: dict[str, float] = {}
    judged: dict[int, tuple[Feedback, float]] = {}  # layers share moments
    for key, about in known.items():
        if isinstance(about, RowImportance):
            rows[key], typical = _of_rows(about) if about.columns is None else _of_both(about, about.columns)
            if about.has_gradient:
                exact[key] = typical
            continue
        if id(about.known) not in judged:
            judged[id(about.known)] = _of_inputs(about.known, about.shrinkage())
        fed, typical = judged[id(about.known)]
        rows[key] = replace(fed, grain=_grain(tensors[key].size // max(len(fed.order), 1)))
        shrinkage[key] = fed.shrinkage
        if about.gradient is not None:
            exact[key] = typical / math.sqrt(max(about.gradient * about.n_samples, 1e-30))
    unit = _typical({key: exact[key] / tensors[key].plain_step for key in exact}, tensors)
    steps = {key: about.plain_step for key, about in tensors.items()}
    for key, step in exact.items():
        steps[key] *= (step / unit / steps[key]) ** TRUST
    return SecondOrder(steps, rows, shrinkage)


def coding_order(known: Matrix | Blocks) -> NDArray[np.int64]:
    """Inputs of large second moment first, within each block: the others then make up for their errors."""
    orders, start = [np.zeros(0, np.int64)], 0
    for block in known.parts if isinstance(known, Blocks) else (known,):
        orders.append(start + np.argsort(-np.diag(block), kind="stable"))
        start += len(block)
    return np.concatenate(orders)


def _of_inputs(known: Matrix | Blocks, shrinkage: float) -> tuple[Feedback, float]:
    """The feedback of a layer, its steps relative to the typical one; and the typical one."""
    order = coding_order(known)
    blocks = by_block(known, order)
    pivots = np.concatenate([triangle(block, within, shrinkage, LEAST_BELIEVED)[1] for _, block, within in blocks])
    steps = np.empty(len(order))
    steps[order] = np.maximum(pivots, 1e-30) ** -0.5
    typical = float(np.exp(np.mean(np.log(steps))))
    return Feedback(steps / typical, 0, order, known, shrinkage), typical


def _grain(n_outputs: int) -> int:
    """How coarsely steps are told of inputs with so many weights: short rows should not spend their bits on them.

    Steps off by a uniform error within w octaves cost each weight about w^2 / 17 bits and save log2 w a row: best at w
    = 3.5 / sqrt(weights).
    """
    octaves = _BEST_GRAIN / math.sqrt(max(n_outputs, 1))
    return min(max(math.floor(math.log2(OCTAVE_STEPS * octaves)), 0), _COARSEST_GRAIN)


def _of_rows(about: RowImportance) -> tuple[RowSteps, float]:
    """Steps of an embedding's rows relative to the typical one, and the typical one."""
    steps = np.maximum(about.rows, 1e-30) ** -0.5
    typical = float(np.exp(np.mean(np.log(steps))))
    return RowSteps(np.clip(steps / typical, LEAST_ROW_STEP, MOST_ROW_STEP), _ROW_GRAIN), typical


def _of_both(about: RowImportance, columns: Matrix) -> tuple[Feedback, float]:
    """Feedback for an embedding that is an output layer: its columns are inputs, its rows have steps as well."""
    fed, typical = _of_inputs(columns, about.shrinkage)
    of_rows, typical_row = _of_rows(replace(about, rows=about.rows / float(np.mean(np.diag(columns)))))
    return replace(fed, column_steps=of_rows.steps), typical * typical_row


def _typical(ratios: Mapping[str, float], tensors: Mapping[str, Weights]) -> float:
    """Geometric mean by weights; 1 of none."""
    n = sum(tensors[key].size for key in ratios)
    return math.exp(sum(tensors[key].size * math.log(ratio) for key, ratio in ratios.items()) / n) if n else 1.0


def best_shrinkage(halves: tuple[Matrix, Matrix], shrinkages: Sequence[float] = SHRINKAGES) -> float:
    """The shrinkage with which each half of the samples serves the other best."""
    found = excess_damage(halves, shrinkages)
    return shrinkages[int(np.argmin(found))]


def excess_damage(halves: tuple[Matrix, Matrix], shrinkages: Sequence[float]) -> NDArray[np.float64]:
    """Log of the damage per weight at equal bits when one half is coded by what the other knows, by shrinkage.

    An encoder that knows moments A leaves errors of covariance about A^-1 and takes (1/2) log2 det A bits; with moments
    B in truth that does damage tr(B A^-1). Wide moments are judged by some of their inputs.
    """
    size = len(halves[0])
    chosen = np.arange(0, size, -(-size // _MAX_TRIED_INPUTS))
    first, second = (half[np.ix_(chosen, chosen)].astype(np.float64) for half in halves)
    return 0.5 * (_damages(first, second, shrinkages) + _damages(second, first, shrinkages))


def _damages(
    truth: NDArray[np.float64], believed: NDArray[np.float64], shrinkages: Sequence[float]
) -> NDArray[np.float64]:
    """log(tr(B A^-1) / n) + log(det A) / n, where B is the truth and A what is believed, shrunk, on correlations."""
    diagonal = np.diag(believed)
    scale = np.sqrt(np.maximum(diagonal, max(float(diagonal.mean()), 1e-30) * LEAST_MOMENT))
    correlations = believed / np.outer(scale, scale)
    np.fill_diagonal(correlations, 1.0)
    energies, directions = np.linalg.eigh(correlations)
    seen = np.einsum("ij,ij->j", directions, (truth / np.outer(scale, scale)) @ directions)
    found = []
    for shrinkage in shrinkages:
        shrunk = np.maximum((1 - shrinkage) * energies + shrinkage, 1e-12)
        found.append(math.log(max(float(np.mean(seen / shrunk)), 1e-30)) + float(np.mean(np.log(shrunk))))
    return np.array(found) + 2 * float(np.mean(np.log(scale)))
