"""The file format: what `compress` writes and everything else reads. `FORMAT.md` specifies it for other readers.

A container is a plain safetensors file. Per tensor it holds a codebook and packed assignments (`pq/NAME/codebook`,
`pq/NAME/assignments`), or the tensor itself (`keep/NAME`; small ones lie end to end in `pqcli.kept`). Three more
entries say what it all means:

    pqcli.manifest   zlib-compressed JSON: the source's structure, the recipe, and a `Record` per tensor
    pqcli.hashes     8 bytes per record: BLAKE2b of the decoded tensor's bytes
    pqcli.errors     4 float32 per quantized record: rms, relative MSE, cosine, largest absolute error

What compression measures (hashes, errors) is kept out of the manifest, so that the size of a file is known before any
weight is read: `predict` and `Writer` lay out the same records with the same code.

Every later ability is a new named feature; a reader refuses a file whose features it does not know.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pydantic
import safetensors
import torch
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass as validated

from pqcli.atomic import atomic_writer
from pqcli.core import metrics, packing, pq
from pqcli.errors import ContainerError
from pqcli.tensorinfo import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    from typing import Self

VERSION: Final = 1
FEATURES: Final = frozenset({"pq"})
SUFFIX: Final = ".pq.safetensors"
MANIFEST, HASHES, ERRORS, KEPT = "pqcli.manifest", "pqcli.hashes", "pqcli.errors", "pqcli.kept"
BUNDLED_BYTES: Final = 1 << 16
"""Kept tensors up to this size lie in `pqcli.kept`: a header entry of their own would outweigh many of them."""
HASH_BYTES: Final = 8
MAX_MANIFEST_BYTES: Final = 1 << 28
_SAFETENSORS_DTYPES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_STRICT = pydantic.ConfigDict(strict=True, extra="forbid")


@validated(frozen=True, config=_STRICT)
class Record:
    """One tensor of the container, in the checkpoint's order.

    `action` is "pq", "keep" or "alias". `rows` is None where it is `shape[0]`.
    """

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

    @property
    def info(self) -> TensorInfo:
        """The tensor as its checkpoint described it."""
        return TensorInfo(self.name, self.shape, self.dtype, self.alias_of, self.role)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) that blocks were cut from."""
        rows = self.shape[0] if self.rows is None else self.rows
        return rows, self.info.numel // max(rows, 1)

    @property
    def n_vectors(self) -> int:
        """Number of assignments."""
        rows, columns = self.matrix_shape
        return rows * -(-columns // (self.block_size or 1))

    @property
    def payload_bytes(self) -> int:
        """Bytes this tensor takes in the file, without header and manifest."""
        if self.action == "alias":
            return 0
        if self.action == "keep":
            return self.info.n_bytes
        block_size, n_centroids = self.block_size or 0, self.n_centroids or 0
        codebook = n_centroids * block_size * ITEM_BYTES[self.codebook_dtype]
        return codebook + packing.packed_bytes(self.n_vectors, packing.n_bits(n_centroids))


@validated(frozen=True, config=_STRICT)
class Manifest:
    """What `pqcli.manifest` holds. `source` describes the checkpoint (format, structure, size), `recipe` the wish."""

    version: int
    features: tuple[str, ...]
    source: dict[str, Any]
    recipe: dict[str, Any]
    tensors: tuple[Record, ...]


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


def tensor_bytes(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The little-endian bytes of a dense tensor, row by row."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy() if flat.numel() else np.zeros(0, np.uint8)


def tensor_hash(tensor: torch.Tensor) -> bytes:
    """BLAKE2b-64 of the tensor's bytes."""
    return hashlib.blake2b(tensor_bytes(tensor).tobytes(), digest_size=HASH_BYTES).digest()


# --- layout ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One safetensors entry and, once written, where its bytes lie in the spool."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int
    spooled_at: int = 0


def _entries(records: Sequence[Record]) -> list[_Entry]:
    """The entries that the tensors themselves take, in the order in which a writer produces them."""
    entries = []
    for record in records:
        info = record.info
        if record.action == "pq":
            k, d = record.n_centroids or 0, record.block_size or 0
            size = k * d * ITEM_BYTES[record.codebook_dtype]
            entries.append(_Entry(f"pq/{record.name}/codebook", record.codebook_dtype, (k, d), size))
            packed = record.payload_bytes - size
            entries.append(_Entry(f"pq/{record.name}/assignments", "uint8", (packed,), packed))
        elif record.action == "keep" and info.n_bytes > BUNDLED_BYTES:
            native = info.dtype in _SAFETENSORS_DTYPES
            shape = info.shape if native else (info.n_bytes,)
            entries.append(_Entry(f"keep/{record.name}", info.dtype if native else "uint8", shape, info.n_bytes))
    return entries


def _bundled(record: Record) -> bool:
    return record.action == "keep" and record.info.n_bytes <= BUNDLED_BYTES


def _closing_entries(manifest: Manifest) -> list[_Entry]:
    records = manifest.tensors
    kept = sum(record.info.n_bytes for record in records if _bundled(record))
    n_coded = sum(record.action == "pq" for record in records)
    n_manifest = len(_manifest_bytes(manifest))
    return [
        _Entry(KEPT, "uint8", (kept,), kept),
        _Entry(HASHES, "uint8", (len(records), HASH_BYTES), len(records) * HASH_BYTES),
        _Entry(ERRORS, "float32", (n_coded, 4), n_coded * 16),
        _Entry(MANIFEST, "uint8", (n_manifest,), n_manifest),
    ]


def _manifest_bytes(manifest: Manifest) -> bytes:
    defaults = {name: value.default for name, value in Record.__dataclass_fields__.items()}
    plain = asdict(manifest)
    plain["tensors"] = [
        {key: value for key, value in record.items() if key not in defaults or value != defaults[key]}
        for record in plain["tensors"]
    ]
    return zlib.compress(json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode(), 9)


def _header(entries: Iterable[_Entry], features: Iterable[str]) -> tuple[bytes, list[_Entry]]:
    """The safetensors header, and the entries in the order of their data: widest dtype first, so all are aligned."""
    ordered = sorted(entries, key=lambda entry: (-ITEM_BYTES[entry.dtype], entry.key))
    head: dict[str, Any] = {
        "__metadata__": {"format": "pqcli", "version": str(VERSION), "features": ",".join(features)}
    }
    offset = 0
    for entry in ordered:
        end = offset + entry.n_bytes
        dtype = _SAFETENSORS_DTYPES[entry.dtype]
        head[entry.key] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, ordered


def make_manifest(source: dict[str, Any], recipe: dict[str, Any], records: Sequence[Record]) -> Manifest:
    """The manifest of a file with these records, naming the features that they need."""
    features = tuple(sorted({record.action for record in records} - {"keep", "alias"}))
    return Manifest(VERSION, features, source, recipe, tuple(records))


def predict(manifest: Manifest) -> int:
    """Size in bytes of the file that these records make: exactly what `Writer` will write for them."""
    entries = _entries(manifest.tensors) + _closing_entries(manifest)
    header, _ = _header(entries, manifest.features)
    return len(header) + sum(entry.n_bytes for entry in entries)


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass
class Writer:
    """Takes encoded tensors one by one, and makes the file of them at the end.

    Payloads are spooled to a nameless temporary file beside the target, because the header, which comes first, is known
    only when all are there. Nothing appears at `target` before `finish`. Use as a context manager.
    """

    target: Path
    force: bool = False
    records: list[Record] = field(default_factory=list)
    _hashes: list[bytes] = field(default_factory=list)
    _errors: list[StoredError] = field(default_factory=list)
    _kept: list[bytes] = field(default_factory=list)
    _spooled: dict[str, int] = field(default_factory=dict)
    _length: int = 0

    def __post_init__(self) -> None:
        """Open the spool; raises OSError where the target's folder cannot be written."""
        self._spool = tempfile.TemporaryFile(dir=self.target.parent)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()

    def add_pq(self, record: Record, tensor: pq.PQTensor, decoded_hash: bytes, error: metrics.Error) -> None:
        """A tensor as codebook and assignments."""
        packed = packing.pack(tensor.assignments.numpy(), packing.n_bits(tensor.n_centroids))
        self._put(f"pq/{record.name}/codebook", tensor_bytes(tensor.codebook))
        self._put(f"pq/{record.name}/assignments", packed)
        self._errors.append(StoredError.of(error))
        self._note(record, decoded_hash)

    def add_kept(self, record: Record, tensor: torch.Tensor) -> None:
        """A tensor bit for bit."""
        data = tensor_bytes(tensor)
        if _bundled(record):
            self._kept.append(data.tobytes())
        else:
            self._put(f"keep/{record.name}", data)
        self._note(record, tensor_hash(tensor))

    def add_alias(self, record: Record) -> None:
        """Another name of a tensor that is there already."""
        self._note(record, bytes(HASH_BYTES))

    def finish(self, source: dict[str, Any], recipe: dict[str, Any]) -> int:
        """Write the file; returns its size in bytes. Raises OutputError where it cannot be written."""
        manifest = make_manifest(source, recipe, self.records)
        closing = _closing_entries(manifest)
        self._put(KEPT, b"".join(self._kept))
        self._put(HASHES, b"".join(self._hashes))
        rows = [[e.rms, e.relative_mse, e.cosine, e.max_abs_error] for e in self._errors]
        with np.errstate(over="ignore"):
            self._put(ERRORS, np.array(rows, "<f4").tobytes())
        self._put(MANIFEST, _manifest_bytes(manifest))
        header, ordered = _header(_entries(self.records) + closing, manifest.features)
        with atomic_writer(self.target, force=self.force) as out:
            out.write(header)
            for entry in ordered:
                self._spool.seek(self._spooled[entry.key])
                _copy(self._spool, out, entry.n_bytes)
        return len(header) + sum(entry.n_bytes for entry in ordered)

    def _note(self, record: Record, decoded_hash: bytes) -> None:
        self.records.append(record)
        self._hashes.append(decoded_hash)

    def _put(self, key: str, data: bytes | NDArray[np.uint8]) -> None:
        self._spooled[key] = self._length
        self._spool.write(data if isinstance(data, bytes) else data.data)
        self._length += len(data)


def _copy(source: Any, target: Any, n_bytes: int) -> None:
    while n_bytes:
        piece = source.read(min(n_bytes, 1 << 24))
        target.write(piece)
        n_bytes -= len(piece)


# --- reading ---------------------------------------------------------------------------------------------------------


class Container:
    """An open container: its manifest, and one decoded tensor at a time. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safetensors.safe_open(str(path), framework="pt", backend="pread")
        except FileNotFoundError:
            raise ContainerError(f"{path}: no such file") from None
        except IsADirectoryError:
            raise ContainerError(f"{path}: a folder; give the {SUFFIX} file inside it") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise ContainerError(
                f"{path}: not a readable container ({error}); was it made by pqcli compress?"
            ) from error
        self._keys = set(self._file.keys())  # type: ignore[no-untyped-call]
        self.manifest = self._read_manifest()
        self._by_name = {record.name: i for i, record in enumerate(self.records)}
        self._offsets = self._bundle_offsets()
        self._check_structure()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    @property
    def records(self) -> tuple[Record, ...]:
        """One record per tensor, in the checkpoint's order."""
        return self.manifest.tensors

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The tensors as the checkpoint described them."""
        return tuple(record.info for record in self.records)

    def record(self, name: str) -> Record:
        """The record of a tensor. Raises ContainerError for a name that is not there."""
        if name not in self._by_name:
            raise ContainerError(
                f"{self.path}: no tensor {name!r}; `pqcli inspect` lists the {len(self.records)} there are"
            )
        return self.records[self._by_name[name]]

    def error(self, name: str) -> StoredError | None:
        """The error that compression measured; None for a tensor that is not quantized."""
        record = self.record(name)
        return self._errors.get(record.name)

    def pq_tensor(self, name: str) -> pq.PQTensor:
        """Codebook and assignments of a quantized tensor, unpacked."""
        record = self.record(name)
        if record.action != "pq":
            raise ContainerError(f"{self.path}: tensor {name!r} has no codebook, its action is {record.action!r}")
        codebook = self._get(f"pq/{name}/codebook")
        packed = self._get(f"pq/{name}/assignments").numpy()
        try:
            assignments = packing.unpack(packed, record.n_vectors, packing.n_bits(len(codebook)))
        except ValueError as error:
            raise ContainerError(f"{self.path}: assignments of {name!r}: {error}; the file is damaged") from None
        if assignments.size and int(assignments.max()) >= len(codebook):
            raise ContainerError(
                f"{self.path}: tensor {name!r} refers to centroid {assignments.max()} of {len(codebook)}; "
                "the file is damaged"
            )
        dtype = getattr(torch, record.dtype)
        return pq.PQTensor(record.shape, dtype, record.matrix_shape, codebook, torch.from_numpy(assignments))

    def decode(self, name: str, *, check: bool = True) -> torch.Tensor:
        """The dense tensor, in its original dtype and in its own memory.

        Raises ContainerError if its bytes are not those that compression saw (`check=False` skips this).
        """
        record = self.record(name)
        if record.alias_of is not None:
            return self.decode(record.alias_of, check=check)
        tensor = pq.decode(self.pq_tensor(name)) if record.action == "pq" else self._kept(record)
        if check and not self.is_intact(name, tensor):
            raise ContainerError(
                f"{self.path}: tensor {name!r} decodes to other bytes than were compressed; the file is damaged"
            )
        return tensor

    def is_intact(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether `tensor` has the bytes that `name` had when it was compressed."""
        return tensor_hash(tensor) == self._hashes[self._by_name[name]]

    def _kept(self, record: Record) -> torch.Tensor:
        dtype = getattr(torch, record.dtype)
        if not _bundled(record):
            return self._get(f"keep/{record.name}").view(dtype).reshape(record.shape)
        start = self._offsets[record.name]
        data = self._bundle[start : start + record.info.n_bytes].clone()
        return data.view(dtype).reshape(record.shape)

    def _bundle_offsets(self) -> dict[str, int]:
        offsets, offset = {}, 0
        for record in self.records:
            if _bundled(record):
                offsets[record.name] = offset
                offset += record.info.n_bytes
        return offsets

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())  # type: ignore[no-untyped-call]

    def _get(self, key: str) -> torch.Tensor:
        if key not in self._keys:
            raise ContainerError(f"{self.path}: entry {key!r} is missing; the file is damaged or not a pqcli container")
        try:
            tensor: torch.Tensor = self._file.get_tensor(key)  # type: ignore[no-untyped-call]
        except (OSError, safetensors.SafetensorError, RuntimeError, ValueError) as error:
            raise ContainerError(f"{self.path}: entry {key!r} cannot be read ({error}); the file is damaged") from error
        return tensor

    def _read_manifest(self) -> Manifest:
        raw = self._get(MANIFEST)
        try:
            inflate = zlib.decompressobj()
            text = inflate.decompress(raw.numpy().tobytes(), MAX_MANIFEST_BYTES)
            plain = json.loads(text)
            unknown = sorted(set(plain["features"]) - FEATURES)
            version = plain["version"]
        except (zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ContainerError(f"{self.path}: the manifest cannot be read ({error}); the file is damaged") from error
        if version != VERSION or unknown:
            what = f"features {', '.join(map(str, unknown))}" if unknown else f"format version {version}"
            raise ContainerError(f"{self.path}: needs {what}, which this pqcli does not know; install a newer pqcli")
        try:
            return pydantic.TypeAdapter(Manifest).validate_json(text)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ContainerError(f"{self.path}: manifest entry {place}: {first['msg']}; the file is damaged") from None

    def _check_structure(self) -> None:
        """Check all that can be checked without reading payloads, so that decoding meets no surprise."""
        if len(self._by_name) != len(self.records):
            raise ContainerError(f"{self.path}: the manifest names a tensor twice; the file is damaged")
        for record in self.records:
            if (
                record.action not in {"pq", "keep", "alias"}
                or record.dtype not in ITEM_BYTES
                or min(record.shape, default=0) < 0
            ):
                raise ContainerError(f"{self.path}: the record of {record.name!r} makes no sense; the file is damaged")
            if (record.action == "alias") != (record.alias_of is not None):
                raise ContainerError(f"{self.path}: {record.name!r} is an alias of nothing; the file is damaged")
            target = self._by_name.get(record.alias_of or record.name)
            if target is None or (record.action == "alias" and self.records[target].action == "alias"):
                raise ContainerError(f"{self.path}: {record.name!r} is an alias of nothing; the file is damaged")
            self._check_pq(record)
        expected = {e.key: e for e in _entries(self.records)}
        for key, entry in expected.items():
            if key not in self._keys or self._shape(key) != entry.shape:
                raise ContainerError(
                    f"{self.path}: entry {key!r} is missing or has the wrong shape; the file is damaged"
                )
        self._bundle, hashes, errors = self._get(KEPT), self._get(HASHES), self._get(ERRORS)
        coded = [record.name for record in self.records if record.action == "pq"]
        kept = sum(record.info.n_bytes for record in self.records if _bundled(record))
        if (self._bundle.numel(), tuple(hashes.shape), tuple(errors.shape)) != (
            kept, (len(self.records), HASH_BYTES), (len(coded), 4),
        ):  # fmt: skip
            raise ContainerError(f"{self.path}: the manifest and the data disagree; the file is damaged")
        self._hashes = [bytes(row) for row in hashes.numpy()]
        self._errors = {name: StoredError(*row) for name, row in zip(coded, errors.tolist(), strict=True)}

    def _check_pq(self, record: Record) -> None:
        if record.action != "pq":
            return
        rows, columns = record.matrix_shape if record.shape else (0, 0)
        if (
            not record.block_size or record.block_size < 1 or not record.n_centroids or not 1 <= record.n_centroids
            <= 1 << 16 or rows * columns != record.info.numel or record.block_size > columns
            or record.codebook_dtype not in {"float16", "float32"}
            or record.dtype not in {"float64", "float32", "float16", "bfloat16"}
        ):  # fmt: skip
            raise ContainerError(f"{self.path}: the record of {record.name!r} makes no sense; the file is damaged")


def open_container(path: str | Path) -> Container:
    """The container at `path`. Raises ContainerError if it is missing, damaged, or from a newer pqcli."""
    return Container(Path(path))
