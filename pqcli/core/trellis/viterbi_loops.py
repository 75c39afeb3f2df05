"""The loops of `pqcli.core.trellis.viterbi`, in C (`viterbi.c`): what levels cost, the walk, and the way back.

Shapes as there. `batch` is: weights, row_scale, column_scale, labels, first row, first column, columns, steps; and the
costs: bits, slope, points, rate weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pqcli.core.native.library import function, reads, writes

Matrix = NDArray[np.float32]

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

_FLOATS = reads(np.float32)
_COSTS = _FLOATS, _FLOATS, _FLOATS, np.float32
_BATCH = _FLOATS, _FLOATS, _FLOATS, reads(np.uint8), *[int] * 6, *_COSTS
_LOOK_UP = function(
    "look_up_branch_metrics", *_BATCH, writes(np.int64), writes(np.int8), writes(np.uint8), writes(np.int64)
)
_WEIGH = function("weigh_branch_metrics", *_BATCH, _FLOATS, _FLOATS, writes(np.int64))
_WALK = function(
    "walk_runs",
    reads(np.int64), int, reads(np.int64), int, int, writes(np.uint16), writes(np.uint16), writes(np.uint32),
)  # fmt: skip
_TRACE_BACK = function(
    "trace_back",
    *_BATCH, reads(np.int8), bool, _FLOATS, _FLOATS,
    reads(np.uint16), int, reads(np.uint32), reads(np.int32), writes(np.int32),
)  # fmt: skip
_GATHER = function(
    "gather_levels",
    _FLOATS, _FLOATS, _FLOATS, reads(np.int32), reads(np.uint8), reads(np.uint8), int, int, int,
    reads(np.int64), writes(np.float64), writes(np.float64),
)  # fmt: skip

Batch = tuple[Matrix, Matrix, Matrix, NDArray[np.uint8], int, int, int, int, Matrix, Matrix, Matrix, np.float32]


def look_up_branch_metrics(
    batch: Batch,
    metric_table: NDArray[np.int64],
    level_table: NDArray[np.int8],
    is_filled: NDArray[np.uint8],
    branch_metrics: NDArray[np.int64],
) -> None:
    """Fill in branch_metrics[step, lane] of a batch of runs, and the rows of the tables that it needs."""
    _LOOK_UP(*_with_shape(batch), metric_table, level_table, is_filled, branch_metrics)


def weigh_branch_metrics(
    batch: Batch, row_importance: Matrix, column_importance: Matrix, branch_metrics: NDArray[np.int64]
) -> None:
    """As `look_up_branch_metrics`, but squared errors count by importance, and nothing is looked up.

    importance * error^2 + rate_weight * bits is importance times the cost at a rate weight of rate_weight / importance.
    """
    _WEIGH(*_with_shape(batch), row_importance, column_importance, branch_metrics)


def walk(
    branch_metrics: NDArray[np.int64],
    n_steps: int,
    moves: NDArray[np.int64],
    path_metrics: NDArray[np.uint16],
    taken: NDArray[np.uint32],
) -> None:
    """Walk n_steps steps: fills `taken`.

    The path metrics (2, n_states, LANES) before are the first ones; those after n_steps are the ones at n_steps % 2.
    """
    _WALK(branch_metrics, n_steps, moves, len(moves), path_metrics.shape[1], path_metrics[0], path_metrics[1], taken)


def trace_back(
    batch: Batch,
    level_table: NDArray[np.int8],
    row_importance: Matrix,
    column_importance: Matrix,
    path_metrics: NDArray[np.uint16],
    taken: NDArray[np.uint32],
    backward: NDArray[np.int32],
    levels: NDArray[np.int32],
) -> None:
    """Write the levels along the best path of every run of a batch, from its end to its start.

    With importances (arrays that are not empty) the levels are those of `weigh_branch_metrics`, else of the table.
    """
    _TRACE_BACK(
        *_with_shape(batch), level_table, row_importance.size > 0, row_importance, column_importance,
        path_metrics, len(path_metrics), taken, backward, levels,
    )  # fmt: skip


def gather(
    weights: Matrix,
    row_scale: Matrix,
    column_scale: Matrix,
    levels: NDArray[np.int32],
    labels: NDArray[np.uint8],
    row_labels: NDArray[np.uint8],
    run_rows: int,
    next_state: NDArray[np.int64],
    counts: NDArray[np.float64],
    sums: NDArray[np.float64],
) -> None:
    """Add the levels found to counts (N_CLASSES, 3, N_COSTS) and sums (3, N_POINTS, 2) of |weight| and how many."""
    _GATHER(
        weights, row_scale, column_scale, levels, labels, row_labels, *levels.shape, run_rows, next_state, counts, sums
    )


def _with_shape(batch: Batch) -> tuple[Any, ...]:
    return *batch[:4], *batch[0].shape, *batch[4:]
