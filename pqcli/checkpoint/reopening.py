"""A checkpoint in another process: not sent, but opened there by its path.

Pickling a `Checkpoint` keeps its path and, for every file it consists of, size and time of the last change. Where it is
unpickled the files must still be those. A process parses the headers of an input once, however many of its jobs name
it, and keeps the last few inputs open.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from pqcli.checkpoint.bytesource import reading
from pqcli.checkpoint.stamps import Stamp
from pqcli.errors import CheckpointError

if TYPE_CHECKING:
    from pqcli.checkpoint.asked import Asked
    from pqcli.checkpoint.opened import Checkpoint

_KEPT_OPEN = 8


def stamp_of(path: Path) -> Stamp:
    """The stamp of a file as it is now."""
    with reading(path):
        status = path.stat()
    return Stamp(str(path.absolute()), status.st_size, status.st_mtime_ns)


def reopened(path: str, stamps: tuple[Stamp, ...], asked: Asked) -> Checkpoint:
    """The checkpoint at `path`; closing it leaves it to the other jobs of this process.

    Raises `CheckpointError`, naming the file, where one has changed since `stamps` were taken.
    """
    for stamp in stamps:
        _check(stamp, stamp_of(Path(stamp.path)))
    return _opened_once(path, stamps, asked).shared()


@functools.lru_cache(maxsize=_KEPT_OPEN)
def _opened_once(path: str, stamps: tuple[Stamp, ...], asked: Asked) -> Checkpoint:
    from pqcli.checkpoint.opening import open_checkpoint  # which needs `opened`, which needs this module

    checkpoint = open_checkpoint(path, limits=asked.limits, from_module=asked.from_module)
    found = {stamp.path: stamp for stamp in checkpoint.stamps}
    for stamp in stamps:
        _check(stamp, found.get(stamp.path))
    return checkpoint.model_only() if asked.model_only else checkpoint


def _check(then: Stamp, now: Stamp | None) -> None:
    if now != then:
        size = f", {then.n_bytes:,} B then and {now.n_bytes:,} B now" if now and now.n_bytes != then.n_bytes else ""
        raise CheckpointError(f"'{then.path}' has changed since it was opened{size}; start again")
