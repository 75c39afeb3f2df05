"""What every codec is: a few verbs that one loop (`pqcli.jobs.compress`) drives.

    survey    find out what can be coded                          Codec.survey  -> Survey
              (and what is better coded by itself                 Codec.set_apart)
    fit       learn what tensors share                            Codec.fit     -> Session
    draft     guess what a level would come to                    Session.draft
    jobs      the work of a level, piece by piece                 Session.jobs  -> Job.run -> Piece or StreamPieces
    finish    put the streams together                            Session.finish -> Streams
    decode    one matrix at a time                                Codec.decoder -> Decoder

A codec that treats every tensor by itself (plain PQ) gives finished tensors (`Piece`); one whose tensors share what was
learned gives parts of streams (`StreamPiece`). The `level` says how coarse the result is: the quantization step in
units of weights; times a tensor's own scale it is that tensor's step.

Shapes: matrix (rows, columns) float32.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pqcli.codecs import registry
from pqcli.core.dtypes import saturated
from pqcli.core.trellis.sources import Source
from pqcli.tensors.moments import form_of
from pqcli.tensors.records import Alias, Coded, Coding, Kept, Moments, Plain, Record, Same

if TYPE_CHECKING:
    import torch

    from pqcli.core.dtypes import Array
    from pqcli.core.importance import Importance
    from pqcli.core.metrics import Error
    from pqcli.plan.plan import PlanEntry
    from pqcli.recipe.recipe import Recipe
    from pqcli.stats.damage import Damage
    from pqcli.tensors.records import StoredError

Matrix = NDArray[np.float32]


# --- what is coded ----------------------------------------------------------------------------------------------------


class Readable(Protocol):
    """An open checkpoint, as far as codecs need it. It can be pickled: another process opens the file anew."""

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor."""

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some elements of a tensor, in row-major order."""


@dataclass(frozen=True)
class Weights:
    """What is coded, what decoded weights become, and what these are compared with.

    Here all three are the checkpoint's tensors. Where weights are coded as a difference to some base, `coded` gives the
    difference and `restored` adds the base; `original` stays what the user has (`pqcli.codecs.difference`).
    """

    checkpoint: Readable

    def original(self, name: str) -> torch.Tensor:
        """The tensor that the user has."""
        return self.checkpoint.read(name)

    def original_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of it, in row-major order."""
        return self.checkpoint.read_flat(name, start, stop)

    def coded(self, name: str) -> torch.Tensor:
        """The tensor that is coded in its place."""
        return self.checkpoint.read(name)

    def coded_rows(self, name: str, start: int, stop: int, columns: int) -> torch.Tensor:
        """Rows `start` to `stop` of it as a matrix of so many columns."""
        return self.checkpoint.read_flat(name, start * columns, stop * columns).view(-1, columns)

    def importance(self, name: str) -> Importance | None:  # noqa: ARG002 - statistics would be asked by name
        """How much the errors of its rows and columns count; None where all weights count alike, as they do here."""
        return None

    def base(self, name: str) -> torch.Tensor | None:  # noqa: ARG002 - a base would be asked by name
        """What a kept tensor may be told from: the base's tensor of that name and shape; None where there is none."""
        return None

    def restored(self, record: Record, decoded: Array) -> Array:
        """What the user gets of what was decoded (float32), in the original's shape and dtype."""
        return dense(decoded, record)


def dense(decoded: Array, record: Record) -> Array:
    """Decoded values in the tensor's own shape and dtype."""
    return saturated(decoded.reshape(record.info.shape), record.info.dtype)


def record_of(entry: PlanEntry) -> Record:
    """The record of a tensor that becomes what is planned."""
    info, scheme = entry.info, entry.scheme
    rows = None if not info.shape or entry.rows == info.shape[0] else entry.rows
    coding: Coding
    if info.alias_of is not None:
        coding = Alias(info.alias_of)
    elif entry.action == "keep":
        coding = Kept()
    elif entry.action == "base":
        coding = Same()
    elif entry.action == Moments.action:
        coding = Moments(form_of(info) or "", entry.predicted_bytes)
    elif scheme is not None:
        coding = Plain(scheme.block_size, scheme.n_centroids, scheme.codebook_dtype, rows)
    else:
        coding = Coded(entry.action, rows, kernel_of(info.shape, entry.rows))
    return Record(info, coding, entry.reason, entry.kind, difference=entry.difference)


def source_of(record: Record) -> Source:
    """A record's tensor as a matrix."""
    rows, columns = record.matrix_shape
    return Source(record.name, record.info.shape, rows, columns, getattr(record.coding, "kernel", 1))


def as_matrix(weight: torch.Tensor, record: Record) -> Matrix:
    """A tensor as codecs take it: (rows, columns) float32."""
    matrix: Matrix = weight.reshape(record.matrix_shape).float().numpy()
    return matrix


