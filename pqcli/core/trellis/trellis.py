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

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pqcli.core.importance import Importance
from pqcli.core.lookahead import in_order
from pqcli.core.threads import lone_blas
from pqcli.core.trellis import side as side_information
from pqcli.core.trellis.feedback import Feedback, RowSteps
from pqcli.core.trellis.params import TrellisParams
from pqcli.core.trellis.rotation import Rotations, fit_rotations
from pqcli.core.trellis.side import Side, make_side, parse_side, write_side
from pqcli.core.trellis.sources import Source
from pqcli.core.trellis.stream import (
    EncodedStream,
    count_stream,
    decode_and_count_stream,
    decode_stream,
    encode_split,
    encode_stream,
    entropy_bits,
)
from pqcli.core.trellis.streams import Segment, height, stream_layout

__all__ = [
    "EncodedStreams",
    "TrellisParams",
    "decode",
    "encode",
    "entropies",
    "fit_rotations",
    "gather_streams",
    "segment_importance",
    "segment_weights",
]

Matrix = NDArray[np.float32]
_T = TypeVar("_T")

_MAX_SIZE = float(1 << 29)
"""Largest weight in steps; a level must stay an int32."""
_MOST_IMPORTANT = np.float32(8.0)
"""Of a row, or of a column, against their geometric mean: path metrics have 16 bits and saturate."""
_LEAST_QUOTIENT_STEP = 1e-30
"""Below, a float32 quotient would lose digits."""


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
        return side_information.mixes(self.side)

    @property
    def has_rows(self) -> bool:
        """Whether rows of any source have steps of their own, which a decoder must know of."""
        return side_information.has_rows(self.side)


def encode(
    sources: Sequence[Source],
    read: Callable[[str], Matrix],
    params: TrellisParams,
    rotations: Rotations,
    steps: Mapping[str, float] | None = None,
    n_threads: int = 2,
    importance: Mapping[str, Importance] | None = None,
    second_order: Mapping[str, RowSteps] | None = None,
) -> EncodedStreams:
    """The sources as streams. `read(key)` is called once per source, in order; it gives (rows, columns) float32.

    `steps` gives a source a step of its own, rounded to params.step * 2^(i/8). At most `n_threads + 1` streams' weights
    are held beside the tensor just read; with `second_order` tensors' in place of streams'. The bytes do not depend on
    `n_threads`. Raises ValueError where a weight is too large for its step (2^29 steps).

    With `importance`, by key and of the matrix (rows, columns), squared errors within a source count by it when levels
    are chosen (between sources, steps decide). Raises ValueError where a rotation mixes columns that differ in it, and
    for a source with feedback.

    `second_order` gives, by key, the steps of a source's rows and perhaps how errors are fed forward (`feedback`);
    sources with feedback are coded transposed where that says so.
    """
    given = second_order or {}
    sources_fed = [source.key for source in sources if source.key in given and isinstance(given[source.key], Feedback)]
    rotations = replace(rotations, transposed=rotations.transposed | turned(given).intersection(sources_fed))
    side = make_side(sources, params, rotations, steps, given)
    layout = stream_layout(sources, rotations.transposed, params.stream_weights)

    def work(job: tuple[list[tuple[Segment, ...]], list[Matrix]]) -> list[EncodedStream]:
        streams, weights = job
        if len(streams) > 1:
            return encode_split(weights[0], [segment for (segment,) in streams], sources, params, rotations, given)
        named = [(segment, sources[segment.source]) for segment in streams[0]]
        importances = [
            segment_importance(
                importance[source.key], segment, source, is_transposed=source.key in rotations.transposed
            )
            if importance and source.key in importance
            else None
            for segment, source in named
        ]
        return [encode_stream(weights, streams[0], sources, params, rotations, importances, given)]

    prepared = _prepared(streams_together(layout, sources, frozenset(sources_fed)), sources, read, side)
    with lone_blas() if given else nullcontext():
        done = in_order(prepared, work, n_threads, ahead=n_threads + 1)
        return gather_streams((stream for job in done for stream in job), layout, sources, side)


