"""One run an output, and room for it: what is settled before long work starts.

A claim is a lock (flock) on a hidden file beside the output. The kernel drops it with the process, however that ends,
so a killed run never blocks the next one; the file itself means nothing and is taken over.
"""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from pqcli.atomic import LOCK_ENDING, final_path, hidden_name, lock, output_errors, remembered
from pqcli.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def claimed(target: Path) -> Iterator[None]:
    """Let nobody else write `target` (a file or a folder) during the block.

    Raises `OutputError` where another run, of this process or any other, is at it, or where nothing can be written.
    """
    path = _lock_path(final_path(target))
    with remembered(path):
        descriptor = _locked(target, path)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is locked: whoever waits for it finds that it has gone
            os.close(descriptor)


def check_space(target: Path, n_bytes: int) -> None:
    """Raise `OutputError` where the disk of `target` has less than `n_bytes` free."""
    real = final_path(target)
    with output_errors(target):
        found = os.statvfs(real if real.is_dir() else real.parent)
    free = found.f_bavail * found.f_frsize
    if found.f_blocks and free < n_bytes:  # some file systems do not tell
        raise OutputError(
            f"cannot write '{target}': the disk is too full: writing it takes {n_bytes:,} bytes, and {free:,} are "
            "free; free some space or choose another folder"
        )


def _lock_path(real: Path) -> Path:
    """Beside the output; a folder that holds something already is filled in place, and may lie where nobody writes."""
    name = hidden_name(real, LOCK_ENDING)
    with contextlib.suppress(OSError):
        if real.is_dir() and any(real.iterdir()):
            return real / name
    return real.with_name(name) if real.name else real / name


def _locked(target: Path, path: Path) -> int:
    """The descriptor of the locked file, which holds the number of this process."""
    while True:
        with output_errors(target):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            if _is_ours(target, path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its owner removed it just now


def _is_ours(target: Path, path: Path, descriptor: int) -> bool:
    """Lock the file and put our number into it; False where it is no longer the one at `path`."""
    if lock(descriptor) is False:
        raise OutputError(
            f"another pqcli{_holder(descriptor)} is writing '{target}'; wait for it, or use -o to write elsewhere"
        )
    if not _is_still(path, descriptor):
        return False
    with output_errors(target):
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        except OSError:
            path.unlink()
            raise
    return True


def _holder(descriptor: int) -> str:
    number = os.pread(descriptor, 20, 0).strip()
    return f" (process {int(number)})" if number.isdigit() else ""


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that lies at `path`."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