def kernel_of(shape: tuple[int, ...], rows: int) -> int:
    """Kernel positions of a convolution's weight; 1 for anything else."""
    is_convolution = len(shape) > 2 and rows == shape[0]
    return math.prod(shape[2:]) if is_convolution else 1


# --- what comes out ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """How a tensor's assignments are spread: centroids that occur, entropy in bits per assignment and in all."""

    centroids: int | None
    entropy: float | None
    entropy_bits: float


@dataclass(frozen=True)
class Piece:
    """One finished tensor: its record, the bytes of its own entries by key, and what was measured.

    `bundled` are the bytes of a small kept tensor, which shares an entry with others. `damage` is what statistics
    predict of the error. `stored` is the error as another file tells it, where it was not measured anew.
    """

    record: Record
    digest: bytes
    entries: tuple[tuple[str, bytes | NDArray[np.uint8]], ...] = ()
    bundled: NDArray[np.uint8] | None = None
    error: Error | None = None
    use: Use | None = None
    damage: Damage | None = None
    stored: StoredError | None = None


@dataclass(frozen=True)
class StreamPiece:
    """One stream: its place among the session's, its bytes, and whatever `Session.finish` wants to know."""

    index: int
    data: bytes
    about: Any = None


@dataclass(frozen=True)
class Streams:
    """What a codec made of all the tensors that share something.

    `tensor_bytes` tells each one's share, by name, and is not data. `features` are those that the file needs beside the
    codec's own.
    """

    shared: bytes
    streams: Sequence[bytes]
    tensor_bytes: Mapping[str, int] = field(default_factory=dict, compare=False)
    features: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Size of all of it."""
        return len(self.shared) + sum(map(len, self.streams))


@dataclass(frozen=True)
class Draft:
    """About what encoding at some level would give."""

    n_bytes: float
    relative_mse: float


# --- the verbs --------------------------------------------------------------------------------------------------------


Found = TypeVar("Found")
Found_co = TypeVar("Found_co", covariant=True)


class Task(Protocol[Found_co]):
    """A unit of work. It can be pickled, and depends on nothing but its fields."""

    @property
    def name(self) -> str:
        """What to show while it runs."""

    @property
    def n_weights(self) -> int:
        """How much work it is."""

    @property
    def n_bytes(self) -> int:
        """Memory that it takes while it runs and until its result is written."""

    def run(self, device: torch.device) -> Found_co:
        """Do it; `device` is where matrix work may run."""


Result = Piece | StreamPiece | list[StreamPiece]
Job = Task[Result]
"""A task whose result goes into the file."""


class Run(Protocol):
    """Runs tasks wherever there is room for them."""

    def __call__(self, tasks: Sequence[Task[Found]], stage: str) -> Iterator[tuple[int, Found]]:
        """The result of every task with its place among them, in any order; the hook is told of the stage."""


class TensorTask:
    """What tasks on one tensor have in common: they are called like it, and are as much work as it has weights."""

    record: Record

    @property
    def name(self) -> str:
        """The tensor's."""
        return self.record.name

    @property
    def n_weights(self) -> int:
        """The tensor's."""
        return self.record.info.numel


@dataclass(frozen=True)
class Original:
    """A tensor of which the difference to a base's is coded: its own spread, and the sum of its squares."""

    spread: float
    energy: float


@dataclass(frozen=True)
class Survey:
    """What was found out about the tensors that are to be coded: their plan, and the `spread` of their weights.

    `rejected` are the records of those that their values rule out, kept now, with the reason; `exact` the jobs of
    those of few distinct values. `zeros` tells, by name, the exact zeros of those that have some
    (`pqcli.codecs.zeros`), `weak_rows` the root mean square of a weak row. `originals` has, of tensors that are coded
    as differences, what must be known of the tensors themselves; `fineness` is what steps of differences are times
    those of the tensors (`fine_for_differences`).
    """

    entries: tuple[PlanEntry, ...]
    spreads: Mapping[str, float] = field(default_factory=dict)
    rejected: tuple[Record, ...] = ()
    exact: tuple[Job, ...] = ()
    zeros: Mapping[str, bytes] = field(default_factory=dict)
    weak_rows: Mapping[str, float] = field(default_factory=dict)
    originals: Mapping[str, Original] = field(default_factory=dict)
    fineness: float = 1.0

    @cached_property
    def records(self) -> tuple[Record, ...]:
        """The tensors' records, as the plan has them."""
        lengths = {name: len(data) for name, data in self.zeros.items()}
        return tuple(replace(record_of(entry), zero_bytes=lengths.get(entry.info.name)) for entry in self.entries)

    @property
    def unit(self) -> float:
        """The typical magnitude of a weight, the yardstick of levels: geometric mean of the tensors' spreads, by size.

        A few tensors that hold most of the energy hardly move it. 1 where all weights are zero.
        """
        return _geometric_mean([(record.info.numel, self.own_spread(record.name)) for record in self.records]) or 1.0

    def own_spread(self, name: str) -> float:
        """The spread of the tensor itself, by which errors are judged, also where its difference is coded."""
        original = self.originals.get(name)
        return self.spreads.get(name, 0.0) if original is None else original.spread

    def own_energy(self, name: str, coded: float) -> float:
        """The sum of squares of the tensor itself, where `coded` is that of what is coded."""
        original = self.originals.get(name)
        return coded if original is None else original.energy

    def fineness_of(self, name: str) -> float:
        """What the step of a tensor is times the one that it would have if it were no difference."""
        return self.fineness if name in self.originals else 1.0

    def fine_for_differences(self) -> Survey:
        """The survey for a level that is no budget's: steps of differences shrink as much as the weights did.

        By one factor for all differences, the geometric mean over their weights: within them, errors are balanced as
        they are between the tensors.
        """
        shrunk = [
            (record.info.numel, self.spreads[record.name] / original.spread)
            for record in self.records
            if (original := self.originals.get(record.name)) is not None and original.spread
        ]
        return replace(self, fineness=min(_geometric_mean(shrunk) or 1.0, 1.0))

    def without(self, names: frozenset[str]) -> Survey:
        """The survey of the other tensors."""
        entries = tuple(entry for entry in self.entries if entry.info.name not in names)
        return replace(self, entries=entries)