def turned(second_order: Mapping[str, RowSteps]) -> frozenset[str]:
    """The sources with feedback that are coded transposed."""
    return frozenset(key for key, rows in second_order.items() if isinstance(rows, Feedback) and rows.is_transposed)


def streams_together(
    layout: Sequence[tuple[Segment, ...]], sources: Sequence[Source], fed: Collection[str]
) -> Iterator[list[tuple[Segment, ...]]]:
    """The streams, those of a source whose errors are fed forward from one to the next together."""
    job: list[tuple[Segment, ...]] = []
    for segments in layout:
        goes_on = job and segments[0].start > 0 and sources[segments[0].source].key in fed
        if job and not goes_on:
            yield job
            job = []
        job.append(segments)
    if job:
        yield job


def gather_streams(
    coded: Iterable[EncodedStream], layout: Sequence[tuple[Segment, ...]], sources: Sequence[Source], side: Side
) -> EncodedStreams:
    """All streams of a layout, coded and in its order, together with the side information."""
    streams: list[bytes] = []
    mixed: set[int] = set()
    errors = {source.key: 0.0 for source in sources}
    sizes = {source.key: 0 for source in sources}
    for segments, stream in zip(layout, coded, strict=True):
        if stream.is_mixed:
            mixed.add(len(streams))
        streams.append(stream.data)
        for segment, error, length in zip(segments, stream.squared_errors, stream.lengths, strict=True):
            errors[sources[segment.source].key] += error * float(side.step_of(segment.source)) ** 2
            sizes[sources[segment.source].key] += length
    side = replace(side, mixed=frozenset(mixed))
    return EncodedStreams(write_side(side, sources, len(streams)), tuple(streams), errors, sizes)


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
    side, layout = parse_side(encoded.side, sources, len(encoded.streams))
    wanted = {source.key for source in sources} if keys is None else set(keys)
    if bits is None:
        found = _ahead(decode_stream, encoded, layout, sources, side, wanted, n_threads)
    else:
        both = _ahead(decode_and_count_stream, encoded, layout, sources, side, wanted, n_threads)
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
        bits[key] = entropy_bits(counts[key])
        yield segment, weights


def entropies(encoded: EncodedStreams, sources: Sequence[Source], n_threads: int = 2) -> dict[str, float]:
    """Bits that the levels of every source would take at their order-0 entropy: one table a source and a set.

    Which set a level comes from is known before it, so the entropy is that of the level given the set. Raises
    ValueError as `decode` does.
    """
    side, layout = parse_side(encoded.side, sources, len(encoded.streams))
    wanted = {source.key for source in sources}
    counts: dict[str, Counter[int]] = {source.key: Counter() for source in sources}
    for segment, found in _ahead(count_stream, encoded, layout, sources, side, wanted, n_threads):
        counts[sources[segment.source].key].update(found)
    return {key: entropy_bits(found) for key, found in counts.items()}


def _ahead(
    work: Callable[[bytes, bool, Sequence[Segment], Sequence[Source], Side], list[_T]],
    encoded: EncodedStreams,
    layout: Sequence[tuple[Segment, ...]],
    sources: Sequence[Source],
    side: Side,
    wanted: set[str],
    n_threads: int,
) -> Iterator[tuple[Segment, _T]]:
    """What `work` makes of each segment of the streams that hold a wanted tensor, in order; later streams run ahead."""
    needed = [i for i, segments in enumerate(layout) if any(sources[s.source].key in wanted for s in segments)]

    def of_stream(stream: tuple[int, bytes]) -> list[_T]:
        i, data = stream
        return work(data, i in side.mixed, layout[i], sources, side)

    fetched = ((i, encoded.streams[i]) for i in needed)
    for i, found in zip(needed, in_order(fetched, of_stream, n_threads, ahead=n_threads + 1), strict=True):
        yield from zip(layout[i], found, strict=True)


