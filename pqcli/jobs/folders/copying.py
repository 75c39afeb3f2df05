"""What lies beside the weights of a folder, carried over bit for bit."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from pqcli.atomic import atomic_writer
from pqcli.checkpoint.bytesource import reading
from pqcli.errors import CheckpointError
from pqcli.jobs.events import Hook, Stage

_PIECE_BYTES = 8 << 20


def make_folders(target: Path, folders: Iterable[str], links: Mapping[str, str]) -> None:
    """Make the folders of a folder, and the links between them."""
    for path in folders:
        (target / path).mkdir(parents=True, exist_ok=True)
    for path, leads_to in links.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).symlink_to(leads_to, target_is_directory=True)


def copy_files(source: Path, target: Path, sizes: Mapping[str, int], hook: Hook, *, verify: bool) -> None:
    """Copy files of `source`, given by their paths in it; with `verify` each copy is read again.

    Raises CheckpointError where one cannot be read or has another size by now.
    """
    done = Stage(hook, "copying", sum(sizes.values()))
    for path, n_bytes in sizes.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        _copy(source / path, target / path, n_bytes, verify=verify)
        done(n_bytes, path)


def is_same(one: Path, other: Path) -> bool:
    """Whether two files have the same bytes."""
    if one.stat().st_size != other.stat().st_size:
        return False
    with one.open("rb") as a, other.open("rb") as b:
        while piece := a.read(_PIECE_BYTES):
            if piece != b.read(_PIECE_BYTES):
                return False
    return True


def _copy(source: Path, target: Path, n_bytes: int, *, verify: bool) -> None:
    copied = 0
    with reading(source):
        file = source.open("rb")
        mode = stat.S_IMODE(source.stat().st_mode) & 0o777
    with file, atomic_writer(target, check=_nothing if verify else None) as out:
        while True:
            with reading(source):
                piece = file.read(_PIECE_BYTES)
            if not piece:
                break
            out.write(piece)
            copied += len(piece)
    if copied != n_bytes:
        raise CheckpointError(f"'{source}' has changed meanwhile, {n_bytes:,} B then and {copied:,} B now; start again")
    target.chmod(mode | stat.S_IWUSR)


def _nothing(_path: Path) -> None:
    """There is nothing to check of a copy but its bytes, which the writer itself does."""
