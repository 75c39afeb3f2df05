"""Files that appear whole or not at all.

`atomic_writer` hands out a temporary file beside the target and moves it into place only when the block ends well: a
full disk, an interrupt or a crash leaves the target as it was. The order is the one of borg and restic: write, fsync
the file, rename, fsync the folder; and before the rename, where the caller has a `check`, what the disk holds is read
again.

`atomic_folder` does the same for a folder.

A temporary file is locked (flock) while its process lives. What a killed process left behind is told by its lock,
which is gone, and removed by the next one that writes the same target.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import stat
import threading
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, cast

from pqcli.errors import OutputError, PQError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Check = Callable[[Path], None]
    """Reads a finished file, or folder, under its temporary name; raises a `PQError` where it is not right."""

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would exceed the size limit of the file system or the shell (ulimit -f)",
    errno.EIO: "input/output error; the disk or its connection is failing, choose another one",
    errno.EXDEV: "it is a mount point, which cannot be replaced; name something inside it",
    errno.EBUSY: "it is a mount point or in use, and cannot be replaced; name something inside it",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "operation not permitted; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "its folder does not exist; create it first",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its symbolic links run in a circle",
}
LOCK_ENDING: Final = ".pqcli-lock"
"""How the files end that `pqcli.claim` locks."""
JOURNAL_ENDING: Final = ".pqcli-journal"
"""How the files end that long runs leave when they are killed (`pqcli.jobs.journal`)."""
_CANNOT_SYNC: Final = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF}
"""What file systems say that cannot fsync a folder, or do not let it be opened for that."""
_PIECE_BYTES: Final = 1 << 20


@contextlib.contextmanager
def atomic_writer(target: Path, *, force: bool = False, check: Check | None = None) -> Iterator[BinaryIO]:
    """Give a seekable binary file that becomes `target` when the block ends without an exception.

    The mode follows the umask, or is the one of the file that is replaced (as root, its owner too). A symbolic link
    stays a link: the file it points to is replaced. With a `check` the file is read again before it is put in place:
    the disk must give back the bytes that were written, and then the check must pass.

    Raises `OutputError` where the target exists and `force` is off, is a folder or a device, cannot be written, or
    fails its check; on any exception the temporary file is gone and the target untouched.
    """
    real = final_path(target)
    check_target(target, force=force)
    with output_errors(target):
        with temporary_beside(real) as (temporary, descriptor):
            # a duplicate: the lock lasts until the file has been moved, and closing is where some disks report errors
            with _Remembering(io.FileIO(os.dup(descriptor), "r+b"), remembers=check is not None) as file:
                yield cast("BinaryIO", file)
                file.flush()
                _take_over_mode(real, file.fileno())
                os.fsync(file.fileno())
                file.check(target)
            if check:
                run_check(check, temporary, target)
            check_target(target, force=force)  # somebody may have created it while we worked
            move(temporary, real)
        sync_folder(target, real.parent)


@contextlib.contextmanager
def atomic_folder(target: Path, *, force: bool = False, may_go: Callable[[str], bool]) -> Iterator[Path]:
    """Give an empty folder that becomes `target` when the block ends without an exception.

    With `force` a folder in its place is replaced as a whole, in one step where the system can exchange two names; but
    only where each file in it has a successor, or `may_go` by its path: nothing is lost that the new one does not have.

    Raises `OutputError` as `atomic_writer` does; what the block says of the temporary folder, it says of `target`.
    """
    real = final_path(target)
    check_folder_target(target, force=force)
    with output_errors(target):
        with temporary_beside(real, is_folder=True) as (temporary, _):
            try:
                yield temporary
            except OutputError as error:
                raise OutputError(str(error).replace(str(temporary), str(target))) from error
            for place, _below, _names in os.walk(temporary):
                sync_folder(target, Path(place))
            check_folder_target(target, force=force)  # somebody may have created it while we worked
            _check_successors(target, real, temporary, may_go)
            move_folder(temporary, real)
        sync_folder(target, real.parent)


def check_folder_target(target: Path, *, force: bool) -> None:
    """Raise `OutputError` where `target` is not a place for a new folder; cheap, so call it before long work too."""
    with output_errors(target):
        real = final_path(target)
        if target.is_symlink() and not real.exists():
            raise OutputError(f"cannot write '{target}': it is a link to something that is not there")
        if not real.exists():
            if not real.parent.is_dir():
                raise FileNotFoundError(errno.ENOENT, "no folder")
            return
        if not real.is_dir():
            raise OutputError(f"cannot write the folder '{target}': a file of that name exists")
        if not force and any(not name.endswith(LOCK_ENDING) for name in os.listdir(real)):  # noqa: PTH208 - names alone
            raise OutputError(f"'{target}' exists already and is not empty; use --force to replace it, or -o elsewhere")


def _check_successors(target: Path, real: Path, new: Path, may_go: Callable[[str], bool]) -> None:
    lost = [
        path.relative_to(real).as_posix()
        for path in (Path(place, name) for place, _, names in os.walk(real) for name in names)
        if not path.name.endswith(LOCK_ENDING)
    ]
    lost = [path for path in lost if not may_go(path) and not os.path.lexists(new / path)]
    if lost:
        raise OutputError(
            f"'{target}' holds what the new folder does not have, and --force would lose ({len(lost)} files: "
            f"{', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}); move that away, or choose another folder with -o"
        )


def check_target(target: Path, *, force: bool) -> None:
    """Raise `OutputError` where `target` is not a place for a new file; cheap, so call it before long work too."""
    with output_errors(target):
        try:
            mode = target.stat().st_mode
        except FileNotFoundError:
            if not final_path(target).parent.is_dir():
                raise
            return
    if stat.S_ISDIR(mode):
        raise OutputError(f"cannot write '{target}': it is a folder; name a file")
    if not stat.S_ISREG(mode):
        raise OutputError(f"cannot write '{target}': it is a device, pipe or socket; name an ordinary file")
    if not force:
        raise OutputError(f"'{target}' exists already; use --force to replace it, or -o to write elsewhere")


def check_output(target: Path, *inputs: Path, force: bool) -> None:
    """Raise `OutputError` where `target` is one of the inputs, or as `check_target` does."""
    with output_errors(target):
        if any(_is_same(target, source) for source in inputs):
            raise OutputError(f"'{target}' is the input itself; use -o to write elsewhere")
    check_target(target, force=force)


def final_path(target: Path) -> Path:
    """Where `target` really lies, symbolic links followed."""
    with output_errors(target):
        try:
            return target.resolve()
        except RuntimeError as error:  # Python 3.11 reports circular links so
            raise OSError(errno.ELOOP, str(error)) from error


def run_check(check: Check, temporary: Path, target: Path) -> None:
    """Run a check of what will become `target`; its failure is an `OutputError` that names the target."""
    try:
        check(temporary)
    except PQError as error:
        what = str(error).replace(str(temporary), str(target))
        raise OutputError(f"cannot write '{target}': what was written is not what was meant ({what})") from error


def sync_folder(target: Path, folder: Path) -> None:
    """Make the rename of `target` into `folder` survive a power cut, where the file system can.

    Raises `OutputError` where the disk fails at it: the file is in its place then, and whole.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _CANNOT_SYNC:  # some network file systems: the file itself is safe already
            return
        raise OutputError(
            f"'{target}' is written, but the disk could not confirm its name ({error.strerror}): it may be gone after "
            "a power cut; check the disk"
        ) from error