def _assemble(
    decoded: Iterable[tuple[Segment, Matrix]], sources: Sequence[Source], side: Side, wanted: set[str]
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
        if segment.stop == height(source, side.rotations.transposed):
            yield source.key, target
            n_done = segment.source + 1
    yield from _empty(sources[n_done:], wanted)


def _empty(sources: Sequence[Source], wanted: set[str]) -> Iterator[tuple[str, Matrix]]:
    for source in sources:
        if source.n_weights == 0 and source.key in wanted:
            yield source.key, np.zeros((source.rows, source.columns), np.float32)


# --- weights in steps -------------------------------------------------------------------------------------------------


def segment_weights(matrix: Matrix, segment: Segment, source: Source, side: Side) -> Matrix:
    """A segment's weights as `encode_stream` takes them: rows of the coded matrix in steps, a fresh contiguous array.

    `matrix` is all of the source, (rows, columns) float32. Raises ValueError where it has another shape, and where a
    weight is too large for its step (2^29 steps).
    """
    if matrix.shape != (source.rows, source.columns):
        raise ValueError(f"{matrix.shape[0]} x {matrix.shape[1]} weights read; {source.rows} x {source.columns} said")
    coded = matrix.T if source.key in side.rotations.transposed else matrix
    return in_steps(coded[segment.start : segment.stop], side.step_of(segment.source))


def segment_importance(
    importance: Importance, segment: Segment, source: Source, *, is_transposed: bool
) -> Importance | None:
    """A segment's importance as `encode_stream` takes it: of rows of the coded matrix, relative to the whole source.

    `importance` is that of the source's matrix (rows, columns). None where every weight counts alike; factors beyond
    1/8 and 8 of their geometric mean count as these. Raises ValueError where the shape is another.
    """
    if importance.shape != (source.rows, source.columns):
        raise ValueError(f"importance of {importance.shape} for {source.rows} x {source.columns} weights")
    if importance.is_uniform:
        return None
    known = (importance.T if is_transposed else importance).normalised()
    rows, columns = (np.clip(factors, 1 / _MOST_IMPORTANT, _MOST_IMPORTANT) for factors in (known.rows, known.columns))
    return Importance(rows[segment.start : segment.stop], columns)


def _prepared(
    jobs: Iterable[list[tuple[Segment, ...]]], sources: Sequence[Source], read: Callable[[str], Matrix], side: Side
) -> Iterator[tuple[list[tuple[Segment, ...]], list[Matrix]]]:
    """Every job's streams and weights, those of one source as a whole; each source is read once."""
    held: tuple[int, Matrix] | None = None
    for streams in jobs:
        weights: list[Matrix] = []
        segments = streams[0]
        if len(streams) > 1:
            segments = (Segment(segments[0].source, segments[0].start, streams[-1][0].stop),)
        for segment in segments:
            source = sources[segment.source]
            if held is None or held[0] != segment.source:
                held = (segment.source, read(source.key))
            weights.append(segment_weights(held[1], segment, source, side))
        yield streams, weights
        del weights  # the coder of the stream alone holds them


def in_steps(weights: Matrix, step: np.float32) -> Matrix:
    """A fresh array of weights / step. Raises ValueError where a weight is too large for the step (2^29 steps)."""
    largest = float(np.max(np.abs(weights), initial=0.0))
    if largest > _MAX_SIZE * float(step):
        raise ValueError(f"a weight of magnitude {largest:g} is too large for the step {float(step):g}")
    if float(step) > _LEAST_QUOTIENT_STEP:
        return np.ascontiguousarray(weights / step, dtype=np.float32)
    return np.ascontiguousarray((weights.astype(np.float64) / float(step)).astype(np.float32))
