"""Records -> entries and header of the safetensors file. Writer and prediction share it, so they cannot disagree."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from pqcli.codecs.coders import CODECS, MIXING, ROWS
from pqcli.container.peek import MANIFEST
from pqcli.container.records import HASH_BYTES, Manifest, Record, is_bundled
from pqcli.tensors.info import ITEM_BYTES

VERSION: Final = 1
KEPT_CODED: Final = "kept-coded"
FEATURES: Final = frozenset({"pq", KEPT_CODED, MIXING, ROWS, *CODECS})
HASHES, ERRORS, ENTROPIES, KEPT, CODED = (
    "pqcli.hashes", "pqcli.errors", "pqcli.entropies", "pqcli.kept", "pqcli.coded",
)  # fmt: skip
ENTROPIES_SHARE: Final = 2000
"""Entropies are stored where they take at most this fraction of what is coded; in less it is quick to compute them."""
_ENTRY_BYTES: Final = 80
"""What one more entry adds to the header."""
SAFETENSORS_DTYPES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One entry of the safetensors file."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Length of its data."""
        size = ITEM_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


def tensor_entries(manifest: Manifest) -> list[Entry]:
    """The entries that single tensors have for themselves."""
    entries = []
    for record in manifest.tensors:
        info = record.info
        if record.action == "pq":
            codebook = Entry(
                f"pq/{record.name}/codebook", record.codebook_dtype, (record.n_centroids or 0, record.block_size or 0)
            )
            packed = record.payload_bytes - codebook.n_bytes
            entries += [codebook, Entry(f"pq/{record.name}/assignments", "uint8", (packed,))]
        elif record.action == "keep" and not is_bundled(record):
            if KEPT_CODED in manifest.features:
                entries.append(Entry(f"keep/{record.name}", "uint8", (record.payload_bytes,)))
            elif info.dtype in SAFETENSORS_DTYPES:
                entries.append(Entry(f"keep/{record.name}", info.dtype, info.shape))
            else:
                entries.append(Entry(f"keep/{record.name}", "uint8", (info.n_bytes,)))
    return entries


def shared_entries(manifest: Manifest, kept_bytes: int | None = None, hash_bytes: int = HASH_BYTES) -> list[Entry]:
    """The entries that all tensors share. `kept_bytes` is the length of `pqcli.kept` where it is coded."""
    records = manifest.tensors
    if kept_bytes is None:
        kept_bytes = sum(record.info.n_bytes for record in records if is_bundled(record))
    n_quantized = sum(record.quantized for record in records)
    entries = [
        Entry(KEPT, "uint8", (kept_bytes,)),
        Entry(HASHES, "uint8", (len(records), hash_bytes)),
        Entry(ERRORS, "float32", (n_quantized, 4)),
        Entry(MANIFEST, "uint8", (len(manifest_bytes(manifest)),)),
    ]
    if manifest.coded:
        entries.append(Entry(CODED, "uint8", (_coded_bytes(manifest),)))
    return entries


def entropies_entry(manifest: Manifest) -> Entry:
    """The entropies of coded tensors; a file has them or not."""
    return Entry(ENTROPIES, "float16", (sum(record.action in CODECS for record in manifest.tensors),))


def worth_entropies(manifest: Manifest) -> bool:
    """Whether a file of coded tensors is large enough to tell their entropies."""
    if not manifest.coded:
        return False
    return ENTROPIES_SHARE * (entropies_entry(manifest).n_bytes + _ENTRY_BYTES) <= _coded_bytes(manifest)


def _coded_bytes(manifest: Manifest) -> int:
    return int(manifest.coded["shared"] + sum(manifest.coded["streams"]))


def manifest_bytes(manifest: Manifest) -> bytes:
    """The manifest as it is stored: fields with their default values are left out."""
    defaults = {name: value.default for name, value in Record.__dataclass_fields__.items()}
    plain = asdict(manifest)
    plain["tensors"] = [
        {key: value for key, value in record.items() if key not in defaults or value != defaults[key]}
        for record in plain["tensors"]
    ]
    if not plain["coded"]:
        del plain["coded"]
    return zlib.compress(json.dumps(plain, separators=(",", ":"), ensure_ascii=False).encode(), 9)


def header(entries: Iterable[Entry], features: Iterable[str]) -> tuple[bytes, list[Entry]]:
    """The safetensors header, and the entries in the order of their data: widest dtype first, so all are aligned."""
    ordered = sorted(entries, key=lambda entry: (-ITEM_BYTES[entry.dtype], entry.key))
    meta = {"format": "pqcli", "version": str(VERSION), "features": ",".join(features)}
    head: dict[str, Any] = {"__metadata__": meta}
    offset = 0
    for entry in ordered:
        end = offset + entry.n_bytes
        dtype = SAFETENSORS_DTYPES[entry.dtype]
        head[entry.key] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, ordered


def make_manifest(
    source: dict[str, Any],
    recipe: dict[str, Any],
    records: Sequence[Record],
    coded: dict[str, Any] | None = None,
    features: Iterable[str] = (),
) -> Manifest:
    """The manifest of a file with these records, naming the features that they need, and `features` beside."""
    needed = {record.action for record in records if record.quantized} | set(features)
    return Manifest(VERSION, tuple(sorted(needed)), source, recipe, tuple(records), coded or {})


def predict(manifest: Manifest) -> int:
    """Size in bytes of the file that these records make: exactly what `Writer` will write for plain PQ."""
    entries = tensor_entries(manifest) + shared_entries(manifest)
    head, _ = header(entries, manifest.features)
    return len(head) + sum(entry.n_bytes for entry in entries)
