"""What must be the same for a run to go on where another one stopped: its input, its recipe, pqcli, and where it runs.

A file is the same if its size and the time of its last change are; its content is not read for that, and its folder
does not count, so that a checkpoint may be moved (not copied, unless times are kept: `cp -p`). The identity is plain
data, and is compared by words: what differs is told.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from pqcli.recipe import documents
from pqcli.version import __version__

if TYPE_CHECKING:
    from pqcli.checkpoint import Checkpoint
    from pqcli.recipe.recipe import Recipe

Identity = dict[str, Any]
_WORDS: Final = {
    "device": "the device",
    "shard_bytes": "the shard size",
    "with_copies": "--with-copies",
    "files": "the hash of the embedded files",
    "tensors": "the hash of the tensors' names, shapes and dtypes",
}
_FILES: Final = ("input", "base", "statistics")
_SHOWN: Final = 4


def identity_of(
    checkpoints: Sequence[Checkpoint],
    root: Path,
    recipe: Recipe,
    device: torch.device,
    *,
    bases: Sequence[Path] = (),
    files: Mapping[str, bytes] | None = None,
    shard_bytes: int | None = None,
    with_copies: bool = False,
) -> Identity:
    """The identity of a run that compresses these checkpoints, which lie in (or are) `root`."""
    return {
        "pqcli": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "device": device.type,
        "recipe": documents.to_json(recipe),
        "input": {
            _name(Path(stamp.path), root): [stamp.n_bytes, stamp.modified_ns]
            for checkpoint in checkpoints
            for stamp in checkpoint.stamps
        },
        "tensors": _hash(repr(info) for checkpoint in checkpoints for info in checkpoint.tensors),
        "base": {f"{i}/{name}": found for i, base in enumerate(bases) for name, found in _stamps(base)},
        "statistics": dict(_stamps(Path(recipe.stats))) if recipe.stats is not None else {},
        "files": _hash(f"{name} {data.hex()}" for name, data in files.items()) if files else None,
        "shard_bytes": shard_bytes,
        "with_copies": with_copies,
    }


def differences(then: Identity, now: Identity) -> list[str]:
    """What differs between two identities, in words; nothing where they are the same."""
    found = []
    for key in dict.fromkeys([*then, *now]):
        before, after = then.get(key), now.get(key)
        if before == after:
            continue
        if key == "recipe" and isinstance(before, dict) and isinstance(after, dict):
            found += [
                _was(name, before.get(name), after.get(name))
                for name in sorted({*before, *after})
                if before.get(name) != after.get(name)
            ]
        elif key in _FILES and isinstance(before, dict) and isinstance(after, dict):
            found += _changed(before, after)
        else:
            found.append(_was(_WORDS.get(key, key), before, after))
    if len(found) > 1:  # which only says again that a file has changed
        found = [text for text in found if not text.startswith(_WORDS["tensors"])]
    return found if len(found) <= _SHOWN else [*found[:_SHOWN], f"and {len(found) - _SHOWN} more"]


def _was(name: str, before: object, after: object) -> str:
    return f"{name} was {_shown(before)} and is {_shown(after)}"


def _shown(value: object) -> str:
    return "not set" if value is None else str(value)


def _changed(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Which files have changed, and how."""
    for name in dict.fromkeys([*before, *after]):
        one, other, shown = before.get(name), after.get(name), f"'{name.rpartition('/')[2]}'"
        if one == other:
            continue
        if one is None or other is None:
            yield f"{shown} was {'not ' * (one is None)}there and is {'not ' * (other is None)}now"
        elif one[0] != other[0]:
            yield f"{shown} had {one[0]:,} B and has {other[0]:,}"
        else:
            yield f"{shown} was last changed {_time(one[1])} and now {_time(other[1])}"


def _time(nanoseconds: int) -> str:
    return f"{datetime.fromtimestamp(nanoseconds / 1e9, UTC):%Y-%m-%d %H:%M:%S.%f} UTC"


def _stamps(path: Path) -> Iterator[tuple[str, list[int]]]:
    """A file, or all ordinary files of a folder, with sizes and times; what cannot be read is told later."""
    paths = [path] if not path.is_dir() else sorted(Path(at, name) for at, _, names in os.walk(path) for name in names)
    for found in paths:
        try:
            status = found.stat()
        except OSError:
            continue
        if not found.name.startswith("."):
            yield _name(found, path), [status.st_size, status.st_mtime_ns]


def _name(path: Path, root: Path) -> str:
    """The path as seen from `root`, as JSON can hold it; the name alone where it does not lie there."""
    path, root = path.absolute(), root.absolute()
    seen = path.relative_to(root).as_posix() if path != root and path.is_relative_to(root) else path.name
    return seen.encode("utf-8", "backslashreplace").decode()


def _hash(texts: Iterator[str]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for text in texts:
        found.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()
