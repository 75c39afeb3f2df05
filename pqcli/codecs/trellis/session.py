"""Encoding with the trellis: one level after another over the same rotations."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from pqcli.codecs.base import Draft, Matrix, Session, StreamPiece, Streams, Survey, Tell, Weights, as_matrix, source_of
from pqcli.codecs.rate.budget import error_bound
from pqcli.codecs.rate.steps import RATE_WEIGHT, Steps, steps_of
from pqcli.core.threads import lone_blas, n_threads
from pqcli.core.trellis.feedback import Feedback, RowSteps
from pqcli.core.trellis.params import TrellisParams
from pqcli.core.trellis.rotation import Rotations, fit_rotations
from pqcli.core.trellis.side import Side, make_side, write_side
from pqcli.core.trellis.stream import EncodedStream, encode_split, encode_stream
from pqcli.core.trellis.streams import Segment, stream_layout
from pqcli.core.trellis.trellis import encode, in_steps, segment_importance, streams_together, turned
from pqcli.defaults import STATES_BELOW

if TYPE_CHECKING:
    import torch

    from pqcli.core.importance import Importance
    from pqcli.core.trellis.sources import Source
    from pqcli.recipe.recipe import Recipe
    from pqcli.tensors.records import Record

MIXING: Final = "trellis-mixing"
"""The feature of files of which a stream is coded by mixing."""
ROWS: Final = "trellis-rows"
"""The feature of files of which rows have steps of their own."""
COLUMNS: Final = "trellis-columns"
"""The feature of files of which columns have, too."""
DRAFT_STATES: Final = 64
DRAFT_WEIGHTS: Final = 1 << 22
DRAFT_WEIGHTS_EACH: Final = 1 << 17
DRAFT_TENSORS: Final = 128
"""Drafts look at so many weights in all, but so many at least of each tensor, of so many tensors."""
SAMPLING_EXCESS: Final = 0.004
"""A sample takes more bytes by this fraction than its share: contexts learn less from it."""
DRAFT_EXCESS: Final = 0.025
"""What more error the few states of a draft leave, as a fraction."""
MIXING_GAINS: Final = ((8e6, 0.0), (math.inf, 0.06))
"""What mixing must save of a stream's bytes to be used, by the number of weights: large checkpoints should not take
three times as long to decode for less."""


@dataclass
class TrellisSession(Session):
    """The tensors that share streams, their steps, and the rotations that were fitted to them.

    `rows` has, by key, what statistics of inputs made of a tensor's rows.
    """

    survey: Survey
    weights: Weights
    effort: int | None
    steps: Steps
    sources: tuple[Source, ...]
    rotations: Rotations
    rows: Mapping[str, RowSteps] = field(default_factory=dict)
    _drafted: dict[str, Matrix] = field(default_factory=dict)
    _drafted_rows: dict[str, RowSteps] = field(default_factory=dict)

    @classmethod
    def fitted(cls, survey: Survey, weights: Weights, recipe: Recipe, first_level: float, tell: Tell) -> TrellisSession:
        """A session whose rotations pay at `first_level`.

        Raises StatsError where the recipe names statistics that are none, or not of this checkpoint.
        """
        records = {record.name: record for record in survey.records}
        sources = tuple(map(source_of, survey.records))
        steps = steps_of(survey, recipe.objective, error_bound(recipe))

        def read(key: str) -> Matrix:
            tell(records[key].info.numel, key)
            return as_matrix(weights.coded(key), records[key])

        if recipe.stats is not None:
            from pqcli.codecs.statistics import learned

            plan, steps = learned(recipe.stats, survey, steps, tell, in_blocks=True)
            rotations = plan.rotations(sources, read, steps.at(first_level), n_threads())
            rotations = replace(rotations, transposed=rotations.transposed | turned(plan.rows))
            return cls(survey, weights, recipe.effort, steps, sources, rotations, plan.rows)
        rotations = fit_rotations(sources, read, steps.at(first_level), n_threads())
        return cls(survey, weights, recipe.effort, steps, sources, rotations)

    def jobs(self, level: float) -> list[StreamJob]:
        """A job for every stream; one for all the streams of a tensor whose errors are fed forward."""
        side, params = self._side(level), self._params(level)
        layout = stream_layout(self.sources, self.rotations.transposed, params.stream_weights)
        flipped = {
            source.key: WholeMatrix(self.weights, record)
            for source, record in zip(self.sources, self.survey.records, strict=True)
            if source.key in self.rotations.transposed
        }
        fed = {key for key, rows in self.rows.items() if isinstance(rows, Feedback)}
        jobs, index = [], 0
        for streams in streams_together(layout, self.sources, fed):
            jobs.append(StreamJob.of(index, streams, self.sources, side, params, self.weights, flipped, self.rows))
            index += len(streams)
        return jobs

    def finish(self, level: float, pieces: Sequence[StreamPiece]) -> Streams:
        """The streams in order, and before them what they share."""
        ordered = sorted(pieces, key=lambda piece: piece.index)
        sizes = {source.key: 0 for source in self.sources}
        for piece in ordered:
            for key, length in piece.about.lengths:
                sizes[key] += length
        mixed = frozenset(piece.index for piece in ordered if piece.about.is_mixed)
        side = replace(self._side(level), mixed=mixed)
        shared = write_side(side, self.sources, len(ordered))
        used = ((MIXING, mixed), (ROWS, side.row_kinds), (COLUMNS, side.column_exponents))
        features = [name for name, is_used in used if is_used]
        return Streams(shared, [piece.data for piece in ordered], sizes, tuple(features))

    def draft(self, level: float) -> Draft:
        """From some rows of every large tensor, with few states; the rows are read once and kept in memory."""
        if not self._drafted:
            most = _draft_weights([source.n_weights for source in self.sources])
            for source, record, n in zip(self.sources, self.survey.records, most, strict=True):
                matrix = as_matrix(self.weights.coded(source.key), record)
                self._draft_from(source.key, matrix, n)
        sources = [
            replace(source, rows=self._drafted[source.key].shape[0], columns=self._drafted[source.key].shape[1])
            for source in self.sources
        ]
        params = replace(self._params(level), n_states=min(self._n_states, DRAFT_STATES))
        encoded = encode(
            sources, self._drafted.__getitem__, params, self.rotations, self.steps.at(level), n_threads(),
            second_order=self._drafted_rows,
        )  # fmt: skip
        n_bytes, error, energy = float(len(encoded.side)), 0.0, 0.0
        for source in self.sources:
            rows = self._drafted[source.key]
            factor = source.n_weights / max(rows.size, 1)
            n_bytes += factor * encoded.coded_bytes[source.key]
            error += factor * encoded.squared_errors[source.key]
            coded = factor * float(np.sum(np.square(rows, dtype=np.float64)))
            energy += self.survey.own_energy(source.key, coded)
        is_sample = sum(rows.size for rows in self._drafted.values()) < self._n_weights
        return Draft(
            n_bytes / (1 + SAMPLING_EXCESS * is_sample), error / energy / (1 + DRAFT_EXCESS) if energy else 0.0
        )

    def _draft_from(self, key: str, matrix: Matrix, n_weights: int) -> None:
        """Keep what drafts look at of a tensor: some of its rows, or of its outputs where errors are fed forward."""
        rows = self.rows.get(key)
        is_fed = isinstance(rows, Feedback)
        axis = int((key in self.rotations.transposed) != is_fed)
        chosen = _spread_out(matrix, n_weights, axis)
        self._drafted[key] = np.ascontiguousarray(np.take(matrix, chosen, axis))
        if isinstance(rows, Feedback):
            columns = rows.column_steps
            self._drafted_rows[key] = rows if columns is None else replace(rows, column_steps=columns[chosen])
        elif rows is not None:
            self._drafted_rows[key] = replace(rows, steps=rows.steps[chosen])

    @property
    def _n_weights(self) -> int:
        return sum(source.n_weights for source in self.sources)

    @property
    def _n_states(self) -> int:
        return n_states(self._n_weights, self.effort)

    def _params(self, level: float) -> TrellisParams:
        gain = next(gain for below, gain in MIXING_GAINS if self._n_weights < below)
        return TrellisParams(level, self._n_states, RATE_WEIGHT, mixing_gain=gain)

    def _side(self, level: float) -> Side:
        return make_side(self.sources, self._params(level), self.rotations, self.steps.at(level), self.rows)


def n_states(n_weights: int, effort: int | None) -> int:
    """The states of the trellis for so many weights; `effort` is what was asked for."""
    return effort or next(states for below, states in STATES_BELOW if n_weights < below)


class WholeMatrix:
    """A matrix that several streams need as a whole: read once for all that are at work, and for no longer."""

    def __init__(self, weights: Weights, record: Record) -> None:
        self._weights, self._record = weights, record
        self._reading = threading.Lock()
        self._held: weakref.ref[Matrix] | None = None

    def __reduce__(self) -> tuple[type[WholeMatrix], tuple[Weights, Record]]:
        return type(self), (self._weights, self._record)

    def get(self) -> Matrix:
        """(rows, columns) float32, not to be written to."""
        with self._reading:
            matrix = self._held() if self._held else None
            if matrix is None:
                matrix = as_matrix(self._weights.coded(self._record.name), self._record)
                self._held = weakref.ref(matrix)
            return matrix


@dataclass(frozen=True)
class StreamFacts:
    """What `TrellisSession.finish` must know of a stream beside its bytes: each segment's key with its length."""

    is_mixed: bool
    lengths: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class StreamJob:
    """Encode one stream, or all those of one source whose errors are fed forward from one to the next.

    It knows the sources, steps, rows and rotations of its own segments only. `segments` count among `sources`, which
    are those of these streams; `flipped` has the matrices that are coded transposed, of which no range of rows would
    do. `index` is the first stream's; with several streams every segment is one.
    """

    index: int
    n_streams: int
    segments: tuple[Segment, ...]
    sources: tuple[Source, ...]
    steps: tuple[np.float32, ...]
    rotations: Rotations
    params: TrellisParams
    weights: Weights
    flipped: Mapping[str, WholeMatrix]
    rows: Mapping[str, RowSteps]

    @classmethod
    def of(
        cls,
        index: int,
        streams: Sequence[Sequence[Segment]],
        sources: Sequence[Source],
        side: Side,
        params: TrellisParams,
        weights: Weights,
        flipped: Mapping[str, WholeMatrix],
        rows: Mapping[str, RowSteps],
    ) -> StreamJob:
        """The job of a stream of the whole checkpoint's layout, or of some that belong together."""
        segments = [segment for stream in streams for segment in stream]
        places = list(dict.fromkeys(segment.source for segment in segments))
        own = tuple(sources[place] for place in places)
        return cls(
            index,
            len(streams),
            tuple(replace(segment, source=places.index(segment.source)) for segment in segments),
            own,
            tuple(map(side.step_of, places)),
            side.rotations.only([source.key for source in own]),
            params,
            weights,
            {source.key: flipped[source.key] for source in own if source.key in flipped},
            {source.key: rows[source.key] for source in own if source.key in rows},
        )

    @property
    def name(self) -> str:
        """The first tensor's."""
        return self.sources[0].key

    @property
    def n_weights(self) -> int:
        """Weights of all segments."""
        return sum(self._n_weights(segment) for segment in self.segments)

    @property
    def n_bytes(self) -> int:
        """The weights in float32, what the search knows of them, and levels; a matrix read as a whole not counted.

        What is fed forward takes three matrices of its own.
        """
        factors = [rows.n_known for rows in self.rows.values() if isinstance(rows, Feedback)]
        return 16 * self.n_weights + 12 * max(factors, default=0)

    def run(self, device: torch.device) -> StreamPiece | list[StreamPiece]:  # noqa: ARG002 - the CPU searches
        """The stream, or the streams."""
        with lone_blas() if self.rows else nullcontext():
            if self.n_streams == 1:
                return self._piece(self.index, self._stream(), self.sources)
            whole = Segment(0, self.segments[0].start, self.segments[-1].stop)
            coded = encode_split(
                self._in_steps(whole), self.segments, self.sources, self.params, self.rotations, self.rows
            )
        return [self._piece(self.index + i, stream, self.sources) for i, stream in enumerate(coded)]

    def _stream(self) -> EncodedStream:
        matrices = [self._in_steps(segment) for segment in self.segments]
        importances = [self._importance(segment) for segment in self.segments]
        return encode_stream(matrices, self.segments, self.sources, self.params, self.rotations, importances, self.rows)

    @staticmethod
    def _piece(index: int, stream: EncodedStream, sources: Sequence[Source]) -> StreamPiece:
        lengths = tuple((source.key, n) for source, n in zip(sources, stream.lengths, strict=True))
        return StreamPiece(index, stream.data, StreamFacts(stream.is_mixed, lengths))

    def _in_steps(self, segment: Segment) -> Matrix:
        """The segment's weights in steps, as they are coded."""
        source, step = self.sources[segment.source], self.steps[segment.source]
        if source.key in self.flipped:
            return in_steps(self.flipped[source.key].get().T[segment.start : segment.stop], step)
        rows = self.weights.coded_rows(source.key, segment.start, segment.stop, source.columns)
        return in_steps(rows.float().numpy(), step)

    def _importance(self, segment: Segment) -> Importance | None:
        source = self.sources[segment.source]
        importance = self.weights.importance(source.key)
        if importance is None:
            return None
        return segment_importance(importance, segment, source, is_transposed=source.key in self.flipped)

    def _n_weights(self, segment: Segment) -> int:
        source = self.sources[segment.source]
        width = source.rows if source.key in self.flipped else source.columns
        return (segment.stop - segment.start) * width


def _draft_weights(sizes: Sequence[int]) -> list[int]:
    """How many weights of each tensor a draft looks at: all of small ones, a share of large ones."""
    share = DRAFT_WEIGHTS / max(sum(sizes), 1)
    least = DRAFT_WEIGHTS_EACH * min(1.0, DRAFT_TENSORS / max(len(sizes), 1))
    return [min(size, int(max(share * size, least))) for size in sizes]


def _spread_out(matrix: Matrix, n_weights: int, axis: int) -> NDArray[np.int64]:
    """Evenly spread places along an axis, about `n_weights` weights; all of a matrix of no more."""
    size = matrix.shape[axis]
    if matrix.size <= n_weights:
        return np.arange(size)
    n = max(1, n_weights * size // matrix.size)
    return np.linspace(0, size - 1, n).astype(np.int64)
