"""The loops of the trellis codec, compiled: the search for levels, their entropy coding, and what decoding undoes.

Shapes: weights (rows, columns) float32 in units of the step; levels (rows, columns) int32; labels (columns,) uint8,
1 where the odd set is pure. `next_state (n_states, 2)` is the trellis; `reconstruction (3, N_POINTS)` float32 and
`cost (N_CLASSES, 3, N_COSTS)` float32 are indexed by *set*: 0 the even levels, 1 the odd levels and zero, 2 the odd
levels alone. A state's low bit says whether its weight takes an even or an odd level, see `pqcli.core.trellis`.
"""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, check-untyped-defs=False
# ruff: noqa: C901 - a fused loop is one function on purpose

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pqcli.core.jit import kernel
from pqcli.core.rangecoder import adapt, code_bit

RUN_COLUMNS = 4096
"""The trellis starts anew in state 0 at every multiple of this column ..."""
RUN_LENGTH = 2048
"""... and at every `max(1, RUN_LENGTH // columns)` rows: runs are long, so that starts are rare, and independent."""

N_POINTS = 8
"""Reconstruction points kept per set; a larger level stands for itself."""
N_COSTS = 32
N_CLASSES = 80
"""Scale classes: quarter octaves of the mean magnitude of a level, from 2^-6 upwards."""
N_UNARY = 15
N_LEVEL_MODELS = N_CLASSES * 3 * N_UNARY

LANES = 32
"""Runs searched side by side, one per SIMD lane."""

BYTES_PER_LEVEL = 32
"""Room that the costliest level needs."""

_LARGE_CLASS = 38
"""From this class on (mean magnitude about 11) the low bits of an index are sent as they are, one more per octave."""
_MAX_STATISTIC = 1 << 15
_MAX_LEVEL = 1 << 30
_INFINITE = np.float32(3e38)


