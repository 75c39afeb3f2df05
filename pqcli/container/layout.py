"""The layout: which entries the safetensors file of a manifest has, where they lie, and how large it is.

Planning, budgets and writing all ask here, so they cannot disagree.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from pqcli.codecs import difference, moments, registry, zeros
from pqcli.container import checksum, files
from pqcli.container.checksum import CHECKSUM, DAMAGE, ENTROPIES, ERRORS, HASHES
from pqcli.container.header import MANIFEST, METADATA, SAFETENSORS_DTYPES
from pqcli.container.manifest import KEPT_CODED, TRAINED, VERSION, Manifest, manifest_bytes
from pqcli.core.digests import HASH_BYTES
from pqcli.tensors.info import ITEM_BYTES
from pqcli.tensors.records import Coded, Copy, Kept, Moments, Plain, Record

SHORT_HASH_BYTES: Final = 4
"""Bytes of a hash in files made to be small: one corrupted tensor in four billion goes unnoticed."""
KEPT, CODED = "pqcli.kept", "pqcli.coded"
SHARDS_FEATURE: Final = "shards"
DAMAGE_FEATURE: Final = "damage"
ENTROPIES_SHARE: Final = 2000
"""Entropies are stored where they take at most this fraction of what is coded; in less it is quick to compute them."""
_ENTRY_BYTES: Final = 80
"""What one more entry adds to the header."""


def known_features() -> frozenset[str]:
    """What a file may need that this version knows."""
    of_tensors = {KEPT_CODED, zeros.FEATURE, difference.FEATURE, Copy.action, moments.FEATURE, DAMAGE_FEATURE}
    return registry.features() | of_tensors | {checksum.FEATURE, files.FEATURE, SHARDS_FEATURE, TRAINED}


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


@dataclass(frozen=True)
class Layout:
    """A file's header, as it is written, and its entries in the order of their data."""

    header: bytes
    entries: tuple[Entry, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(entry.n_bytes for entry in self.entries)


def lay_out(manifest: Manifest, bundle_bytes: int | None = None) -> Layout:
    """The layout of the file that is written for this manifest.

    `bundle_bytes` is the length of `pqcli.kept`; None where small kept tensors are not coded, and it is their sum.
    """
    return laid_out(entries_to_write(manifest, bundle_bytes), manifest.features)


def entries_to_write(manifest: Manifest, bundle_bytes: int | None = None) -> list[Entry]:
    """The entries that are written for this manifest, in no particular order."""
    hash_bytes = SHORT_HASH_BYTES if KEPT_CODED in manifest.features else HASH_BYTES
    return entries_of(
        manifest, len(manifest_bytes(manifest)), bundle_bytes, hash_bytes, has_entropies=worth_entropies(manifest)
    )


def laid_out(entries: Iterable[Entry], features: Iterable[str]) -> Layout:
    """The layout of a file with these entries, whose header names these features."""
    # the widest first: all aligned; the checksum behind what it covers
    ordered = sorted(entries, key=lambda entry: (entry.key == CHECKSUM, -ITEM_BYTES[entry.dtype], entry.key))
    return Layout(_header(ordered, features), tuple(ordered))


def entries_of(
    manifest: Manifest, stored_bytes: int, bundle_bytes: int | None, hash_bytes: int, *, has_entropies: bool
) -> list[Entry]:
    """The entries of a file, in no particular order. The manifest takes `stored_bytes`, each hash `hash_bytes`."""
    records = manifest.tensors
    n_quantized = sum(record.quantized for record in records)
    if bundle_bytes is None:
        bundle_bytes = sum(record.info.n_bytes for record in records if record.is_bundled)
    entries = [entry for record in records for entry in own_entries(record, manifest.features)]
    entries += [
        Entry(zeros.key(record.name), "uint8", (record.zero_bytes,))
        for record in records
        if record.zero_bytes is not None
    ]
    entries += [
        Entry(KEPT, "uint8", (bundle_bytes,)),
        Entry(HASHES, "uint8", (len(records), hash_bytes)),
        Entry(ERRORS, "float32", (n_quantized, 4)),
        Entry(MANIFEST, "uint8", (stored_bytes,)),
    ]
    if checksum.FEATURE in manifest.features:
        entries.append(Entry(CHECKSUM, "uint8", (checksum.N_BYTES,)))
    if manifest.coded is not None:
        entries.append(Entry(CODED, "uint8", (manifest.coded_bytes,)))
    if manifest.files is not None:
        entries.append(Entry(files.FILES, "uint8", (manifest.files.n_bytes,)))
    if manifest.shards is not None:
        entries.append(Entry(checksum.SHARDS, "uint8", (manifest.shards - 1, checksum.N_BYTES)))
    if DAMAGE_FEATURE in manifest.features:
        entries.append(Entry(DAMAGE, "bfloat16", (n_quantized, 2)))
    if has_entropies:
        entries.append(_entropies_entry(manifest))
    return entries


def worth_entropies(manifest: Manifest) -> bool:
    """Whether a file of coded tensors is large enough to tell their entropies."""
    if manifest.coded is None:
        return False
    return ENTROPIES_SHARE * (_entropies_entry(manifest).n_bytes + _ENTRY_BYTES) <= manifest.coded_bytes


def own_entries(record: Record, features: Iterable[str]) -> list[Entry]:
    """The entries that a tensor has for itself."""
    coding, info = record.coding, record.info
    if isinstance(coding, Plain):
        codebook = Entry(f"pq/{info.name}/codebook", coding.codebook_dtype, (coding.n_centroids, coding.block_size))
        return [codebook, Entry(f"pq/{info.name}/assignments", "uint8", (record.assignment_bytes,))]
    if isinstance(coding, Moments):
        return [Entry(moments.key(info.name), "uint8", (coding.n_bytes,))]
    if not isinstance(coding, Kept) or record.is_bundled:
        return []
    if KEPT_CODED in features:
        return [Entry(f"keep/{info.name}", "uint8", (record.payload_bytes,))]
    if info.dtype in SAFETENSORS_DTYPES:
        return [Entry(f"keep/{info.name}", info.dtype, info.shape)]
    return [Entry(f"keep/{info.name}", "uint8", (info.n_bytes,))]


def _entropies_entry(manifest: Manifest) -> Entry:
    """The entropies of coded tensors; a file has them or not."""
    return Entry(ENTROPIES, "float16", (sum(isinstance(record.coding, Coded) for record in manifest.tensors),))


def metadata_of(features: Iterable[str]) -> dict[str, str]:
    """What the safetensors header says of a file with these features."""
    return {"format": "pqcli", "version": str(VERSION), "features": ",".join(features)}


def _header(ordered: Iterable[Entry], features: Iterable[str]) -> bytes:
    """The safetensors header of entries that lie in this order."""
    head: dict[str, Any] = {METADATA: metadata_of(features)}
    offset = 0
    for entry in ordered:
        end = offset + entry.n_bytes
        dtype = SAFETENSORS_DTYPES[entry.dtype]
        head[entry.key] = {"dtype": dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
