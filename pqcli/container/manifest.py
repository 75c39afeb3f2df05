"""The manifest: what a file says of itself, and how that looks as JSON.

`StoredRecord` and `StoredManifest` are the schema: pydantic checks what is read against them, field by field and with
nothing beside, and the checked values become a `Manifest` of `Record`s. Fields with their default values are not
written.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Final

from pqcli.tensors.info import TensorInfo
from pqcli.tensors.records import Alias, Coded, Coding, Kept, Plain, Record

VERSION: Final = 1
KEPT_CODED: Final = "kept-coded"
"""The feature of files whose kept tensors are coded without loss."""
_STRICT: Final = {"strict": True, "extra": "forbid"}
"""How the reader has pydantic check what it reads (here it is not imported: that takes a tenth of a second)."""


@dataclass(frozen=True)
class Manifest:
    """What `pqcli.manifest` holds. `source` describes the checkpoint (format, structure, size), `recipe` the wish.

    `coded` describes `pqcli.coded`: {"codec", "shared" and "streams": lengths in bytes}; empty where there is none.
    """

    version: int
    features: tuple[str, ...]
    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    tensors: tuple[Record, ...]
    coded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def coded_bytes(self) -> int:
        """Length of `pqcli.coded`; 0 where there is none."""
        return int(self.coded["shared"] + sum(self.coded["streams"])) if self.coded else 0


@dataclass(frozen=True)
class StoredRecord:
    """A record as JSON holds it: the fields of all codings side by side, those that do not apply at their defaults."""

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

    @staticmethod
    def of(record: Record) -> StoredRecord:
        """The stored form of a record."""
        info, coding = record.info, record.coding
        given: dict[str, Any] = {}
        if isinstance(coding, Plain):
            given = {
                "rows": coding.rows, "block_size": coding.block_size, "n_centroids": coding.n_centroids,
                "codebook_dtype": coding.codebook_dtype,
            }  # fmt: skip
        elif isinstance(coding, Coded):
            given = {"rows": coding.rows, "kernel": coding.kernel, "coded_bytes": coding.n_bytes}
        elif isinstance(coding, Kept):
            given = {"coded_bytes": coding.n_bytes}
        return StoredRecord(
            info.name, info.shape, info.dtype, coding.action, record.reason, record.kind, info.role, info.alias_of,
            **given,
        )  # fmt: skip

    def record(self) -> Record:
        """The record. Raises ValueError where the action lacks what it needs."""
        info = TensorInfo(self.name, self.shape, self.dtype, self.alias_of, self.role)
        return Record(info, self._coding(), self.reason, self.kind)

    def _coding(self) -> Coding:
        if (self.action == "alias") != (self.alias_of is not None):
            raise ValueError(f"action {self.action!r} of an alias of {self.alias_of!r}")
        if self.alias_of is not None:
            return Alias(self.alias_of)
        if self.action == Kept.action:
            return Kept(self.coded_bytes)
        if self.action != Plain.action:
            return Coded(self.action, self.rows, self.kernel, self.coded_bytes)
        if self.block_size is None or self.n_centroids is None:
            raise ValueError("plain PQ without a block size or a number of centroids")
        return Plain(self.block_size, self.n_centroids, self.codebook_dtype, self.rows)


@dataclass(frozen=True)
class StoredManifest:
    """The manifest as JSON holds it."""

    __pydantic_config__: ClassVar = _STRICT

    version: int
    features: tuple[str, ...]
    source: dict[str, Any]
    recipe: dict[str, Any]
    tensors: tuple[StoredRecord, ...]
    coded: dict[str, Any] = field(default_factory=dict)

    def manifest(self) -> Manifest:
        """The manifest. Raises ValueError, naming the tensor, where a record lacks what it needs."""
        records = []
        for stored in self.tensors:
            try:
                records.append(stored.record())
            except ValueError as error:
                raise ValueError(f"the record of {stored.name!r} makes no sense: {error}") from None
        return Manifest(self.version, self.features, self.source, self.recipe, tuple(records), self.coded)


def make_manifest(
    source: Mapping[str, Any],
    recipe: Mapping[str, Any],
    records: Sequence[Record],
    coded: Mapping[str, Any] | None = None,
    features: Iterable[str] = (),
) -> Manifest:
    """The manifest of a file with these records, naming the features that they need, and `features` beside."""
    needed = {record.action for record in records if record.quantized} | set(features)
    return Manifest(VERSION, tuple(sorted(needed)), source, recipe, tuple(records), coded or {})


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is stored: zlib-compressed JSON."""
    plain: dict[str, Any] = {
        "version": manifest.version,
        "features": manifest.features,
        "source": manifest.source,
        "recipe": manifest.recipe,
        "tensors": [_without_defaults(StoredRecord.of(record)) for record in manifest.tensors],
    }
    if manifest.coded:
        plain["coded"] = manifest.coded
    return zlib.compress(json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode(), 9)


def _without_defaults(stored: StoredRecord) -> dict[str, Any]:
    defaults = {name: value.default for name, value in StoredRecord.__dataclass_fields__.items()}
    return {key: value for key, value in asdict(stored).items() if value != defaults[key]}
