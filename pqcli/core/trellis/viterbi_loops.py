"""The loops of `pqcli.core.trellis.viterbi` around its hot one: what levels cost, and the way back. Shapes as there."""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import numpy as np

from pqcli.core.compiled.jit import kernel
from pqcli.core.trellis.loops import N_CLASSES, N_POINTS, RUN_COLUMNS, RUN_LENGTH, branch

N_COSTS = 32
"""Magnitudes whose bits are counted one by one."""
LANES = 32
"""Runs searched side by side, one per SIMD lane."""
RESOLUTION = 64
"""Weights are rounded to 1/64 of a step before the search: it costs 0.001 dB, and branch metrics can be looked up."""
REACH = 16
"""Weights up to so many steps are looked up, larger ones computed one by one."""
N_BINS = 2 * REACH * RESOLUTION
METRIC_UNIT = 512.0
"""Branch and path metrics are integers in 1/512 of a squared step."""
_DEAREST = 16383
_BLOCK_STEPS = 64


@kernel
def class_of(row_scale, column_scale):
    """The search's guess of a weight's scale class, from 4 log2 of its row's and its column's scale."""
    return min(max(int(row_scale + column_scale), 0), N_CLASSES - 1)


@kernel
def _cost_of(size, level, which, cost, slope, reconstruction, rate_weight):
    """Squared error and cost of the bits of one level (of either sign) for a weight of magnitude `size`."""
    magnitude = abs(level)
    entry = magnitude if magnitude < N_COSTS else N_COSTS - 2 + (magnitude & 1)
    beyond = np.float32(magnitude - entry)
    point = np.float32(magnitude)
    if magnitude < N_POINTS:
        point = reconstruction[which, magnitude]
    error = size - (point if level > 0 else -point)
    return error * error + rate_weight * (cost[which, entry] + slope * beyond)


@kernel
def best_level(weight, subset, label, cost, slope, reconstruction, rate_weight):
    """The level of a subset that costs a weight least, and the cost: of the two nearest from below, the cheaper."""
    parity = subset >> 1
    half = subset & 1
    which = parity + (parity & label)
    mirrored = label == 1 and parity == 1
    size = abs(weight)
    lowest = -4 if label else (0 if parity and not half else 2 - parity if half else 0)
    residue = parity + 2 * half if label or parity == 0 else 3 - 2 * half
    if mirrored and weight < 0:
        residue = (4 - residue) & 3
    near = max(residue - 4 + 4 * int((size - np.float32(residue - 6)) * np.float32(0.25)), lowest)
    level = near
    least = _cost_of(size, near, which, cost, slope, reconstruction, rate_weight)
    lower = max(near - 4, lowest)
    total = _cost_of(size, lower, which, cost, slope, reconstruction, rate_weight)
    if total < least:
        level, least = lower, total
    return least, -level if weight < 0 else level


@kernel
def packed_metrics(weight, label, cost, slope, reconstruction, rate_weight, unit):
    """Branch metrics: what each of the four subsets costs more than the cheapest of them, 16 bits each."""
    a = best_level(weight, 0, label, cost, slope, reconstruction, rate_weight)[0]
    b = best_level(weight, 1, label, cost, slope, reconstruction, rate_weight)[0]
    c = best_level(weight, 2, label, cost, slope, reconstruction, rate_weight)[0]
    d = best_level(weight, 3, label, cost, slope, reconstruction, rate_weight)[0]
    least = min(min(a, b), min(c, d))
    packed = np.int64(min((a - least) * unit, _DEAREST))
    packed |= np.int64(min((b - least) * unit, _DEAREST)) << 16
    packed |= np.int64(min((c - least) * unit, _DEAREST)) << 32
    packed |= np.int64(min((d - least) * unit, _DEAREST)) << 48
    return packed


@kernel
def fill_metrics(row, label, cost, slope, reconstruction, rate_weight, metric_table, level_table):
    """One row of the tables: what weights of one class and label cost, bin by bin."""
    for place in range(N_BINS):
        weight = np.float32((place + 0.5) / RESOLUTION - REACH)
        metric_table[row, place] = packed_metrics(weight, label, cost, slope, reconstruction, rate_weight, METRIC_UNIT)
        for subset in range(4):
            level_table[row, place, subset] = best_level(
                weight, subset, label, cost, slope, reconstruction, rate_weight
            )[1]


