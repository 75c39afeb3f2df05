"""The trellis codec: the smallest known stream for a given squared error, at the price of random access.

A tensor is a matrix of weights, rotated where that pays (`rotation`) and quantized to integer levels times
one step. Which levels a weight may take depends on the levels before it: a trellis of `n_states` states is walked along
the rows, and the state's low bit opens either the even or the odd levels. Half the levels at a time make each choice
one bit cheaper than all of them would be, and the Viterbi search picks, among all walks, the one that minimises

    sum (weight - point)^2 + rate_weight * step^2 * bits

so that the weights of a row are quantized together, as one long vector: most of the way from scalar quantization to
the limit of sphere packing. Where weights are small against the step the odd set also holds zero (`labels` 0),
elsewhere it is pure (`labels` 1), by column or kernel position. Levels are coded by `code_levels` with adaptive
contexts, or by `code_levels_mixed`, which takes longer, where that saves enough; they decode to points that are the
centroids of the weights that chose them, moved a little towards what the coder had predicted.

Tensors are cut into *streams* that are coded each by itself, by several threads at once: one stream holds rows of one
large tensor, or several small tensors. How, follows from the shapes alone (`stream_layout`).
"""

from __future__ import annotations

import struct
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from pqcli.core.trellis.rotation import Rotation, Rotations, apply, fit_rotations
from pqcli.core.trellis.sources import Source

if TYPE_CHECKING:
    from pqcli.core.entropy.rangecoder import RangeCoder

__all__ = [
    "EncodedStreams",
    "Rotation",
    "Rotations",
    "Segment",
    "Source",
    "TrellisParams",
    "decode",
    "encode",
    "entropies",
    "fit_rotations",
    "stream_layout",
]

Matrix = NDArray[np.float32]
_T = TypeVar("_T")

_POLYNOMIALS = {
    1: (0, 0),
    4: (0o5, 0o2),
    8: (0o13, 0o4),
    16: (0o23, 0o4),
    32: (0o45, 0o10),
    64: (0o103, 0o24),
    128: (0o235, 0o126),
    256: (0o515, 0o362),
    512: (0o1315, 0o406),
    1024: (0o2513, 0o1606),
    2048: (0o5303, 0o2232),
}
"""Parity-check polynomials (h0, h1) for one-dimensional signals, by number of states: Ungerboeck's up to 256, beyond
those that quantized Gaussian weights best among some hundreds drawn at random."""

N_STATES = tuple(n for n in _POLYNOMIALS if n > 1)
"""What `TrellisParams.n_states` may be."""

_LABEL_GROUP = 16
"""Columns that share a label where there are no kernel positions."""
_PURE_ABOVE = 0.75
"""The odd set is pure where rms / step exceeds this."""
_TRIAL_STATES = 8
_TRIAL_PASSES = 2
_TRIAL_SHARE = 4
_TRIAL_ALL_BELOW = 1 << 18
_MAX_SIZE = float(1 << 29)
"""Largest weight in steps; a level must stay an int32."""
_LEAST_FORESEEABLE = 0.05
"""Below, it is not tried whether mixing saves enough: to foresee 5 % of the energy saves two percent of two bits."""
_MIXES = 1 << 7
_LEANS = 64
_WEIGHTS_PER_BYTE = 12_000
"""No stream holds more weights per byte: the surest decision has a probability of 1 - 32/65536."""
_LARGEST = float(np.finfo(np.float32).max)
_MAX_RANK = 256
_FEW_SYMBOLS = 1 << 12
_HEADER = struct.Struct("<fBB")
_OCTAVE_STEPS = 8
_RATIOS = tuple(float(np.float32(2.0 ** (i / _OCTAVE_STEPS))) for i in range(_OCTAVE_STEPS))


@dataclass(frozen=True)
class TrellisParams:
    """What the encoder is asked.

    `step` is the distance of neighbouring levels; `rate_weight` what a bit may cost in squared steps; more `n_states`
    find less error for more time (decoding takes no longer); a stream holds about `stream_weights` weights, a power
    of two. A stream's levels are coded by mixing, three times as slow to decode, where that saves more than
    `mixing_gain` of its bytes: with 0 wherever it is smaller, with 1 never.
    """

    step: float
    n_states: int = 256
    rate_weight: float = 0.3
    stream_weights: int = 1 << 20
    mixing_gain: float = 0.0

    def __post_init__(self) -> None:
        if not (0.0 < float(np.float32(self.step)) < _LARGEST):
            raise ValueError(f"step {self.step} is not a positive float32")
        if self.n_states not in N_STATES:
            raise ValueError(f"{self.n_states} states; a trellis has one of {', '.join(map(str, N_STATES))}")
        if self.stream_weights < 1 or self.stream_weights & (self.stream_weights - 1):
            raise ValueError(f"{self.stream_weights} weights per stream is not a power of two")


