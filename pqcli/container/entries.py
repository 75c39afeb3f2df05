"""`Entries`: the data of an open container, entry by entry. What is read is never more than the file has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np

from pqcli.container.checksum import HEAD, Checksum
from pqcli.container.header import Header, Place, open_file, read_header
from pqcli.container.limits import Limits
from pqcli.core.dtypes import Array, dtype_of
from pqcli.errors import ContainerError, DamagedError

_PIECE_BYTES: Final = 1 << 24


@dataclass
class Entries:
    """An open file and its header. Threads may read at the same time."""

    path: Path
    header: Header
    file: BinaryIO
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __contains__(self, key: str) -> bool:
        return key in self.header.entries

    def place(self, key: str) -> Place:
        """Where an entry lies, and what it holds. Raises ContainerError where there is none of that name."""
        if key not in self.header.entries:
            raise self.damaged(f"it has no entry {key!r}")
        return self.header.entries[key]

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytearray:
        """The bytes of an entry, from `start` to `stop`."""
        place = self.place(key)
        stop = place.n_bytes if stop is None else stop
        if not 0 <= start <= stop <= place.n_bytes:
            raise self.damaged(f"bytes {start:,} to {stop:,} of entry {key!r} are wanted, and it has {place.n_bytes:,}")
        data = bytearray(stop - start)
        try:
            with self._lock:
                self.file.seek(place.start + start)
                n_read = self.file.readinto(data)  # type: ignore[attr-defined] # a buffered file has it
        except OSError as error:
            raise ContainerError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        if n_read != len(data):
            raise self.damaged(f"entry {key!r} ends early")
        return data

    def array(self, key: str) -> Array:
        """An entry as an array in memory of its own."""
        place = self.place(key)
        return np.frombuffer(self.read(key), dtype_of(place.dtype)).reshape(place.shape)

    def checksum_of_head(self) -> bytes:
        """The checksum's part over what is read to open the file; takes no time."""
        checksum = Checksum(self.header.raw)
        for key in self.header.entries:
            if key in HEAD:
                checksum.add(key, self.read(key))
        return checksum.head

    def checksum_of_rest(self, but: str) -> bytes:
        """Its part over all other entries but the one that holds it; reads the whole file."""
        checksum = Checksum(b"")
        for key in self.header.entries:
            if key not in HEAD and key != but:
                for piece in self.pieces(key):
                    checksum.add(key, piece)
        return checksum.rest

    def damaged(self, what: str) -> DamagedError:
        """An error that says what is wrong with the file."""
        return DamagedError(f"{self.path}: {what}; the file is damaged")

    @property
    def n_bytes(self) -> int:
        """Size of the file."""
        return len(self.header.raw) + sum(place.n_bytes for place in self.header.entries.values())

    @property
    def largest_file_bytes(self) -> int:
        """Size of the largest of the files."""
        return self.n_bytes

    @property
    def n_files(self) -> int:
        """How many files these are entries of."""
        return 1

    def check_others(self) -> None:
        """Raise ValueError where other files do not belong to this one; there are none here."""

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def pieces(self, key: str) -> Iterator[bytearray]:
        """The bytes of an entry, a bounded piece at a time."""
        n_bytes = self.place(key).n_bytes
        for start in range(0, n_bytes, _PIECE_BYTES):
            yield self.read(key, start, min(start + _PIECE_BYTES, n_bytes))


def open_entries(path: Path, limits: Limits, *, is_shard: bool = False) -> Entries:
    """The entries of the file at `path`, which may be one of several of a container only where `is_shard` says so.

    Raises ContainerError where its header is none of pqcli's.
    """
    file = open_file(path)
    try:
        return Entries(path, read_header(path, file, limits, is_shard=is_shard), file)
    except BaseException:
        file.close()
        raise
