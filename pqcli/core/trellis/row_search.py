"""The search of the trellis codec for one row after another, as feedback of errors asks for (`feedback`).

`viterbi` searches LANES runs side by side, one per SIMD lane. Where a row's weights depend on how the row before was
coded there is but one run, so here the *states* lie side by side. Their order makes that easy. A state moves to half
of itself, crossed (xor) with constants of the trellis:

    even states 2 t: to t and t ^ h1, the lower half of the states; odd states 2 t + 1: to the upper half likewise

so the two origins of consecutive states are consecutive, but for a crossing of lanes that is the same at every step.
Path metrics lie in memory even states first, then the odd ones.

Shapes: branch_metrics (n_steps,) int64, those of four subsets, 16 bits each; path_metrics (2, n_states) uint16; taken
(n_steps, words) uint8 or wider, a bit for each state: whether its better origin is the first one.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pqcli.core.compiled.ir import Code, Compiled, compile_function
from pqcli.core.trellis.loops import N_CLASSES, RUN_COLUMNS
from pqcli.core.trellis.row_loops import UNKNOWN_LEVEL, UNKNOWN_METRICS, fill_rows
from pqcli.core.trellis.viterbi import Costs
from pqcli.core.trellis.viterbi_loops import N_BINS

Matrix = NDArray[np.float32]

_REST_EVERY = 16
"""Steps after which the least path metric is taken off all, see `viterbi`."""
_SHRINK = 4.0
"""A row's scale is estimated with the mean of all rows as so many more weights."""
_PURE_ABOVE = 0.75
"""The odd set is pure in a row where rms / step exceeds this."""
_TINY = 1e-30
_CHUNK = 64
"""States handled by one instruction of the emitted code; processors of narrower registers take several."""


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

    @property
    def chunk(self) -> int:
        """States handled at a time."""
        return min(_CHUNK, self.n_states // 2)


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
        crossings = Crossings.of(next_state)
        n_states, chunk = crossings.n_states, crossings.chunk
        n_columns = len(column_scale)
        self._costs = costs.bits, costs.slope, costs.points, np.float32(costs.rate_weight)
        self._tables = (
            np.full((2 * N_CLASSES, N_BINS), UNKNOWN_METRICS, np.int64),
            np.full((2 * N_CLASSES, N_BINS, 4), UNKNOWN_LEVEL, np.int8),
        )
        width = min(n_columns, RUN_COLUMNS)
        branch_metrics = np.empty(width, np.int64)
        path_metrics = np.empty((2, n_states), np.uint16)
        taken = np.empty((width, n_states // chunk * max(chunk // 8, 1)), np.uint8)
        self._walk = _walk(crossings)
        address = ctypes.cast(self._walk.call, ctypes.c_void_p).value or 0
        arrays = branch_metrics, path_metrics[0], path_metrics[1], taken
        self._walked = (
            branch_metrics, path_metrics, taken, crossings.first, crossings.second, chunk,
            address, *(array.ctypes.data for array in arrays),
        )  # fmt: skip
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
        fill_rows(
            weights, steps, order, places.start, places.stop, fed, near, errors,
            self._column_scale, max(self._mean, _TINY), _SHRINK, _PURE_ABOVE**2,
            *self._costs, *self._tables, *self._walked,
            found.levels, found.targets, found.row_scale, found.row_labels, self._decoded,
        )  # fmt: skip


@functools.lru_cache(16)
def _walk(crossings: Crossings) -> Compiled:
    """walk(branch_metrics, n_steps, metrics, other metrics, taken), n_steps > 0: fills `taken`.

    The path metrics are left in `metrics` after an even number of steps, in the other ones after an odd number.
    """
    n_states, chunk = crossings.n_states, crossings.chunk
    half = n_states // 2
    lanes, narrow = f"<{chunk} x i16>", f"<{max(chunk // 2, 1)} x i16>"
    word = f"i{max(chunk, 8)}"
    code = Code(chunk)
    with code.loop(0, "%n_steps", 1, [("ptr", "%here"), ("ptr", "%there")]) as steps:
        here, there = steps.carried
        steps.following = [there, here]
        with code.when(code.let(f"icmp eq i64 {code.let(f'and i64 {steps.index}, {_REST_EVERY - 1}')}, 0")):
            _take_off_least(code, here, n_states)
        four = code.at("i64", "%branch_metrics", steps.index)
        metrics = [code.splat("i16", code.load("i16", code.at("i16", four, i), 2), chunk) for i in range(4)]
        decisions = code.at(word, "%taken", code.let(f"mul i64 {steps.index}, {n_states // chunk}"))
        for place, to in enumerate(range(0, n_states, chunk)):
            is_odd = to >= half
            t = (to - half) ^ crossings.first if is_odd else to
            paths: list[str] = []
            for branch in range(2):
                crossed = (t ^ crossings.second) if branch else t
                base, cross = crossed & ~(chunk - 1), crossed & (chunk - 1)
                origin = code.load(lanes, code.at("i16", here, (half if is_odd else 0) + base), 2)
                if cross:
                    origin = code.shuffle(origin, origin, chunk, [i ^ cross for i in range(chunk)], "i16")
                paths.append(_call(code, "llvm.uadd.sat", origin, metrics[2 * is_odd + branch], chunk))
            least = _call(code, "llvm.umin", paths[0], paths[1], chunk)
            for parity in range(2):
                some = code.shuffle(least, least, chunk, range(parity, chunk, 2), "i16")
                code.store(narrow, some, code.at("i16", there, half * parity + to // 2), 2)
            is_first = code.let(f"icmp eq {lanes} {least}, {paths[0]}")
            bits = code.let(f"bitcast <{chunk} x i1> {is_first} to i{chunk}")
            if chunk < 8:
                bits = code.let(f"zext i{chunk} {bits} to i8")
            code.store(word, bits, code.at(word, decisions, place), 1)
    names = f"@{{}}.v{chunk}i16({lanes}, {lanes})"
    functions = [f"declare {lanes} {names.format(name)}" for name in ("llvm.uadd.sat", "llvm.usub.sat", "llvm.umin")]
    functions.append(f"declare i16 @llvm.vector.reduce.umin.v{chunk}i16({lanes})")
    signature = "ptr %branch_metrics, i64 %n_steps, ptr %here, ptr %there, ptr %taken"
    module = "\n".join([*functions, f"define void @walk({signature}) {{", *code.lines, "  ret void", "}"])
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    return compile_function(module, "walk", [pointer, number, pointer, pointer, pointer])


def _take_off_least(code: Code, metrics: str, n_states: int) -> None:
    """Subtract the least path metric from all."""
    chunk = code.lanes
    lanes = f"<{chunk} x i16>"
    places = [code.at("i16", metrics, first) for first in range(0, n_states, chunk)]
    costs = [code.load(lanes, place, 2) for place in places]
    least = costs[0]
    for cost in costs[1:]:
        least = _call(code, "llvm.umin", least, cost, chunk)
    low = code.splat("i16", code.let(f"call i16 @llvm.vector.reduce.umin.v{chunk}i16({lanes} {least})"), chunk)
    for place, cost in zip(places, costs, strict=True):
        code.store(lanes, _call(code, "llvm.usub.sat", cost, low, chunk), place, 2)


def _call(code: Code, name: str, a: str, b: str, chunk: int) -> str:
    """An intrinsic of two vectors of path metrics."""
    lanes = f"<{chunk} x i16>"
    return code.let(f"call {lanes} @{name}.v{chunk}i16({lanes} {a}, {lanes} {b})")
