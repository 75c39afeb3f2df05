"""The search of the trellis codec: the walk through the trellis whose levels cost least (Viterbi's algorithm).

Every step of the walk is one weight. A state's low bit opens the even or the odd levels, and the level's subset (which
half of them it lies in) decides between two successors; each state is reached from two others. So per step and state:
two sums, the smaller survives, and one bit remembers which. That is the hot loop, and how it is kept short:

- LANES runs are searched side by side, one per SIMD lane; runs are independent of each other.
- Path metrics are unsigned 16-bit integers in METRIC_UNITs of a squared step. Sums saturate; the least is taken off
  every few steps. Paths that saturate are 128 squared steps behind the best, and beyond hope.
- What the four subsets cost a weight, its *branch metrics*, depends on its scale class, its column's label, and its
  value in steps, which is rounded to 1/64: they are looked up, four in one 64-bit word, not computed.
- The decisions of all lanes at a state are one 32-bit word, straight from a vector comparison.

Shapes: weights, levels (rows, columns); row_scale (rows,) and column_scale (columns,) in quarter octaves;
branch_metrics (n_steps, LANES) int64; path_metrics (n_states, LANES) uint16; taken (n_steps, n_states) uint32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pqcli.core.importance import Importance
from pqcli.core.native.memory import empty_in_lines
from pqcli.core.trellis.loops import N_CLASSES, RUN_COLUMNS, RUN_LENGTH
from pqcli.core.trellis.viterbi_loops import (
    LANES,
    N_BINS,
    look_up_branch_metrics,
    trace_back,
    walk,
    weigh_branch_metrics,
)

Matrix = NDArray[np.float32]

_UNREACHED = 65535


@dataclass(frozen=True)
class Trellis:
    """A trellis as the search wants it. `next_state (n_states, 2)`, by state and branch.

    moves (n_states / 2, 6): two states a, b; the two states u, v that both of them lead to; the subset that leads from
    a to u, and the one that leads from b to u. (To v leads the other half of the set.)
    backward (n_states, 2): 4 * origin + subset, by the bit in `taken`.
    """

    next_state: NDArray[np.int64]
    moves: NDArray[np.int64]
    backward: NDArray[np.int32]

    @staticmethod
    def of(next_state: NDArray[np.int64]) -> Trellis:
        """Pairs up the states that share their origins."""
        n_states = len(next_state)
        incoming = np.argsort(next_state.ravel(), kind="stable").reshape(n_states, 2)
        moves: list[tuple[int, ...]] = []
        backward = np.empty((n_states, 2), np.int32)
        done = np.zeros(n_states, bool)
        for u in range(n_states):
            if done[u]:
                continue
            (a, branch_a), (b, branch_b) = (divmod(int(edge), 2) for edge in incoming[u])
            v = int(next_state[a, 1 - branch_a])
            subset_a, subset_b = 2 * (a & 1) + branch_a, 2 * (b & 1) + branch_b
            backward[u] = 4 * b + subset_b, 4 * a + subset_a
            backward[v] = 4 * b + (subset_b ^ 1), 4 * a + (subset_a ^ 1)
            moves.append((a, b, u, v, subset_a, subset_b))
            done[[u, v]] = True
        return Trellis(next_state, np.array(moves, np.int64), backward)


@dataclass(frozen=True)
class Costs:
    """What levels cost.

    bits (N_CLASSES, 3, N_COSTS) by class, set and magnitude, `slope` (N_CLASSES,) more for each unit of magnitude
    beyond; the reconstruction points (3, N_POINTS); `rate_weight`, what a bit may
    cost in squared steps.
    """

    bits: Matrix
    slope: Matrix
    points: Matrix
    rate_weight: float


class Search:
    """Searches at one set of costs, remembering the branch metrics computed before."""

    def __init__(self, costs: Costs, next_state: NDArray[np.int64]) -> None:
        self._trellis = Trellis.of(next_state)
        self._costs = costs.bits, costs.slope, costs.points, np.float32(costs.rate_weight)
        self._metric_table = np.empty((2 * N_CLASSES, N_BINS), np.int64)
        self._level_table = np.empty((2 * N_CLASSES, N_BINS, 4), np.int8)
        self._is_filled = np.zeros(2 * N_CLASSES, np.uint8)

    def fill(
        self,
        weights: Matrix,
        row_scale: Matrix,
        column_scale: Matrix,
        labels: NDArray[np.uint8],
        levels: NDArray[np.int32],
        importance: Importance | None = None,
    ) -> None:
        """Fill in the levels that minimise sum importance * (weight - point)^2 + rate_weight * bits over every run.

        Without `importance` (of the matrix of weights) that of every weight is 1, and the search is faster.
        """
        nothing = np.zeros(0, np.float32)
        factors = (nothing, nothing) if importance is None else (importance.rows, importance.columns)
        n_rows, n_columns = weights.shape
        moves, backward = self._trellis.moves, self._trellis.backward
        run_rows = max(1, RUN_LENGTH // max(1, n_columns))
        most_steps = min(run_rows, n_rows) * min(n_columns, RUN_COLUMNS)
        branch_metrics = np.empty((most_steps, LANES), np.int64)
        taken = np.empty((most_steps, len(backward)), np.uint32)
        path_metrics = empty_in_lines((2, len(backward), LANES), np.uint16)
        for row0 in range(0, n_rows, run_rows * LANES):
            for column0 in range(0, n_columns, RUN_COLUMNS):
                width = min(RUN_COLUMNS, n_columns - column0)
                n_steps = min(run_rows, n_rows - row0) * width
                batch = weights, row_scale, column_scale, labels, row0, column0, width, n_steps, *self._costs
                if importance is None:
                    tables = self._metric_table, self._level_table, self._is_filled
                    look_up_branch_metrics(batch, *tables, branch_metrics)
                else:
                    weigh_branch_metrics(batch, *factors, branch_metrics)
                path_metrics[0] = _UNREACHED
                path_metrics[0, 0] = 0
                walk(branch_metrics, n_steps, moves, path_metrics, taken)
                reached = path_metrics[n_steps % 2]
                trace_back(batch, self._level_table, *factors, reached, taken, backward, levels)