@dataclass(frozen=True)
class EncodedStreams:
    """All that decoding needs beside the sources: `side` (steps, rotations) and one byte string per stream.

    `squared_errors` and `coded_bytes` tell, by key, the squared error the encoder caused and the share of the streams
    that a source takes; they are not part of the data.
    """

    side: bytes
    streams: Sequence[bytes]
    squared_errors: Mapping[str, float] = field(default_factory=dict, compare=False)
    coded_bytes: Mapping[str, int] = field(default_factory=dict, compare=False)

    @property
    def n_bytes(self) -> int:
        """Size of all of it."""
        return len(self.side) + sum(map(len, self.streams))

    @property
    def mixes(self) -> bool:
        """Whether any stream was coded by mixing, which a decoder must know how to undo."""
        return len(self.side) >= _HEADER.size and self.side[4] & _MIXES != 0


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of the coded matrix of source number `source`."""

    source: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Side:
    """What `EncodedStreams.side` says."""

    step: float
    n_states: int
    stream_weights: int
    exponents: tuple[int, ...]
    rotations: Rotations
    mixed: frozenset[int] = frozenset()

    def step_of(self, index: int) -> np.float32:
        """The step of source number `index`: step * 2^(exponent / 8), in defined arithmetic."""
        octave, eighth = divmod(self.exponents[index], _OCTAVE_STEPS)
        return np.float32(np.ldexp(float(np.float32(self.step)) * _RATIOS[eighth], octave))


def stream_layout(
    sources: Sequence[Source], transposed: Iterable[str], stream_weights: int
) -> list[tuple[Segment, ...]]:
    """Which rows each stream holds. Tensors of more than `stream_weights` weights are split evenly into streams."""
    flipped = frozenset(transposed)
    streams: list[tuple[Segment, ...]] = []
    gathered: list[Segment] = []
    weights = 0
    for index, source in enumerate(sources):
        if source.n_weights == 0:
            continue
        n_rows = source.columns if source.key in flipped else source.rows
        if gathered and weights + source.n_weights > stream_weights:
            streams.append(tuple(gathered))
            gathered, weights = [], 0
        if source.n_weights <= stream_weights:
            gathered.append(Segment(index, 0, n_rows))
            weights += source.n_weights
            continue
        n_parts = min(n_rows, -(-source.n_weights // stream_weights))
        height = -(-n_rows // n_parts)
        streams += [(Segment(index, r, min(r + height, n_rows)),) for r in range(0, n_rows, height)]
    return [*streams, tuple(gathered)] if gathered else streams


def encode(
    sources: Sequence[Source],
    read: Callable[[str], Matrix],
    params: TrellisParams,
    rotations: Rotations,
    steps: Mapping[str, float] | None = None,
    n_threads: int = 2,
) -> EncodedStreams:
    """The sources as streams. `read(key)` is called once per source, in order; it gives (rows, columns) float32.

    `steps` gives a source a step of its own, rounded to params.step * 2^(i/8). At most `n_threads + 1` streams' weights
    are held beside the tensor just read. The bytes do not depend on `n_threads`. Raises ValueError where a weight is
    too large for its step (2^29 steps).
    """
    side = _Side(
        params.step,
        params.n_states,
        params.stream_weights,
        tuple(_exponent(params.step, (steps or {}).get(source.key, params.step)) for source in sources),
        rotations,
    )
    streams: list[bytes] = []
    mixed: set[int] = set()
    errors = {source.key: 0.0 for source in sources}
    sizes = {source.key: 0 for source in sources}
    pending: deque[tuple[tuple[Segment, ...], Future[_Stream]]] = deque()

    def collect() -> None:
        segments, future = pending.popleft()
        stream = future.result()
        if stream.is_mixed:
            mixed.add(len(streams))
        streams.append(stream.data)
        for segment, error, length in zip(segments, stream.squared_errors, stream.lengths, strict=True):
            errors[sources[segment.source].key] += error * float(side.step_of(segment.source)) ** 2
            sizes[sources[segment.source].key] += length

    with ThreadPoolExecutor(n_threads) as pool:
        held: tuple[int, Matrix] | None = None
        for segments in stream_layout(sources, rotations.transposed, params.stream_weights):
            blocks: list[Matrix] = []
            for segment in segments:
                if held is None or held[0] != segment.source:
                    held = (segment.source, _read(sources[segment.source], read, rotations.transposed))
                blocks.append(_in_steps(held[1][segment.start : segment.stop], side.step_of(segment.source)))
            pending.append((segments, pool.submit(_encode_stream, blocks, segments, sources, params, rotations)))
            while len(pending) > n_threads:
                collect()
        while pending:
            collect()
    side = replace(side, mixed=frozenset(mixed))
    return EncodedStreams(_code_side(side, sources, len(streams)), tuple(streams), errors, sizes)


def decode(
    encoded: EncodedStreams,
    sources: Sequence[Source],
    keys: Iterable[str] | None = None,
    n_threads: int = 2,
    bits: dict[str, float] | None = None,
) -> Iterator[tuple[str, Matrix]]:
    """(key, weights (rows, columns) float32) of every source, or of those in `keys`, in the sources' order.

    Bit-identical on every machine. Only streams that hold a wanted tensor are decoded, at most `n_threads + 1` ahead.
    A source's entropy is in `bits`, where that is given, before its weights come (see `entropies`). Raises ValueError
    for bytes that are not what `encode` wrote for these sources.
    """
    side, layout = _parse_side(encoded.side, sources, len(encoded.streams))
    wanted = {source.key for source in sources} if keys is None else set(keys)
    if bits is None:
        found = _ahead(_decode_stream, encoded, layout, sources, side, wanted, n_threads)
    else:
        both = _ahead(_decode_and_count_stream, encoded, layout, sources, side, wanted, n_threads)
        found = _noting(both, sources, bits)
    return _assemble(found, sources, side, wanted)


def _noting(
    found: Iterable[tuple[Segment, tuple[Matrix, dict[int, int]]]], sources: Sequence[Source], bits: dict[str, float]
) -> Iterator[tuple[Segment, Matrix]]:
    """The segments' weights; the entropy of a source so far goes to `bits`."""
    counts: dict[str, Counter[int]] = {source.key: Counter() for source in sources}
    bits.update(dict.fromkeys(counts, 0.0))
    for segment, (weights, counted) in found:
        key = sources[segment.source].key
        counts[key].update(counted)
        bits[key] = _entropy_bits(counts[key])
        yield segment, weights


