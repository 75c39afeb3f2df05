"""The second coder of the trellis codec's levels: their scale, sign and size are predicted from their neighbours.

`pqcli.core.trellis.loops.code_levels` expects a level of the running mean of its column times a ratio for its row.
Here that scale is corrected by what the levels around it suggest, each *clue* by a share that is learned; a linear
predictor, learned as well, guesses the level itself, and with it the sign. Three models then predict every decision of
a magnitude, three more that of a sign, and `pqcli.core.entropy.mixing` makes one probability of them.

It takes three to four times as long. Weights that are independent given their rows and columns, as those of
transformers are, gain next to nothing; small convolutional networks gain a percent, filters that vary smoothly ten or
twenty. Hence every stream says which of the two coded it.

Shapes: levels, guesses (rows, columns) int32; labels (columns,) uint8; weights (rows, columns) float32. Guesses are
levels in 1/65536; clues are in 1/256 octaves, shares and taps in 1/65536.
"""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, check-untyped-defs=False
# ruff: noqa: C901 - a fused loop is one function on purpose

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pqcli.core.compiled.jit import kernel
from pqcli.core.entropy.mixing import FIRST_WEIGHT, N_INPUTS, code_mixed, exp2, log2
from pqcli.core.trellis.loops import (
    LARGE_CLASS,
    MAX_LEVEL,
    MAX_STATISTIC,
    N_CLASSES,
    N_UNARY,
    RUN_COLUMNS,
    branch,
    code_tail,
    index_of,
    initial_models,
    magnitude_of,
)

_PER_CLASS = 3 * N_UNARY
_N_CLUES = 6
_MAX_CLUE = 2 * 256
_N_AGES = 10
"""Shares are learned apart by the number of columns, or rows, seen so far: 0, 1, 2-3, 4-7, ..., 256 and more."""
_LEFT_TAPS = 8
_N_TAPS = _LEFT_TAPS + 7
_N_GUESSES = 8
_N_PHASES = 32
_N_SURE = 16

_BY_GUESS = N_CLASSES * _PER_CLASS
_BY_PHASE = _BY_GUESS + N_CLASSES * _N_GUESSES * _PER_CLASS
_SIGNS = _BY_PHASE + N_CLASSES // 2 * _N_PHASES * _PER_CLASS
_SIGNS_NEAR = _SIGNS + 4 * _N_SURE
_SIGNS_FAR = _SIGNS_NEAR + 2 * 27
_N_MODELS = _SIGNS_FAR + 2 * 27
_SIGN_SET = _PER_CLASS
_SIGN_COUNT = 20

_LEAST_MEAN = 16
_FIRST, _LAST = 6 * 256, 27 * 256
"""Scales are kept within 2^6 and 2^27, the bounds of classes and of statistics."""
_TAP_RATE = 2621
_TAP_FLOOR = 10
_MAX_GUESS = 127
_SHARE_RATE = 131
_FIRST_SHARE_RATE = 2622
_SHARE_RATE_WEIGHTS = 40_000
_MOST_SEEN = 1 << 40


class Mixing(NamedTuple):
    """What the coder of one stream has learned; segments hand it on.

    models (n, 2) int32; weights (46, N_INPUTS); shares (2, clues, ages) and taps (2, taps), of matrices without and
    with kernel positions; seen (1,): weights coded.
    """

    models: NDArray[np.int32]
    weights: NDArray[np.int64]
    shares: NDArray[np.int64]
    taps: NDArray[np.int64]
    seen: NDArray[np.int64]

    @classmethod
    def fresh(cls) -> Self:
        """What a stream starts from: the scale of its row and column, and no idea of signs."""
        by_class = initial_models().reshape(N_CLASSES, _PER_CLASS, 2)
        models = np.empty((_N_MODELS, 2), np.int32)
        models[:_BY_GUESS] = by_class.reshape(-1, 2)
        models[_BY_GUESS:_BY_PHASE] = np.repeat(by_class, _N_GUESSES, axis=0).reshape(-1, 2)
        models[_BY_PHASE:_SIGNS] = np.repeat(by_class[1::2], _N_PHASES, axis=0).reshape(-1, 2)
        models[_SIGNS:] = 32768, _SIGN_COUNT
        shares = np.zeros((2, _N_CLUES, _N_AGES), np.int64)
        shares[:, 0] = 65536
        return cls(
            models,
            np.full((_SIGN_SET + 1, N_INPUTS), FIRST_WEIGHT, np.int64),
            shares,
            np.zeros((2, _N_TAPS), np.int64),
            np.zeros(1, np.int64),
        )


@kernel
def _sign(value):
    return np.int64(value > 0) - np.int64(value < 0)


@kernel
def _three_signs(a, b, c, factor):
    """0 to 26: which of three levels are negative, zero or positive."""
    return (_sign(a) * factor + 1) * 9 + (_sign(b) * factor + 1) * 3 + _sign(c) * factor + 1


