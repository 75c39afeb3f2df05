"""One stream: weights in steps to bytes and back. Streams are independent, so another process may code them.

All arguments and results of the public functions can be pickled. Weights are those of the coded matrices, rows
`start` to `stop` of each segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from pqcli.core import progress
from pqcli.core.importance import Importance
from pqcli.core.trellis import slots
from pqcli.core.trellis.feedback import Feedback, RowSteps, column_exponents, kind_of
from pqcli.core.trellis.loops import scale_columns, scale_rows, scale_up, sets
from pqcli.core.trellis.params import WEIGHTS_PER_BYTE, TrellisParams, next_states
from pqcli.core.trellis.rotation import Rotations, apply
from pqcli.core.trellis.rows import RowKind, Rows, exponents_of
from pqcli.core.trellis.search import Block, block, search
from pqcli.core.trellis.side import Side
from pqcli.core.trellis.sources import Source
from pqcli.core.trellis.stream_fields import (
    SHRINKAGE_STEPS,
    Decoded,
    code_block,
    code_points,
    code_shrinkage,
    level_code,
)
from pqcli.core.trellis.streams import Segment, height, period

Matrix = NDArray[np.float32]

_LEAST_FORESEEABLE = 0.05
"""Below, it is not tried whether mixing saves enough: to foresee 5 % of the energy saves two percent of two bits."""
_SEARCHED = 0.8
"""The share of the time of encoding a stream that the search takes; for progress alone."""
_FEW_SYMBOLS = 1 << 12


@dataclass(frozen=True)
class EncodedStream:
    """A stream's bytes, whether mixing coded them, and by segment the squared error in squared steps, and the bytes."""

    data: bytes
    is_mixed: bool
    squared_errors: list[float]
    lengths: list[int]


def encode_stream(
    weights: list[Matrix],
    segments: Sequence[Segment],
    sources: Sequence[Source],
    params: TrellisParams,
    rotations: Rotations,
    importances: Sequence[Importance | None] | None = None,
    second_order: Mapping[str, RowSteps] | None = None,
) -> EncodedStream:
    """The stream that holds `weights`, for each segment its rows of the coded matrix in steps; they are overwritten.

    `second_order` has, by key, the steps of rows and the feedback between them. A source with feedback must be in the
    stream as a whole; see `encode_split`. `importances` has one for each segment (see `trellis.segment_importance`;
    None: all weights alike). Only what the encoder chooses depends on it; no decoder needs it. Raises ValueError where
    a rotation mixes columns of different importance, and for a source with both feedback and importance.
    """
    blocks = [
        _block(matrix, segment, sources, rotations, second_order or {}, importance)
        for matrix, segment, importance in zip(weights, segments, importances or [None] * len(segments), strict=True)
    ]
    with progress.within(0.0, _SEARCHED):
        points = search(blocks, params)
    return _smaller(blocks, points, params)


def encode_split(
    weights: Matrix,
    segments: Sequence[Segment],
    sources: Sequence[Source],
    params: TrellisParams,
    rotations: Rotations,
    second_order: Mapping[str, RowSteps],
) -> list[EncodedStream]:
    """The streams, one a segment, of one source with feedback; `weights` is all of its coded matrix in steps."""
    whole = Segment(segments[0].source, segments[0].start, segments[-1].stop)
    block = _block(weights, whole, sources, rotations, second_order)
    with progress.within(0.0, _SEARCHED):
        points = search([block], params)
    return [_smaller([_part(block, segment)], points, params) for segment in segments]


def _part(block: Block, segment: Segment) -> Block:
    """Some rows of a block that has been searched."""
    rows = slice(segment.start, segment.stop)
    return replace(
        block, weights=block.weights[rows], row_scale=block.row_scale[rows], levels=block.levels[rows],
        rows=block.rows.part(segment.start, segment.stop),
        unfed=None if block.unfed is None else block.unfed[rows],
    )  # fmt: skip


