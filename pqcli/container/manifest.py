"""The manifest: what a file says of itself, and how that looks as JSON.

`StoredRecord` and `StoredManifest` are the schema: pydantic checks what is read against them, field by field and with
nothing beside, and the checked values become a `Manifest` of `Record`s. Fields with their default values are not
written.
"""

from __future__ import annotations

import functools
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

from pqcli.codecs import difference, zeros
from pqcli.container import checksum
from pqcli.container.files import FEATURE as FILES_FEATURE
from pqcli.container.files import Files
from pqcli.container.header import LARGEST, is_shape, is_size
from pqcli.container.naming import BaseName, Naming
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.records import Alias, Coded, Coding, Copy, Kept, Moments, Plain, Record, Same

if TYPE_CHECKING:
    from pydantic import TypeAdapter

VERSION: Final = 1
KEPT_CODED: Final = "kept-coded"
"""The feature of files whose kept tensors are coded without loss."""
TRAINED: Final = "trained"
"""The feature of files with tensors that were trained after they had been compressed."""
MOST_SHARDS: Final = 99_999
_STRICT: Final = {"strict": True, "extra": "forbid"}
"""How the reader has pydantic check what it reads (here it is not imported: that takes a tenth of a second)."""


@dataclass(frozen=True)
class Source:
    """The checkpoint that was compressed.

    `format` is what `pqcli.checkpoint` calls its format, `n_bytes` its size, `skeleton` all that is no tensor, as JSON,
    `dropped` what is not in the file: places, each with the reason; `side_bytes` is the size of those of its files that
    are not in it.
    """

    __pydantic_config__: ClassVar = {**_STRICT, "extra": "ignore"}  # a later pqcli may tell more

    format: str
    n_bytes: int
    skeleton: dict[str, Any]
    dropped: list[tuple[str, str]] = field(default_factory=list)
    side_bytes: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.n_bytes <= LARGEST and 0 <= self.side_bytes <= LARGEST):
            raise ValueError(f"a source of {self.n_bytes} bytes")


@dataclass(frozen=True)
class CodedStreams:
    """What `pqcli.coded` holds: `codec` is what made it, `shared` and `streams` are lengths in bytes."""

    __pydantic_config__: ClassVar = _STRICT

    codec: str
    shared: int
    streams: tuple[int, ...]

    def __post_init__(self) -> None:
        if min((self.shared, *self.streams)) < 0 or self.n_bytes > LARGEST:
            raise ValueError("streams of such lengths cannot be")

    @property
    def n_bytes(self) -> int:
        """All of it."""
        return self.shared + sum(self.streams)


@dataclass(frozen=True)
class Manifest:
    """What `pqcli.manifest` holds; `recipe` is the wish.

    `coded` is None where there is no `pqcli.coded`, `files` where there is no `pqcli.files`; `shards` is the number of
    files that the container lies in, None where it is one. `base` is None where no record needs one.
    """

    version: int
    features: tuple[str, ...]
    source: Source
    recipe: Mapping[str, Any]
    tensors: tuple[Record, ...]
    coded: CodedStreams | None = None
    base: BaseName | None = None
    files: Files | None = None
    shards: int | None = None

    @property
    def coded_bytes(self) -> int:
        """Length of `pqcli.coded`; 0 where there is none."""
        return self.coded.n_bytes if self.coded else 0


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
    copy_of: str | None = None
    rows: int | None = None
    block_size: int | None = None
    n_centroids: int | None = None
    codebook_dtype: str = "float16"
    kernel: int = 1
    coded_bytes: int | None = None
    zero_bytes: int | None = None
    difference: bool = False
    form: str | None = None
    trained: bool = False

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
        elif isinstance(coding, Moments):
            given = {"form": coding.form, "coded_bytes": coding.n_bytes}
        elif isinstance(coding, Copy):
            given = {"copy_of": coding.of}
        return StoredRecord(
            info.name, info.shape, info.dtype, coding.action, record.reason, record.kind, info.role, info.alias_of,
            zero_bytes=record.zero_bytes, difference=record.difference, trained=record.trained, **given,
        )  # fmt: skip

    def record(self) -> Record:
        """The record. Raises ValueError where the action lacks what it needs, or a number cannot be."""
        numbers = (self.rows, self.block_size, self.n_centroids, self.kernel, self.coded_bytes, self.zero_bytes)
        if not is_shape(self.shape) or not all(number is None or is_size(number) for number in numbers):
            raise ValueError("a size that no tensor has")
        info = TensorInfo(self.name, self.shape, self.dtype, self.alias_of, self.role)
        return Record(info, self._coding(), self.reason, self.kind, self.zero_bytes, self.difference, self.trained)

    def _coding(self) -> Coding:
        if (self.action == "alias") != (self.alias_of is not None):
            raise ValueError(f"action {self.action!r} of an alias of {self.alias_of!r}")
        if (self.action == Copy.action) != (self.copy_of is not None):
            raise ValueError(f"action {self.action!r} of a copy of {self.copy_of!r}")
        if (self.action == Moments.action) != (self.form is not None):
            raise ValueError(f"action {self.action!r} with moments of the form {self.form!r:.40}")
        if self.alias_of is not None:
            return Alias(self.alias_of)
        if self.copy_of is not None:
            return Copy(self.copy_of)
        if self.action == Kept.action:
            return Kept(self.coded_bytes)
        if self.form is not None:
            if self.coded_bytes is None:
                raise ValueError("moments of which it is not said how many bytes they take")
            return Moments(self.form, self.coded_bytes)
        if self.action == Same.action:
            return Same()
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
    source: Source
    recipe: dict[str, Any]
    tensors: tuple[StoredRecord, ...]
    coded: CodedStreams | None = None
    base: BaseName | None = None
    files: Files | None = None
    shards: int | None = None

    def __post_init__(self) -> None:
        if self.shards is not None and not 2 <= self.shards <= MOST_SHARDS:
            raise ValueError(f"a container in {self.shards} files")

    def manifest(self) -> Manifest:
        """The manifest. Raises ValueError, naming the tensor, where a record lacks what it needs."""
        records = []
        for stored in self.tensors:
            try:
                records.append(stored.record())
            except ValueError as error:
                raise ValueError(f"the record of {stored.name!r} makes no sense: {error}") from None
        return Manifest(
            self.version,
            self.features,
            self.source,
            self.recipe,
            tuple(records),
            self.coded,
            self.base,
            self.files,
            self.shards,
        )


