"""The fields of one stream, each written or read by one piece of code.

A stream holds the reconstruction points of its sets, then segment by segment the class of its mean magnitude, its
labels, what its rows have of their own (`rows`) and its levels; levels that are coded by mixing are followed by the
shrinkage, the share by which weights are moved towards what was guessed of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pqcli.core.entropy.rangecoder import RATES, RangeCoder
from pqcli.core.trellis.loops import N_POINTS, code_levels, dequantize
from pqcli.core.trellis.params import LABEL_GROUP
from pqcli.core.trellis.rows import Rows, code_rows
from pqcli.core.trellis.slots import StreamSlots

Matrix = NDArray[np.float32]

SHRINKAGE_STEPS = 64
"""Shrinkage towards what was guessed (`lean` in FORMAT.md) counts in 1/64."""


@dataclass(frozen=True)
class Decoded:
    """A segment as a reader has it; only where levels are mixed, `guesses` (as many as levels) and `shrinkage`."""

    levels: NDArray[np.int32]
    labels: NDArray[np.uint8]
    points: Matrix
    guesses: NDArray[np.int32]
    rows: Rows
    shrinkage: int = 0

    @classmethod
    def empty(
        cls, levels: NDArray[np.int32], labels: NDArray[np.uint8], points: Matrix, rows: Rows, *, is_mixed: bool
    ) -> Decoded:
        """A segment with room for guesses where there will be some."""
        return cls(levels, labels, points, np.zeros(levels.shape if is_mixed else (0, 0), np.int32), rows)

    def weights(self, next_state: NDArray[np.int64]) -> Matrix:
        """The weights in steps of their rows: the points of the levels, moved towards what was guessed of them."""
        weights = np.empty(self.levels.shape, np.float32)
        run = self.rows.run_rows(len(self.labels))
        dequantize(self.levels, self.labels, self.rows.labels, run, next_state, self.points, weights)
        if self.shrinkage:
            from pqcli.core.trellis.mixing_loops import shrink

            shrink(weights, self.guesses, np.float32(self.shrinkage / SHRINKAGE_STEPS))
        return weights


def code_points(coder: RangeCoder, points: Matrix) -> Matrix:
    """Reconstruction points as offsets from their levels in 1/256, those of magnitude 0 being 0."""
    result = np.zeros((3, N_POINTS), np.float32)
    for which in range(3):
        for magnitude in range(1, N_POINTS):
            if which != 1 and (magnitude & 1) != (which > 0):
                continue
            if which == 1 and (magnitude & 1) == 0:
                continue
            offset = 0
            if coder.encoding:
                offset = int(np.clip(np.round((points[which, magnitude] - magnitude) * 256), -255, 255))
            offset = coder.signed(StreamSlots.POINT, offset)
            if abs(offset) > 255:
                raise ValueError(f"reconstruction point {offset}/256 off its level")
            result[which, magnitude] = magnitude + offset / 256
    return result


def rounded_points(points: Matrix) -> Matrix:
    """Reconstruction points as `code_points` gives them back to a reader, where sets hold the magnitude."""
    magnitudes = np.arange(points.shape[1])
    rounded = magnitudes + np.clip(np.round((points - magnitudes) * 256), -255, 255) / 256
    return np.where(magnitudes > 0, rounded, 0).astype(np.float32)


LevelCode = Callable[[Decoded, int, int, NDArray[np.int64]], bool]
"""(decoded, period, scale0, next_state): writes or reads a segment's levels; False where no stream can hold these."""


def level_code(coder: RangeCoder, *, is_mixed: bool) -> LevelCode:
    """The coder of one stream's levels; what it learns from one segment serves the next."""
    encoding, window, buffer = coder.encoding, coder.window, coder.buffer

    def matrix(decoded: Decoded) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.uint8], int]:
        rows, n_columns = decoded.rows, len(decoded.labels)
        return decoded.levels, decoded.labels, rows.labels, rows.run_rows(n_columns)

    if not is_mixed:

        def plain(decoded: Decoded, period: int, scale0: int, next_state: NDArray[np.int64]) -> bool:
            return code_levels(
                encoding, *matrix(decoded), period, scale0, next_state, coder.models, RATES, window, buffer
            )

        return plain
    from pqcli.core.trellis.mixing_loops import Mixing, code_levels_mixed

    mixing = Mixing.fresh()

    def mixed(decoded: Decoded, period: int, scale0: int, next_state: NDArray[np.int64]) -> bool:
        return code_levels_mixed(
            encoding, *matrix(decoded), period, scale0, next_state, mixing, decoded.guesses, RATES, window, buffer
        )

    return mixed


def code_shrinkage(coder: RangeCoder, decoded: Decoded, shrinkage: int = 0) -> Decoded:
    """The shrinkage, which follows the levels of a segment that are mixed. Raises ValueError if it exceeds one."""
    shrinkage = coder.integer(StreamSlots.POINT, shrinkage)
    if shrinkage > SHRINKAGE_STEPS:
        raise ValueError(f"weights moved by {shrinkage}/{SHRINKAGE_STEPS}")
    return replace(decoded, shrinkage=shrinkage)


def code_block(
    coder: RangeCoder,
    code: LevelCode,
    decoded: Decoded,
    period: int,
    previous_class: int,
    next_state: NDArray[np.int64],
) -> int:
    """Write or read one segment: the class of its mean magnitude, its labels, what rows have, its levels.

    The class that is returned is what the next segment's is coded relative to.
    """
    levels, labels = decoded.levels, decoded.labels
    scale_class = 0
    if coder.encoding:
        mean = float(np.mean(np.abs(levels), dtype=np.float64))
        scale_class = int(np.clip(round(4 * float(np.log2(mean + 2**-6))), -24, 59))
    scale_class = previous_class + coder.signed(StreamSlots.SCALE_CLASS, scale_class - previous_class)
    if not -24 <= scale_class <= 59:
        raise ValueError(f"scale class {scale_class}")
    n_columns = levels.shape[1]
    groups = [(i, i + 1) for i in range(period)] if period > 1 else [
        (i, min(i + LABEL_GROUP, n_columns)) for i in range(0, n_columns, LABEL_GROUP)
    ]  # fmt: skip
    previous = 0
    for start, stop in groups:
        previous = coder.bit(StreamSlots.LABEL + previous, int(labels[start]) if coder.encoding else 0)
        labels[start:stop] = previous
    if period > 1:
        labels[:] = np.tile(labels[:period], n_columns // period)
    code_rows(coder, decoded.rows)
    octave, quarter = divmod(scale_class, 4)
    scale0 = ((4096, 4871, 5793, 6889)[quarter] << 6 >> (6 - octave)) if octave < 6 else 4096 << octave
    if not code(decoded, period, scale0, next_state):
        raise ValueError("a level is beyond all bounds")
    return scale_class