def _block(
    matrix: Matrix,
    segment: Segment,
    sources: Sequence[Source],
    rotations: Rotations,
    second_order: Mapping[str, RowSteps],
    importance: Importance | None = None,
) -> Block:
    source = sources[segment.source]
    given = second_order.get(source.key)
    _check_importance(importance, matrix, source, rotations)
    if importance is not None and isinstance(given, Feedback):
        raise ValueError(f"{source.key!r} has both feedback and importance")
    if source.key in rotations.use:
        apply(matrix, rotations.items[rotations.use[source.key]], inverse=False)
    rows = Rows.empty(kind_of(given), len(matrix), column_exponents(given))
    if rows.columns.size:
        matrix = matrix / rows.column_steps()
    if given is not None:
        rows.exponents[:] = exponents_of(given.steps[segment.start : segment.stop], given.grain)
    feedback = given.feeding() if isinstance(given, Feedback) else ()
    return block(matrix, period(source, rotations.transposed), rows, feedback, importance)


def _check_importance(importance: Importance | None, matrix: Matrix, source: Source, rotations: Rotations) -> None:
    if importance is None:
        return
    if importance.shape != matrix.shape:
        raise ValueError(f"importance of a matrix {importance.shape} for {matrix.shape[0]} x {matrix.shape[1]} weights")
    if source.key in rotations.use:
        mixed = importance.columns.reshape(-1, rotations.items[rotations.use[source.key]].size)
        if not (mixed == mixed[:, :1]).all():
            raise ValueError(f"{source.key!r} has columns of different importance that its rotation mixes")


def _smaller(blocks: Sequence[Block], points: Matrix, params: TrellisParams) -> EncodedStream:
    """The stream coded by mixing where that saves what is asked of it; else without."""
    plain = _written(blocks, points, params, is_mixed=False)
    gain = params.mixing_gain
    if gain >= 1 or (gain > 0 and max(map(_foreseeable, blocks)) < _LEAST_FORESEEABLE):
        return plain
    mixed = _written(blocks, points, params, is_mixed=True)
    return mixed if len(mixed.data) < (1 - gain) * len(plain.data) else plain


def _foreseeable(block: Block) -> float:
    """About the share of the energy that a linear guess from neighbours explains: squared correlations, summed."""
    weights, lag = block.weights, block.period
    pairs = [(weights[:, 1:], weights[:, :-1]), (weights[1:], weights[:-1])]
    if lag > 1:
        pairs.append((weights[:, lag:], weights[:, :-lag]))
    energy = max(float(np.einsum("ij,ij->", weights, weights)), 1e-30)
    return sum((float(np.einsum("ij,ij->", a, b)) / energy) ** 2 for a, b in pairs)


def _written(blocks: Sequence[Block], points: Matrix, params: TrellisParams, *, is_mixed: bool) -> EncodedStream:
    next_state = next_states(params.n_states)
    coder = slots.writer(sum(block.levels.size for block in blocks))
    points = code_points(coder, points)
    code = level_code(coder, is_mixed=is_mixed)
    errors, ends = [], []
    previous_class = 0
    for searched in blocks:
        decoded = Decoded.empty(searched.levels, searched.labels, points, searched.rows, is_mixed=is_mixed)
        previous_class = code_block(coder, code, decoded, searched.period, previous_class, next_state)
        if is_mixed:
            shrinkage = 0 if searched.feedback else _best_shrinkage(decoded, searched.weights, next_state)
            decoded = code_shrinkage(coder, decoded, shrinkage)
        ends.append(int(coder.window[3]))
        difference = decoded.weights(next_state)
        if searched.rows.kind != RowKind.PLAIN:
            difference *= searched.rows.steps(np.float32(1))[:, None]
        difference -= searched.unscaled()
        if searched.rows.columns.size:
            difference *= searched.rows.column_steps()
        errors.append(float(np.sum(np.square(difference, dtype=np.float64))))
    data = coder.finish()
    ends[-1] = len(data)
    lengths = [min(end, len(data)) - start for start, end in zip([0, *ends], ends, strict=False)]
    return EncodedStream(data, is_mixed, errors, lengths)


_Piece = tuple[Segment, Decoded]


def _best_shrinkage(decoded: Decoded, weights: Matrix, next_state: NDArray[np.int64]) -> int:
    """The shrinkage towards the guesses that leaves the least squared error."""
    points = decoded.weights(next_state)
    offsets = np.clip(decoded.guesses / np.float32(65536) - points, -1, 1)
    energy = float(np.sum(np.square(offsets, dtype=np.float64)))
    return int(
        np.clip(
            round(SHRINKAGE_STEPS * float(np.sum((weights - points) * offsets, dtype=np.float64)) / max(energy, 1e-9)),
            0,
            SHRINKAGE_STEPS,
        )
    )


