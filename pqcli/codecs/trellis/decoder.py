"""Decoding the trellis codec's streams, ahead of what is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from pqcli.codecs.base import Decoder, Matrix, Streams
from pqcli.core.threads import n_threads
from pqcli.core.trellis import trellis

if TYPE_CHECKING:
    from pqcli.core.trellis.sources import Source

SKIPPED_TENSORS: Final = 16
"""A decoder passes over so many tensors before it starts anew behind them."""


class TrellisDecoder(Decoder):
    """Reads ahead: tensors come out of streams in order, several streams being decoded at a time."""

    def __init__(self, streams: Streams, sources: Sequence[Source], *, counting: bool = False) -> None:
        self._encoded = trellis.EncodedStreams(streams.shared, streams.streams)
        self._sources = sources
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
        if self._bits is not None and key in self._bits:
            return self._bits[key]
        if self._entropies is None:
            self._entropies = trellis.entropies(self._encoded, self._sources, n_threads())
        return self._entropies[key]

    def _start(self, index: int) -> None:
        wanted = [source.key for source in self._sources[index:]]
        self._ahead.clear()
        self._running = trellis.decode(self._encoded, self._sources, wanted, n_threads(), self._bits)
        self._next = index
