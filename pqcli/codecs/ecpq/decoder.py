"""Decoding the streams of entropy-constrained PQ: one a tensor, each when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pqcli.codecs.base import Decoder, Matrix, Streams
from pqcli.core.ecpq import payload
from pqcli.core.ecpq.model import Model

if TYPE_CHECKING:
    from pqcli.core.trellis.sources import Source


class EcpqDecoder(Decoder):
    """Random access: every tensor has a stream of its own."""

    def __init__(self, streams: Streams, sources: Sequence[Source]) -> None:
        if len(streams.streams) != len(sources):
            raise ValueError(f"{len(streams.streams)} streams for {len(sources)} tensors")
        self._model = Model.from_bytes(streams.shared)
        self._streams = streams.streams
        self._sources = {source.key: (i, source) for i, source in enumerate(sources)}

    def matrix(self, key: str) -> Matrix:
        """The matrix of that source."""
        i, source = self._sources[key]
        return payload.decode(self._streams[i], self._model, source.rows, source.columns)

    def entropy(self, key: str) -> float:
        """Bits at the order-0 entropy."""
        i, source = self._sources[key]
        return payload.entropy(self._streams[i], self._model, source.rows, source.columns)