def decode_stream(
    data: bytes, is_mixed: bool, segments: Sequence[Segment], sources: Sequence[Source], side: Side
) -> list[Matrix]:
    """The segments' weights (coded rows, coded columns)."""
    return [_weights(piece, sources, side) for piece in _levels_of_stream(data, is_mixed, segments, sources, side)]


def decode_and_count_stream(
    data: bytes, is_mixed: bool, segments: Sequence[Segment], sources: Sequence[Source], side: Side
) -> list[tuple[Matrix, dict[int, int]]]:
    """What `decode_stream` and `count_stream` give, for little more than one of them."""
    pieces = _levels_of_stream(data, is_mixed, segments, sources, side)
    return [(_weights(piece, sources, side), _symbol_counts(piece, side)) for piece in pieces]


def _weights(piece: _Piece, sources: Sequence[Source], side: Side) -> Matrix:
    segment, decoded = piece
    source = sources[segment.source]
    weights = decoded.weights(next_states(side.n_states))
    if source.key in side.rotations.use:
        apply(weights, side.rotations.items[side.rotations.use[source.key]], inverse=True)
    step = side.step_of(segment.source)
    if decoded.rows.kind == RowKind.PLAIN:
        scale_up(weights, step)
    else:
        scale_rows(weights, decoded.rows.steps(step))
    if decoded.rows.columns.size:
        scale_columns(weights, decoded.rows.column_steps())
    return weights


def count_stream(
    data: bytes, is_mixed: bool, segments: Sequence[Segment], sources: Sequence[Source], side: Side
) -> list[dict[int, int]]:
    """How often each symbol, 3 * level + set, occurs in each segment."""
    return [_symbol_counts(piece, side) for piece in _levels_of_stream(data, is_mixed, segments, sources, side)]


def _symbol_counts(piece: _Piece, side: Side) -> dict[int, int]:
    _, decoded = piece
    which = np.empty(decoded.levels.shape, np.uint8)
    rows = decoded.rows
    sets(
        decoded.levels,
        decoded.labels,
        rows.labels,
        rows.run_rows(len(decoded.labels)),
        next_states(side.n_states),
        which,
    )
    return _counts(3 * decoded.levels.astype(np.int64) + which)


def _counts(symbols: NDArray[np.int64]) -> dict[int, int]:
    """How often each occurs; without sorting where they lie close together, as levels do."""
    least = int(symbols.min())
    if int(symbols.max()) - least > symbols.size + _FEW_SYMBOLS:
        found, counts = np.unique(symbols, return_counts=True)
    else:
        counts = np.bincount((symbols - least).reshape(-1))
        found = np.flatnonzero(counts)
        found, counts = found + least, counts[found]
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _levels_of_stream(
    data: bytes, is_mixed: bool, segments: Sequence[Segment], sources: Sequence[Source], side: Side
) -> Iterator[_Piece]:
    """The segments in turn, with what they hold."""
    shapes = [
        (s.stop - s.start, sources[s.source].n_weights // height(sources[s.source], side.rotations.transposed))
        for s in segments
    ]
    n_weights = sum(rows * columns for rows, columns in shapes)
    if n_weights > (len(data) + 8) * WEIGHTS_PER_BYTE:
        raise ValueError(f"{len(data)} bytes cannot hold {n_weights} weights")
    next_state = next_states(side.n_states)
    coder = slots.reader(data)
    points = code_points(coder, np.zeros((3, 0), np.float32))
    code = level_code(coder, is_mixed=is_mixed)
    previous_class = 0
    for segment, shape in zip(segments, shapes, strict=True):
        source = sources[segment.source]
        levels, labels = np.empty(shape, np.int32), np.empty(shape[1], np.uint8)
        rows = Rows.empty(side.row_kind(segment.source), shape[0], side.column_exponents.get(source.key))
        decoded = Decoded.empty(levels, labels, points, rows, is_mixed=is_mixed)
        previous_class = code_block(
            coder, code, decoded, period(source, side.rotations.transposed), previous_class, next_state
        )
        yield segment, code_shrinkage(coder, decoded) if is_mixed else decoded
    coder.finish()


def entropy_bits(counts: Mapping[int, int]) -> float:
    """Bits of symbols 3 * level + set at their order-0 entropy, one table a set."""
    bits = 0.0
    for which in range(3):
        n = np.array([count for symbol, count in counts.items() if symbol % 3 == which], np.float64)
        bits += float((n * np.log2(n.sum() / n)).sum())
    return bits