@kernel
def _scale_class(scale):
    """The class of a mean magnitude in 1/4096: floor(4 log2) from 64 (2^-6) on, its fractions rounded as specified."""
    scale = np.int64(max(scale, 64))
    octave = -1
    rest = scale
    while rest > 0:
        rest >>= 1
        octave += 1
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
def code_levels(encoding, levels, labels, period, scale0, next_state, models, rates, window, buffer):
    """Write or read the levels of one matrix; False when what is read cannot be a stream.

    Contexts are backward-adaptive: the expected magnitude of a level is the running mean of its column times the
    ratio of magnitudes met and expected so far in its row. A column starts from the running mean of its phase
    (column modulo `period`), a phase from `scale0`; all in 1/4096.
    """
    n_rows, n_columns = levels.shape
    run_rows = max(1, RUN_LENGTH // max(1, n_columns))
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
            shift = max(0, (scale - _LARGE_CLASS) >> 2)
            parity = state & 1
            label = labels[j]
            context = (scale * 3 + parity + (parity & label)) * N_UNARY
            level = np.int64(0)
            index = np.int64(0)
            if encoding:
                level = np.int64(levels[r, j])
                magnitude = abs(level)
                index = (magnitude + (parity & (1 - label))) >> 1
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
            if n == N_UNARY:  # Exp-Golomb, in raw bits
                excess = high - N_UNARY + 1
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
                        return False
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
            if not encoding:
                level = 2 * n + parity if label or n == 0 or parity == 0 else 2 * n - 1
                if parity and not label and n == 0:
                    level = np.int64(0)
            if level != 0:
                bit, low, span, code, position = code_bit(
                    encoding, 1 if level < 0 else 0, 32768, low, span, code, position, length, buffer
                )
                if not encoding:
                    if level > _MAX_LEVEL:
                        return False
                    if bit:
                        level = -level
            if not encoding:
                levels[r, j] = level
            if n_states > 1:
                state = next_state[state, branch(level, parity, label)]
            statistic = min(abs(level), _MAX_STATISTIC) << 12
            met = max(met + statistic - (met >> 8), 256)
            expected = max(expected + mean - (expected >> 8), 256)
            column_mean[j] = mean + (((statistic - mean) * rates[column_count[j]]) >> 16)
            if column_count[j] < 250:
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
def dequantize(levels, labels, next_state, reconstruction, weights):
    """weights[r, j] = the reconstruction point of levels[r, j], walking the trellis as the coder does."""
    n_rows, n_columns = levels.shape
    run_rows = max(1, RUN_LENGTH // max(1, n_columns))
    state = 0
    for r in range(n_rows):
        if r % run_rows == 0:
            state = 0
        for j in range(n_columns):
            if j % RUN_COLUMNS == 0 and j > 0:
                state = 0
            level = np.int64(levels[r, j])
            parity = state & 1
            magnitude = abs(level)
            value = np.float32(magnitude)
            if magnitude < N_POINTS:
                value = reconstruction[parity + (parity & labels[j]), magnitude]
            weights[r, j] = -value if level < 0 else value
            state = next_state[state, branch(level, parity, labels[j])]


@kernel
def sets(levels, labels, next_state, which):
    """which[r, j] = the set that levels[r, j] comes from, walking the trellis as the coder does."""
    n_rows, n_columns = levels.shape
    run_rows = max(1, RUN_LENGTH // max(1, n_columns))
    state = 0
    for r in range(n_rows):
        if r % run_rows == 0:
            state = 0
        for j in range(n_columns):
            if j % RUN_COLUMNS == 0 and j > 0:
                state = 0
            parity = state & 1
            which[r, j] = parity + (parity & labels[j])
            state = next_state[state, branch(np.int64(levels[r, j]), parity, labels[j])]


@kernel
def _class_of(row_scale, column_scale):
    """The search's guess of a weight's scale class, from 4 log2 of its row's and its column's scale."""
    return min(max(int(row_scale + column_scale), 0), N_CLASSES - 1)


@kernel
def gather(weights, row_scale, column_scale, levels, labels, next_state, counts, sums):
    """Add the levels found to counts (N_CLASSES, 3, N_COSTS) and sums (3, N_POINTS, 2) of |weight| and how many."""
    n_rows, n_columns = levels.shape
    run_rows = max(1, RUN_LENGTH // max(1, n_columns))
    state = 0
    for r in range(n_rows):
        if r % run_rows == 0:
            state = 0
        for j in range(n_columns):
            if j % RUN_COLUMNS == 0 and j > 0:
                state = 0
            level = np.int64(levels[r, j])
            parity = state & 1
            which = parity + (parity & labels[j])
            magnitude = abs(level)
            if magnitude < N_COSTS:
                counts[_class_of(row_scale[r], column_scale[j]), which, magnitude] += 1
            if magnitude < N_POINTS:
                sums[which, magnitude, 0] += -weights[r, j] if level < 0 else weights[r, j]
                sums[which, magnitude, 1] += 1
            state = next_state[state, branch(level, parity, labels[j])]


@kernel
def search(
    weights, row_scale, column_scale, labels, cost, slope, reconstruction, rate_weight, butterflies, backward, levels
):
    """Viterbi: levels that minimise sum (weight - point)^2 + rate_weight * bits over every run.

    Two states share each pair of successors; `butterflies (n_states / 2, 6)` and `backward (n_states, 3)` of
    `trellis_moves` say how. LANES runs are searched side by side, so that the inner loops run along SIMD lanes.
    """
    n_rows, n_columns = weights.shape
    n_states = backward.shape[0]
    n_butterflies = butterflies.shape[0]
    n_words = (n_states + 31) // 32
    run_rows = max(1, RUN_LENGTH // max(1, n_columns))
    n_steps = run_rows * min(n_columns, RUN_COLUMNS)
    choice = np.empty((n_steps, 4, LANES), np.int32)
    taken = np.empty((n_steps, n_words, LANES), np.uint32)
    price = np.empty((4, LANES), np.float32)
    here = np.empty((n_states, LANES), np.float32)
    there = np.empty((n_states, LANES), np.float32)
    size = np.empty(LANES, np.float32)
    negative = np.empty(LANES, np.bool_)
    base = np.empty(LANES, np.int32)
    steep = np.empty(LANES, np.float32)
    nearest = np.empty(LANES, np.int32)
    lower = np.empty(LANES, np.int32)
    costs = cost.reshape(-1)
    points = np.empty(3 * N_COSTS, np.float32)
    for which in range(3):
        for magnitude in range(N_COSTS):
            entry = which * N_COSTS + magnitude
            points[entry] = reconstruction[which, magnitude] if magnitude < N_POINTS else np.float32(magnitude)
    n_batches = (n_rows + run_rows * LANES - 1) // (run_rows * LANES)
    for batch in range(n_batches):
        row0 = batch * run_rows * LANES
        for column0 in range(0, n_columns, RUN_COLUMNS):
            width = min(RUN_COLUMNS, n_columns - column0)
            here[:] = _INFINITE
            here[0] = 0
            n_live = min(run_rows, n_rows - row0)  # steps that no lane needs are not taken
            for step in range(n_live * width):
                j = column0 + step % width
                in_run = step // width
                label = labels[j]
                for lane in range(LANES):
                    r = row0 + lane * run_rows + in_run
                    value = np.float32(0)
                    scale = 0
                    if r < n_rows:
                        value = weights[r, j]
                        scale = _class_of(row_scale[r], column_scale[j])
                    size[lane] = abs(value)
                    negative[lane] = value < 0
                    base[lane] = scale * (3 * N_COSTS)
                    steep[lane] = slope[scale]
                for subset in range(4):
                    parity = subset >> 1
                    half = subset & 1
                    which = parity + (parity & label)
                    first = which * N_COSTS
                    mirrored = label == 1 or parity == 0
                    lowest = (
                        np.int32(-4) if label else np.int32(0 if parity and not half else 2 - parity if half else 0)
                    )
                    for lane in range(LANES):
                        # the level of this subset that is nearest, mirrored so that the weight is not negative
                        residue = np.int32(parity + 2 * half if mirrored else 3 - 2 * half)
                        if mirrored and negative[lane]:
                            residue = np.int32(4 - residue) & np.int32(3)
                        above = (size[lane] - np.float32(residue - 6)) * np.float32(0.25)
                        near = max(residue - np.int32(4) + np.int32(4) * np.int32(above), lowest)
                        nearest[lane] = near
                        lower[lane] = max(near - np.int32(4), lowest)
                    for lane in range(LANES):
                        near = nearest[lane]
                        magnitude = abs(near)
                        entry = magnitude if magnitude < N_COSTS else N_COSTS - 2 + (magnitude & 1)
                        beyond = np.float32(magnitude - entry)
                        point = points[first + entry] + beyond
                        error = size[lane] - (point if near > 0 else -point)
                        bits = costs[base[lane] + first + entry] + steep[lane] * beyond
                        price[subset, lane] = error * error + rate_weight * bits
                    for lane in range(LANES):
                        low = lower[lane]
                        magnitude = abs(low)
                        entry = magnitude if magnitude < N_COSTS else N_COSTS - 2 + (magnitude & 1)
                        beyond = np.float32(magnitude - entry)
                        point = points[first + entry] + beyond
                        error = size[lane] - (point if low > 0 else -point)
                        bits = costs[base[lane] + first + entry] + steep[lane] * beyond
                        total = error * error + rate_weight * bits
                        is_lower = total < price[subset, lane]
                        price[subset, lane] = total if is_lower else price[subset, lane]
                        level = low if is_lower else nearest[lane]
                        choice[step, subset, lane] = -level if negative[lane] else level
                for word in range(n_words):
                    for lane in range(LANES):
                        taken[step, word, lane] = 0
                for i in range(n_butterflies):
                    from_a = butterflies[i, 0]
                    from_b = butterflies[i, 1]
                    to_a = butterflies[i, 2]
                    to_b = butterflies[i, 3]
                    way_a = butterflies[i, 4]
                    way_b = butterflies[i, 5]
                    word = i >> 4
                    place = np.uint32((2 * i) & 31)
                    for lane in range(LANES):
                        a = here[from_a, lane]
                        b = here[from_b, lane]
                        straight_a = a + price[way_a, lane]
                        straight_b = b + price[way_b, lane]
                        crossed_a = a + price[way_a ^ 1, lane]
                        crossed_b = b + price[way_b ^ 1, lane]
                        there[to_a, lane] = min(straight_a, straight_b)
                        there[to_b, lane] = min(crossed_a, crossed_b)
                        bits = np.uint32(1) if straight_b < straight_a else np.uint32(0)
                        bits |= np.uint32(2) if crossed_b < crossed_a else np.uint32(0)
                        taken[step, word, lane] |= bits << place
                here, there = there, here
            for lane in range(LANES):
                r0 = row0 + lane * run_rows
                n_valid = min(run_rows, n_rows - r0) * width
                if n_valid <= 0:
                    continue
                state = 0
                for s in range(n_states):
                    if here[s, lane] < here[state, lane]:
                        state = s
                for step in range(n_live * width - 1, -1, -1):
                    slot = backward[state, 0]
                    second = np.int64((taken[step, slot >> 5, lane] >> np.uint32(slot & 31)) & np.uint32(1))
                    origin = backward[state, 1 + second]
                    if step < n_valid:
                        levels[r0 + step // width, column0 + step % width] = choice[step, origin & 3, lane]
                    state = origin >> 2


@kernel
def scale_up(weights, step):
    """Multiply by the step, in place; what would overflow becomes the largest float32."""
    largest = np.float32(3.4028234663852886e38)
    for r in range(weights.shape[0]):
        for j in range(weights.shape[1]):
            weights[r, j] = min(max(weights[r, j] * step, -largest), largest)


def initial_models() -> NDArray[np.int32]:
    """The models (N_LEVEL_MODELS, 2) a stream starts from: P(index > n) for geometric magnitudes of the class's mean.

    Only +, -, *, / of IEEE doubles, so that every machine computes the same integers.
    """
    models = np.empty((N_CLASSES, 3, N_UNARY, 2), np.int32)
    for scale_class in range(N_CLASSES):
        shift = max(0, (scale_class - _LARGE_CLASS) >> 2)
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
    return models.reshape(N_LEVEL_MODELS, 2)


def trellis_moves(next_state: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What `search` wants to know of a trellis whose states pair up to share their successors.

    butterflies (n_states / 2, 6): states a, b; successors u, v; subset that leads from a to u, and from b to u (to v
    leads the other half of the set). backward (n_states, 3): the bit that tells how a state was reached, and
    4 * origin + subset for bit 0 and for bit 1. A subset is 2 * parity + branch.
    """
    n_states = len(next_state)
    ways_in = np.argsort(next_state.ravel(), kind="stable").reshape(n_states, 2)
    butterflies: list[tuple[int, ...]] = []
    backward = np.empty((n_states, 3), np.int64)
    done = np.zeros(n_states, bool)
    for u in range(n_states):
        if done[u]:
            continue
        (a, branch_a), (b, branch_b) = (divmod(int(way), 2) for way in ways_in[u])
        v = int(next_state[a, 1 - branch_a])
        subset_a, subset_b = 2 * (a & 1) + branch_a, 2 * (b & 1) + branch_b
        backward[u] = 2 * len(butterflies), 4 * a + subset_a, 4 * b + subset_b
        backward[v] = 2 * len(butterflies) + 1, 4 * a + (subset_a ^ 1), 4 * b + (subset_b ^ 1)
        butterflies.append((a, b, u, v, subset_a, subset_b))
        done[[u, v]] = True
    return np.array(butterflies, np.int64), backward
