"""The loops of `row_search` around its hot one: rows in order, what levels cost, and the way back. Shapes as there."""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from pqcli.core.compiled.jit import call_at, kernel
from pqcli.core.trellis.loops import N_POINTS, RUN_COLUMNS
from pqcli.core.trellis.viterbi_loops import (
    METRIC_UNIT,
    N_BINS,
    REACH,
    RESOLUTION,
    best_level,
    class_of,
    packed_metrics,
)

UNREACHED = 65535
"""The path metric of a state that no path has come to."""
UNKNOWN_METRICS = -1
UNKNOWN_LEVEL = -128
"""What tables hold where nothing was looked up yet."""
_LARGEST_SQUARE = 1e30
_LEAST_SQUARE = 1e-30


@kernel
def quarter_octaves(ratio):
    """4 log2 of a root of a ratio, that is 2 log2 of it: the same number on every machine."""
    exponent = 0
    ratio = min(max(ratio, _LEAST_SQUARE), _LARGEST_SQUARE)
    while ratio >= 1.5:
        ratio *= 0.5
        exponent += 1
    while ratio < 0.75:
        ratio *= 2.0
        exponent -= 1
    t = (ratio - 1.0) / (ratio + 1.0)  # |t| <= 0.2: four terms of the series for log are right to 1e-7
    square = t * t
    series = t * (1.0 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9)))))
    return 2.0 * exponent + 2.0 * 2.8853900817779268 * series


@kernel
def _fed_target(weights, row, fed, near, errors, place, done, step, target):
    """What the row is quantized as, in its own steps; the sum of its squares."""
    n_columns = len(target)
    for j in range(n_columns):
        target[j] = weights[row, j] + fed[place, j]
    i = 0
    while i + 4 <= done:  # four at a time, which spares reading and writing the target
        a, b, c, d = near[done, i], near[done, i + 1], near[done, i + 2], near[done, i + 3]
        for j in range(n_columns):
            target[j] += a * errors[i, j] + b * errors[i + 1, j] + c * errors[i + 2, j] + d * errors[i + 3, j]
        i += 4
    while i < done:
        a = near[done, i]
        for j in range(n_columns):
            target[j] += a * errors[i, j]
        i += 1
    inverse = np.float32(1.0) / step
    for j in range(n_columns):
        target[j] *= inverse
    energy = 0.0
    for j in range(n_columns):
        energy += np.float64(target[j]) * np.float64(target[j])
    return energy


@kernel
def fill_rows(
    weights, steps, order, first, last, fed, near, errors, column_scale, mean, shrink, pure_above,
    cost, slope, reconstruction, rate_weight, metric_table, level_table,
    branch_metrics, path_metrics, taken, crossing, branch_crossing, chunk,
    walk, branch_metrics_at, path_metrics_at, others_at, taken_at,
    levels, targets, row_scale, row_labels, decoded,
):  # fmt: skip
    """Quantize the rows in places first to last of the order, see `feedback.fill`.

    near (last - first, last - first): what the errors of rows before, in `errors`, add to a row. `walk` is the address
    of the hot loop, the others are those of arrays that it reads and writes.
    """
    n_columns = weights.shape[1]
    n_states = path_metrics.shape[1]
    for place in range(first, last):
        row = order[place]
        done = place - first
        target = targets[row]
        energy = _fed_target(weights, row, fed, near, errors, place, done, steps[row], target)
        variance = (energy + shrink * mean) / (n_columns + shrink)
        scale = np.float32(quarter_octaves(variance / mean))
        label = 1 if variance > pure_above else 0
        row_scale[row] = scale
        row_labels[row] = label
        for start in range(0, n_columns, RUN_COLUMNS):
            stop = min(start + RUN_COLUMNS, n_columns)
            branch_metrics_of_row(
                target, scale, column_scale, label, start, stop, cost, slope, reconstruction, rate_weight,
                metric_table, branch_metrics,
            )  # fmt: skip
            for s in range(n_states):
                path_metrics[0, s] = UNREACHED
            path_metrics[0, 0] = 0
            call_at(walk, branch_metrics_at, stop - start, path_metrics_at, others_at, taken_at)
            trace_row(
                target, scale, column_scale, label, start, stop, cost, slope, reconstruction, rate_weight, level_table,
                path_metrics[(stop - start) % 2], taken, crossing, branch_crossing, chunk, levels[row], decoded,
            )  # fmt: skip
        step = steps[row]
        for j in range(n_columns):
            errors[done, j] = weights[row, j] - step * decoded[j]


@kernel
def branch_metrics_of_row(
    row, row_scale, column_scale, label, first, last,
    cost, slope, reconstruction, rate_weight, metric_table, branch_metrics,
):  # fmt: skip
    """branch_metrics[j - first] of columns first to last; fills in what the table lacks of them."""
    for j in range(first, last):
        weight = row[j]
        scale = class_of(row_scale, column_scale[j])
        if abs(weight) < REACH:
            place = 2 * scale + label
            bin_ = min(int((weight + np.float32(REACH)) * np.float32(RESOLUTION)), N_BINS - 1)
            found = metric_table[place, bin_]
            if found == UNKNOWN_METRICS:
                found = packed_metrics(
                    _middle(bin_), label, cost[scale], slope[scale], reconstruction, rate_weight, METRIC_UNIT
                )
                metric_table[place, bin_] = found
            branch_metrics[j - first] = found
        else:
            branch_metrics[j - first] = packed_metrics(
                weight, label, cost[scale], slope[scale], reconstruction, rate_weight, METRIC_UNIT
            )


@kernel
def _middle(bin_):
    """The weight that stands for all of a bin."""
    return np.float32((bin_ + 0.5) / RESOLUTION - REACH)


@kernel
def trace_row(
    row, row_scale, column_scale, label, first, last,
    cost, slope, reconstruction, rate_weight, level_table,
    path_metrics, taken, crossing, branch_crossing, chunk, levels, decoded,
):  # fmt: skip
    """Write the levels of columns first to last along the best path, and the points that they stand for."""
    n_states = len(path_metrics)
    half = n_states // 2
    word = max(chunk // 8, 1)
    best = 0
    for i in range(n_states):
        if path_metrics[i] < path_metrics[best]:
            best = i
    state = 2 * best if best < half else 2 * (best - half) + 1
    for j in range(last - 1, first - 1, -1):
        at = state // chunk * word + (state % chunk) // 8
        branch = 1 - ((np.int64(taken[j - first, at]) >> (state % chunk % 8)) & 1)
        parity = 1 if state >= half else 0
        t = ((state - half) ^ crossing) if parity else state
        if branch:
            t ^= branch_crossing
        state = 2 * t + parity
        subset = 2 * parity + branch
        weight = row[j]
        scale = class_of(row_scale, column_scale[j])
        if abs(weight) < REACH:
            place = 2 * scale + label
            bin_ = min(int((weight + np.float32(REACH)) * np.float32(RESOLUTION)), N_BINS - 1)
            level = np.int64(level_table[place, bin_, subset])
            if level == UNKNOWN_LEVEL:
                level = np.int64(
                    best_level(_middle(bin_), subset, label, cost[scale], slope[scale], reconstruction, rate_weight)[1]
                )
                level_table[place, bin_, subset] = level
        else:
            level = np.int64(
                best_level(weight, subset, label, cost[scale], slope[scale], reconstruction, rate_weight)[1]
            )
        levels[j] = level
        magnitude = abs(level)
        point = np.float32(magnitude)
        if magnitude < N_POINTS:
            point = reconstruction[parity + (parity & label), magnitude]
        decoded[j] = -point if level < 0 else point