def _geometric_mean(sizes: Sequence[tuple[int, float]]) -> float | None:
    """Of (weights, value), weight by weight, zeros left out; None where there is nothing else."""
    known = [(size, value) for size, value in sizes if value]
    n = sum(size for size, _ in known)
    return math.exp(sum(size * math.log(value) for size, value in known) / n) if n else None


class Session(ABC):
    """A codec at work on one checkpoint: all it has learned, and what it remembers from one level to the next."""

    survey: Survey
    """What is left for `jobs`: the tensors that share something."""

    @abstractmethod
    def jobs(self, level: float) -> Sequence[Job]:
        """The work of this level, in the order of its streams."""

    @abstractmethod
    def finish(self, level: float, pieces: Sequence[StreamPiece]) -> Streams | None:
        """The streams of this level put together; None for a codec that has none."""

    @abstractmethod
    def draft(self, level: float) -> Draft:
        """What the level would come to, in less time and a few percent off: for finding a level."""


class Decoder(ABC):
    """One matrix at a time. Raises ValueError for bytes that no encoder wrote."""

    @abstractmethod
    def matrix(self, key: str) -> Matrix:
        """The matrix of that source. Asking in the sources' order is quickest."""

    @abstractmethod
    def entropy(self, key: str) -> float:
        """Bits that the source's symbols would take at their order-0 entropy: a table of its own, and no context."""


Tell = Callable[[int, str], None]
"""`tell(n_weights, name)`: so much more is done."""


class Codec(ABC):
    """What turns weights into bytes, and back."""

    is_compact: bool = True
    """Whether its files code kept tensors without loss and have short hashes."""
    takes_blocks: bool = False
    """Whether it can use second moments of which only blocks along the diagonal are known."""

    def compacted(self) -> Codec:
        """The same codec, for a file that is compact."""
        return self

    def costs(self, n_weights: int, recipe: Recipe) -> Mapping[str, float]:  # noqa: ARG002 - for those that differ by it
        """The stages that so many weights go through, in their order, with about the time that each takes a weight.

        In nanoseconds of one core, measured with tests/benchmarks/progress.py. Only their proportions are relied on.
        "keeping" comes where it belongs; what it takes goes by what is kept.
        """
        return {"keeping": 0.0, "encoding": 500.0}

    @abstractmethod
    def survey(self, entries: Sequence[PlanEntry], weights: Weights, run: Run) -> Survey:
        """Which of the planned tensors can be coded, and what levels must know of them."""

    def set_apart(
        self,
        survey: Survey,
        weights: Weights,  # noqa: ARG002 - for those who look at them
        recipe: Recipe,  # noqa: ARG002
        level: float,  # noqa: ARG002
        choosing: Callable[[], Tell],  # noqa: ARG002 - begins a stage, where there is something to choose
    ) -> tuple[Sequence[Job], Survey]:
        """Jobs for tensors that are better coded by themselves, and the survey of the rest. Usually there are none."""
        return (), survey

    @abstractmethod
    def fit(self, survey: Survey, weights: Weights, recipe: Recipe, first_level: float, tell: Tell) -> Session:
        """A session with what the tensors share; `first_level` is the first that will be asked for."""


def load(name: str) -> Codec:
    """The codec of that name in the table."""
    codec: Codec = importlib.import_module(registry.row(name).home).CODEC
    return codec


class StreamCodec(Codec):
    """A codec whose tensors share something: their bytes are streams, with what is shared before them."""

    @abstractmethod
    def decoder(self, streams: Streams, sources: Sequence[Source], *, counting: bool = False) -> Decoder:
        """Reads what `Session.finish` gave. `streams.streams` is indexed as needed, so it may fetch a stream then.

        A decoder that is `counting` knows the entropy of a matrix that it has just given.
        """