def make_manifest(
    source: Mapping[str, Any],
    recipe: Mapping[str, Any],
    records: Sequence[Record],
    coded: CodedStreams | None = None,
    features: Iterable[str] = (),
    naming: Naming | None = None,
    files: Files | None = None,
) -> Manifest:
    """The manifest of a file with these records, naming the features that they need, and `features` beside.

    `source` has the fields of `Source`; `naming` knows the base that records may need.
    """
    needed = {record.action for record in records if record.quantized or isinstance(record.coding, Copy)} | {
        checksum.FEATURE,
        *features,
    }
    if any(record.zero_bytes is not None for record in records):
        needed.add(zeros.FEATURE)
    if any(record.trained for record in records):
        needed.add(TRAINED)
    if files is not None:
        needed.add(FILES_FEATURE)
    base = naming.name_for(records) if naming else None
    if base is not None:
        needed.add(difference.FEATURE)
    return Manifest(VERSION, tuple(sorted(needed)), Source(**source), recipe, tuple(records), coded, base, files)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is stored: zlib-compressed JSON."""
    plain: dict[str, Any] = {
        "version": manifest.version,
        "features": manifest.features,
        "source": {key: value for key, value in vars(manifest.source).items() if key != "side_bytes" or value},
        "recipe": manifest.recipe,
        "tensors": [_without_defaults(StoredRecord.of(record)) for record in manifest.tensors],
    }
    if manifest.coded is not None:
        plain["coded"] = vars(manifest.coded)
    if manifest.base is not None:
        plain["base"] = vars(manifest.base)
    if manifest.files is not None:
        plain["files"] = vars(manifest.files)
    if manifest.shards is not None:
        plain["shards"] = manifest.shards
    return zlib.compress(json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode(), 9)


def parse_manifest(plain: dict[str, Any]) -> Manifest:
    """The manifest that JSON describes. Raises ValueError for all that is not as `StoredManifest` has it."""
    import pydantic

    # what is free in form is set aside: pydantic's parser takes less depth than a checkpoint may have
    source, recipe = plain.get("source"), plain.get("recipe")
    skeleton = source.get("skeleton") if isinstance(source, dict) else None
    aside = dict(plain)
    if isinstance(skeleton, dict) and isinstance(recipe, dict) and isinstance(source, dict):
        aside |= {"source": {**source, "skeleton": {}}, "recipe": {}}
    else:
        skeleton, recipe = {}, {}  # the schema refuses the manifest
    try:
        stored = _checker().validate_json(json.dumps(aside))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"entry {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return replace(stored, source=replace(stored.source, skeleton=skeleton), recipe=recipe).manifest()


@functools.cache
def _checker() -> TypeAdapter[StoredManifest]:
    import pydantic

    return pydantic.TypeAdapter(StoredManifest)


def _without_defaults(stored: StoredRecord) -> dict[str, Any]:
    defaults = {name: value.default for name, value in StoredRecord.__dataclass_fields__.items()}
    return {key: value for key, value in asdict(stored).items() if value != defaults[key]}
