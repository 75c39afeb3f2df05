"""What values tell: a tensor of few distinct ones is held exactly, by whatever codec the rest is coded.

Masks, constants, binary and ternary weights take a bit or two a weight as they are; a codec that comes near them for
as much would only spoil them. They become plain PQ whose codebook holds every distinct block, or are kept where the
file codes what it keeps without loss, and that takes less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.codecs.base import Piece, TensorTask, Use, Weights
from pqcli.codecs.kept import KeptJob, as_words, kept_piece
from pqcli.core import metrics
from pqcli.core.digests import tensor_bytes, tensor_hash
from pqcli.core.entropy import lossless
from pqcli.core.pq import packing, pq
from pqcli.tensors.records import BUNDLED_BYTES, Coded, Plain, Record

if TYPE_CHECKING:
    from pqcli.codecs.base import Job

FEW_VALUES: Final = 16
"""Distinct values, told apart by their bits, that are few."""
FEW_BITS: Final = 2.05
"""Tensors that take no more bits a weight than this when held exactly always are: four values, and their codebook."""
BLOCK_SIZES: Final = (1, 2, 3, 4, 5, 8, 16)
ENTRY_BYTES: Final = 200
"""About what a tensor with entries of its own costs beside them."""
_CHUNK: Final = 1 << 20
_FIRST: Final = 1 << 10
_WORDS: Final = {2: np.uint16, 4: np.uint32, 8: np.uint64}
_CODEBOOK_DTYPES: Final = (torch.float16, torch.float32)
WHY: Final = "few distinct values, held exactly"


@dataclass(frozen=True)
class Few:
    """The distinct values of a tensor, and which one each of its elements is: `codes` (numel,) uint8."""

    values: torch.Tensor
    codes: NDArray[np.uint8]

    def blocks(self, block_size: int) -> tuple[NDArray[np.uint64], NDArray[np.intp]]:
        """The distinct blocks, each as the digits of a number with the first value last, and which one each block is.

        `block_size` must divide what a row has.
        """
        grid = self.codes.reshape(-1, block_size).astype(np.uint64)
        powers = np.uint64(FEW_VALUES) ** np.arange(block_size, dtype=np.uint64)
        found = np.unique(grid @ powers, return_inverse=True)
        return found[0], found[1].reshape(-1)


@dataclass(frozen=True)
class ExactJob(TensorTask):
    """Hold a tensor of few values exactly, as plain PQ with the blocks that the record says."""

    record: Record
    weights: Weights

    @property
    def n_bytes(self) -> int:
        """The tensor, what it decodes to, and its codes as numbers."""
        return 4 * self.record.info.n_bytes

    def run(self, device: torch.device) -> Piece:  # noqa: ARG002 - nothing to compute
        """The tensor as plain PQ."""
        return exact_piece(self.record, self.weights.coded(self.record.name))


def exact_piece(record: Record, weight: torch.Tensor) -> Piece:
    """A tensor of few values as plain PQ without error. Raises ValueError where its values are many."""
    few, coding = few_values(weight), record.coding
    if few is None or not isinstance(coding, Plain):
        raise ValueError(f"tensor {record.name!r} has more than {FEW_VALUES} values")
    blocks, assignments = few.blocks(coding.block_size)
    digits = blocks[:, None] // np.uint64(FEW_VALUES) ** np.arange(coding.block_size, dtype=np.uint64)
    codebook = few.values[torch.from_numpy((digits % np.uint64(FEW_VALUES)).astype(np.int64))]
    codebook = codebook.to(getattr(torch, coding.codebook_dtype))
    bits = packing.n_bits(len(blocks))
    entries = (
        (f"pq/{record.name}/codebook", tensor_bytes(codebook)),
        (f"pq/{record.name}/assignments", packing.pack(assignments, bits)),
    )
    counts = torch.from_numpy(np.bincount(assignments))
    entropy = metrics.entropy(counts)
    use = Use(len(blocks), entropy, entropy * assignments.size)
    return Piece(record, tensor_hash(weight), entries, error=metrics.compare(weight, weight), use=use)


def job_of(record: Record, weight: torch.Tensor, weights: Weights, *, is_compact: bool) -> Job | None:
    """The job of a tensor that is better held exactly; None for one of many values, or that would take too much.

    `record` tells what it would be otherwise, `is_compact` whether the file codes what it keeps without loss.
    """
    found = exact_record(record, weight, is_compact=is_compact)
    if found is None:
        return None
    return ExactJob(found, weights) if isinstance(found.coding, Plain) else KeptJob(found, weights, is_compact)


def exact_or_none(record: Record, weight: torch.Tensor, *, is_compact: bool) -> Piece | None:
    """The piece of a tensor that is better held exactly; None as above."""
    found = exact_record(record, weight, is_compact=is_compact)
    if found is None:
        return None
    if isinstance(found.coding, Plain):
        return exact_piece(found, weight)
    return kept_piece(found, weight, is_compact=is_compact)


def exact_record(record: Record, weight: torch.Tensor, *, is_compact: bool) -> Record | None:
    """What a tensor of few values becomes; None where its values are many, or would take too many bits."""
    few = few_values(weight)
    if few is None:
        return None
    kept = record.kept(f"{record.reason}; {WHY}")
    if weight.numel() * weight.element_size() <= BUNDLED_BYTES and is_compact:
        return kept
    plain = _smallest(record, few)
    if plain is None:
        return kept
    n_bytes = plain.payload_bytes + ENTRY_BYTES
    if is_compact:
        words = as_words(tensor_bytes(weight), record.info.dtype)
        kept_bytes = len(lossless.compress([words]))
        if kept_bytes <= n_bytes:
            plain, n_bytes = kept, kept_bytes
    elif n_bytes >= record.info.n_bytes:
        return kept
    usual = record.payload_bytes if isinstance(record.coding, Plain) else 0
    return plain if 8 * (n_bytes - ENTRY_BYTES) <= FEW_BITS * weight.numel() or n_bytes <= usual else None


def few_values(weight: torch.Tensor) -> Few | None:
    """The distinct values of a tensor; None where they are more than `FEW_VALUES`, which is usually seen at once."""
    words = tensor_bytes(weight).view(_WORDS[weight.element_size()])
    known = np.zeros(0, words.dtype)
    starts = [0, *range(_FIRST, len(words), _CHUNK)]
    for start, stop in zip(starts, [*starts[1:], len(words)], strict=True):
        known = np.union1d(known, words[start:stop])
        if len(known) > FEW_VALUES:
            return None
    codes = np.empty(len(words), np.uint8)
    for start in range(0, len(words), _CHUNK):
        codes[start : start + _CHUNK] = np.searchsorted(known, words[start : start + _CHUNK])
    values = torch.from_numpy(known.view(np.uint8).copy()).view(weight.dtype)
    return Few(values, codes)


def _smallest(record: Record, few: Few) -> Record | None:
    """The record with the blocks that take the fewest bytes; None where no codebook's dtype holds the values."""
    dtype = next((dtype for dtype in _CODEBOOK_DTYPES if _holds(dtype, few.values)), None)
    if dtype is None:
        return None
    rows = record.coding.rows if isinstance(record.coding, Plain | Coded) else None
    found = []
    for block_size in BLOCK_SIZES:
        if record.matrix_shape[1] % block_size:
            continue
        k = len(few.blocks(block_size)[0])
        if k > 1 << packing.MAX_BITS:
            break
        coding = Plain(block_size, k, str(dtype).removeprefix("torch."), rows)
        found.append(replace(record, coding=coding, reason=f"{record.reason}; {WHY}"))
    return min(found, key=lambda candidate: candidate.payload_bytes)


def _holds(dtype: torch.dtype, values: torch.Tensor) -> bool:
    """Whether values in this dtype come back bit for bit."""
    back = pq.saturated(values.to(dtype), values.dtype)
    return bool((tensor_bytes(back) == tensor_bytes(values)).all())
