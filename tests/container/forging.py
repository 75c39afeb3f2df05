"""Containers that no pqcli wrote: a sound file taken apart, changed at will, and put together with a true checksum."""

import hashlib
import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEAD = ("pqcli.manifest", "pqcli.hashes", "pqcli.errors", "pqcli.entropies", "pqcli.damage", "pqcli.shards")


@dataclass
class Forgery:
    """A file in parts: metadata, entries in order as [dtype, shape, bytes], the manifest as JSON."""

    metadata: dict[str, Any]
    entries: dict[str, list]
    manifest: Any
    header_text: Callable[[dict], bytes] = lambda head: json.dumps(head).encode()
    manifest_text: bytes | None = None
    manifest_packed: bytes | None = None

    def bytes(self) -> bytes:
        """The file."""
        entries = {key: list(value) for key, value in self.entries.items()}
        text = self.manifest_text or json.dumps(self.manifest).encode()
        packed = self.manifest_packed or zlib.compress(text)
        if "pqcli.manifest" in entries and entries["pqcli.manifest"][2] is None:
            entries["pqcli.manifest"][1:] = [[len(packed)], packed]
        head, offset = {"__metadata__": self.metadata}, 0
        for key, (dtype, shape, data) in entries.items():
            head[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
            offset += len(data)
        text = self.header_text(head)
        raw = struct.pack("<Q", len(text)) + text
        parts = [hashlib.blake2b(raw, digest_size=8), hashlib.blake2b(digest_size=8)]
        for key, (_, _, data) in entries.items():
            if key != "pqcli.checksum":
                parts[key not in HEAD].update(data)
        if "pqcli.checksum" in entries and entries["pqcli.checksum"][2] == bytes(16):
            entries["pqcli.checksum"][2] = b"".join(part.digest() for part in parts)
        return raw + b"".join(data for _, _, data in entries.values())


def taken_apart(path: Path) -> Forgery:
    """A sound file; what is put together of it unchanged is sound as well."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8 : 8 + length])
    metadata, entries = head.pop("__metadata__"), {}
    for key, about in sorted(head.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (8 + length + offset for offset in about["data_offsets"])
        entries[key] = [about["dtype"], about["shape"], data[start:stop]]
    manifest = json.loads(zlib.decompress(entries["pqcli.manifest"][2]))
    entries["pqcli.manifest"][2] = None  # made anew
    if "pqcli.checksum" in entries:
        entries["pqcli.checksum"][2] = bytes(16)
    return Forgery(metadata, entries, manifest)
