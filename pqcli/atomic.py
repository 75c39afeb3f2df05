"""Files that appear whole or not at all.

`atomic_writer` hands out a temporary file beside the target and moves it into place only when the block ends well: a
full disk, an interrupt or a crash leaves the target as it was. The order is the one of borg and restic: write, fsync
the file, rename, fsync the folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from typing import TYPE_CHECKING, BinaryIO

from pqcli.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another folder",
    errno.EFBIG: "the file would exceed the size limit of the file system or the shell (ulimit -f)",
    errno.EACCES: "permission denied; choose a folder you may write to",
    errno.EPERM: "operation not permitted; choose a folder you may write to",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOENT: "its folder does not exist; create it first",
    errno.ENOTDIR: "a part of its path is a file, not a folder",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "its symbolic links run in a circle",
}


@contextlib.contextmanager
def atomic_writer(target: Path, *, force: bool = False) -> Iterator[BinaryIO]:
    """Give a seekable binary file that becomes `target` when the block ends without an exception.

    The mode follows the umask. A symbolic link stays a link: the file it points to is replaced. Raises `OutputError`
    where the target exists and `force` is off, is a folder or a device, or cannot be written; on any exception the
    temporary file is gone and the target untouched.
    """
    real = final_path(target)
    check_target(target, force=force)
    temporary = real.with_name(f".{real.name[:50]}.{secrets.token_hex(4)}.tmp")
    with output_errors(target):
        # O_EXCL: never follow or reuse what somebody else put there; 0o666 lets the umask decide the mode
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(descriptor, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            check_target(target, force=force)  # somebody may have created it while we worked
            temporary.replace(real)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(real.parent)


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


def final_path(target: Path) -> Path:
    """Where `target` really lies, symbolic links followed."""
    with output_errors(target):
        try:
            return target.resolve()
        except RuntimeError as error:  # Python 3.11 reports circular links so
            raise OSError(errno.ELOOP, str(error)) from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):  # some network file systems cannot; the file itself is safe already
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