@contextlib.contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into an `OutputError` that names `target` and says what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(f"cannot write '{target}': {advice}") from error
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise OutputError("cannot write a file whose name contains a null byte") from error


def _is_same(target: Path, source: Path) -> bool:
    try:
        return os.path.samestat(target.stat(), source.stat())
    except (FileNotFoundError, NotADirectoryError):
        return False


def _take_over_mode(real: Path, descriptor: int) -> None:
    """Give a file the permissions, and as root the owner, of the one that it will replace."""
    with contextlib.suppress(OSError):  # there is none, or the file system knows neither
        old = real.stat()
        if os.geteuid() == 0:
            os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode) & 0o777)


class _Remembering(io.BufferedRandom):
    """A file that can tell whether the disk gives back what was written: it keeps a CRC-32 of every write."""

    def __init__(self, raw: io.FileIO, *, remembers: bool) -> None:
        super().__init__(raw)
        self._remembers = remembers
        self._written: list[tuple[int, int, int]] = []

    def write(self, data: Any) -> int:
        """Write, and remember what and where."""
        if not self._remembers:
            return super().write(data)
        start = self.tell()
        n_bytes = super().write(data)
        self._written.append((start, n_bytes, zlib.crc32(data)))
        return n_bytes

    def check(self, target: Path) -> None:
        """Read the file from the disk again; raise OutputError where it is not what was written."""
        if not self._remembers:
            return
        with contextlib.suppress(OSError, AttributeError):  # from the disk where that can be had, not from memory
            os.posix_fadvise(self.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for start, n_bytes, expected in _last_written(self._written):
            self.seek(start)
            found, left = 0, n_bytes
            while left and (piece := self.read(min(left, _PIECE_BYTES))):
                found, left = zlib.crc32(piece, found), left - len(piece)
            if left or found != expected:
                raise OutputError(
                    f"cannot write '{target}': the disk gives back other bytes than were written, in the {n_bytes:,} "
                    f"bytes from {start:,} on; check the disk, or choose another one"
                )


def _last_written(written: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The writes that no later one reaches into, by place: what is written over, such as a zip's headers, is left."""
    kept: list[tuple[int, int, int]] = []
    starts: list[int] = []
    ends: list[int] = []  # what later writes cover, in pieces that do not touch
    for start, n_bytes, expected in reversed(written):
        if not n_bytes:
            continue
        stop = start + n_bytes
        near = slice(bisect.bisect_left(ends, start), bisect.bisect_right(starts, stop))
        if all(ends[i] == start or starts[i] == stop for i in range(near.start, near.stop)):
            kept.append((start, n_bytes, expected))
        starts[near], ends[near] = [min([start, *starts[near]])], [max([stop, *ends[near]])]
    return sorted(kept)


# -- temporary files ---------------------------------------------------------------------------------------------------

_LIVE: set[Path] = set()
"""What this process would leave behind if it ended now."""
_PLACED: list[Path] = []
_CHANGING = threading.Lock()
"""Held while a temporary file is made or moved; `abandon` takes it for good."""


@contextlib.contextmanager
def temporary_beside(real: Path, *, is_folder: bool = False, suffix: str = "") -> Iterator[tuple[Path, int]]:
    """A new file (or folder) beside `real`, locked, and its descriptor; gone after the block unless `move` took it.

    What dead processes left of the same target is removed first. The name ends in `suffix`, a dot and letters.
    """
    _remove_stale(real)
    path, descriptor = _made_beside(real, is_folder=is_folder, suffix=suffix)
    try:
        yield path, descriptor
    finally:
        if path in _LIVE:
            _remove(path)
            _LIVE.discard(path)
        os.close(descriptor)


def move(temporary: Path, real: Path) -> None:
    """Put a temporary file (or folder) in its place."""
    with _CHANGING:
        temporary.replace(real)
        _LIVE.discard(temporary)
        if not any(folder in _LIVE for folder in real.parents):  # else it has only come into a temporary folder
            _PLACED.append(real)


def move_folder(temporary: Path, real: Path) -> None:
    """Put a temporary folder in its place; one that is there already is exchanged for it, and removed afterwards."""
    if not real.is_dir() or not any(real.iterdir()):
        move(temporary, real)
        return
    temporary.chmod(stat.S_IMODE(real.stat().st_mode))
    with _CHANGING:
        if not exchanged(temporary, real):
            aside = real.with_name(f"{_prefix(real)}{secrets.token_hex(8)}.old")
            real.rename(aside)
            try:
                temporary.rename(real)
            except OSError:
                aside.rename(real)
                raise
            aside.rename(temporary)
        _PLACED.append(real)


def hidden_name(real: Path, ending: str) -> str:
    """The name of a hidden file that belongs to `real`, and that every run on it knows."""
    digest = hashlib.blake2b(os.fsencode(real.name), digest_size=4).hexdigest()
    return f".{real.name[:50]}.{digest}{ending}"


def placed() -> int:
    """How many files this process has put in place."""
    return len(_PLACED)


@contextlib.contextmanager
def remembered(path: Path) -> Iterator[None]:
    """Let `abandon` remove `path`, should the process end within the block."""
    _LIVE.add(path)
    try:
        yield
    finally:
        _LIVE.discard(path)


def abandon() -> None:
    """Remove every temporary file of this process, from whichever thread, just before it ends.

    Nothing can be made or put in place afterwards: the process must end.
    """
    _CHANGING.acquire(timeout=0.3)  # a rename on a dead network disk may hold it for ever
    for path in sorted(_LIVE):
        _remove(path)


def lock(descriptor: int) -> bool | None:
    """Whether an open file or folder could be locked, without waiting; None where the file system knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def exchanged(one: Path, other: Path) -> bool:
    """Exchange the names of two files or folders in one step; False where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, flag = -100, 2  # AT_FDCWD; RENAME_EXCHANGE of Linux and RENAME_SWAP of macOS
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(here, names[0], here, names[1], flag) == 0)
    if hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(*names, flag) == 0)
    return False


