"""What no codec takes: tensors bit for bit, and other names of tensors that are there already."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pqcli.codecs.base import Piece, TensorTask, Weights
from pqcli.codecs.difference import exact_difference
from pqcli.core.digests import HASH_BYTES, tensor_bytes, tensor_hash
from pqcli.core.entropy import lossless
from pqcli.tensors.info import ITEM_BYTES
from pqcli.tensors.records import Kept, Record

if TYPE_CHECKING:
    import torch


_QUICK_COPIES = 5
"""Memory that coding a large tensor takes, in copies of it: itself, byte planes, and those coded, twice."""


def cost(n_bytes: int, *, is_compact: bool, quick: bool) -> float:
    """About the nanoseconds that keeping so many bytes takes."""
    return n_bytes * (2.0 if not is_compact else 30.0 if quick else 500.0)


@dataclass(frozen=True)
class KeptJob(TensorTask):
    """Read a tensor to be kept; `is_compact`: code it without loss, unless it is so small that it will be bundled.

    `quick`: with little effort.
    """

    record: Record
    weights: Weights
    is_compact: bool
    quick: bool = False

    @property
    def n_bytes(self) -> int:
        """The tensor, and its copy without loss."""
        return (_QUICK_COPIES if self.quick else 2) * self.record.info.n_bytes

    def run(self, device: torch.device) -> Piece:  # noqa: ARG002 - nothing to compute
        """The tensor's bytes."""
        name = self.record.name
        base = self.weights.base(name) if self.is_compact else None
        tensor = self.weights.original(name)
        return kept_piece(self.record, tensor, is_compact=self.is_compact, base=base, quick=self.quick)


def kept_piece(
    record: Record,
    tensor: torch.Tensor,
    *,
    is_compact: bool,
    base: torch.Tensor | None = None,
    quick: bool = False,
) -> Piece:
    """A tensor bit for bit: its bytes, or where that takes less, what they differ by from those of the `base`."""
    data, digest = tensor_bytes(tensor), tensor_hash(tensor)
    if base is not None and base.element_size() == tensor.element_size():
        difference = exact_difference(data, base, record.info.dtype)
        if len(_coded(difference, record, quick=quick)) < len(_coded(data, record, quick=quick)):
            record, data = replace(record, difference=True), difference
    if record.is_bundled:
        return Piece(record, digest, bundled=data.copy())
    if not is_compact:
        return Piece(record, digest, ((f"keep/{record.name}", data),))
    coded = _coded(data, record, quick=quick)
    return Piece(replace(record, coding=Kept(len(coded))), digest, ((f"keep/{record.name}", coded),))


def reference_piece(record: Record) -> Piece:
    """Another name, or a copy, of a tensor that is there already; it has no bytes of its own."""
    return Piece(record, bytes(HASH_BYTES))


def bundle(pieces: Iterable[Piece], *, is_compact: bool) -> bytes:
    """The small kept tensors end to end, as they share an entry."""
    bundled = [(piece.bundled, piece.record.info.dtype) for piece in pieces if piece.bundled is not None]
    if not is_compact:
        return b"".join(data.tobytes() for data, _ in bundled)
    return lossless.compress([as_words(data, dtype) for data, dtype in bundled])


def _coded(data: NDArray[np.uint8], record: Record, *, quick: bool) -> bytes:
    return lossless.compress([as_words(data, record.info.dtype)], quick=quick)


def as_words(data: NDArray[np.uint8], dtype: str) -> NDArray[np.generic]:
    """The bytes of a tensor as unsigned words of its item size, which is all that the lossless coder looks at."""
    size = ITEM_BYTES[dtype]
    return data.view("V16" if size == 16 else f"<u{size}")
