"""Tensors so large that memory should not hold them: the same piece as `PlainJob` makes, read a stretch at a time.

An embedding of 128,000 tokens has 1 GB in bfloat16; as float32 vectors, decoded, and compared it would take five times
that. Here every pass reads it anew, which costs a second or two a gigabyte, and what is held is what is found:
assignments and bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.codecs import zeros
from pqcli.codecs.base import Piece, Use
from pqcli.codecs.values import few_values
from pqcli.core import kernels, metrics
from pqcli.core.digests import HASH_BYTES, tensor_bytes
from pqcli.core.pq import far, packing, pq
from pqcli.core.pq.far import Far, NotHeldError
from pqcli.tensors.records import Plain, Record

if TYPE_CHECKING:
    from pqcli.codecs.base import Weights
    from pqcli.core.pq import em

LARGE_BYTES: Final = 256 << 20
"""Tensors of more bytes are read a piece at a time."""
HELD_BYTES: Final = 128 << 20
"""What pieces, and a sample with what EM makes of it, take in memory."""
BYTES_A_VECTOR: Final = 9
"""What is held of a vector: two assignments for as long as one pass follows another, and what is packed of one."""


def is_large(record: Record, options: em.Options, device: torch.device) -> bool:
    """Whether a tensor is to be read a piece at a time, and can be."""
    coding = record.coding
    if not isinstance(coding, Plain) or record.difference or device.type != "cpu":
        return False
    n, d = record.n_vectors, coding.block_size
    is_whole = not record.matrix_shape[1] % d
    return record.info.n_bytes > LARGE_BYTES and is_whole and kernels.is_compiled_for(n, options.n_centroids, d)


def held_bytes(record: Record) -> int:
    """The memory that `piece` takes."""
    return HELD_BYTES + BYTES_A_VECTOR * record.n_vectors


def piece(record: Record, weights: Weights, options: em.Options) -> Piece | None:
    """The tensor as plain PQ; None where it must be read as a whole after all."""
    try:
        return _piece(record, weights, options)
    except NotHeldError:
        return None


def _piece(record: Record, weights: Weights, options: em.Options) -> Piece:
    coding = record.coding
    if not isinstance(coding, Plain):
        raise TypeError(f"a plain job for a tensor that is {coding}")
    d = coding.block_size
    vectors = Far(lambda start, stop: weights.coded_rows(record.name, start, stop, d), (record.n_vectors, d))
    peak = far.peak(vectors)
    if not 2.0**-pq.SAFE_EXPONENT < peak < 2.0**pq.SAFE_EXPONENT or few_values(vectors[0 : far.PIECE]) is not None:
        raise NotHeldError
    encoded = far.encode(vectors, options, getattr(torch, coding.codebook_dtype))
    n_centroids, dtype = len(encoded.codebook), str(encoded.codebook.dtype).removeprefix("torch.")
    record = replace(record, coding=Plain(d, n_centroids, dtype, coding.rows))
    found, codebook = _compared(vectors, encoded, record), encoded.codebook
    del encoded  # its assignments are packed by now, and coding zeros takes as much again
    far.give_back()
    held = zeros.held_by_bits(found.zeros, found.n_zeros, record) if found.n_zeros else None
    if held is not None:
        record = replace(record, zero_bytes=len(held))
    if record.payload_bytes >= record.info.n_bytes:
        raise NotHeldError  # it is kept
    entries: list[tuple[str, bytes | NDArray[np.uint8]]] = [
        (f"pq/{record.name}/codebook", tensor_bytes(codebook)),
        (f"pq/{record.name}/assignments", found.packed),
    ]
    if held is not None:
        entries.append((zeros.key(record.name), held))
    entropy = metrics.entropy(found.counts)
    use = Use(int((found.counts > 0).sum()), entropy, entropy * len(vectors))
    return Piece(record, found.digest, tuple(entries), error=found.error, use=use)


@dataclass(frozen=True)
class _Found:
    """What a last pass over the tensor finds: how it comes back, what is packed, a bit for each of its zeros."""

    error: metrics.Error
    digest: bytes
    counts: torch.Tensor
    packed: NDArray[np.uint8]
    zeros: NDArray[np.uint8]
    n_zeros: int


def _compared(vectors: Far, encoded: far.Encoded, record: Record) -> _Found:
    codebook = pq.saturated(encoded.codebook, getattr(torch, record.info.dtype))
    digest, counts = hashlib.blake2b(digest_size=HASH_BYTES), torch.zeros(len(codebook), dtype=torch.int64)
    bits = packing.n_bits(len(codebook))
    # made first, for the same reason as in `Far.picked`
    packed = np.empty(packing.packed_bytes(len(vectors), bits), np.uint8)
    masks, n_zeros = np.empty(packing.packed_bytes(vectors.numel(), 1), np.uint8), 0

    def pieces() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal n_zeros
        for start, original in vectors.pieces():
            assignments = encoded.assignments[start : start + len(original)].int()
            counts.add_(torch.bincount(assignments, minlength=len(codebook)))
            _put(packed, start * bits, packing.pack(assignments.numpy(), bits))
            decoded = codebook.index_select(0, assignments)
            is_zero = original == 0
            n_zeros += int(is_zero.sum())
            _put(masks, start * vectors.shape[1], np.packbits(is_zero.numpy(), bitorder="little"))
            decoded[is_zero] = 0
            digest.update(tensor_bytes(decoded).data)
            yield original, decoded

    error = metrics.compare_pieces(pieces())
    return _Found(error, digest.digest(), counts, packed, masks, n_zeros)


def _put(into: NDArray[np.uint8], bit: int, data: NDArray[np.uint8]) -> None:
    into[bit // 8 : bit // 8 + len(data)] = data
