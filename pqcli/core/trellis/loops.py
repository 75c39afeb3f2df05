"""The loops of the trellis codec, compiled: the entropy coding of levels, and what decoding undoes.

Shapes: weights (rows, columns) float32 in units of the step; levels (rows, columns) int32; labels (columns,) and
row_labels (rows,) uint8, either of them 1 where the odd set is pure. The trellis starts anew every `run_rows` rows;
`next_state (n_states, 2)` is its table. `reconstruction (3, N_POINTS)` float32 is indexed by *set*: 0 the even levels,
1 the odd levels and zero, 2 the odd levels alone. A state's low bit says whether its weight takes an even or an odd
level, see `pqcli.core.trellis`.
"""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, check-untyped-defs=False
# ruff: noqa: C901 - a fused loop is one function on purpose

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from pqcli.core.compiled.jit import kernel
from pqcli.core.entropy.rangecoder import adapt, code_bit

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
MAX_STATISTIC = 1 << 15
MAX_LEVEL = 1 << 30


@kernel
def _scale_class(scale):
    """The class of a mean magnitude in 1/4096: floor(4 log2) from 64 (2^-6) on, its fractions rounded as specified."""
    scale = np.int64(max(scale, 64))
    octave = 0
    rest = scale
    for width in (32, 16, 8, 4, 2, 1):
        if rest >> width:
            octave += width
            rest >>= width
    mantissa = (scale << 8) >> octave
    quarter = 0
    if mantissa >= 304:
        quarter = 1
    if mantissa >= 362:
        quarter = 2
    if mantissa >= 430:
        quarter = 3
    return min((octave - 6) * 4 + quarter, N_CLASSES - 1)


@kernel
def branch(level, parity, label):
    """The bit of a level that drives the trellis on: which half of its set it lies in."""
    magnitude = abs(level)
    if parity == 0:
        return (magnitude >> 1) & 1
    if label:
        return ((level - 1) >> 1) & 1
    return 1 if (magnitude & 3) == 1 else 0


@kernel
def index_of(level, parity, label):
    """What a level's magnitude is counted by: its place among those of its set."""
    return (abs(level) + (parity & (1 - label))) >> 1


@kernel
def magnitude_of(index, parity, label):
    """The magnitude that `index_of` counts by `index`."""
    if parity and not label:
        return max(2 * index - 1, 0)
    return 2 * index + parity


@kernel
def code_tail(encoding, index, n, shift, low, span, code, position, length, buffer):
    """What of an index its `n` unary ones leave open, in raw bits: (index, low, span, code, position) afterwards.

    After N_UNARY ones, the excess in Exp-Golomb code; then the `shift` low bits. The index is -1 where what is read
    cannot be one.
    """
    if n == N_UNARY:
        excess = (index >> shift) - N_UNARY + 1
        n_bits = 0
        while encoding and excess >> (n_bits + 1):
            n_bits += 1
        bits = 0
        while True:
            bit, low, span, code, position = code_bit(
                encoding, 1 if bits < n_bits else 0, 32768, low, span, code, position, length, buffer
            )
            if bit == 0:
                break
            bits += 1
            if bits > 30:
                return np.int64(-1), low, span, code, position
        value = np.int64(1)
        for i in range(bits - 1, -1, -1):
            bit, low, span, code, position = code_bit(
                encoding, (excess >> i) & 1, 32768, low, span, code, position, length, buffer
            )
            value = (value << 1) | bit
        n += value - 1
    for i in range(shift - 1, -1, -1):
        bit, low, span, code, position = code_bit(
            encoding, (index >> i) & 1, 32768, low, span, code, position, length, buffer
        )
        n = (n << 1) | bit
    return n, low, span, code, position


