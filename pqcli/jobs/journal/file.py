"""The file of a journal: frames, each with its length and a checksum, one behind the other.

    frame   length of its head, length of head and result together, BLAKE2b-128 of both; the head; the result
    first   its head is the identity of the run, as JSON; it has no result

A process may be killed, or a machine lose power, in the midst of a frame: what does not have its checksum is cut off,
with all that lies behind it, and forgotten. Only a file that is this user's, and that nobody else may write, is read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pqcli.atomic import JOURNAL_ENDING, hidden_name, lock
from pqcli.jobs.journal.values import Buffer

_MAGIC: Final = b"pqcli journal 1\n"
_FRAME: Final = struct.Struct("<QQ16s")
_PIECE_BYTES: Final = 1 << 20
_LARGEST_HEAD: Final = 1 << 26


class StrangeError(Exception):
    """What lies where the journal should is not one of ours."""


@dataclass(frozen=True)
class Frame:
    """The head of a frame, and where its result lies in the file."""

    head: bytes
    start: int
    n_bytes: int


def journal_path(real: Path) -> Path:
    """Where the journal of a run lies that makes `real`."""
    return real.with_name(hidden_name(real, JOURNAL_ENDING))


class JournalFile:
    """An open journal, locked for as long as it is open."""

    def __init__(self, path: Path, descriptor: int, end: int) -> None:
        self.path = path
        self._descriptor, self._end = descriptor, end

    @classmethod
    def found(cls, path: Path) -> tuple[JournalFile, list[Frame]] | None:
        """The journal at `path` with its frames, or None where there is none.

        Raises StrangeError where what is there is not a journal of this user's, or is in use.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:  # a link, a folder, or somebody else's
            raise StrangeError(error.strerror) from error
        try:
            _check_ours(descriptor)
            frames = list(_frames(descriptor))
            end = frames[-1].start + frames[-1].n_bytes if frames else 0
            os.ftruncate(descriptor, end)
        except OSError as error:
            os.close(descriptor)
            raise StrangeError(error.strerror) from error
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, end), frames

    @classmethod
    def made(cls, path: Path, identity: bytes) -> JournalFile:
        """A new journal at `path`, where nothing lies. Raises OSError or StrangeError."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = cls(path, os.open(path, flags, 0o600), 0)
        try:
            _check_ours(file._descriptor)
            file._write([_MAGIC])
            file.append([identity], [])
        except BaseException:
            file.remove()
            raise
        return file

    def append(self, head: Sequence[Buffer], result: Sequence[Buffer]) -> Frame:
        """One more frame."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (*head, *result):
            digest.update(part)
        n_head, n_result = sum(map(len, head)), sum(map(len, result))
        start = self._end + _FRAME.size + n_head
        self._write([_FRAME.pack(n_head, n_head + n_result, digest.digest()), *head, *result])
        return Frame(b"".join(head), start, n_result)

    def read(self, frame: Frame) -> bytes:
        """The result of a frame. Raises OSError or ValueError where it is gone."""
        data = b"".join(_pieces(self._descriptor, frame.start, frame.n_bytes))
        if len(data) != frame.n_bytes:
            raise ValueError("a journal has become shorter")
        return data

    def sync(self) -> None:
        """Let what was appended survive a power cut."""
        os.fsync(self._descriptor)

    def remove(self) -> None:
        """Remove it, while it is locked."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Leave it where it is."""
        os.close(self._descriptor)

    def _write(self, parts: Sequence[Buffer]) -> None:
        n_bytes = sum(map(len, parts))
        if n_bytes <= _PIECE_BYTES:
            parts = [b"".join(parts)]
        at = self._end
        try:
            for part in parts:
                left = memoryview(part)
                while left:
                    written = os.pwrite(self._descriptor, left, at)
                    at, left = at + written, left[written:]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            raise
        self._end = at


def _check_ours(descriptor: int) -> None:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise StrangeError("it is no file")
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise StrangeError("it is, or may be written to by, somebody else")
    if lock(descriptor) is False:
        raise StrangeError("another run has it open")


def _frames(descriptor: int) -> Iterator[Frame]:
    """The frames that are whole, up to the first that is not."""
    size, at = os.fstat(descriptor).st_size, len(_MAGIC)
    if os.pread(descriptor, len(_MAGIC), 0) != _MAGIC:
        return
    while size - at >= _FRAME.size:
        n_head, n_bytes, expected = _FRAME.unpack(os.pread(descriptor, _FRAME.size, at))
        at += _FRAME.size
        if not n_head <= n_bytes <= size - at or n_head > _LARGEST_HEAD:
            return
        digest = hashlib.blake2b(digest_size=16)
        for piece in _pieces(descriptor, at, n_bytes):
            digest.update(piece)
        if digest.digest() != expected:
            return
        yield Frame(os.pread(descriptor, n_head, at), at + n_head, n_bytes - n_head)
        at += n_bytes


def _pieces(descriptor: int, start: int, n_bytes: int) -> Iterator[bytes]:
    while n_bytes:
        piece = os.pread(descriptor, min(n_bytes, _PIECE_BYTES), start)
        if not piece:
            return
        yield piece
        start, n_bytes = start + len(piece), n_bytes - len(piece)


def advice(error: OSError) -> str:
    """Why a disk does not take a journal."""
    full = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
    return full.get(error.errno or 0, error.strerror or str(error))