@kernel
def code_levels_mixed(
    encoding, levels, labels, row_labels, run_rows, period, scale0, next_state, models, weights, all_shares, all_taps,
    seen, guesses, rates, window, buffer,
):  # fmt: skip
    """Write or read the levels of one matrix; False when what is read cannot be a stream. See `code_levels`.

    Takes the fields of a `Mixing`. Also fills in the guesses.
    """
    n_rows, n_columns = levels.shape
    is_convolution = 1 if period > 1 else 0
    shares, taps = all_shares[is_convolution], all_taps[is_convolution]
    low, span, code, position, length = window[0], window[1], window[2], window[3], window[4]
    column_mean = np.zeros(n_columns, np.int64)
    column_count = np.full(n_columns, 2, np.int64)
    phase_mean = np.full(period, scale0, np.int64)
    phase_count = np.ones(period, np.int64)
    recent = np.empty((2, period), np.int64)  # by phase: magnitudes met, and expected
    by_column = np.full((2, 2, n_columns + 2), scale0, np.int64)  # likewise, of two rows; one more at each end
    margin = max(_LEFT_TAPS, period + 1)
    past = np.zeros((3, margin + n_columns + 1), np.int64)  # the levels of three rows
    clue = np.empty(_N_CLUES, np.int64)
    age = np.zeros(_N_CLUES, np.int64)
    state = 0
    row_age = 0
    for r in range(n_rows):
        if r % run_rows == 0:
            state = 0
        if r >> row_age and row_age < _N_AGES - 1:
            row_age += 1
        share_rate = _SHARE_RATE + _FIRST_SHARE_RATE * _SHARE_RATE_WEIGHTS // (_SHARE_RATE_WEIGHTS + seen[0])
        seen[0] = min(seen[0] + n_columns, _MOST_SEEN)
        here, above = by_column[r & 1], by_column[1 - (r & 1)]
        row, row_above, row_before = past[r % 3], past[(r + 2) % 3], past[(r + 1) % 3]
        met = scale0 * 8
        expected = scale0 * 8
        fast_met = scale0 * 8
        fast_expected = scale0 * 8
        for i in range(period):
            recent[0, i] = scale0
            recent[1, i] = scale0
        phase = 0
        column_age = 0
        for j in range(n_columns):
            if j % RUN_COLUMNS == 0 and j > 0:
                state = 0
            if j >> column_age and column_age < _N_AGES - 1:
                column_age += 1
            if r == 0:
                column_mean[j] = phase_mean[phase]
            mean = max(column_mean[j], _LEAST_MEAN)

            # the scale
            log_mean = log2(mean)
            clue[0] = log2(met) - log2(expected)
            clue[1] = log2(fast_met + fast_expected) - log2(2 * fast_expected)
            clue[2] = log2(max(phase_mean[phase], _LEAST_MEAN)) - log_mean
            clue[3] = log2(recent[0, phase] + recent[1, phase]) - log2(2 * recent[1, phase])
            met_above = above[0, j] + 2 * above[0, j + 1] + above[0, j + 2]
            expected_above = above[1, j] + 2 * above[1, j + 1] + above[1, j + 2]
            clue[4] = log2(2 * met_above + expected_above) - log2(3 * expected_above)
            clue[5] = log2(here[0, j] + here[1, j]) - log2(2 * here[1, j])
            age[0] = column_age
            age[1] = column_age
            age[2] = row_age
            age[3] = column_age
            age[4] = row_age
            plain = min(max(log_mean + clue[0], _FIRST), _LAST)  # its classes lie between those of the scale
            log_scale = log_mean
            for i in range(_N_CLUES):
                clue[i] = min(max(clue[i], -_MAX_CLUE), _MAX_CLUE)
                log_scale += (shares[i, age[i]] * clue[i]) >> 16
            log_scale = min(max(log_scale, _FIRST), _LAST)
            scale = min((log_scale - _FIRST) >> 6, N_CLASSES - 1)
            plain_scale = min((plain - _FIRST + 32) >> 6, N_CLASSES - 1)

            # the level itself
            at = margin + j
            guess = np.int64(0)
            energy = np.int64(_TAP_FLOOR)
            for i in range(_LEFT_TAPS):
                near = row[at - _LEFT_TAPS + i]
                guess += taps[i] * near
                energy += near * near
            for i in range(3):
                near = row_above[at - 1 + i]
                guess += taps[_LEFT_TAPS + i] * near
                energy += near * near
            near = row_before[at]
            guess += taps[_LEFT_TAPS + 3] * near
            energy += near * near
            if period > 1:
                for i in range(3):
                    near = row[at - period - 1 + i]
                    guess += taps[_LEFT_TAPS + 4 + i] * near
                    energy += near * near
            guess = min(max(guess, -_MAX_GUESS << 16), _MAX_GUESS << 16)
            guesses[r, j] = guess
            sure = log2((abs(guess) >> 4) + 1) - log_scale

            shift = max(0, (scale - LARGE_CLASS) >> 2)
            parity = state & 1
            label = labels[j] | row_labels[r]
            which = (parity + (parity & label)) * N_UNARY
            a = plain_scale * _PER_CLASS + which
            b = _BY_GUESS + (scale * _N_GUESSES + min(max((sure >> 7) + 5, 0), _N_GUESSES - 1)) * _PER_CLASS + which
            coarse = min((log_scale - _FIRST + 32) >> 7, N_CLASSES // 2 - 1)
            c = _BY_PHASE + (coarse * _N_PHASES + (phase if period <= _N_PHASES else 0)) * _PER_CLASS + which
            level = np.int64(0)
            index = np.int64(0)
            if encoding:
                level = np.int64(levels[r, j])
                index = np.int64(index_of(level, parity, label))
            high = index >> shift
            n = np.int64(0)
            while n < N_UNARY:
                bit, low, span, code, position = code_mixed(
                    encoding, 1 if high > n else 0, models, a + n, b + n, c + n, weights, which + n, rates,
                    low, span, code, position, length, buffer,
                )  # fmt: skip
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
                magnitude = abs(level)
                if magnitude > MAX_LEVEL:
                    return False
                toward = -1 if guess < 0 else 1
                a = _SIGNS + min(max((3 * sure >> 8) + 10, 0), _N_SURE - 1) * 4 + min(magnitude, 4) - 1
                left = row[at - period] if period > 1 else row[at - 2]
                b = _SIGNS_NEAR + 2 * _three_signs(row[at - 1], left, row_above[at], toward) + is_convolution
                c = _SIGNS_FAR + 2 * _three_signs(row[at - 2], row_above[at - 1], row_above[at + 1], toward)
                bit, low, span, code, position = code_mixed(
                    encoding, 1 if level * toward < 0 else 0, models, a, b, c + is_convolution, weights, _SIGN_SET,
                    rates, low, span, code, position, length, buffer,
                )  # fmt: skip
                if not encoding and (bit == 1) == (toward > 0):
                    level = -level
            if not encoding:
                levels[r, j] = level
            state = next_state[state, branch(level, parity, label)]

            # what all of these learn
            known = min(max(level, -_MAX_GUESS), _MAX_GUESS)
            pull = (((known << 16) - guess) * _TAP_RATE) // energy
            for i in range(_LEFT_TAPS):
                taps[i] += (pull * row[at - _LEFT_TAPS + i]) >> 16
            for i in range(3):
                taps[_LEFT_TAPS + i] += (pull * row_above[at - 1 + i]) >> 16
            taps[_LEFT_TAPS + 3] += (pull * row_before[at]) >> 16
            if period > 1:
                for i in range(3):
                    taps[_LEFT_TAPS + 4 + i] += (pull * row[at - period - 1 + i]) >> 16
            row[at] = known
            statistic = min(abs(level), MAX_STATISTIC) << 12
            scale = exp2(log_scale)
            pull = min(((statistic - scale) << 16) // (scale + 4096), 3 << 16) * share_rate
            for i in range(_N_CLUES):
                shares[i, age[i]] = min(max(shares[i, age[i]] + ((pull * clue[i]) >> 24), 0), 65536)
            met = max(met + statistic - (met >> 8), 256)
            expected = max(expected + mean - (expected >> 8), 256)
            fast_met = max(fast_met + statistic - (fast_met >> 4), 256)
            fast_expected = max(fast_expected + mean - (fast_expected >> 4), 256)
            recent[0, phase] += (statistic - recent[0, phase]) >> 2
            recent[1, phase] = max(recent[1, phase] + ((mean - recent[1, phase]) >> 2), 1)
            here[0, j + 1] = statistic
            here[1, j + 1] = mean
            column_mean[j] += ((statistic - column_mean[j]) * rates[column_count[j]]) >> 16
            if column_count[j] < 120:
                column_count[j] += 1
            phase_mean[phase] += ((statistic - phase_mean[phase]) * rates[phase_count[phase]]) >> 16
            if phase_count[phase] < 500:
                phase_count[phase] += 1
            phase += 1
            if phase == period:
                phase = 0
    window[0], window[1], window[2], window[3] = low, span, code, position
    return True


@kernel
def shrink(weights, guesses, share):
    """Move weights, in steps, by the fraction `share` towards their guesses, at most by `share`. In place."""
    one = np.float32(1.0)
    unit = np.float32(1.0 / 65536)
    for r in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            offset = np.float32(guesses[r, j]) * unit - weights[r, j]
            weights[r, j] += share * min(max(offset, -one), one)
