"""Codecs that take a whole checkpoint at one error level: `trellis`, and `ecpq` (entropy-constrained PQ).

Plain PQ treats every tensor by itself. These two share what they learn between tensors (rotations, codebooks,
probabilities) and spend bits where they lower the error most. One number, the `level`, sets how coarse the result is:
the quantization step in weight units; times a tensor's own `scale` it is that tensor's step. A bit may cost
`RATE_WEIGHT * step^2` of squared error, in either codec, so that both answer a level with about the same error.

    coder = Coder.of("trellis", sources, read, Steps(scales, ceilings))
    coded = coder.encode(level)                     -> Coded: bytes, and which tensor takes how many
    decoder("trellis", coded, sources).matrix(key)  -> one matrix, bit for bit what the encoder meant

Shapes: matrix (rows, columns) float32.
"""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from pqcli.core.trellis.sources import Source

if TYPE_CHECKING:
    import torch

    from pqcli.core.ecpq.ecpq import Model, Sample
    from pqcli.core.trellis.rotation import Rotations
    from pqcli.core.trellis.trellis import EncodedStreams

Matrix = NDArray[np.float32]
Read = Callable[[str], Matrix]

CODECS: Final = ("trellis", "ecpq")
MIXING: Final = "trellis-mixing"
"""The feature of files of which a stream is coded by mixing."""
ROWS: Final = "trellis-rows"
"""The feature of files of which rows have steps of their own."""
RATE_WEIGHT: Final = 0.3
"""What a bit may cost, in squared steps: close to the slope of the rate-distortion curve at all rates of interest."""
STATES_BELOW: Final = ((4e6, 2048), (64e6, 1024), (math.inf, 256))
"""Trellis states by the number of weights: doubling them finds 0.03 dB, and the time of the search doubles."""
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
SKIPPED_TENSORS: Final = 16
"""A decoder passes over so many tensors before it starts anew behind them."""


