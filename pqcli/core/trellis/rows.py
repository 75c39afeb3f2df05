"""What single rows of a coded matrix have of their own: steps, and the label of their odd set.

A source has no such rows, rows with steps, or *lone* rows: with steps and labels, and each a run of the trellis, so
that an encoder can code them in the order that it likes (`feedback`). A row's step is the source's times an eighth of
an octave to the power of its exponent. Where rows are lone, columns can have steps too, which multiply with them: rows
*crossed* by columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pqcli.core.entropy.rangecoder import RangeCoder
from pqcli.core.trellis.loops import run_rows
from pqcli.core.trellis.slots import StreamSlots

OCTAVE_STEPS = 8
_RATIOS = tuple(float(np.float32(2.0 ** (i / OCTAVE_STEPS))) for i in range(OCTAVE_STEPS))
MAX_EXPONENT = 255
"""Row steps lie within 32 octaves of the source's, to either side."""
_LARGEST_STEP = float(np.finfo(np.float32).max)
_MAX_GRAIN = 4
_PREDICTION_SHIFT = 3
_PREDICTION_BITS = 8


class RowKind(IntEnum):
    """What the rows of a source have of their own."""

    PLAIN = 0
    STEPS = 1
    LONE = 2
    CROSSED = 3

    @property
    def is_lone(self) -> bool:
        """Whether every row is a run of the trellis."""
        return self >= RowKind.LONE


@dataclass(frozen=True)
class Rows:
    """The rows of one segment: exponents (rows,) int64, labels (rows,) uint8, 1 where the odd set is pure.

    `columns` (columns,) int64 are the exponents of its columns, where rows are crossed by them; else it is empty.
    """

    kind: RowKind
    exponents: NDArray[np.int64]
    labels: NDArray[np.uint8]
    columns: NDArray[np.int64]

    @classmethod
    def empty(cls, kind: RowKind, n_rows: int, columns: NDArray[np.int64] | None = None) -> Rows:
        """Rows with the source's step, and labels 0."""
        columns = np.zeros(0, np.int64) if columns is None else columns
        return cls(kind, np.zeros(n_rows, np.int64), np.zeros(n_rows, np.uint8), columns)

    def part(self, start: int, stop: int) -> Rows:
        """Some of the rows, sharing memory."""
        return Rows(self.kind, self.exponents[start:stop], self.labels[start:stop], self.columns)

    def run_rows(self, n_columns: int) -> int:
        """How many rows make a run of the trellis."""
        return 1 if self.kind.is_lone else run_rows(n_columns)

    def column_steps(self) -> NDArray[np.float32]:
        """What a row's step is multiplied by, column by column; empty where that is 1."""
        return steps_of(1.0, self.columns)

    def steps(self, step: np.float32) -> NDArray[np.float32]:
        """The steps (rows,) where the source's is `step`, in defined arithmetic."""
        return steps_of(float(step), self.exponents)


def step_of(step: float, exponent: int) -> np.float32:
    """Step * 2^(exponent / 8) in defined arithmetic; the largest float32 where that is larger."""
    octave, eighth = divmod(exponent, OCTAVE_STEPS)
    return np.float32(min(float(np.ldexp(float(np.float32(step)) * _RATIOS[eighth], octave)), _LARGEST_STEP))


def steps_of(step: float, exponents: NDArray[np.int64]) -> NDArray[np.float32]:
    """`step_of` every exponent."""
    octaves, eighths = np.divmod(exponents, OCTAVE_STEPS)
    products = np.ldexp(float(np.float32(step)) * np.array(_RATIOS)[eighths], octaves)
    return np.minimum(products, _LARGEST_STEP).astype(np.float32)


def exponents_of(steps: NDArray[np.float64], grain: int = 0) -> NDArray[np.int64]:
    """The exponents of relative steps, rounded to multiples of 2^grain and bounded."""
    unit = 1 << grain
    limit = MAX_EXPONENT // unit
    exact = OCTAVE_STEPS / unit * np.log2(np.maximum(steps, 1e-300))
    return np.clip(np.round(exact), -limit, limit).astype(np.int64) * unit


def code_rows(coder: RangeCoder, rows: Rows) -> None:
    """Write the rows' exponents and labels, or read them into the arrays; raises what `code_exponents` does."""
    if rows.kind == RowKind.PLAIN:
        return
    exponents = rows.exponents
    code_exponents(coder, exponents)
    if rows.kind.is_lone:
        previous = 0
        for r in range(len(exponents)):
            previous = coder.bit(StreamSlots.ROW_LABEL + previous, int(rows.labels[r]) if coder.encoding else 0)
            rows.labels[r] = previous


def code_exponents(coder: RangeCoder, exponents: NDArray[np.int64]) -> None:
    """Write exponents, or read them into the array: multiples of 2^grain, relative to a running mean of those before.

    Raises ValueError where what is read is out of bounds.
    """
    grain = coder.integer(StreamSlots.ROW_EXPONENT, _grain(exponents) if coder.encoding else 0)
    if grain > _MAX_GRAIN:
        raise ValueError(f"row exponents in multiples of 2^{grain}")
    mean = 0
    for r in range(len(exponents)):
        predicted = mean >> _PREDICTION_BITS
        given = (int(exponents[r]) >> grain) - predicted if coder.encoding else 0
        value = predicted + coder.signed(StreamSlots.ROW_EXPONENT, given)
        if abs(value) > MAX_EXPONENT >> grain:
            raise ValueError(f"row exponent {value << grain}")
        exponents[r] = value << grain
        mean += ((value << _PREDICTION_BITS) + (1 << _PREDICTION_BITS - 1) - mean) >> _PREDICTION_SHIFT


def _grain(exponents: NDArray[np.int64]) -> int:
    """The largest grain of which all are multiples."""
    common = int(np.bitwise_or.reduce(exponents, initial=0))
    grain = 0
    while grain < _MAX_GRAIN and not (common >> grain) & 1:
        grain += 1
    return grain
