"""From a file of statistics to what the trellis encoder can use: steps, rows and feedback of every tensor.

A tensor's matrix (rows, columns) has its inputs along the columns; where the layer's weight is stored the other way
round (transformers' `Conv1D`, transposed convolutions) along the rows, and then it is coded as it lies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from pqcli import stats as statistics
from pqcli.codecs.base import Matrix, as_matrix
from pqcli.codecs.rate.steps import SMALLEST_STEP, Steps
from pqcli.core.second_order import Moments, RowImportance, SecondOrder, prepare
from pqcli.core.second_order import Weights as Plain
from pqcli.core.trellis.feedback import Feedback
from pqcli.errors import StatsError

if TYPE_CHECKING:
    from pqcli.codecs.base import Survey, Tell, Weights
    from pqcli.tensors.records import Record

WIDEST: Final = 1 << 14
"""Inputs of the widest layer whose moments are used."""
COARSEST: Final = 32.0
"""Largest step of a tensor that statistics may ask for, and the smallest likewise, in units of the typical one."""


def learned(path: str, survey: Survey, weights: Weights, steps: Steps, tell: Tell) -> tuple[SecondOrder, Steps]:
    """What the statistics in the file say of the surveyed tensors, and the steps that follow in place of `steps`.

    Tensors without statistics keep theirs, in comparable units. Raises StatsError where the file is none, knows no
    tensor of the checkpoint, or knows one by another shape.
    """
    file = statistics.open(path)
    reading = _Reading(file, weights)
    known: dict[str, Moments | RowImportance] = {}
    for record in survey.records:
        found = reading.known(record)
        if found is not None:
            known[record.name] = found
        tell(0, record.name)
    if not known:
        raise StatsError(_no_match(path, file, survey))
    tensors = {record.name: Plain(record.info.numel, steps.scales[record.name]) for record in survey.records}
    plan = prepare(tensors, known, reading.energies)
    plan = replace(plan, rows={name: _turned(rows, name in reading.turned) for name, rows in plan.rows.items()})
    scales = {name: _bounded(scale, survey, name) for name, scale in plan.steps.items()}
    ceilings = {name: np.inf if name in known else ceiling for name, ceiling in steps.ceilings.items()}
    return plan, Steps(scales, ceilings)


def _turned(rows: Any, is_turned: bool) -> Any:
    return replace(rows, is_transposed=False) if is_turned and isinstance(rows, Feedback) else rows


def _bounded(scale: float, survey: Survey, name: str) -> float:
    """A step that the streams can hold, whatever the statistics ask for."""
    relative = (survey.spreads[name] or survey.unit) / survey.unit
    return min(max(scale, SMALLEST_STEP * relative), COARSEST * relative)


def _no_match(path: str, file: statistics.Statistics, survey: Survey) -> str:
    ours = ", ".join(record.name for record in survey.records[:2])
    theirs = ", ".join(list(file.names)[:2])
    return (
        f"{path}: none of its {len(file)} weights ({theirs}, ...) is one of the {len(survey.records)} tensors "
        f"({ours}, ...) to be coded; collect them from this model"
    )


class _Reading:
    """Statistics turned into the core's terms, tensor by tensor; layers that share inputs share the matrix."""

    def __init__(self, file: statistics.Statistics, weights: Weights) -> None:
        self._file, self._weights = file, weights
        self._matrices: dict[int, Matrix | None] = {}
        self.energies: dict[str, float] = {}
        self.turned: set[str] = set()

    def known(self, record: Record) -> Moments | RowImportance | None:
        """What is known of a tensor; None where that is nothing, or nothing that fits how it is coded."""
        seen = self._file.moments(record.name)
        if seen is None:
            return None
        inputs = self._inputs(record, seen)
        return inputs if seen.row_frequency is None else self._looked_up(record, seen, inputs)

    def _inputs(self, record: Record, seen: statistics.Moments) -> Moments | None:
        rows, columns = record.matrix_shape
        if seen.diagonal is None or seen.axis not in {0, 1} or rows != record.info.shape[0]:
            return None
        size = columns if seen.axis == 1 else rows
        if len(seen.diagonal) != size:
            raise StatsError(
                f"{record.name}: statistics of {len(seen.diagonal):,} inputs, but the weight has {size:,}; collect "
                "them from this model"
            )
        matrix = self._matrix(record.name, seen)
        if matrix is None or not seen.n_samples:
            return None
        if seen.axis == 0:
            self.turned.add(record.name)
        if seen.gradient is None:
            weight = as_matrix(self._weights.original(record.name), record)
            across = weight if seen.axis == 1 else weight.T
            self.energies[record.name] = float(np.einsum("ij,ij->", across @ matrix, across)) / len(across)
        return Moments(matrix, seen.n_samples, seen.gradient, noise=seen.noise)

    def _matrix(self, name: str, seen: statistics.Moments) -> Matrix | None:
        """Second moments as one matrix, zero where only blocks of it are known."""
        site = self._file.weights[self._file.aliases.get(name, name)].site
        if site is None or seen.diagonal is None:
            return None
        if site not in self._matrices:
            self._matrices[site] = _whole(seen) if len(seen.diagonal) <= WIDEST else None
        return self._matrices[site]

    def _looked_up(self, record: Record, seen: statistics.Moments, inputs: Moments | None) -> RowImportance | None:
        rows, _ = record.matrix_shape
        frequency: NDArray[np.float64] = np.asarray(seen.row_frequency)
        if rows != record.info.shape[0]:
            return None
        if len(frequency) != rows:
            raise StatsError(
                f"{record.name}: statistics of {len(frequency):,} rows, but the embedding has {rows:,}; collect them "
                "from this model"
            )
        gradient = seen.lookup_gradient
        if gradient is None:
            matrix = as_matrix(self._weights.original(record.name), record)
            gradient = 1 / max(float(frequency @ np.square(matrix, dtype=np.float64).mean(1)), 1e-30)
        return RowImportance.of(frequency * seen.n_lookups, gradient, inputs, seen.row_gradient)


def _whole(seen: statistics.Moments) -> Matrix:
    if seen.second is not None:
        return np.asarray(seen.second, np.float32)
    matrix: Matrix = np.diag(np.asarray(seen.diagonal, np.float32))
    start = 0
    for block in seen.blocks or ():
        matrix[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return matrix