@kernel
def look_up_branch_metrics(
    weights, row_scale, column_scale, labels, row0, column0, width, n_steps,
    cost, slope, reconstruction, rate_weight, metric_table, level_table, is_filled, branch_metrics,
):  # fmt: skip
    """Fill in branch_metrics[step, lane] of a batch of runs, and the rows of the tables that it needs."""
    n_rows = weights.shape[0]
    run_rows = max(1, RUN_LENGTH // max(1, weights.shape[1]))
    for first in range(0, n_steps, _BLOCK_STEPS):
        last = min(first + _BLOCK_STEPS, n_steps)
        for lane in range(LANES):
            r = row0 + lane * run_rows + first // width
            j = column0 + first % width
            for step in range(first, last):
                weight = np.float32(0)
                scale = 0
                if r < n_rows:
                    weight = weights[r, j]
                    scale = class_of(row_scale[r], column_scale[j])
                label = labels[j]
                row = 2 * scale + label
                if not is_filled[row]:
                    is_filled[row] = 1
                    fill_metrics(
                        row, label, cost[scale], slope[scale], reconstruction, rate_weight, metric_table, level_table
                    )
                if abs(weight) < REACH:
                    place = int((weight + np.float32(REACH)) * np.float32(RESOLUTION))
                    branch_metrics[step, lane] = metric_table[row, min(place, N_BINS - 1)]
                else:
                    branch_metrics[step, lane] = packed_metrics(
                        weight, label, cost[scale], slope[scale], reconstruction, rate_weight, METRIC_UNIT
                    )
                j += 1
                if j == column0 + width:
                    j = column0
                    r += 1


@kernel
def weigh_branch_metrics(
    weights, row_scale, column_scale, labels, row0, column0, width, n_steps,
    cost, slope, reconstruction, rate_weight, row_importance, column_importance, branch_metrics,
):  # fmt: skip
    """As `look_up_branch_metrics`, but squared errors count by importance, and nothing is looked up.

    importance * error^2 + rate_weight * bits is importance times the cost at a rate weight of rate_weight / importance.
    """
    n_rows = weights.shape[0]
    run_rows = max(1, RUN_LENGTH // max(1, weights.shape[1]))
    for step in range(n_steps):
        j = column0 + step % width
        label = labels[j]
        for lane in range(LANES):
            r = row0 + lane * run_rows + step // width
            if r >= n_rows:
                branch_metrics[step, lane] = 0
                continue
            scale = class_of(row_scale[r], column_scale[j])
            factor = row_importance[r] * column_importance[j]
            branch_metrics[step, lane] = packed_metrics(
                weights[r, j], label, cost[scale], slope[scale], reconstruction, rate_weight / factor,
                METRIC_UNIT * factor,
            )  # fmt: skip


@kernel
def trace_back(
    weights, row_scale, column_scale, labels, row0, column0, width, n_steps,
    cost, slope, reconstruction, rate_weight, level_table, row_importance, column_importance, path_metrics, taken,
    backward, levels,
):  # fmt: skip
    """Write the levels along the best path of every run of a batch, from its end to its start.

    With importances (arrays that are not empty) the levels are those of `weigh_branch_metrics`, else of the table.
    """
    is_weighed = row_importance.shape[0] > 0
    n_rows = weights.shape[0]
    n_states = path_metrics.shape[0]
    run_rows = max(1, RUN_LENGTH // max(1, weights.shape[1]))
    state = np.zeros(LANES, np.int32)
    for lane in range(LANES):
        for s in range(n_states):
            if path_metrics[s, lane] < path_metrics[state[lane], lane]:
                state[lane] = s
    for step in range(n_steps - 1, -1, -1):
        j = column0 + step % width
        in_run = step // width
        label = labels[j]
        for lane in range(LANES):
            s = state[lane]
            origin = backward[s, (taken[step, s] >> np.uint32(lane)) & np.uint32(1)]
            state[lane] = origin >> 2
            r = row0 + lane * run_rows + in_run
            if r < n_rows:
                weight = weights[r, j]
                scale = class_of(row_scale[r], column_scale[j])
                if abs(weight) < REACH and not is_weighed:
                    place = int((weight + np.float32(REACH)) * np.float32(RESOLUTION))
                    levels[r, j] = level_table[2 * scale + label, min(place, N_BINS - 1), origin & 3]
                else:
                    own_rate_weight = rate_weight
                    if is_weighed:
                        own_rate_weight = rate_weight / (row_importance[r] * column_importance[j])
                    levels[r, j] = best_level(
                        weight, origin & 3, label, cost[scale], slope[scale], reconstruction, own_rate_weight
                    )[1]


@kernel
def gather(weights, row_scale, column_scale, levels, labels, row_labels, run_rows, next_state, counts, sums):
    """Add the levels found to counts (N_CLASSES, 3, N_COSTS) and sums (3, N_POINTS, 2) of |weight| and how many."""
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
            which = parity + (parity & label)
            magnitude = abs(level)
            if magnitude < N_COSTS:
                counts[class_of(row_scale[r], column_scale[j]), which, magnitude] += 1
            if magnitude < N_POINTS:
                sums[which, magnitude, 0] += -weights[r, j] if level < 0 else weights[r, j]
                sums[which, magnitude, 1] += 1
            state = next_state[state, branch(level, parity, label)]