def entropies(encoded: EncodedStreams, sources: Sequence[Source], n_threads: int = 2) -> dict[str, float]:
    """Bits that the levels of every source would take at their order-0 entropy: one table a source and a set.

    Which set a level comes from is known before it, so the entropy is that of the level given the set. Raises
    ValueError as `decode` does.
    """
    side, layout = _parse_side(encoded.side, sources, len(encoded.streams))
    wanted = {source.key for source in sources}
    counts: dict[str, Counter[int]] = {source.key: Counter() for source in sources}
    for segment, found in _ahead(_count_stream, encoded, layout, sources, side, wanted, n_threads):
        counts[sources[segment.source].key].update(found)
    return {key: _entropy_bits(found) for key, found in counts.items()}


def _ahead(
    work: Callable[[bytes, bool, Sequence[Segment], Sequence[Source], _Side], list[_T]],
    encoded: EncodedStreams,
    layout: Sequence[tuple[Segment, ...]],
    sources: Sequence[Source],
    side: _Side,
    wanted: set[str],
    n_threads: int,
) -> Iterator[tuple[Segment, _T]]:
    """What `work` makes of each segment of the streams that hold a wanted tensor, in order; later streams run ahead."""
    needed = [i for i, segments in enumerate(layout) if any(sources[s.source].key in wanted for s in segments)]
    pending: deque[tuple[int, Future[list[_T]]]] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        try:
            while needed or pending:
                while needed and len(pending) <= n_threads:
                    i = needed.pop(0)
                    pending.append(
                        (i, pool.submit(work, encoded.streams[i], i in side.mixed, layout[i], sources, side))
                    )
                i, future = pending.popleft()
                yield from zip(layout[i], future.result(), strict=True)
        finally:
            for _, future in pending:
                future.cancel()


def _assemble(
    decoded: Iterable[tuple[Segment, Matrix]], sources: Sequence[Source], side: _Side, wanted: set[str]
) -> Iterator[tuple[str, Matrix]]:
    """Whole tensors from their segments; those without weights, which no stream holds, in their places."""
    n_done = 0
    target = np.zeros((0, 0), np.float32)
    for segment, block in decoded:
        yield from _empty(sources[n_done : segment.source], wanted)
        n_done = segment.source
        source = sources[segment.source]
        if source.key not in wanted:
            continue
        if segment.start == 0:
            target = np.empty((source.rows, source.columns), np.float32)
        flipped = source.key in side.rotations.transposed
        (target.T if flipped else target)[segment.start : segment.stop] = block
        if segment.stop == _height(source, side.rotations.transposed):
            yield source.key, target
            n_done = segment.source + 1
    yield from _empty(sources[n_done:], wanted)


def _empty(sources: Sequence[Source], wanted: set[str]) -> Iterator[tuple[str, Matrix]]:
    for source in sources:
        if source.n_weights == 0 and source.key in wanted:
            yield source.key, np.zeros((source.rows, source.columns), np.float32)


# --- weights in steps -------------------------------------------------------------------------------------------------


def _exponent(step: float, own: float) -> int:
    return int(np.clip(round(_OCTAVE_STEPS * float(np.log2(own / step))), -2048, 2047))


def _read(source: Source, read: Callable[[str], Matrix], transposed: frozenset[str]) -> Matrix:
    weights = read(source.key)
    if weights.shape != (source.rows, source.columns):
        raise ValueError(f"{weights.shape[0]} x {weights.shape[1]} weights read; {source.rows} x {source.columns} said")
    return weights.T if source.key in transposed else weights


