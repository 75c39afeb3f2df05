"""The loops of `row_search` around its hot one: what the levels of one row cost, and the way back. Shapes as there."""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from pqcli.core.compiled.jit import kernel
from pqcli.core.trellis.loops import N_POINTS
from pqcli.core.trellis.viterbi_loops import (
    METRIC_UNIT,
    N_BINS,
    REACH,
    RESOLUTION,
    best_level,
    class_of,
    fill_metrics,
    packed_metrics,
)


@kernel
def branch_metrics_of_row(
    row, row_scale, column_scale, label, first, last,
    cost, slope, reconstruction, rate_weight, metric_table, level_table, is_filled, branch_metrics,
):  # fmt: skip
    """branch_metrics[j - first] of columns first to last; fills the rows of the tables it needs."""
    for j in range(first, last):
        weight = row[j]
        scale = class_of(row_scale, column_scale[j])
        place = 2 * scale + label
        if not is_filled[place]:
            is_filled[place] = 1
            fill_metrics(
                place, label, cost[scale], slope[scale], reconstruction, rate_weight, metric_table, level_table
            )
        if abs(weight) < REACH:
            bin_ = int((weight + np.float32(REACH)) * np.float32(RESOLUTION))
            branch_metrics[j - first] = metric_table[place, min(bin_, N_BINS - 1)]
        else:
            branch_metrics[j - first] = packed_metrics(
                weight, label, cost[scale], slope[scale], reconstruction, rate_weight, METRIC_UNIT
            )


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
            place = int((weight + np.float32(REACH)) * np.float32(RESOLUTION))
            level = np.int64(level_table[2 * scale + label, min(place, N_BINS - 1), subset])
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
