"""The search of the trellis codec for one row after another, as feedback of errors asks for (`feedback`).

`viterbi` searches LANES runs side by side, one per SIMD lane. Where a row's weights depend on how the row before was
coded there is but one run, so here the *states* lie side by side. Their order makes that easy. A state moves to half
of itself, crossed (xor) with constants of the trellis:

    even states 2 t: to t and t ^ h1, the lower half of the states; odd states 2 t + 1: to the upper half likewise

so the two origins of consecutive states are consecutive, but for a crossing of lanes that is the same at every step.
The loops, one for each trellis, are in C (`row_search.c`, `row_walk.h`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pqcli.core.native.library import function, reads, writes
from pqcli.core.native.memory import empty_in_lines
from pqcli.core.trellis.loops import N_CLASSES, RUN_COLUMNS
from pqcli.core.trellis.viterbi import Costs
from pqcli.core.trellis.viterbi_loops import N_BINS

Matrix = NDArray[np.float32]

_SHRINK = 4.0
"""A row's scale is estimated with the mean of all rows as so many more weights."""
_PURE_ABOVE = 0.75
"""The odd set is pure in a row where rms / step exceeds this."""
_TINY = 1e-30
_UNKNOWN_METRICS = -1
_UNKNOWN_LEVEL = -128
"""What tables hold where nothing was looked up yet."""

_STEP_BYTES = function("row_step_bytes", int, int, int, returns=int)
"""(states, first and second crossing): bytes of `taken` that a step takes; 0 where there is no walk for the trellis."""
_FILL_ROWS = function(
    "fill_rows",
    reads(np.float32), reads(np.float32), reads(np.int64), int, int, reads(np.float32), reads(np.float32),
    writes(np.float32), reads(np.float32), int, float, float, float,
    reads(np.float32), reads(np.float32), reads(np.float32), np.float32, writes(np.int64), writes(np.int8),
    int, int, int, writes(np.int64), writes(np.uint16), writes(np.uint8),
    writes(np.int32), writes(np.float32), writes(np.float32), writes(np.uint8), writes(np.float32),
    returns=bool,
)  # fmt: skip


@dataclass(frozen=True)
class Crossings:
    """What moves do to a state beside halving it: `first` where it is odd, `second` where the branch is 1."""

    n_states: int
    first: int
    second: int

    @staticmethod
    def of(next_state: NDArray[np.int64]) -> Crossings:
        """Of a trellis whose even states lead to the lower half of the states, and odd ones to the upper half."""
        n_states = len(next_state)
        half = n_states // 2
        first, second = int(next_state[1, 0]), int(next_state[0, 1])
        states = np.arange(n_states)
        expected = (states >> 1) ^ np.where(states & 1, first, 0)
        if not (half <= first < n_states and second < half and np.array_equal(next_state[:, 0], expected)):
            raise ValueError("not a trellis of a shift register with feedback")
        return Crossings(n_states, first - half, second)


@dataclass(frozen=True)
class Searched:
    """What a search fills in, row by row: levels and targets (rows, columns), row_scale and row_labels (rows,)."""

    levels: NDArray[np.int32]
    targets: Matrix
    row_scale: Matrix
    row_labels: NDArray[np.uint8]


class RowSearch:
    """Searches single rows at one set of costs, remembering the branch metrics looked up before."""

    def __init__(self, costs: Costs, next_state: NDArray[np.int64], column_scale: Matrix) -> None:
        found = Crossings.of(next_state)
        crossings = found.n_states, found.first, found.second
        step_bytes = _STEP_BYTES(*crossings)
        if not step_bytes:
            raise ValueError(f"no walk for a trellis of {found.n_states} states crossed by {found.first, found.second}")
        n_columns = len(column_scale)
        width = min(n_columns, RUN_COLUMNS)
        self._costs = costs.bits, costs.slope, costs.points, np.float32(costs.rate_weight)
        self._tables = (
            np.full((2 * N_CLASSES, N_BINS), _UNKNOWN_METRICS, np.int64),
            np.full((2 * N_CLASSES, N_BINS, 4), _UNKNOWN_LEVEL, np.int8),
        )
        self._walked = (
            *crossings,
            np.empty(width, np.int64),
            empty_in_lines((2, found.n_states), np.uint16),
            np.empty((width, step_bytes), np.uint8),
        )
        self._column_scale = column_scale
        self._mean = float(np.mean(np.exp2((column_scale.astype(np.float64) - 24) / 2)))
        self._decoded = np.empty(n_columns, np.float32)

    def fill(
        self,
        weights: Matrix,
        steps: Matrix,
        order: NDArray[np.int64],
        places: slice,
        fed: Matrix,
        near: Matrix,
        errors: Matrix,
        found: Searched,
    ) -> None:
        """Fill in, for the rows in these places of the order, the levels that cost least of what they are then.

        That is the weights, and what the errors of others added: `fed` (by place), and by `near` those of the rows of
        these places that come before, which are left in `errors`. Costs are sum (target - point)^2 + rate_weight *
        bits, in squares of the row's step.
        """
        _FILL_ROWS(
            weights, steps, order, places.start, places.stop, fed, near, errors,
            self._column_scale, len(self._column_scale), max(self._mean, _TINY), _SHRINK, _PURE_ABOVE**2,
            *self._costs, *self._tables, *self._walked,
            found.levels, found.targets, found.row_scale, found.row_labels, self._decoded,
        )  # fmt: skip