@dataclass(frozen=True)
class Coded:
    """What a codec made of all tensors. `tensor_bytes` tells each one's share of the streams, and is not data.

    `features` are those that the file needs beside the codec's own.
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
    """About what encoding all tensors at some level would give."""

    n_bytes: float
    relative_mse: float


@dataclass(frozen=True)
class Steps:
    """The step of every tensor at a level: level * scale, but never above its ceiling, so that no tensor is lost."""

    scales: Mapping[str, float]
    ceilings: Mapping[str, float]

    def at(self, level: float) -> dict[str, float]:
        """Steps by key."""
        return {key: min(level * scale, self.ceilings[key]) for key, scale in self.scales.items()}


@dataclass
class Coder(ABC):
    """Encodes the same tensors at one level after another, remembering what serves the next level too.

    `effort` is the number of trellis states (None: by the size of the checkpoint), `seed` decides random samples; each
    means something to one codec only.
    """

    sources: Sequence[Source]
    read: Read
    steps: Steps
    effort: int | None = None
    seed: int = 0

    @staticmethod
    def of(
        codec: str,
        sources: Sequence[Source],
        read: Read,
        steps: Steps,
        effort: int | None = None,
        seed: int = 0,
    ) -> Coder:
        """The coder of that name; see its fields."""
        kinds: dict[str, type[Coder]] = {"trellis": TrellisCoder, "ecpq": EcpqCoder}
        return kinds[codec](sources, read, steps, effort, seed)

    @abstractmethod
    def encode(self, level: float) -> Coded:
        """All tensors at this level."""

    @abstractmethod
    def draft(self, level: float) -> Draft:
        """What `encode` would come to at this level, in less time and a few percent off: for finding a level."""

    @property
    def n_weights(self) -> int:
        """Weights of all tensors."""
        return sum(source.n_weights for source in self.sources)


@dataclass
class TrellisCoder(Coder):
    """Rotations, trellis-coded quantization and adaptive arithmetic coding (`pqcli.core.trellis`)."""

    _rotations: Rotations | None = None
    _drafted: dict[str, Matrix] = field(default_factory=dict)

    def encode(self, level: float) -> Coded:
        """All tensors at this level; rotations are fitted for the first level asked for, and kept."""
        encoded = self._encoded(self.sources, self.read, level, self._n_states)
        features = [name for name, used in ((MIXING, encoded.mixes), (ROWS, encoded.has_rows)) if used]
        return Coded(encoded.side, encoded.streams, encoded.coded_bytes, tuple(features))

    def draft(self, level: float) -> Draft:
        """From some rows of every large tensor, with few states; the rows are read once and kept in memory."""
        steps = self.steps.at(level)
        if not self._drafted:
            transposed = self._rotations_for(steps).transposed
            most = _draft_weights([source.n_weights for source in self.sources])
            for source, n in zip(self.sources, most, strict=True):
                self._drafted[source.key] = _some_rows(self.read(source.key), n, source.key in transposed)
        sources = [
            replace(source, rows=self._drafted[source.key].shape[0], columns=self._drafted[source.key].shape[1])
            for source in self.sources
        ]
        encoded = self._encoded(sources, self._drafted.__getitem__, level, min(self._n_states, DRAFT_STATES))
        n_bytes, error, energy = float(len(encoded.side)), 0.0, 0.0
        for source in self.sources:
            rows = self._drafted[source.key]
            factor = source.n_weights / max(rows.size, 1)
            n_bytes += factor * encoded.coded_bytes[source.key]
            error += factor * encoded.squared_errors[source.key]
            energy += factor * float(np.sum(np.square(rows, dtype=np.float64)))
        is_sample = sum(rows.size for rows in self._drafted.values()) < self.n_weights
        return Draft(
            n_bytes / (1 + SAMPLING_EXCESS * is_sample), error / energy / (1 + DRAFT_EXCESS) if energy else 0.0
        )

    @property
    def _n_states(self) -> int:
        return self.effort or next(states for below, states in STATES_BELOW if self.n_weights < below)

    def _rotations_for(self, steps: Mapping[str, float]) -> Rotations:
        from pqcli.core.trellis import trellis

        if self._rotations is None:
            self._rotations = trellis.fit_rotations(self.sources, self.read, steps, n_threads())
        return self._rotations

    def _encoded(self, sources: Sequence[Source], read: Read, level: float, n_states: int) -> EncodedStreams:
        from pqcli.core.trellis import trellis

        steps = self.steps.at(level)
        gain = next(gain for below, gain in MIXING_GAINS if self.n_weights < below)
        params = trellis.TrellisParams(level, n_states, RATE_WEIGHT, mixing_gain=gain)
        return trellis.encode(sources, read, params, self._rotations_for(steps), steps, n_threads())


def _draft_weights(sizes: Sequence[int]) -> list[int]:
    """How many weights of each tensor a draft looks at: all of small ones, a share of large ones."""
    share = DRAFT_WEIGHTS / max(sum(sizes), 1)
    least = DRAFT_WEIGHTS_EACH * min(1.0, DRAFT_TENSORS / max(len(sizes), 1))
    return [min(size, int(max(share * size, least))) for size in sizes]


def _some_rows(matrix: Matrix, n_weights: int, is_transposed: bool) -> Matrix:
    """Evenly spread rows (columns where the matrix is coded transposed), about `n_weights` weights, as a copy."""
    if matrix.size <= n_weights:
        return matrix.copy()
    axis = 1 if is_transposed else 0
    n_rows = max(1, n_weights * matrix.shape[axis] // matrix.size)
    chosen = np.linspace(0, matrix.shape[axis] - 1, n_rows).astype(np.int64)
    return np.ascontiguousarray(np.take(matrix, chosen, axis))


@dataclass
class EcpqCoder(Coder):
    """Shared codebooks learned under a price for bits, and entropy-coded assignments (`pqcli.core.ecpq`)."""

    _samples: dict[tuple[str, float], Sample] = field(default_factory=dict)
    _model: Model | None = None

    def encode(self, level: float) -> Coded:
        """All tensors at this level."""
        from pqcli.core.ecpq import ecpq

        samples, model, price = self._learned(level)
        streams = tuple(
            ecpq.encode(self._matrix(key), model, price, scale=scale, seed=self._seed(key)).payload
            for key, scale in samples
        )
        sizes = {source.key: len(stream) for source, stream in zip(self.sources, streams, strict=True)}
        return Coded(model.to_bytes(), streams, sizes)

    def draft(self, level: float) -> Draft:
        """From the samples that the codebooks are learned from."""
        from pqcli.core.ecpq import ecpq

        samples, model, price = self._learned(level)
        n_bytes, error, energy = float(len(model.to_bytes())), 0.0, 0.0
        for (_, scale), sample in samples.items():
            estimate = ecpq.estimate([sample], model, price)
            n_bytes += estimate.bits / 8
            error += scale**2 * estimate.squared_error
            energy += scale**2 * sample.factor * float(np.sum(np.square(sample.pieces, dtype=np.float64)))
        return Draft(n_bytes, error / energy if energy else 0.0)

    def _learned(self, level: float) -> tuple[Mapping[tuple[str, float], Sample], Model, float]:
        """Samples by key and scale, the model for this level (that of the level before is its start), a bit's price."""
        from pqcli.core.ecpq import ecpq

        price = RATE_WEIGHT * level**2
        scales = {key: step / level for key, step in self.steps.at(level).items()}
        self._samples = {
            (key, scale): self._samples.get((key, scale))
            or ecpq.draw(self._matrix(key), scale=scale, seed=self._seed(key))
            for key, scale in scales.items()
        }
        self._model = ecpq.fit(self._samples.values(), price, start=self._model)
        return self._samples, self._model, price

    def _matrix(self, key: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(self.read(key))

    def _seed(self, key: str) -> int:
        return int.from_bytes(hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=7).digest(), "little")


