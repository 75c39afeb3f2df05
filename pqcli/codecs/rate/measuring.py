"""Measuring: what streams decode to, compared with what the user has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from pqcli.codecs.base import Piece, StreamCodec, Streams, Tell, Use, Weights, source_of
from pqcli.core import metrics
from pqcli.core.digests import tensor_hash
from pqcli.core.pq import pq
from pqcli.tensors.records import Coded, Record


def measured_pieces(
    codec: StreamCodec, streams: Streams, records: Sequence[Record], weights: Weights, tell: Tell
) -> Iterator[Piece]:
    """Every coded tensor, decoded and compared, in order; `records` know their shares."""
    decoder = codec.decoder(streams, [source_of(record) for record in records], counting=True)
    for record in records:
        decoded = weights.restored(record.name, dense(decoder.matrix(record.name), record))
        error = metrics.compare(weights.original(record.name), decoded)
        use = Use(None, None, decoder.entropy(record.name))
        yield Piece(record, tensor_hash(decoded), error=error, use=use)
        tell(record.info.numel, record.name)


def relative_mse(codec: StreamCodec, streams: Streams, records: Sequence[Record], weights: Weights) -> float:
    """The relative MSE of all coded tensors together."""
    decoder = codec.decoder(streams, [source_of(record) for record in records])
    return metrics.total(
        metrics.compare(
            weights.original(record.name),
            weights.restored(record.name, dense(decoder.matrix(record.name), record)),
        )
        for record in records
    ).relative_mse


def dense(matrix: object, record: Record) -> torch.Tensor:
    """A decoded matrix in the tensor's own shape and dtype."""
    weight = torch.from_numpy(matrix).reshape(record.info.shape)
    return pq.saturated(weight, getattr(torch, record.info.dtype))


def with_shares(records: Sequence[Record], streams: Streams) -> tuple[Record, ...]:
    """The records with their bytes: their own streams, and by their weights what all of them share."""
    shared = streams.n_bytes - sum(streams.tensor_bytes.values())
    n_weights = sum(record.info.numel for record in records)
    given, seen, found = 0, 0, []
    for record in records:
        seen += record.info.numel
        upto = shared * seen // max(n_weights, 1)
        if not isinstance(record.coding, Coded):
            raise TypeError(f"tensor {record.name!r} has no share of the streams")
        n_bytes = streams.tensor_bytes[record.name] + upto - given
        found.append(replace(record, coding=replace(record.coding, n_bytes=n_bytes)))
        given = upto
    return tuple(found)
