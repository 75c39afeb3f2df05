"""The encoder's search: the levels of all segments of one stream, and the reconstruction points that fit them.

What a bit costs depends on how often levels are used, and that on what bits cost; so a few quick passes, with few
states over a part of the weights, learn both before the pass that counts. `pqcli.core.trellis.viterbi` is the pass.

Shapes: weights, levels (rows, columns); labels (columns,); row_scale (rows,), column_scale (columns,); points
(3, N_POINTS), by set and magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pqcli.core.importance import Importance
from pqcli.core.trellis.loops import N_CLASSES, N_POINTS, RUN_LENGTH
from pqcli.core.trellis.params import LABEL_GROUP, TrellisParams, next_states
from pqcli.core.trellis.viterbi import Costs, Search
from pqcli.core.trellis.viterbi_loops import LANES, N_COSTS, gather

Matrix = NDArray[np.float32]

_PURE_ABOVE = 0.75
"""The odd set is pure where rms / step exceeds this."""
_TRIAL_STATES = 8
_TRIAL_PASSES = 2
_TRIAL_SHARE = 4
"""Trial passes look at one run in four ..."""
_TRIAL_ALL_BELOW = 1 << 18
"""... unless the stream has no more weights than this."""


@dataclass
class Block:
    """One segment on its way through the encoder: rotated weights in steps, and what the search knows of them."""

    weights: Matrix
    period: int
    labels: NDArray[np.uint8]
    row_scale: Matrix
    column_scale: Matrix
    levels: NDArray[np.int32]
    importance: Importance | None = None


def block(weights: Matrix, period: int, importance: Importance | None = None) -> Block:
    """Scales by row and by column (shrunk towards their mean, as they are estimates), and the labels they suggest."""
    n_rows, n_columns = weights.shape
    squares = np.square(weights, dtype=np.float64)
    mean = float(squares.mean())
    rows = (squares.sum(axis=1) + 4 * mean) / (n_columns + 4)
    columns = squares.mean(axis=0)
    phases = columns.reshape(-1, period).mean(axis=0)
    shrunk = (columns * n_rows + 8 * np.tile(phases, n_columns // period)) / (n_rows + 8)
    if period > 1:
        labels = np.tile(np.sqrt(phases) > _PURE_ABOVE, n_columns // period)
    else:
        starts = np.arange(0, n_columns, LABEL_GROUP)
        groups = np.add.reduceat(columns, starts) / np.minimum(LABEL_GROUP, n_columns - starts)
        labels = np.repeat(np.sqrt(groups) > _PURE_ABOVE, LABEL_GROUP)[:n_columns]
    tiny = 1e-30
    row_scale = 2 * np.log2(np.maximum(rows, tiny) / max(mean, tiny))
    column_scale = 2 * np.log2(np.maximum(shrunk, tiny)) + 24
    return Block(
        weights,
        period,
        labels.astype(np.uint8),
        row_scale.astype(np.float32),
        column_scale.astype(np.float32),
        np.zeros(weights.shape, np.int32),
        importance,
    )


def search(blocks: Sequence[Block], params: TrellisParams) -> Matrix:
    """Fill in the blocks' levels; the reconstruction points (3, N_POINTS) that fit them."""
    prior = prior_probabilities(N_CLASSES, N_COSTS)
    scale = 2.0 ** ((np.arange(N_CLASSES) + 0.5) / 4 - 6)
    slope = np.minimum(2.0 / scale, 4.0).astype(np.float32)
    points: Matrix = np.tile(np.arange(N_POINTS, dtype=np.float32), (3, 1))
    costs = Costs(bits_of(prior), slope, points, params.rate_weight)
    trial = [_sample(block) for block in blocks] if sum(b.weights.size for b in blocks) > _TRIAL_ALL_BELOW else blocks
    schedule = [(trial, _TRIAL_STATES)] * _TRIAL_PASSES + [(blocks, params.n_states)]
    for some, n_states in schedule:
        next_state = next_states(n_states)
        viterbi = Search(costs, next_state)
        counts = np.zeros((N_CLASSES, 3, N_COSTS))
        sums = np.zeros((3, N_POINTS, 2))
        for block in some:
            scales = block.row_scale, block.column_scale
            viterbi.fill(block.weights, *scales, block.labels, block.levels, block.importance)
            gather(block.weights, *scales, block.levels, block.labels, next_state, counts, sums)
        seen = counts.copy()
        seen[1:] += 0.25 * counts[:-1]
        seen[:-1] += 0.25 * counts[1:]
        means = sums[..., 0] / np.maximum(sums[..., 1], 1)
        points = np.where(sums[..., 1] > 20, means, np.arange(N_POINTS)).astype(np.float32)
        costs = Costs(bits_of(seen + 20 * prior), slope, points, params.rate_weight)
    return costs.points


def _sample(block: Block) -> Block:
    """Every fourth batch of runs of a block, the first among them."""
    n_rows, n_columns = block.weights.shape
    height = max(1, RUN_LENGTH // n_columns) * LANES
    rows = np.flatnonzero((np.arange(n_rows) // height) % _TRIAL_SHARE == 0)
    weights = np.ascontiguousarray(block.weights[rows])
    importance = block.importance and replace(block.importance, rows=block.importance.rows[rows])
    return Block(
        weights, block.period, block.labels, block.row_scale[rows], block.column_scale,
        np.zeros(weights.shape, np.int32), importance,
    )  # fmt: skip


def prior_probabilities(n_classes: int, n_costs: int) -> NDArray[np.float64]:
    """P(magnitude | class, set) before anything was seen: two-sided exponential, in the pure odd set Gaussian."""
    magnitude = np.arange(n_costs)
    scale = (2.0 ** ((np.arange(n_classes) + 0.5) / 4 - 6))[:, None]
    spread = np.maximum(scale / np.sqrt(2.0), 0.05)
    even = np.where(magnitude % 2 == 0, np.exp(-magnitude / spread), 0)
    odd = np.where((magnitude % 2 == 1) | (magnitude == 0), np.exp(-magnitude / spread), 0)
    odd[:, 0] *= 0.5
    even[:, 0] *= 0.5
    wide = np.maximum(scale, 0.12)
    pure = np.exp(-0.5 * np.minimum((magnitude / wide) ** 2, 2 * magnitude / wide + 8)) * (magnitude % 2 == 1)
    allowed = np.stack([magnitude % 2 == 0, (magnitude % 2 == 1) | (magnitude == 0), magnitude % 2 == 1])
    prior = np.stack([even, odd, pure], axis=1) + 1e-9 * allowed
    result: NDArray[np.float64] = prior / prior.sum(axis=2, keepdims=True)
    return result


def bits_of(weights: NDArray[np.float64]) -> Matrix:
    """Bits by (class, set, magnitude), the sign's included, from unnormalised probabilities."""
    probability = weights / weights.sum(axis=2, keepdims=True)
    bits = -np.log2(np.maximum(probability, 1e-12)) + (np.arange(weights.shape[2]) > 0)
    return np.asarray(np.minimum(bits, 40), np.float32)
