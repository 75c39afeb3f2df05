"""From a file of statistics to what encoders can use: what is known of each tensor, and the steps that follow.

A tensor's matrix (rows, columns) has its inputs along the columns; where the layer's weight is stored the other way
round (transformers' `Conv1D`, transposed convolutions) along the rows, and then it is coded as it lies.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
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
from pqcli.tensors.prefixes import matched

if TYPE_CHECKING:
    from pqcli.codecs.base import Survey, Tell, Weights
    from pqcli.stats.sums import WeightSums
    from pqcli.tensors.records import Record

WIDEST: Final = 1 << 14
"""Inputs of the widest layer whose moments are used."""
COARSEST: Final = 32.0
"""Largest step of a tensor that statistics may ask for, and the smallest likewise, in units of the typical one."""


def learned(path: str, survey: Survey, weights: Weights, steps: Steps, tell: Tell) -> tuple[SecondOrder, Steps]:
    """What the statistics in the file say of the surveyed tensors, and the steps that follow in place of `steps`.

    Tensors without statistics keep theirs, in comparable units. Raises StatsError as `opened` does.
    """
    reading = opened(path, survey.records, weights)
    known: dict[str, Moments | RowImportance] = {}
    energies, turned = {}, set()
    for record in survey.records:
        found = reading.known(record)
        if found is not None:
            known[record.name] = found
        if isinstance(found, Moments):
            if found.gradient is None:
                energies[record.name] = reading.output_energy(record, found)
            if reading.axis(record) == 0:
                turned.add(record.name)
        tell(0, record.name)
    tensors = {
        record.name: Plain(record.info.numel, steps.scales[record.name] / survey.fineness_of(record.name))
        for record in survey.records
    }
    plan = prepare(tensors, known, energies)
    plan = replace(plan, rows={name: _turned(rows, name in turned) for name, rows in plan.rows.items()})
    scales = {name: _bounded(scale, survey, name) * survey.fineness_of(name) for name, scale in plan.steps.items()}
    is_free = {name: name in known and survey.fineness_of(name) == 1 for name in steps.ceilings}
    ceilings = {name: np.inf if is_free[name] else ceiling for name, ceiling in steps.ceilings.items()}
    return plan, Steps(scales, ceilings)


def opened(path: str, records: Sequence[Record], weights: Weights) -> Reading:
    """The statistics in the file, for tensors of these weights.

    Raises StatsError where the file is none, or knows none of the tensors; `Reading` does where shapes differ.
    """
    file = statistics.open(path)
    names = matched([record.name for record in records], list(file.names))
    if not names and not any(record.name in file for record in records):
        ours = ", ".join(record.name for record in records[:2])
        theirs = ", ".join(list(file.names)[:2])
        raise StatsError(
            f"{path}: none of its {len(file)} weights ({theirs}, ...) is one of the {len(records)} tensors "
            f"({ours}, ...) to be coded; collect them from this model"
        )
    return Reading(path, file, weights, names)


class Reading:
    """Statistics turned into the core's terms, tensor by tensor; layers that share inputs share the matrix.

    `names` are those in the file of tensors that have other ones there. A matrix is held for as long as it is in use. A
    copy in another process opens the file anew.
    """

    def __init__(
        self, path: str, file: statistics.Statistics, weights: Weights, names: Mapping[str, str] | None = None
    ) -> None:
        self._path, self._file, self._weights, self._names = path, file, weights, names or {}
        self._matrices: dict[int, weakref.ref[Matrix]] = {}
        self._reading = threading.Lock()

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _reopened, (self._path, self._weights, self._names)

    def known(self, record: Record) -> Moments | RowImportance | None:
        """What is known of a tensor; None where that is nothing, or nothing that fits how it is coded."""
        seen = self._file.moments(self._name(record))
        if seen is None:
            return None
        inputs = self._inputs(record, seen)
        return inputs if seen.row_frequency is None else self._looked_up(record, seen, inputs)

    def axis(self, record: Record) -> int:
        """The axis of the tensor's matrix that its inputs belong to."""
        return self._sums(record).axis

    def _name(self, record: Record) -> str:
        return self._names.get(record.name, record.name)

    def _sums(self, record: Record) -> WeightSums:
        name = self._name(record)
        return self._file.weights[self._file.aliases.get(name, name)]

    def output_energy(self, record: Record, known: Moments) -> float:
        """The mean square of an output of the layer."""
        weight = as_matrix(self._weights.original(record.name), record)
        across = weight if self.axis(record) == 1 else weight.T
        return float(np.einsum("ij,ij->", across @ known.matrix, across)) / len(across)

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
        matrix = self._matrix(record, seen)
        if matrix is None or not seen.n_samples:
            return None
        return Moments(matrix, seen.n_samples, seen.gradient, noise=seen.noise)

    def _matrix(self, record: Record, seen: statistics.Moments) -> Matrix | None:
        """Second moments as one matrix, zero where only blocks of it are known."""
        site = self._sums(record).site
        if site is None or seen.diagonal is None or len(seen.diagonal) > WIDEST:
            return None
        with self._reading:
            held = self._matrices.get(site)
            matrix = held() if held else None
            if matrix is None:
                matrix = _whole(seen)
                self._matrices[site] = weakref.ref(matrix)
            return matrix

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


def _reopened(path: str, weights: Weights, names: Mapping[str, str]) -> Reading:
    return Reading(path, statistics.open(path), weights, names)


def _turned(rows: Any, is_turned: bool) -> Any:
    return replace(rows, is_transposed=False) if is_turned and isinstance(rows, Feedback) else rows


def _bounded(scale: float, survey: Survey, name: str) -> float:
    """A step that the streams can hold, whatever the statistics ask for."""
    relative = (survey.own_spread(name) or survey.unit) / survey.unit
    return min(max(scale, SMALLEST_STEP * relative), COARSEST * relative)


def _whole(seen: statistics.Moments) -> Matrix:
    if seen.second is not None:
        return np.asarray(seen.second, np.float32)
    matrix: Matrix = np.diag(np.asarray(seen.diagonal, np.float32))
    start = 0
    for block in seen.blocks or ():
        matrix[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return matrix