def _in_steps(weights: Matrix, step: np.float32) -> Matrix:
    """A fresh array of weights / step."""
    largest = float(np.max(np.abs(weights), initial=0.0))
    if largest > _MAX_SIZE * float(step):
        raise ValueError(f"a weight of magnitude {largest:g} is too large for the step {float(step):g}")
    if float(step) > 1e-30:
        return np.ascontiguousarray(weights / step, dtype=np.float32)
    return np.ascontiguousarray((weights.astype(np.float64) / float(step)).astype(np.float32))


def _trellis(n_states: int) -> NDArray[np.int64]:
    """next_state (n_states, 2): Ungerboeck's systematic feedback encoder."""
    h0, h1 = _POLYNOMIALS[n_states]
    table = np.zeros((n_states, 2), np.int64)
    for state in range(n_states):
        for bit in range(2):
            shifted = state >> 1
            if state & 1:
                shifted ^= h0 >> 1
            if bit:
                shifted ^= h1 >> 1
            table[state, bit] = shifted
    return table


# --- one stream -------------------------------------------------------------------------------------------------------

_N_INTEGER_KINDS = 2


@dataclass
class _Block:
    """One segment on its way through the encoder: rotated weights in steps, and what the search knows of them."""

    weights: Matrix
    period: int
    labels: NDArray[np.uint8]
    row_scale: Matrix
    column_scale: Matrix
    levels: NDArray[np.int32]


def _period(source: Source, transposed: bool) -> int:
    return 1 if transposed else source.kernel


@dataclass(frozen=True)
class _Stream:
    """A stream's bytes, whether mixing coded them, and by segment the squared error in squared steps, and the bytes."""

    data: bytes
    is_mixed: bool
    squared_errors: list[float]
    lengths: list[int]


def _encode_stream(
    weights: list[Matrix],
    segments: Sequence[Segment],
    sources: Sequence[Source],
    params: TrellisParams,
    rotations: Rotations,
) -> _Stream:
    blocks = []
    for matrix, segment in zip(weights, segments, strict=True):
        source = sources[segment.source]
        if source.key in rotations.use:
            apply(matrix, rotations.items[rotations.use[source.key]], inverse=False)
        blocks.append(_block(matrix, _period(source, source.key in rotations.transposed)))
    return _smaller(blocks, _search(blocks, params), params)


def _smaller(blocks: Sequence[_Block], points: Matrix, params: TrellisParams) -> _Stream:
    """The stream coded by mixing where that saves what is asked of it; else without."""
    plain = _written(blocks, points, params, is_mixed=False)
    gain = params.mixing_gain
    if gain >= 1 or (gain > 0 and max(map(_foreseeable, blocks)) < _LEAST_FORESEEABLE):
        return plain
    mixed = _written(blocks, points, params, is_mixed=True)
    return mixed if len(mixed.data) < (1 - gain) * len(plain.data) else plain


def _foreseeable(block: _Block) -> float:
    """About the share of the energy that a linear guess from neighbours explains: squared correlations, summed."""
    weights, lag = block.weights, block.period
    pairs = [(weights[:, 1:], weights[:, :-1]), (weights[1:], weights[:-1])]
    if lag > 1:
        pairs.append((weights[:, lag:], weights[:, :-lag]))
    energy = max(float(np.einsum("ij,ij->", weights, weights)), 1e-30)
    return sum((float(np.einsum("ij,ij->", a, b)) / energy) ** 2 for a, b in pairs)


def _written(blocks: Sequence[_Block], points: Matrix, params: TrellisParams, *, is_mixed: bool) -> _Stream:
    next_state = _trellis(params.n_states)
    coder = _level_coder_for_writing(sum(block.levels.size for block in blocks))
    points = _code_points(coder, points)
    code = _level_code(coder, is_mixed=is_mixed)
    errors, ends = [], []
    previous_class = 0
    for block in blocks:
        decoded = _Decoded.empty(block.levels, block.labels, points, is_mixed=is_mixed)
        previous_class = _code_block(coder, code, decoded, block.period, previous_class, next_state)
        if is_mixed:
            decoded = _code_lean(coder, decoded, _best_lean(decoded, block.weights, next_state))
        ends.append(int(coder.window[3]))
        difference = decoded.weights(next_state)
        difference -= block.weights
        errors.append(float(np.sum(np.square(difference, dtype=np.float64))))
    data = coder.finish()
    ends[-1] = len(data)
    lengths = [min(end, len(data)) - start for start, end in zip([0, *ends], ends, strict=False)]
    return _Stream(data, is_mixed, errors, lengths)


@dataclass(frozen=True)
class _Decoded:
    """A segment as a reader has it; `guesses`, as many as levels, and `lean`, in 1/64, only where levels are mixed."""

    levels: NDArray[np.int32]
    labels: NDArray[np.uint8]
    points: Matrix
    guesses: NDArray[np.int32]
    lean: int = 0

    @classmethod
    def empty(cls, levels: NDArray[np.int32], labels: NDArray[np.uint8], points: Matrix, *, is_mixed: bool) -> _Decoded:
        """With room for guesses where there will be some."""
        return cls(levels, labels, points, np.zeros(levels.shape if is_mixed else (0, 0), np.int32))

    def weights(self, next_state: NDArray[np.int64]) -> Matrix:
        """In steps: the points of the levels, moved towards what was guessed of them."""
        from pqcli.core.trellis.loops import dequantize

        weights = np.empty(self.levels.shape, np.float32)
        dequantize(self.levels, self.labels, next_state, self.points, weights)
        if self.lean:
            from pqcli.core.trellis.mixing_loops import lean

            lean(weights, self.guesses, np.float32(self.lean / _LEANS))
        return weights


