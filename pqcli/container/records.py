"""What a container knows of its tensors: `Record`, `Manifest`, stored errors, hashes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.codecs.coders import CODECS
from pqcli.core import metrics
from pqcli.core.pq import packing
from pqcli.core.trellis.sources import Source
from pqcli.tensors.info import ITEM_BYTES, TensorInfo

ACTIONS: Final = ("pq", *CODECS, "keep", "alias")
HASH_BYTES: Final = 8
"""Bytes of a hash, with plain PQ."""
SHORT_HASH_BYTES: Final = 4
"""Bytes of a hash in files made to be small: one corrupted tensor in four billion goes unnoticed."""
BUNDLED_BYTES: Final = 1 << 16
"""Kept tensors up to this size lie in `pqcli.kept`: a header entry of their own would outweigh many of them."""
_STRICT: Final = {"strict": True, "extra": "forbid"}
"""How the reader has pydantic check what it reads (here it is not imported: that takes a tenth of a second)."""


@dataclass(frozen=True)
class Record:
    """One tensor of the container, in the checkpoint's order.

    `action` is "pq", the name of a whole-checkpoint codec, "keep" or "alias". `rows` is None where it is `shape[0]`;
    `kernel` counts the kernel positions of a convolution, for codecs that make use of them; `coded_bytes` is the share
    of `pqcli.coded` that the tensor takes.
    """

    __pydantic_config__: ClassVar = _STRICT

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: str
    reason: str = ""
    kind: str = ""
    role: str = "model"
    alias_of: str | None = None
    rows: int | None = None
    block_size: int | None = None
    n_centroids: int | None = None
    codebook_dtype: str = "float16"
    kernel: int = 1
    coded_bytes: int | None = None

    @property
    def info(self) -> TensorInfo:
        """The tensor as its checkpoint described it."""
        return TensorInfo(self.name, self.shape, self.dtype, self.alias_of, self.role)

    @property
    def quantized(self) -> bool:
        """Whether decoding may give other values than the original's."""
        return self.action not in {"keep", "alias"}

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) that blocks were cut from."""
        rows = self.shape[0] if self.rows is None else self.rows
        return rows, self.info.numel // max(rows, 1)

    @property
    def source(self) -> Source:
        """The tensor as a whole-checkpoint codec sees it."""
        rows, columns = self.matrix_shape
        return Source(self.name, self.shape, rows, columns, self.kernel)

    @property
    def n_vectors(self) -> int:
        """Number of assignments."""
        rows, columns = self.matrix_shape
        return rows * -(-columns // (self.block_size or 1))

    @property
    def assignment_bytes(self) -> int:
        """Bytes of the assignments; with a whole-checkpoint codec, of all that is coded for the tensor."""
        if self.action == "pq":
            return packing.packed_bytes(self.n_vectors, packing.n_bits(self.n_centroids or 0))
        return self.coded_bytes or 0

    @property
    def payload_bytes(self) -> int:
        """Bytes this tensor takes in the file, without header and manifest."""
        if self.action == "alias":
            return 0
        if self.action == "pq":
            block_size, n_centroids = self.block_size or 0, self.n_centroids or 0
            return n_centroids * block_size * ITEM_BYTES[self.codebook_dtype] + self.assignment_bytes
        return self.info.n_bytes if self.coded_bytes is None else self.coded_bytes


@dataclass(frozen=True)
class Manifest:
    """What `pqcli.manifest` holds. `source` describes the checkpoint (format, structure, size), `recipe` the wish.

    `coded` describes `pqcli.coded`: {"codec", "shared" and "streams": lengths in bytes}; empty where there is none.
    """

    __pydantic_config__: ClassVar = _STRICT

    version: int
    features: tuple[str, ...]
    source: dict[str, Any]
    recipe: dict[str, Any]
    tensors: tuple[Record, ...]
    coded: dict[str, Any] = field(default_factory=dict)


def is_bundled(record: Record) -> bool:
    """Whether a kept tensor lies in `pqcli.kept`, and not in an entry of its own."""
    return record.action == "keep" and record.info.n_bytes <= BUNDLED_BYTES


@dataclass(frozen=True)
class StoredError:
    """The error of one tensor as compression measured it, in float32."""

    rms: float
    relative_mse: float
    cosine: float
    max_abs_error: float

    @staticmethod
    def of(error: metrics.Error) -> StoredError:
        """The stored form of a measured error."""
        rms = math.sqrt(error.energy / error.n) if error.n else 0.0
        return StoredError(rms, error.relative_mse, error.cosine, error.max_abs_error)


def with_kept_shares(records: Sequence[Record], kept_bytes: int) -> list[Record]:
    """The records with the bytes of `pqcli.kept` shared out among the small kept tensors, by their dense size."""
    dense = sum(record.info.n_bytes for record in records if is_bundled(record))
    seen, found = 0, []
    for record in records:
        if is_bundled(record) and dense:
            before = kept_bytes * seen // dense
            seen += record.info.n_bytes
            found.append(replace(record, coded_bytes=kept_bytes * seen // dense - before))
        else:
            found.append(record)
    return found


def tensor_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The little-endian bytes of a dense tensor, row by row."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)


def tensor_hash(tensor: torch.Tensor) -> bytes:
    """BLAKE2b-64 of the tensor's bytes; shorter hashes are its beginning."""
    return hashlib.blake2b(tensor_bytes(tensor).data, digest_size=HASH_BYTES).digest()
