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
from pqcli.codecs.base import Matrix
from pqcli.codecs.rate.steps import SMALLEST_STEP, Steps
from pqcli.core.second_order import Moments, RowImportance, SecondOrder, prepare
from pqcli.core.second_order import Weights as Plain
from pqcli.core.trellis.feedback import Blocks, Feedback
from pqcli.errors import StatsError
from pqcli.stats.damage import Damage, predicted
from pqcli.tensors.prefixes import matched

if TYPE_CHECKING:
    import torch

    from pqcli.codecs.base import Survey, Tell
    from pqcli.stats.sums import WeightSums
    from pqcli.tensors.records import Record

WIDEST: Final = 1 << 14
"""Inputs of the widest layer whose moments are used as one matrix."""
NOTHING_KNOWN: Final = ""
OTHER_LAYOUT: Final = "their inputs lie along no axis of what is coded"
_BLOCK: Final = 128
"""Width of the blocks where only the diagonal is known."""
_STACKED: Final = 3
"""Dimensions of stacked experts: (experts, a, b)."""
_STACKED_FIRST: Final = -2
"""The axis of their inputs where these come before the outputs."""
_N_NAMED: Final = 3
COARSEST: Final = 32.0
"""Largest step of a tensor that statistics may ask for, and the smallest likewise, in units of the typical one."""


def learned(
    path: str, survey: Survey, steps: Steps, tell: Tell, *, in_blocks: bool = False
) -> tuple[SecondOrder, Steps]:
    """What the statistics in the file say of the surveyed tensors, and the steps that follow in place of `steps`.

    Tensors without statistics keep theirs, in comparable units. Whoever takes moments `in_blocks` gets them so where no
    more is known, or where they are large. Raises StatsError as `opened` does.
    """
    reading = opened(path, survey.records, in_blocks=in_blocks)
    known: dict[str, Moments | RowImportance] = {}
    turned = set()
    for record in survey.records:
        found = reading.known(record)
        if found is not None:
            known[record.name] = found
        if isinstance(found, Moments) and reading.axis(record) == 0:
            turned.add(record.name)
        tell(0, record.name)
    tensors = {
        record.name: Plain(record.info.numel, steps.scales[record.name] / survey.fineness_of(record.name))
        for record in survey.records
    }
    plan = prepare(tensors, known)
    plan = replace(plan, rows={name: _turned(rows, name in turned) for name, rows in plan.rows.items()})
    scales = {name: _bounded(scale, survey, name) * survey.fineness_of(name) for name, scale in plan.steps.items()}
    is_free = {name: name in known and survey.fineness_of(name) == 1 for name in steps.ceilings}
    ceilings = {name: np.inf if is_free[name] else ceiling for name, ceiling in steps.ceilings.items()}
    return plan, Steps(scales, ceilings)


