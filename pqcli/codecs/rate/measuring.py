"""Measuring: what streams decode to, compared with what the user has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from pqcli.codecs import zeros
from pqcli.codecs.base import Decoder, Piece, StreamCodec, Streams, Survey, Tell, Use, Weights, source_of
from pqcli.codecs.rate.protection import Watch
from pqcli.core import metrics
from pqcli.core.arrays import as_tensor
from pqcli.core.digests import tensor_hash
from pqcli.stats.damage import Damage
from pqcli.tensors.records import Coded, Record

Predict = Callable[[Record, torch.Tensor, torch.Tensor], Damage | None]
"""`predict(record, original, decoded)`: what the error of a tensor does, where that is known."""


def measured_pieces(
    codec: StreamCodec,
    streams: Streams,
    survey: Survey,
    weights: Weights,
    tell: Tell,
    watch: Watch | None = None,
    predict: Predict | None = None,
) -> Iterator[Piece]:
    """Every coded tensor, decoded and compared, in order; `watch` and `predict` see them too."""
    records = with_shares(survey.records, streams)
    decoder = codec.decoder(streams, [source_of(record) for record in records], counting=True)
    for record in records:
        decoded = _decoded(decoder, record, survey, weights)
        original = weights.original(record.name)
        error = metrics.compare(original, decoded)
        if watch is not None:
            watch.see(record, original, decoded)
        use = Use(None, None, decoder.entropy(record.name))
        held = survey.zeros.get(record.name)
        entries = () if held is None else ((zeros.key(record.name), held),)
        damage = None if predict is None else predict(record, original, decoded)
        yield Piece(record, tensor_hash(decoded), entries, error=error, use=use, damage=damage)
        tell(record.info.numel, record.name)


def relative_mse(codec: StreamCodec, streams: Streams, survey: Survey, weights: Weights, tell: Tell) -> float:
    """The relative MSE of all coded tensors together."""
    records = survey.records
    decoder = codec.decoder(streams, [source_of(record) for record in records])

    def errors() -> Iterator[metrics.Error]:
        for record in records:
            yield metrics.compare(weights.original(record.name), _decoded(decoder, record, survey, weights))
            tell(record.info.numel, record.name)

    return metrics.total(errors()).relative_mse


def _decoded(decoder: Decoder, record: Record, survey: Survey, weights: Weights) -> torch.Tensor:
    """What the reader will give: the decoded matrix in the tensor's shape and dtype, with its exact zeros."""
    array = weights.restored(record, decoder.matrix(record.name))
    held = survey.zeros.get(record.name)
    return as_tensor(array if held is None else zeros.restored(array, record, held))


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