def _made_beside(real: Path, *, is_folder: bool, suffix: str) -> tuple[Path, int]:
    while True:
        path = real.with_name(f"{_prefix(real)}{secrets.token_hex(8)}.pqcli{suffix}")
        with _CHANGING:
            _LIVE.add(path)
            try:
                descriptor = _made(path, is_folder=is_folder)
            except BaseException:
                _LIVE.discard(path)
                raise
        # another process may have found it before it was locked, and taken it for one of a dead process
        if lock(descriptor) is not False and os.fstat(descriptor).st_nlink:
            return path, descriptor
        os.close(descriptor)
        _LIVE.discard(path)


def _made(path: Path, *, is_folder: bool) -> int:
    if is_folder:
        path.mkdir()
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # O_EXCL: never follow or reuse what somebody else put there; 0o666 lets the umask decide the mode
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def _prefix(real: Path) -> str:
    return f".{real.name[:50]}."


def _remove_stale(real: Path) -> None:
    """Remove the temporary files of this target whose processes are dead."""
    is_ours = re.compile(re.escape(_prefix(real)) + r"[0-9a-f]{16}\.pqcli(\.[a-z]+)?").fullmatch
    with contextlib.suppress(OSError):
        for name in filter(is_ours, os.listdir(real.parent)):  # noqa: PTH208 - names alone, of any number of files
            with contextlib.suppress(OSError):
                _remove_if_dead(real.with_name(name))


def _remove_if_dead(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if lock(descriptor):
            _remove(path)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