@kernel
def code_levels(
    encoding, levels, labels, row_labels, run_rows, period, scale0, next_state, models, rates, window, buffer
):
    """Write or read the levels of one matrix; False when what is read cannot be a stream.

    Contexts are backward-adaptive: the expected magnitude of a level is the running mean of its column times the
    ratio of magnitudes met and expected so far in its row. A column starts from the running mean of its phase
    (column modulo `period`), a phase from `scale0`; all in 1/4096.
    """
    n_rows, n_columns = levels.shape
    n_states = next_state.shape[0]
    low, span, code, position, length = window[0], window[1], window[2], window[3], window[4]
    column_mean = np.zeros(n_columns, np.int64)
    column_count = np.full(n_columns, 2, np.int64)
    phase_mean = np.full(period, scale0, np.int64)
    phase_count = np.ones(period, np.int64)
    state = 0
    for r in range(n_rows):
        if r % run_rows == 0:
            state = 0
        met = scale0 * 8
        expected = scale0 * 8
        phase = 0
        for j in range(n_columns):
            if j % RUN_COLUMNS == 0 and j > 0:
                state = 0
            if r == 0:
                column_mean[j] = phase_mean[phase]
            mean = column_mean[j]
            scale = _scale_class(mean * met // expected)
            shift = max(0, (scale - LARGE_CLASS) >> 2)
            parity = state & 1
            label = labels[j] | row_labels[r]
            context = (scale * 3 + parity + (parity & label)) * N_UNARY
            level = np.int64(0)
            index = np.int64(0)
            if encoding:
                level = np.int64(levels[r, j])
                index = np.int64(index_of(level, parity, label))
            high = index >> shift
            n = np.int64(0)
            while n < N_UNARY:
                bit, low, span, code, position = code_bit(
                    encoding, 1 if high > n else 0, np.int64(models[context + n, 0]),
                    low, span, code, position, length, buffer,
                )  # fmt: skip
                adapt(models, context + n, bit, rates)
                if bit == 0:
                    break
                n += 1
            if n == N_UNARY or shift:
                n, low, span, code, position = code_tail(
                    encoding, index, n, shift, low, span, code, position, length, buffer
                )
                if n < 0:
                    return False
            if not encoding:
                level = np.int64(magnitude_of(n, parity, label))
            if level != 0:
                bit, low, span, code, position = code_bit(
                    encoding, 1 if level < 0 else 0, 32768, low, span, code, position, length, buffer
                )
                if not encoding:
                    if level > MAX_LEVEL:
                        return False
                    if bit:
                        level = -level
            if not encoding:
                levels[r, j] = level
            if n_states > 1:
                state = next_state[state, branch(level, parity, label)]
            statistic = min(abs(level), MAX_STATISTIC) << 12
            met = max(met + statistic - (met >> 8), 256)
            expected = max(expected + mean - (expected >> 8), 256)
            column_mean[j] = mean + (((statistic - mean) * rates[column_count[j]]) >> 16)
            if column_count[j] < 250:
                column_count[j] += 1
            if r == 0:  # no later row asks for the means of phases
                phase_mean[phase] += ((statistic - phase_mean[phase]) * rates[phase_count[phase]]) >> 16
                if phase_count[phase] < 500:
                    phase_count[phase] += 1
                phase += 1
                if phase == period:
                    phase = 0
    window[0], window[1], window[2], window[3] = low, span, code, position
    return True


@kernel
def dequantize(levels, labels, row_labels, run_rows, next_state, reconstruction, weights):
    """weights[r, j] = the reconstruction point of levels[r, j], walking the trellis as the coder does."""
    n_rows, n_columns = levels.shape
    state = 0
    for r in range(n_rows):
        if r % run_rows == 0:
            state = 0
        for j in range(n_columns):
            if j % RUN_COLUMNS == 0 and j > 0:
                state = 0
            level = np.int64(levels[r, j])
            parity = state & 1
            label = labels[j] | row_labels[r]
            magnitude = abs(level)
            value = np.float32(magnitude)
            if magnitude < N_POINTS:
                value = reconstruction[parity + (parity & label), magnitude]
            weights[r, j] = -value if level < 0 else value
            state = next_state[state, branch(level, parity, label)]


@kernel
def sets(levels, labels, row_labels, run_rows, next_state, which):
    """which[r, j] = the set that levels[r, j] comes from, walking the trellis as the coder does."""
    n_rows, n_columns = levels.shape
    state = 0
    for r in range(n_rows):
        if r % run_rows == 0:
            state = 0
        for j in range(n_columns):
            if j % RUN_COLUMNS == 0 and j > 0:
                state = 0
            parity = state & 1
            label = labels[j] | row_labels[r]
            which[r, j] = parity + (parity & label)
            state = next_state[state, branch(np.int64(levels[r, j]), parity, label)]


@kernel
def scale_up(weights, step):
    """Multiply by the step, in place; what would overflow becomes the largest float32."""
    largest = np.float32(3.4028234663852886e38)
    for r in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            weights[r, j] = min(max(weights[r, j] * step, -largest), largest)


@kernel
def scale_rows(weights, steps):
    """Multiply every row by its step, as `scale_up` does."""
    largest = np.float32(3.4028234663852886e38)
    for r in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            weights[r, j] = min(max(weights[r, j] * steps[r], -largest), largest)


@kernel
def scale_columns(weights, steps):
    """Multiply every column by its step, as `scale_up` does."""
    largest = np.float32(3.4028234663852886e38)
    for r in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            weights[r, j] = min(max(weights[r, j] * steps[j], -largest), largest)


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