_Piece = tuple[Segment, _Decoded]


def _best_lean(decoded: _Decoded, weights: Matrix, next_state: NDArray[np.int64]) -> int:
    """How far weights lie from their points towards the guesses: the share that leaves the least squared error."""
    points = decoded.weights(next_state)
    ways = np.clip(decoded.guesses / np.float32(65536) - points, -1, 1)
    energy = float(np.sum(np.square(ways, dtype=np.float64)))
    return int(
        np.clip(
            round(_LEANS * float(np.sum((weights - points) * ways, dtype=np.float64)) / max(energy, 1e-9)), 0, _LEANS
        )
    )


def _decode_stream(
    data: bytes, is_mixed: bool, segments: Sequence[Segment], sources: Sequence[Source], side: _Side
) -> list[Matrix]:
    """The segments' weights (coded rows, coded columns)."""
    return [_weights(piece, sources, side) for piece in _levels_of_stream(data, is_mixed, segments, sources, side)]


def _decode_and_count_stream(
    data: bytes, is_mixed: bool, segments: Sequence[Segment], sources: Sequence[Source], side: _Side
) -> list[tuple[Matrix, dict[int, int]]]:
    """What `_decode_stream` and `_count_stream` give, for little more than one of them."""
    pieces = _levels_of_stream(data, is_mixed, segments, sources, side)
    return [(_weights(piece, sources, side), _symbol_counts(piece, side)) for piece in pieces]


def _weights(piece: _Piece, sources: Sequence[Source], side: _Side) -> Matrix:
    from pqcli.core.trellis.loops import scale_up

    segment, decoded = piece
    source = sources[segment.source]
    weights = decoded.weights(_trellis(side.n_states))
    if source.key in side.rotations.use:
        apply(weights, side.rotations.items[side.rotations.use[source.key]], inverse=True)
    scale_up(weights, side.step_of(segment.source))
    return weights


def _count_stream(
    data: bytes, is_mixed: bool, segments: Sequence[Segment], sources: Sequence[Source], side: _Side
) -> list[dict[int, int]]:
    """How often each symbol, 3 * level + set, occurs in each segment."""
    return [_symbol_counts(piece, side) for piece in _levels_of_stream(data, is_mixed, segments, sources, side)]


def _symbol_counts(piece: _Piece, side: _Side) -> dict[int, int]:
    from pqcli.core.trellis.loops import sets

    _, decoded = piece
    which = np.empty(decoded.levels.shape, np.uint8)
    sets(decoded.levels, decoded.labels, _trellis(side.n_states), which)
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


def _entropy_bits(counts: Mapping[int, int]) -> float:
    bits = 0.0
    for which in range(3):
        n = np.array([count for symbol, count in counts.items() if symbol % 3 == which], np.float64)
        bits += float((n * np.log2(n.sum() / n)).sum())
    return bits


