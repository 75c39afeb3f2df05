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

from pqcli.core import progress
from pqcli.core.importance import Importance
from pqcli.core.trellis.feedback import Feeding, fill
from pqcli.core.trellis.loops import N_CLASSES, N_POINTS, RUN_LENGTH
from pqcli.core.trellis.params import LABEL_GROUP, TrellisParams, next_states
from pqcli.core.trellis.row_search import Searched
from pqcli.core.trellis.rows import RowKind, Rows
from pqcli.core.trellis.stream_fields import rounded_points
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
_TRIAL_COLUMNS = 256
"""Where errors are fed forward, one column in four, unless there are fewer than these."""


@dataclass
class Block:
    """One segment on its way through the encoder: rotated weights in steps, and what the search knows of them.

    With `feedback`, the segment is all of a source, and the search overwrites `weights` by what it quantizes in the
    end, `row_scale`, and the labels of rows; `unfed` are the weights in steps of the source.
    """

    weights: Matrix
    period: int
    labels: NDArray[np.uint8]
    row_scale: Matrix
    column_scale: Matrix
    levels: NDArray[np.int32]
    rows: Rows
    feedback: tuple[Feeding, ...] = ()
    unfed: Matrix | None = None
    importance: Importance | None = None

    def unscaled(self) -> Matrix:
        """The weights in steps of the source."""
        if self.unfed is not None:
            return self.unfed
        if self.rows.kind == RowKind.PLAIN:
            return self.weights
        return self.weights * self.rows.steps(np.float32(1))[:, None]


def block(
    weights: Matrix,
    period: int,
    rows: Rows,
    feedback: tuple[Feeding, ...] = (),
    importance: Importance | None = None,
) -> Block:
    """Scales by row and by column (shrunk towards their mean, as they are estimates), and the labels they suggest.

    Takes weights in steps of the source, and divides them by those of rows.
    """
    unfed = weights
    if rows.kind != RowKind.PLAIN:
        weights = weights / rows.steps(np.float32(1))[:, None]
    n_rows, n_columns = weights.shape
    squares = np.square(weights, dtype=np.float64)
    mean = float(squares.mean())
    row_means = (squares.sum(axis=1) + 4 * mean) / (n_columns + 4)
    columns = squares.mean(axis=0)
    phases = columns.reshape(-1, period).mean(axis=0)
    shrunk = (columns * n_rows + 8 * np.tile(phases, n_columns // period)) / (n_rows + 8)
    if rows.kind.is_lone:  # whose own labels the search finds
        labels = np.zeros(n_columns, bool)
    elif period > 1:
        labels = np.tile(np.sqrt(phases) > _PURE_ABOVE, n_columns // period)
    else:
        starts = np.arange(0, n_columns, LABEL_GROUP)
        groups = np.add.reduceat(columns, starts) / np.minimum(LABEL_GROUP, n_columns - starts)
        labels = np.repeat(np.sqrt(groups) > _PURE_ABOVE, LABEL_GROUP)[:n_columns]
    tiny = 1e-30
    row_scale = 2 * np.log2(np.maximum(row_means, tiny) / max(mean, tiny))
    column_scale = 2 * np.log2(np.maximum(shrunk, tiny)) + 24
    return Block(
        weights,
        period,
        labels.astype(np.uint8),
        row_scale.astype(np.float32),
        column_scale.astype(np.float32),
        np.zeros(weights.shape, np.int32),
        rows,
        feedback,
        unfed if feedback else None,
        importance,
    )


def search(blocks: Sequence[Block], params: TrellisParams) -> Matrix:
    """Fill in the blocks' levels; the reconstruction points (3, N_POINTS) that fit them.

    Where errors are fed forward, they are errors of points known beforehand: those that the trial passes found.
    """
    feeds = any(block.feedback for block in blocks)
    prior = prior_probabilities(N_CLASSES, N_COSTS)
    scale = 2.0 ** ((np.arange(N_CLASSES) + 0.5) / 4 - 6)
    slope = np.minimum(2.0 / scale, 4.0).astype(np.float32)
    points: Matrix = np.tile(np.arange(N_POINTS, dtype=np.float32), (3, 1))
    costs = Costs(bits_of(prior), slope, points, params.rate_weight)
    trial = [_sample(block) for block in blocks] if sum(b.weights.size for b in blocks) > _TRIAL_ALL_BELOW else blocks
    schedule = [(trial, _TRIAL_STATES)] * _TRIAL_PASSES + [(blocks, params.n_states)]
    done, whole = 0, sum(block.weights.size * n_states for some, n_states in schedule for block in some)
    for some, n_states in schedule:
        used = points
        next_state = next_states(n_states)
        viterbi = Search(costs, next_state)
        counts = np.zeros((N_CLASSES, 3, N_COSTS))
        sums = np.zeros((3, N_POINTS, 2))
        for block in some:
            scales = block.row_scale, block.column_scale
            before, done = done, done + block.weights.size * n_states
            with progress.within(before / whole, done / whole):
                if block.feedback:
                    _fill_feeding(block, block.feedback, costs, next_state)
                else:
                    viterbi.fill(block.weights, *scales, block.labels, block.levels, block.importance)
            run = block.rows.run_rows(block.weights.shape[1])
            labels = block.labels, block.rows.labels
            gather(block.weights, *scales, block.levels, *labels, run, next_state, counts, sums)
        seen = counts.copy()
        seen[1:] += 0.25 * counts[:-1]
        seen[:-1] += 0.25 * counts[1:]
        means = sums[..., 0] / np.maximum(sums[..., 1], 1)
        points = np.where(sums[..., 1] > 20, means, np.arange(N_POINTS)).astype(np.float32)
        if feeds:
            points = rounded_points(points)
        costs = Costs(bits_of(seen + 20 * prior), slope, points, params.rate_weight)
    return used if feeds else points


def _fill_feeding(block: Block, feedback: tuple[Feeding, ...], costs: Costs, next_state: NDArray[np.int64]) -> None:
    """The levels of a block that feeds errors forward, and all else that follows from how it did."""
    if block.unfed is None:
        raise ValueError("feedback without the weights that it starts from")
    steps = block.rows.steps(np.float32(1))
    found = Searched(block.levels, block.weights, block.row_scale, block.rows.labels)
    fill(block.unfed, steps, feedback, block.column_scale, costs, next_state, found)


def _sample(block: Block) -> Block:
    """Every fourth batch of runs of a block, the first among them; with feedback every fourth column."""
    n_rows, n_columns = block.weights.shape
    if block.feedback and block.unfed is not None:
        chosen = slice(0, None, _TRIAL_SHARE if n_columns >= _TRIAL_COLUMNS else 1)
        unfed = np.ascontiguousarray(block.unfed[:, chosen])
        return replace(
            block,
            weights=np.empty_like(unfed),
            levels=np.zeros(unfed.shape, np.int32),
            unfed=unfed,
            labels=np.ascontiguousarray(block.labels[chosen]),
            column_scale=np.ascontiguousarray(block.column_scale[chosen]),
        )
    height = max(1, RUN_LENGTH // n_columns) * LANES
    rows = np.flatnonzero((np.arange(n_rows) // height) % _TRIAL_SHARE == 0)
    weights = np.ascontiguousarray(block.weights[rows])
    return replace(
        block, weights=weights, row_scale=block.row_scale[rows], levels=np.zeros(weights.shape, np.int32),
        rows=Rows(block.rows.kind, block.rows.exponents[rows], block.rows.labels[rows], block.rows.columns),
        importance=block.importance and replace(block.importance, rows=block.importance.rows[rows]),
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
