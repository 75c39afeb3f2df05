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

import ctypes
import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pqcli.core.compiled.ir import Code, Compiled, compile_function
from pqcli.core.importance import Importance
from pqcli.core.trellis.loops import N_CLASSES, RUN_COLUMNS, RUN_LENGTH
from pqcli.core.trellis.viterbi_loops import LANES, N_BINS, look_up_branch_metrics, trace_back, weigh_branch_metrics

Matrix = NDArray[np.float32]

_REST_EVERY = 16
"""Steps after which the least path metric is taken off all. It grows by a squared step or so a step; 128 saturate."""
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
        self._walk = _walk()

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
        path_metrics = np.empty((2, len(backward), LANES), np.uint16)
        for row0 in range(0, n_rows, run_rows * LANES):
            for column0 in range(0, n_columns, RUN_COLUMNS):
                width = min(RUN_COLUMNS, n_columns - column0)
                n_steps = min(run_rows, n_rows - row0) * width
                batch = weights, row_scale, column_scale, labels, row0, column0, width, n_steps, *self._costs
                if importance is None:
                    tables = self._metric_table, self._level_table, self._is_filled
                    look_up_branch_metrics(*batch, *tables, branch_metrics)
                else:
                    weigh_branch_metrics(*batch, *factors, branch_metrics)
                path_metrics[0] = _UNREACHED
                path_metrics[0, 0] = 0
                self._walk.call(
                    branch_metrics.ctypes.data, n_steps, moves.ctypes.data, len(moves), len(backward),
                    path_metrics[0].ctypes.data, path_metrics[1].ctypes.data, taken.ctypes.data,
                )  # fmt: skip
                trace_back(*batch, self._level_table, *factors, path_metrics[n_steps % 2], taken, backward, levels)


@functools.cache
def _walk() -> Compiled:
    """walk(branch_metrics, n_steps, moves, n_moves, n_states, path_metrics, others, taken), n_steps > 0: fills `taken`.

    The final path metrics are in `path_metrics` after an even number of steps, in `others` after an odd number.
    """
    arguments = ["ptr", "i64", "ptr", "i64", "i64", "ptr", "ptr", "ptr"]
    names = ["branch_metrics", "n_steps", "moves", "n_moves", "n_states", "here", "there", "taken"]
    kinds = {"ptr": ctypes.c_void_p, "i64": ctypes.c_int64}
    code = Code(LANES)
    lanes, wide = f"<{LANES} x i16>", f"<{4 * LANES} x i16>"
    subset_metrics = code.let(f"alloca [4 x {lanes}], align 64")
    with code.loop(0, "%n_steps", 1, [("ptr", "%here"), ("ptr", "%there")]) as steps:
        here, there = steps.carried
        steps.following = [there, here]
        with code.when(code.let(f"icmp eq i64 {code.let(f'and i64 {steps.index}, {_REST_EVERY - 1}')}, 0")):
            _take_off_least(code, here)
        four = code.load(wide, code.at(wide, "%branch_metrics", steps.index), 8)
        for subset in range(4):
            metric = code.shuffle(four, four, 4 * LANES, range(subset, 4 * LANES, 4), "i16")
            code.store(lanes, metric, code.at(lanes, subset_metrics, subset), 64)
        decisions = code.at("i32", "%taken", code.let(f"mul i64 {steps.index}, %n_states"))
        with code.loop(0, "%n_moves", 1) as moves:
            move = code.at("i64", "%moves", code.let(f"mul i64 {moves.index}, 6"))
            a, b, u, v, subset_a, subset_b = (code.load("i64", code.at("i64", move, i), 8) for i in range(6))
            path_a, path_b = (code.load(lanes, code.at(lanes, here, state), 2) for state in (a, b))
            for to, crossed in ((u, 0), (v, 1)):
                subsets = [code.let(f"xor i64 {subset}, {crossed}") for subset in (subset_a, subset_b)]
                metric_a, metric_b = (
                    code.load(lanes, code.at(lanes, subset_metrics, subset), 64) for subset in subsets
                )
                sum_a = _call(code, "llvm.uadd.sat", path_a, metric_a)
                sum_b = _call(code, "llvm.uadd.sat", path_b, metric_b)
                least = _call(code, "llvm.umin", sum_a, sum_b)
                code.store(lanes, least, code.at(lanes, there, to), 2)
                is_a = code.let(f"icmp eq {lanes} {least}, {sum_a}")
                bits = code.let(f"bitcast <{LANES} x i1> {is_a} to i32")
                code.store("i32", bits, code.at("i32", decisions, to))
    functions = [f"declare {lanes} @{name}.v{LANES}i16({lanes}, {lanes})" for name in _INTRINSICS]
    signature = ", ".join(f"{kind} %{name}" for kind, name in zip(arguments, names, strict=True))
    module = "\n".join([*functions, f"define void @walk({signature}) {{", *code.lines, "  ret void", "}"])
    return compile_function(module, "walk", [kinds[kind] for kind in arguments])


_INTRINSICS = ("llvm.uadd.sat", "llvm.usub.sat", "llvm.umin")


def _take_off_least(code: Code, path_metrics: str) -> None:
    """Subtract, lane by lane, the least path metric from all."""
    lanes = f"<{LANES} x i16>"
    with code.loop(0, "%n_states", 1, [(lanes, code.splat("i16", "-1", LANES))]) as states:
        cost = code.load(lanes, code.at(lanes, path_metrics, states.index), 2)
        states.following = [_call(code, "llvm.umin", states.carried[0], cost)]
    least = states.following[0]
    with code.loop(0, "%n_states", 1) as states:
        at = code.at(lanes, path_metrics, states.index)
        code.store(lanes, _call(code, "llvm.usub.sat", code.load(lanes, at, 2), least), at, 2)


def _call(code: Code, name: str, a: str, b: str) -> str:
    """An intrinsic of two vectors of path metrics."""
    lanes = f"<{LANES} x i16>"
    return code.let(f"call {lanes} @{name}.v{LANES}i16({lanes} {a}, {lanes} {b})")