def _levels_of_stream(
    data: bytes, is_mixed: bool, segments: Sequence[Segment], sources: Sequence[Source], side: _Side
) -> Iterator[_Piece]:
    """The segments in turn, with what they hold."""
    shapes = [
        (s.stop - s.start, sources[s.source].n_weights // _height(sources[s.source], side.rotations.transposed))
        for s in segments
    ]
    n_weights = sum(rows * columns for rows, columns in shapes)
    if n_weights > (len(data) + 8) * _WEIGHTS_PER_BYTE:
        raise ValueError(f"{len(data)} bytes cannot hold {n_weights} weights")
    next_state = _trellis(side.n_states)
    coder = _level_coder_for_reading(data)
    points = _code_points(coder, np.zeros((3, 0), np.float32))
    code = _level_code(coder, is_mixed=is_mixed)
    previous_class = 0
    for segment, shape in zip(segments, shapes, strict=True):
        source = sources[segment.source]
        flipped = source.key in side.rotations.transposed
        levels, labels = np.empty(shape, np.int32), np.empty(shape[1], np.uint8)
        decoded = _Decoded.empty(levels, labels, points, is_mixed=is_mixed)
        previous_class = _code_block(coder, code, decoded, _period(source, flipped), previous_class, next_state)
        yield segment, _code_lean(coder, decoded) if is_mixed else decoded
    coder.finish()


def _height(source: Source, transposed: frozenset[str]) -> int:
    return source.columns if source.key in transposed else source.rows


def _block(weights: Matrix, period: int) -> _Block:
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
        starts = np.arange(0, n_columns, _LABEL_GROUP)
        groups = np.add.reduceat(columns, starts) / np.minimum(_LABEL_GROUP, n_columns - starts)
        labels = np.repeat(np.sqrt(groups) > _PURE_ABOVE, _LABEL_GROUP)[:n_columns]
    tiny = 1e-30
    row_scale = 2 * np.log2(np.maximum(rows, tiny) / max(mean, tiny))
    column_scale = 2 * np.log2(np.maximum(shrunk, tiny)) + 24
    return _Block(
        weights,
        period,
        labels.astype(np.uint8),
        row_scale.astype(np.float32),
        column_scale.astype(np.float32),
        np.zeros(weights.shape, np.int32),
    )


def _search(blocks: Sequence[_Block], params: TrellisParams) -> Matrix:
    """Fill in the blocks' levels; the reconstruction points (3, N_POINTS) that fit them."""
    from pqcli.core.trellis.loops import N_CLASSES, N_POINTS
    from pqcli.core.trellis.viterbi import Costs, Search
    from pqcli.core.trellis.viterbi_loops import N_COSTS, gather

    prior = _prior_probabilities(N_CLASSES, N_COSTS)
    scale = 2.0 ** ((np.arange(N_CLASSES) + 0.5) / 4 - 6)
    slope = np.minimum(2.0 / scale, 4.0).astype(np.float32)
    points: Matrix = np.tile(np.arange(N_POINTS, dtype=np.float32), (3, 1))
    costs = Costs(_bits(prior), slope, points, params.rate_weight)
    trial = [_sample(block) for block in blocks] if sum(b.weights.size for b in blocks) > _TRIAL_ALL_BELOW else blocks
    schedule = [(trial, _TRIAL_STATES)] * _TRIAL_PASSES + [(blocks, params.n_states)]
    for some, n_states in schedule:
        next_state = _trellis(n_states)
        search = Search(costs, next_state)
        counts = np.zeros((N_CLASSES, 3, N_COSTS))
        sums = np.zeros((3, N_POINTS, 2))
        for block in some:
            scales = block.row_scale, block.column_scale
            search.fill(block.weights, *scales, block.labels, block.levels)
            gather(block.weights, *scales, block.levels, block.labels, next_state, counts, sums)
        seen = counts.copy()
        seen[1:] += 0.25 * counts[:-1]
        seen[:-1] += 0.25 * counts[1:]
        means = sums[..., 0] / np.maximum(sums[..., 1], 1)
        points = np.where(sums[..., 1] > 20, means, np.arange(N_POINTS)).astype(np.float32)
        costs = Costs(_bits(seen + 20 * prior), slope, points, params.rate_weight)
    return costs.points


def _sample(block: _Block) -> _Block:
    """Every so manieth batch of runs of a block."""
    from pqcli.core.trellis.loops import RUN_LENGTH
    from pqcli.core.trellis.viterbi_loops import LANES

    n_rows, n_columns = block.weights.shape
    height = max(1, RUN_LENGTH // n_columns) * LANES
    rows = np.flatnonzero((np.arange(n_rows) // height) % _TRIAL_SHARE == 0)
    weights = np.ascontiguousarray(block.weights[rows])
    return _Block(
        weights, block.period, block.labels, block.row_scale[rows], block.column_scale,
        np.zeros(weights.shape, np.int32),
    )  # fmt: skip


def _prior_probabilities(n_classes: int, n_costs: int) -> NDArray[np.float64]:
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


def _bits(weights: NDArray[np.float64]) -> Matrix:
    """Bits by (class, set, magnitude), the sign's included, from unnormalised probabilities."""
    probability = weights / weights.sum(axis=2, keepdims=True)
    bits = -np.log2(np.maximum(probability, 1e-12)) + (np.arange(weights.shape[2]) > 0)
    return np.asarray(np.minimum(bits, 40), np.float32)


# --- the layout of a stream -------------------------------------------------------------------------------------------


def _level_coder_for_writing(n_weights: int) -> RangeCoder:
    from pqcli.core.entropy.rangecoder import RangeCoder
    from pqcli.core.trellis.loops import BYTES_PER_LEVEL

    return _with_level_models(RangeCoder.writer(BYTES_PER_LEVEL * n_weights + 4096, _n_models()))


def _level_coder_for_reading(data: bytes) -> RangeCoder:
    from pqcli.core.entropy.rangecoder import RangeCoder

    return _with_level_models(RangeCoder.reader(data, _n_models()))


def _n_models() -> int:
    from pqcli.core.entropy.rangecoder import N_INTEGER_MODELS
    from pqcli.core.trellis.loops import N_LEVEL_MODELS

    return N_LEVEL_MODELS + 2 + _N_INTEGER_KINDS * N_INTEGER_MODELS


def _with_level_models(coder: RangeCoder) -> RangeCoder:
    from pqcli.core.trellis.loops import N_LEVEL_MODELS, initial_models

    coder.models[:N_LEVEL_MODELS] = initial_models()
    return coder


def _code_points(coder: RangeCoder, points: Matrix) -> Matrix:
    """Reconstruction points as offsets from their levels in 1/256, those of magnitude 0 being 0."""
    from pqcli.core.entropy.rangecoder import N_INTEGER_MODELS
    from pqcli.core.trellis.loops import N_LEVEL_MODELS, N_POINTS

    first_model = N_LEVEL_MODELS + 2 + N_INTEGER_MODELS
    result = np.zeros((3, N_POINTS), np.float32)
    for which in range(3):
        for magnitude in range(1, N_POINTS):
            if which != 1 and (magnitude & 1) != (which > 0):
                continue
            if which == 1 and (magnitude & 1) == 0:
                continue
            offset = 0
            if coder.encoding:
                offset = int(np.clip(np.round((points[which, magnitude] - magnitude) * 256), -255, 255))
            offset = coder.signed(first_model, offset)
            if abs(offset) > 255:
                raise ValueError(f"reconstruction point {offset}/256 off its level")
            result[which, magnitude] = magnitude + offset / 256
    return result


_LevelCode = Callable[[_Decoded, int, int, NDArray[np.int64]], bool]
"""(decoded, period, scale0, next_state): writes or reads a segment's levels; False where these are nonsense."""


def _level_code(coder: RangeCoder, *, is_mixed: bool) -> _LevelCode:
    """How the levels of one stream are coded; what is learned from one segment serves the next."""
    from pqcli.core.entropy.rangecoder import RATES
    from pqcli.core.trellis.loops import code_levels

    encoding, window, buffer = coder.encoding, coder.window, coder.buffer
    if not is_mixed:
        return lambda decoded, *how: code_levels(
            encoding, decoded.levels, decoded.labels, *how, coder.models, RATES, window, buffer
        )
    from pqcli.core.trellis.mixing_loops import Mixing, code_levels_mixed

    mixing = Mixing.fresh()
    return lambda decoded, *how: code_levels_mixed(
        encoding, decoded.levels, decoded.labels, *how, *mixing, decoded.guesses, RATES, window, buffer
    )


def _code_lean(coder: RangeCoder, decoded: _Decoded, lean: int = 0) -> _Decoded:
    """Behind the levels of a segment that are mixed: how far its weights lie towards the guesses."""
    from pqcli.core.entropy.rangecoder import N_INTEGER_MODELS
    from pqcli.core.trellis.loops import N_LEVEL_MODELS

    lean = coder.integer(N_LEVEL_MODELS + 2 + N_INTEGER_MODELS, lean)
    if lean > _LEANS:
        raise ValueError(f"weights moved by {lean}/{_LEANS}")
    return replace(decoded, lean=lean)


def _code_block(
    coder: RangeCoder,
    code: _LevelCode,
    decoded: _Decoded,
    period: int,
    previous_class: int,
    next_state: NDArray[np.int64],
) -> int:
    """One segment: the class of its mean magnitude, its labels, its levels. The class, for the next to differ from."""
    from pqcli.core.trellis.loops import N_LEVEL_MODELS

    levels, labels = decoded.levels, decoded.labels
    scale_class = 0
    if coder.encoding:
        mean = float(np.mean(np.abs(levels), dtype=np.float64))
        scale_class = int(np.clip(round(4 * float(np.log2(mean + 2**-6))), -24, 59))
    scale_class = previous_class + coder.signed(N_LEVEL_MODELS + 2, scale_class - previous_class)
    if not -24 <= scale_class <= 59:
        raise ValueError(f"scale class {scale_class}")
    n_columns = levels.shape[1]
    groups = [(i, i + 1) for i in range(period)] if period > 1 else [
        (i, min(i + _LABEL_GROUP, n_columns)) for i in range(0, n_columns, _LABEL_GROUP)
    ]  # fmt: skip
    previous = 0
    for start, stop in groups:
        previous = coder.bit(N_LEVEL_MODELS + previous, int(labels[start]) if coder.encoding else 0)
        labels[start:stop] = previous
    if period > 1:
        labels[:] = np.tile(labels[:period], n_columns // period)
    octave, quarter = divmod(scale_class, 4)
    scale0 = ((4096, 4871, 5793, 6889)[quarter] << 6 >> (6 - octave)) if octave < 6 else 4096 << octave
    if not code(decoded, period, scale0, next_state):
        raise ValueError("a level is beyond all bounds")
    return scale_class


# --- the layout of the side information -------------------------------------------------------------------------------


def _code_side(side: _Side, sources: Sequence[Source], n_streams: int) -> bytes:
    entries = sum(item.basis.size for item in side.rotations.items)
    coder = _level_coder_for_writing(entries + 64 * len(sources) + n_streams + 64)
    _code_side_fields(coder, side, sources)
    if side.mixed:
        _code_mixed(coder, side.mixed, n_streams)
    log_states = side.n_states.bit_length() - 1 | (_MIXES if side.mixed else 0)
    return _HEADER.pack(side.step, log_states, side.stream_weights.bit_length() - 1) + coder.finish()


def _parse_side(data: bytes, sources: Sequence[Source], n_streams: int) -> tuple[_Side, list[tuple[Segment, ...]]]:
    if len(data) < _HEADER.size:
        raise ValueError(f"side information of {len(data)} bytes")
    step, log_states, log_weights = _HEADER.unpack_from(data)
    mixes, log_states = log_states & _MIXES, log_states & ~_MIXES
    if not 0.0 < step <= _LARGEST:
        raise ValueError(f"step {step}")
    if 1 << min(log_states, 30) not in N_STATES:
        raise ValueError(f"a trellis of 2^{log_states} states")
    if log_weights > 40:
        raise ValueError(f"streams of 2^{log_weights} weights")
    coder = _level_coder_for_reading(data[_HEADER.size :])
    side = _code_side_fields(coder, _Side(step, 1 << log_states, 1 << log_weights, (), Rotations()), sources)
    layout = stream_layout(sources, side.rotations.transposed, side.stream_weights)
    if len(layout) != n_streams:
        raise ValueError(f"{n_streams} streams where the shapes make {len(layout)}")
    if mixes:
        side = replace(side, mixed=_code_mixed(coder, frozenset(), n_streams))
    coder.finish()
    return side, layout


def _code_mixed(coder: RangeCoder, mixed: frozenset[int], n_streams: int) -> frozenset[int]:
    """Which streams are coded by mixing."""
    from pqcli.core.trellis.loops import N_LEVEL_MODELS

    return frozenset(i for i in range(n_streams) if coder.bit(N_LEVEL_MODELS + 1, int(i in mixed)))


def _code_side_fields(coder: RangeCoder, side: _Side, sources: Sequence[Source]) -> _Side:
    """Write `side`'s fields, or read them: the side that a reader then has."""
    from pqcli.core.entropy.rangecoder import N_INTEGER_MODELS
    from pqcli.core.trellis.loops import N_LEVEL_MODELS

    first_model = N_LEVEL_MODELS + 2
    rotations = side.rotations
    exponents: list[int] = []
    use: dict[str, int] = {}
    transposed: set[str] = set()
    last = 0
    for index, source in enumerate(sources):
        known = coder.encoding
        exponents.append(last + coder.signed(first_model, side.exponents[index] - last if known else 0))
        last = exponents[-1]
        if not -2048 <= last <= 2047:
            raise ValueError(f"step exponent {last}")
        item = coder.integer(first_model + N_INTEGER_MODELS, rotations.use.get(source.key, -1) + 1 if known else 0)
        if item:
            use[source.key] = item - 1
        if coder.bit(N_LEVEL_MODELS, int(source.key in rotations.transposed) if known else 0):
            transposed.add(source.key)
    users: dict[int, list[Source]] = {}
    for source in sources:
        if source.key in use:
            users.setdefault(use[source.key], []).append(source)
    if sorted(users) != list(range(len(users))):
        raise ValueError("a rotation without a user")
    items = [
        _code_rotation(coder, users[i], transposed, rotations.items[i] if coder.encoding else None)
        for i in range(len(users))
    ]
    flipped = frozenset(transposed)
    return _Side(side.step, side.n_states, side.stream_weights, tuple(exponents), Rotations(tuple(items), use, flipped))


def _code_rotation(
    coder: RangeCoder, users: Sequence[Source], transposed: set[str], rotation: Rotation | None
) -> Rotation:
    """A rotation over the kernel positions of its users, or else over all columns of the coded matrix."""
    from pqcli.core.entropy.rangecoder import N_INTEGER_MODELS, RATES
    from pqcli.core.trellis.loops import N_LEVEL_MODELS, code_levels

    sizes = {
        (s.rows if s.key in transposed else s.columns) if _period(s, s.key in transposed) == 1 else s.kernel
        for s in users
    }
    if len(sizes) != 1:
        raise ValueError(f"one rotation for vectors of {len(sizes)} sizes")
    size = sizes.pop()
    first_model = N_LEVEL_MODELS + 2 + N_INTEGER_MODELS
    k = coder.integer(first_model, len(rotation.basis) if rotation else 0)
    if not 1 <= k <= min(size, _MAX_RANK):
        raise ValueError(f"{k} basis vectors of size {size}")
    if not coder.encoding and k * size > (len(coder.buffer) + 8) * _WEIGHTS_PER_BYTE:
        raise ValueError(f"{len(coder.buffer)} bytes cannot hold {k} basis vectors of size {size}")
    precisions: list[int] = []
    last = 0
    for i in range(k):
        last += coder.signed(first_model, rotation.precisions[i] - last if rotation else 0)
        if not 0 <= last <= 30:
            raise ValueError(f"a basis vector of precision {last}")
        precisions.append(last)
    levels = 2 * rotation.basis if rotation else np.zeros((k, size), np.int32)
    labels = np.ones(size, np.uint8)
    if not code_levels(
        coder.encoding, levels, labels, 1, 1 << 14, _trellis(1), coder.models, RATES, coder.window, coder.buffer
    ):
        raise ValueError("a basis entry is beyond all bounds")
    return Rotation(levels >> 1, tuple(precisions))