def opened(path: str, records: Sequence[Record], *, in_blocks: bool = False) -> Reading:
    """The statistics in the file, for these tensors.

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
    return Reading(path, file, names, in_blocks=in_blocks)


def warning_of(reading: Reading, records: Sequence[Record]) -> str | None:
    """One line that names the tensors for which statistics do not count, and why; None where they all do."""
    groups: dict[str, list[str]] = {}
    for record in records:
        why = reading.unused(record)
        if why is not None:
            groups.setdefault(why, []).append(record.name)
    unknown = groups.pop(NOTHING_KNOWN, [])
    said = [f"statistics of {_named(names)} were not used ({why})" for why, names in groups.items()]
    if unknown:
        said.append(f"statistics tell nothing of {_named(unknown)}")
    return "; ".join(said) + ": coded as without statistics" if said else None


def _named(names: Sequence[str]) -> str:
    """`12 tensors, a, b, c and 9 more`."""
    more = f" and {len(names) - _N_NAMED:,} more" if len(names) > _N_NAMED else ""
    return f"{len(names):,} tensor{'s' * (len(names) > 1)}, {', '.join(names[:_N_NAMED])}{more}"


class Reading:
    """Statistics turned into the core's terms, tensor by tensor; layers that share inputs share the matrix.

    `names` are those in the file of tensors that have other ones there. A matrix is held for as long as it is in use. A
    copy in another process opens the file anew. With `in_blocks` moments come as blocks where no more is known, or the
    inputs are more than `WIDEST`; without, blocks are filled up by zeros, and such inputs are not used.
    """

    def __init__(
        self, path: str, file: statistics.Statistics, names: Mapping[str, str], *, in_blocks: bool = False
    ) -> None:
        self._path, self._file, self._names, self._in_blocks = path, file, names, in_blocks
        self._held: dict[tuple[int, int], weakref.ref[Matrix | Blocks]] = {}
        self._reading = threading.Lock()

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return _reopened, (self._path, self._names, self._in_blocks)

    def known(self, record: Record) -> Moments | RowImportance | None:
        """What is known of a tensor; None where that is nothing, or nothing that can be used (`unused`)."""
        if self.unused(record) is not None:
            return None
        seen = self._file.moments(self._name(record))
        if seen is None:
            return None
        inputs = self._inputs(record, seen)
        return inputs if seen.row_frequency is None else self._looked_up(record, seen, inputs)

    def unused(self, record: Record) -> str | None:
        """Why statistics do not count for a tensor, as a person says it; None where they do. Reads no matrix."""
        name = self._name(record)
        if name not in self._file:
            return NOTHING_KNOWN
        sums = self._sums(record)
        why = None if sums.site is None else self._unused_inputs(record)
        if sums.lookups is None:
            return NOTHING_KNOWN if sums.site is None else why
        return None if record.matrix_shape[0] == record.info.shape[0] else OTHER_LAYOUT

    def _unused_inputs(self, record: Record) -> str | None:
        outline = self._file.outline(self._site(record))
        axis = self._matrix_axis(record)
        if axis is None:
            return OTHER_LAYOUT
        if not sum(outline.counts):
            return "no input of theirs was seen"
        if not self._in_blocks and outline.columns > WIDEST:
            return f"more than {WIDEST:,} inputs"
        if not self._in_blocks and axis == 0 and record.matrix_shape[0] != outline.columns:
            return "experts stacked with their inputs first"
        return None

    def damage(self, record: Record, original: torch.Tensor, decoded: torch.Tensor) -> Damage | None:
        """What comes of the error of a tensor, as far as the statistics tell; they are believed whole here."""
        seen = self._file.moments(self._name(record))
        return None if seen is None else predicted(seen, original, decoded)

    def axis(self, record: Record) -> int:
        """The axis of the tensor's matrix that its inputs belong to, if it has any."""
        axis = self._matrix_axis(record)
        return 1 if axis is None else axis

    def _matrix_axis(self, record: Record) -> int | None:
        """Likewise; None where the matrix that is coded does not have them along an axis."""
        axis, rows, columns = self._sums(record).axis, *record.matrix_shape
        shape = record.info.shape
        if axis in {0, 1}:
            return axis if rows == shape[0] else None
        # stacked matrices lie below one another
        return {-1: 1, -2: 0}[axis] if len(shape) == _STACKED and columns == shape[-1] else None

    def _name(self, record: Record) -> str:
        return self._names.get(record.name, record.name)

    def _sums(self, record: Record) -> WeightSums:
        name = self._name(record)
        return self._file.weights[self._file.aliases.get(name, name)]

    def _site(self, record: Record) -> int:
        site = self._sums(record).site
        return -1 if site is None else site

    def _inputs(self, record: Record, seen: statistics.Moments) -> Moments | None:
        if seen.diagonal is None or self._unused_inputs(record) is not None:
            return None
        rows, columns = record.matrix_shape
        axis, n_stacked = self.axis(record), record.info.shape[0] if seen.axis == _STACKED_FIRST else 1
        size = (rows if axis == 0 else columns) // n_stacked
        if len(seen.diagonal) != size:
            raise StatsError(
                f"{record.name}: statistics of {len(seen.diagonal):,} inputs, but the weight has {size:,}; collect "
                "them from this model"
            )
        return Moments(self._moments(record, seen, n_stacked), seen.n_samples, seen.gradient, noise=seen.noise)

    def _moments(self, record: Record, seen: statistics.Moments, n_stacked: int) -> Matrix | Blocks:
        """Second moments; those of stacked matrices, whose inputs stand below one another, so many times."""
        site = self._site(record)
        with self._reading:
            held = self._held.get((site, n_stacked))
            known = held() if held else None
            if known is None:
                known = _in_blocks(seen, n_stacked) if self._in_blocks else _whole(seen)
                self._held[site, n_stacked] = weakref.ref(known)
            return known

    def _looked_up(self, record: Record, seen: statistics.Moments, inputs: Moments | None) -> RowImportance | None:
        rows, _ = record.matrix_shape
        frequency: NDArray[np.float64] = np.asarray(seen.row_frequency)
        if len(frequency) != rows:
            raise StatsError(
                f"{record.name}: statistics of {len(frequency):,} rows, but the embedding has {rows:,}; collect them "
                "from this model"
            )
        if inputs is not None and isinstance(inputs.known, Blocks):
            inputs = None  # a head's rows and columns are weighed together, by one matrix
        return RowImportance.of(frequency * seen.n_lookups, seen.lookup_gradient, inputs, seen.row_gradient)


def _reopened(path: str, names: Mapping[str, str], in_blocks: bool) -> Reading:
    return Reading(path, statistics.open(path), names, in_blocks=in_blocks)


def _turned(rows: Any, is_turned: bool) -> Any:
    return replace(rows, is_transposed=False) if is_turned and isinstance(rows, Feedback) else rows


def _bounded(scale: float, survey: Survey, name: str) -> float:
    """A step that the streams can hold, whatever the statistics ask for."""
    relative = (survey.own_spread(name) or survey.unit) / survey.unit
    return min(max(scale, SMALLEST_STEP * relative), COARSEST * relative)


def _whole(seen: statistics.Moments) -> Matrix:
    """Second moments as one matrix, zero where only blocks of it are known."""
    if seen.second is not None:
        return np.asarray(seen.second, np.float32)
    matrix: Matrix = np.diag(np.asarray(seen.diagonal, np.float32))
    start = 0
    for block in seen.blocks or ():
        matrix[start : start + len(block), start : start + len(block)] = block
        start += len(block)
    return matrix


def _in_blocks(seen: statistics.Moments, n_stacked: int) -> Matrix | Blocks:
    """Second moments as far as they are known, and no block too large."""
    diagonal = np.asarray(seen.diagonal, np.float32)
    starts = range(0, len(diagonal), _BLOCK)
    if seen.second is not None:
        whole = np.asarray(seen.second, np.float32)
        if len(whole) <= WIDEST and n_stacked == 1:
            return whole
        cuts = range(0, len(whole), WIDEST // 4)
        parts = (whole,) if len(whole) <= WIDEST else tuple(whole[i:, i:][: WIDEST // 4, : WIDEST // 4] for i in cuts)
    elif seen.blocks is not None:
        parts = tuple(np.asarray(block, np.float32) for block in seen.blocks)
    else:
        parts = tuple(np.diag(diagonal[start : start + _BLOCK]) for start in starts)
    return Blocks(parts * n_stacked)
