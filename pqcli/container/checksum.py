"""The checksum of a file: 8 bytes for what is read to open it, 8 for the rest. Every byte is covered but its own.

The *head* is the header and the small entries that say what the file holds: opening a file of any size checks them at
once. The *rest* are the payloads, whose tensors have hashes of their own besides.
"""

from __future__ import annotations

import hashlib
from typing import Final

from pqcli.container.header import MANIFEST

FEATURE: Final = "checksum"
CHECKSUM: Final = "pqcli.checksum"
HASHES, ERRORS, ENTROPIES = "pqcli.hashes", "pqcli.errors", "pqcli.entropies"
DAMAGE: Final = "pqcli.damage"
SHARDS: Final = "pqcli.shards"
HEAD: Final = frozenset({MANIFEST, HASHES, ERRORS, ENTROPIES, DAMAGE, SHARDS})
PART_BYTES: Final = 8
N_BYTES: Final = 2 * PART_BYTES


class Checksum:
    """The checksum of a file whose header is given, and whose entries come in the order of their data."""

    def __init__(self, header: bytes) -> None:
        self._head = hashlib.blake2b(header, digest_size=PART_BYTES)
        self._rest = hashlib.blake2b(digest_size=PART_BYTES)

    def add(self, key: str, data: bytes | bytearray) -> None:
        """Some bytes of an entry, those that follow what has been added."""
        (self._head if key in HEAD else self._rest).update(data)

    @property
    def head(self) -> bytes:
        """The part over the header and the entries of `HEAD`."""
        return self._head.digest()

    @property
    def rest(self) -> bytes:
        """The part over all other entries."""
        return self._rest.digest()

    def digest(self) -> bytes:
        """What the entry `pqcli.checksum` holds."""
        return self.head + self.rest
