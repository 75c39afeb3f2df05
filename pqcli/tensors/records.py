"""`Record`: what became of one tensor, and what it is coded as.

    Plain   plain PQ: a codebook and packed assignments, each an entry of the file
    Coded   by a codec whose streams lie end to end in one entry, `pqcli.coded`
    Kept    bit for bit
    Moments an optimizer's moments, in eight bits a value
    Alias   another name of an earlier tensor
    Copy    a tensor by itself whose bytes were those of another one, which is held in its place
    Same    the tensor that the file's base has under that name

Each value knows the bytes that it takes and nothing that belongs to another. How records look in a file is the
container's matter (`pqcli.container.manifest`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Final

from pqcli.tensors.info import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    from pqcli.core.metrics import Error

BUNDLED_BYTES: Final = 1 << 16
"""Kept tensors up to this size share one entry of the file: a header entry each would outweigh many of them."""


@dataclass(frozen=True)
class Plain:
    """A codebook (n_centroids, block_size) and an assignment per block. `rows` is None where it is `shape[0]`."""

    block_size: int
    n_centroids: int
    codebook_dtype: str = "float16"
    rows: int | None = None

    action: ClassVar = "pq"

    @property
    def codebook_bytes(self) -> int:
        """Bytes of the codebook."""
        return self.n_centroids * self.block_size * ITEM_BYTES[self.codebook_dtype]


@dataclass(frozen=True)
class Coded:
    """A share of the streams of `codec`.

    `kernel` counts the kernel positions of a convolution. `n_bytes` is the tensor's share, known once it is coded.
    """

    codec: str
    rows: int | None = None
    kernel: int = 1
    n_bytes: int | None = None

    @property
    def action(self) -> str:
        """The codec's name."""
        return self.codec


@dataclass(frozen=True)
class Kept:
    """The tensor itself; `n_bytes` is what it takes where it was coded without loss, None where it was not."""

    n_bytes: int | None = None

    action: ClassVar = "keep"


@dataclass(frozen=True)
class Moments:
    """Moments of an optimizer in eight bits a value, of the `form` "first" or "second"; `n_bytes` is what they take."""

    form: str
    n_bytes: int

    action: ClassVar = "moments"


@dataclass(frozen=True)
class Alias:
    """Another name of the tensor `of`."""

    of: str

    action: ClassVar = "alias"


@dataclass(frozen=True)
class Copy:
    """A tensor of its own that had the same bytes as the tensor `of`, and comes back as what that one comes back as."""

    of: str

    action: ClassVar = "copy"


@dataclass(frozen=True)
class Same:
    """The base's tensor of the same name, in the record's dtype."""

    action: ClassVar = "base"


Coding = Plain | Coded | Kept | Moments | Alias | Copy | Same


@dataclass(frozen=True)
class Record:
    """One tensor: its header, what it is coded as, why (`reason`), and the kind of layer it belongs to.

    `zero_bytes` is the length of what tells its exact zeros (`pqcli.codecs.zeros`); None where that is nothing.
    `difference` says that what is coded is the difference to the base's tensor (`pqcli.codecs.difference`), `trained`
    that the tensor has been trained since it was compressed: how far it is from anything is not known any more.
    """

    info: TensorInfo
    coding: Coding
    reason: str = ""
    kind: str = ""
    zero_bytes: int | None = None
    difference: bool = False
    trained: bool = False

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.info.name

    @property
    def held_by(self) -> str:
        """The tensor that holds what this one comes back as: itself, unless it is a copy."""
        return self.coding.of if isinstance(self.coding, Copy) else self.name

    @property
    def action(self) -> str:
        """What files call it: "keep", "moments", "alias", "copy", "base", or a codec's name."""
        return self.coding.action

    @property
    def needs_base(self) -> bool:
        """Whether decoding it takes the base's tensor of the same name."""
        return self.difference or isinstance(self.coding, Same)

    @property
    def quantized(self) -> bool:
        """Whether decoding may give other values than the original's."""
        return isinstance(self.coding, Plain | Coded | Moments)

    @property
    def is_bundled(self) -> bool:
        """Whether the tensor is kept, and so small that it shares an entry of the file."""
        return isinstance(self.coding, Kept) and self.info.n_bytes <= BUNDLED_BYTES

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the matrix that a quantized tensor is taken as."""
        rows = self.coding.rows if isinstance(self.coding, Plain | Coded) else None
        rows = self.info.shape[0] if rows is None else rows
        return rows, self.info.numel // max(rows, 1)

    @property
    def n_vectors(self) -> int:
        """Number of assignments; 0 unless it is coded with plain PQ."""
        if not isinstance(self.coding, Plain):
            return 0
        rows, columns = self.matrix_shape
        return rows * -(-columns // self.coding.block_size)

    @property
    def assignment_bytes(self) -> int:
        """Bytes of the packed assignments; of a tensor with a share of the streams, all of that."""
        if isinstance(self.coding, Plain):
            return -(-self.n_vectors * (self.coding.n_centroids - 1).bit_length() // 8)
        return (self.coding.n_bytes or 0) if isinstance(self.coding, Coded) else 0

    @property
    def payload_bytes(self) -> int:
        """Bytes that this tensor takes in the file, without header and manifest."""
        coding = self.coding
        if isinstance(coding, Alias | Copy | Same):
            return 0
        if isinstance(coding, Plain):
            return coding.codebook_bytes + self.assignment_bytes + (self.zero_bytes or 0)
        return (self.info.n_bytes if coding.n_bytes is None else coding.n_bytes) + (self.zero_bytes or 0)

    def kept(self, reason: str) -> Record:
        """The record of the same tensor, kept for that reason."""
        return Record(self.info, Kept(), reason, self.kind)


@dataclass(frozen=True)
class StoredError:
    """The error of one tensor as compression measured it; a file holds it in float32."""

    rms: float
    relative_mse: float
    cosine: float
    max_abs_error: float

    @staticmethod
    def of(error: Error) -> StoredError:
        """The stored form of a measured error."""
        rms = math.sqrt(error.energy / error.n) if error.n else 0.0
        return StoredError(rms, error.relative_mse, error.cosine, error.max_abs_error)


def with_bundle_shares(records: list[Record], bundle_bytes: int) -> list[Record]:
    """The records with the bytes of the shared entry divided among the small kept tensors, by their dense size."""
    dense = sum(record.info.n_bytes for record in records if record.is_bundled)
    seen, found = 0, []
    for record in records:
        if record.is_bundled and dense:
            before = bundle_bytes * seen // dense
            seen += record.info.n_bytes
            record = replace(record, coding=Kept(bundle_bytes * seen // dense - before))
        found.append(record)
    return found