def n_threads() -> int:
    """Threads that work on streams side by side; bytes do not depend on them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- decoding --------------------------------------------------------------------------------------------------------


class Decoder(ABC):
    """One matrix at a time. Raises ValueError for bytes that no encoder wrote."""

    @abstractmethod
    def matrix(self, key: str) -> Matrix:
        """The matrix of that source. Asking in the sources' order is quickest."""

    @abstractmethod
    def entropy(self, key: str) -> float:
        """Bits that the source's symbols would take at their order-0 entropy: a table of its own, and no context."""


def decoder(codec: str, coded: Coded, sources: Sequence[Source], *, counting: bool = False) -> Decoder:
    """The decoder of that codec. `coded.streams` is indexed as needed, so it may fetch a stream when asked for it.

    One that is `counting` knows the entropy of a matrix that it has just given.
    """
    return TrellisDecoder(coded, sources, counting) if codec == "trellis" else EcpqDecoder(coded, sources)


class TrellisDecoder(Decoder):
    """Reads ahead: tensors come out of streams in order, several streams being decoded at a time."""

    def __init__(self, coded: Coded, sources: Sequence[Source], counting: bool = False) -> None:
        self._coded, self._sources = coded, sources
        self._bits: dict[str, float] | None = {} if counting else None
        self._index = {source.key: i for i, source in enumerate(sources)}
        self._running: Iterator[tuple[str, Matrix]] = iter(())
        self._next = len(sources)
        self._ahead: dict[str, Matrix] = {}
        self._entropies: dict[str, float] | None = None

    def matrix(self, key: str) -> Matrix:
        """The matrix of that source; decodes from there on, unless it has been passed on the way just now."""
        if key in self._ahead:
            return self._ahead.pop(key)
        if not self._next <= self._index[key] <= self._next + SKIPPED_TENSORS:
            self._start(self._index[key])
        for found, matrix in self._running:
            self._next += 1
            if found == key:
                return matrix
            self._ahead[found] = matrix
        raise ValueError(f"no stream holds {key!r}")

    def entropy(self, key: str) -> float:
        """Bits at the order-0 entropy; unless it is counting, the first call decodes all levels."""
        from pqcli.core.trellis import trellis

        if self._bits is not None and key in self._bits:
            return self._bits[key]
        if self._entropies is None:
            self._entropies = trellis.entropies(self._encoded(), self._sources, n_threads())
        return self._entropies[key]

    def _encoded(self) -> EncodedStreams:
        from pqcli.core.trellis import trellis

        return trellis.EncodedStreams(self._coded.shared, self._coded.streams)  # type: ignore[arg-type]

    def _start(self, index: int) -> None:
        from pqcli.core.trellis import trellis

        wanted = [source.key for source in self._sources[index:]]
        self._ahead.clear()
        self._running = trellis.decode(self._encoded(), self._sources, wanted, n_threads(), self._bits)
        self._next = index


class EcpqDecoder(Decoder):
    """Random access: every tensor has a payload of its own."""

    def __init__(self, coded: Coded, sources: Sequence[Source]) -> None:
        from pqcli.core.ecpq.ecpq import Model

        self._model = Model.from_bytes(coded.shared)
        self._streams = coded.streams
        self._sources = {source.key: (i, source) for i, source in enumerate(sources)}

    def matrix(self, key: str) -> Matrix:
        """The matrix of that source."""
        from pqcli.core.ecpq import ecpq

        i, source = self._sources[key]
        found: Matrix = ecpq.decode(self._streams[i], self._model, source.rows, source.columns).numpy()
        return found

    def entropy(self, key: str) -> float:
        """Bits at the order-0 entropy."""
        from pqcli.core.ecpq import ecpq

        i, source = self._sources[key]
        return ecpq.entropy(self._streams[i], self._model, source.rows, source.columns)
