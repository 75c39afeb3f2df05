"""The search of the trellis codec against a slow one that computes every cost in float64."""

import numpy as np
import pytest

from pqcli.core.importance import Importance
from pqcli.core.trellis.loops import N_CLASSES, N_POINTS
from pqcli.core.trellis.params import N_STATES, next_states
from pqcli.core.trellis.search import bits_of, prior_probabilities
from pqcli.core.trellis.viterbi import Costs, Search, Trellis
from pqcli.core.trellis.viterbi_loops import METRIC_UNIT, N_COSTS, REACH, RESOLUTION

RATE_WEIGHT = 0.3
POINTS = np.tile(np.arange(N_POINTS, dtype=np.float32), (3, 1))
BITS = bits_of(prior_probabilities(N_CLASSES, N_COSTS))
SLOPE = np.minimum(2.0 / 2.0 ** ((np.arange(N_CLASSES) + 0.5) / 4 - 6), 4.0).astype(np.float32)
COSTS = Costs(BITS, SLOPE, POINTS, RATE_WEIGHT)
SCALE = 24.0
"""Class 24: levels of mean magnitude one."""


def searched(weights, labels, n_states, scale=SCALE, importance=None):
    levels = np.full(weights.shape, 99, np.int32)
    rows, columns = weights.shape
    scales = np.zeros(rows, np.float32), np.full(columns, scale, np.float32)
    Search(COSTS, next_states(n_states)).fill(np.float32(weights), *scales, np.uint8(labels), levels, importance)
    return levels


def branch(level, parity, label):
    """FORMAT.md: the bit of a level that drives the trellis."""
    if parity == 0:
        return abs(level) // 2 % 2
    return (level - 1) // 2 % 2 if label else int(abs(level) % 4 == 1)


def cost(weight, level, parity, label, factor=1.0, scale=SCALE):
    which = parity + (parity and label)
    bits = float(BITS[int(scale), which, min(abs(level), N_COSTS - 1)])
    return factor * (weight - level) ** 2 + RATE_WEIGHT * bits


def allowed(parity, label, largest=9):
    return [n for n in range(-largest, largest + 1) if n % 2 == parity or (parity and not label and n == 0)]


def walk_cost(weights, labels, levels, n_states, factors):
    """The cost of the levels of one run; fails where the trellis does not allow one."""
    table, state, total = next_states(n_states), 0, 0.0
    for weight, label, level, factor in zip(weights, labels, levels, factors, strict=True):
        parity = state & 1
        assert level in allowed(parity, label), "a level that the state does not open"
        total += cost(weight, int(level), parity, label, factor)
        state = table[state, branch(int(level), parity, label)]
    return total


def least_cost(weights, labels, n_states, factors):
    """Viterbi's algorithm, one state and one level at a time."""
    table, best = next_states(n_states), {0: 0.0}
    for weight, label, factor in zip(weights, labels, factors, strict=True):
        following: dict[int, float] = {}
        for state, so_far in best.items():
            parity = state & 1
            for level in allowed(parity, label):
                to = int(table[state, branch(level, parity, label)])
                following[to] = min(following.get(to, np.inf), so_far + cost(weight, level, parity, label, factor))
        best = following
    return min(best.values())


@pytest.mark.parametrize("n_states", [4, 8, 64])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("is_weighed", [False, True])
def test_the_walk_found_costs_as_little_as_any(n_states, label, is_weighed):
    rng = np.random.default_rng(n_states)
    weights = rng.normal(0, 1.3, (1, 60))
    labels = np.full(60, label)
    factors = rng.uniform(0.3, 3, 60) if is_weighed else np.ones(60)
    importance = Importance(np.float32([1]), np.float32(factors)) if is_weighed else None
    levels = searched(weights, labels, n_states, importance=importance)
    found = walk_cost(weights[0], labels, levels[0], n_states, factors)
    rounding = 60 * (2 / METRIC_UNIT + 1 / RESOLUTION**2)
    assert found <= least_cost(weights[0], labels, n_states, factors) + rounding


def test_importance_of_one_finds_what_no_importance_finds():
    weights = np.round(np.random.default_rng(0).normal(0, 2, (150, 300)) * RESOLUTION - 0.5) / RESOLUTION
    weights += 0.5 / RESOLUTION  # the middles of the table's bins
    labels = np.arange(300) // 16 % 2
    ones = Importance(np.ones(150, np.float32), np.ones(300, np.float32))
    assert np.array_equal(searched(weights, labels, 32, importance=ones), searched(weights, labels, 32))


def test_runs_side_by_side_do_not_touch_each_other():
    weights = np.random.default_rng(0).normal(0, 2, (150, 300))
    labels = np.arange(300) // 16 % 2
    together = searched(weights, labels, 32)
    height = 2048 // 300
    for start in (0, 66, 144):
        rows = weights[start : start + height]
        assert np.array_equal(searched(rows, labels, 32), together[start : start + height])


@pytest.mark.parametrize("n_states", N_STATES)
def test_every_trellis_pairs_states_that_share_their_origins(n_states):
    trellis = Trellis.of(next_states(n_states))
    assert sorted(trellis.moves[:, 2:4].ravel()) == list(range(n_states))
    for state in range(n_states):
        for origin in trellis.backward[state]:
            assert state in trellis.next_state[origin >> 2]


@pytest.mark.parametrize("size", [REACH - 0.001, REACH, 1000.3, 5e6])
def test_weights_beyond_the_table_are_quantized_as_well(size):
    weights = np.array([[size, -size] * 8])
    levels = searched(weights, np.ones(16), 8, scale=N_CLASSES - 1)
    assert np.abs(levels - weights).max() <= max(2.5, size * 1e-6)


def test_a_narrow_matrix_of_many_rows_and_a_wide_one_of_a_single_row_are_filled():
    for shape in ((5000, 1), (1, 9000), (3, 4097)):
        levels = searched(np.random.default_rng(0).normal(0, 1, shape), np.ones(shape[1]), 16)
        assert np.abs(levels).max() < 9
