"""The loops of the trellis codec, in C (`trellis_levels.c`): the entropy coding of levels, and what decoding undoes.

Shapes: weights (rows, columns) float32 in units of the step; levels (rows, columns) int32; labels (columns,) and
row_labels (rows,) uint8, either of them 1 where the odd set is pure. The trellis starts anew every `run_rows` rows;
`next_state (n_states, 2)` is its table. `reconstruction (3, N_POINTS)` float32 is indexed by *set*: 0 the even levels,
1 the odd levels and zero, 2 the odd levels alone. A state's low bit says whether its weight takes an even or an odd
level, see `pqcli.core.trellis`.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from pqcli.core.native.library import function, reads, writes

Matrix = NDArray[np.float32]

RUN_COLUMNS = 4096
"""The trellis starts anew in state 0 at every multiple of this column ..."""
RUN_LENGTH = 2048
"""... and at every `run_rows` rows: runs are long, so that starts are rare, and independent."""


def run_rows(n_columns: int) -> int:
    """Rows of a run, unless every row is one."""
    return max(1, RUN_LENGTH // max(1, n_columns))


N_POINTS = 8
"""Reconstruction points kept per set; a larger level stands for itself."""
N_CLASSES = 80
"""Scale classes: quarter octaves of the mean magnitude of a level, from 2^-6 upwards."""
N_UNARY = 15
N_LEVEL_MODELS = N_CLASSES * 3 * N_UNARY

BYTES_PER_LEVEL = 32
"""Room that the costliest level needs."""

LARGE_CLASS = 38
"""From this class on (mean magnitude about 11) the low bits of an index are sent as they are, one more per octave."""

_MATRIX = writes(np.int32), int, int, reads(np.uint8), reads(np.uint8), int
"""levels, their shape, labels, row_labels, run_rows."""
_READ_MATRIX = reads(np.int32), *_MATRIX[1:]
_CODE_LEVELS = function(
    "code_levels",
    bool, *_MATRIX, int, int, reads(np.int64), int,
    writes(np.int32), reads(np.int64), writes(np.int64), writes(np.uint8), writes(np.int64),
    returns=bool,
)  # fmt: skip
_DEQUANTIZE = function("dequantize", *_READ_MATRIX, reads(np.int64), reads(np.float32), writes(np.float32))
_SETS = function("sets_of_levels", *_READ_MATRIX, reads(np.int64), writes(np.uint8))
_SCALE_UP = function("scale_up", writes(np.float32), int, int, np.float32)
_SCALE_ROWS = function("scale_rows", writes(np.float32), int, int, reads(np.float32))
_SCALE_COLUMNS = function("scale_columns", writes(np.float32), int, int, reads(np.float32))


def code_levels(
    encoding: bool,
    levels: NDArray[np.int32],
    labels: NDArray[np.uint8],
    row_labels: NDArray[np.uint8],
    run_rows: int,
    period: int,
    scale0: int,
    next_state: NDArray[np.int64],
    models: NDArray[np.int32],
    rates: NDArray[np.int64],
    window: NDArray[np.int64],
    buffer: NDArray[np.uint8],
) -> bool:
    """Write or read the levels of one matrix; False when what is read cannot be a stream.

    Contexts are backward-adaptive: the expected magnitude of a level is the running mean of its column times the
    ratio of magnitudes met and expected so far in its row. A column starts from the running mean of its phase
    (column modulo `period`), a phase from `scale0`; all in 1/4096.
    """
    means = np.empty(2 * (levels.shape[1] + period), np.int64)
    is_stream: bool = _CODE_LEVELS(
        encoding, levels, *levels.shape, labels, row_labels, run_rows, period, scale0, next_state, len(next_state),
        models, rates, window, buffer, means,
    )  # fmt: skip
    return is_stream


def dequantize(
    levels: NDArray[np.int32],
    labels: NDArray[np.uint8],
    row_labels: NDArray[np.uint8],
    run_rows: int,
    next_state: NDArray[np.int64],
    reconstruction: Matrix,
    weights: Matrix,
) -> None:
    """weights[r, j] = the reconstruction point of levels[r, j], walking the trellis as the coder does."""
    _DEQUANTIZE(levels, *levels.shape, labels, row_labels, run_rows, next_state, reconstruction, weights)


def sets(
    levels: NDArray[np.int32],
    labels: NDArray[np.uint8],
    row_labels: NDArray[np.uint8],
    run_rows: int,
    next_state: NDArray[np.int64],
    which: NDArray[np.uint8],
) -> None:
    """which[r, j] = the set that levels[r, j] comes from, walking the trellis as the coder does."""
    _SETS(levels, *levels.shape, labels, row_labels, run_rows, next_state, which)


def scale_up(weights: Matrix, step: np.float32) -> None:
    """Multiply by the step, in place; what would overflow becomes the largest float32."""
    _SCALE_UP(weights, *weights.shape, step)


def scale_rows(weights: Matrix, steps: Matrix) -> None:
    """Multiply every row by its step, as `scale_up` does."""
    _SCALE_ROWS(weights, *weights.shape, steps)


def scale_columns(weights: Matrix, steps: Matrix) -> None:
    """Multiply every column by its step, as `scale_up` does."""
    _SCALE_COLUMNS(weights, *weights.shape, steps)


@functools.cache
def initial_models() -> NDArray[np.int32]:
    """The models (N_LEVEL_MODELS, 2) a stream starts from: P(index > n) for geometric magnitudes of the class's mean.

    They are made once, and cannot be written to.
    Only +, -, *, / of IEEE doubles, so that every machine computes the same integers.
    """
    models = np.empty((N_CLASSES, 3, N_UNARY, 2), np.int32)
    for scale_class in range(N_CLASSES):
        shift = max(0, (scale_class - LARGE_CLASS) >> 2)
        octave, quarter = divmod(scale_class, 4)
        mean = (1.0905, 1.2968, 1.5422, 1.8340)[quarter] * 2.0 ** (octave - 6 - shift)
        theta = mean / (mean + 1.0)
        for which in range(3):
            for n in range(N_UNARY):
                p = theta * theta
                if n == 0 and which == 0:
                    p = theta * (0.4 + 0.6 * theta)
                if n == 0 and which == 1:
                    p = theta * (1.15 - 0.15 * theta)
                models[scale_class, which, n, 0] = min(max(int(p * 65536.0), 200), 65300)
    models[..., 1] = 4
    models.flags.writeable = False
    return models.reshape(N_LEVEL_MODELS, 2)
