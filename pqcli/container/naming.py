"""How a container names its base: by a hash of what it uses of it, and by a path that says where to look.

The hash is over names, dtypes, shapes and bytes of those tensors of the base that records need, so that it is the same
whatever file holds them: a checkpoint of any format, or a container that decodes to them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar, Final

from pqcli.tensors.records import Record

HASH_DIGITS: Final = 32
LONGEST_PATH: Final = 4096


@dataclass(frozen=True)
class BaseName:
    """What the manifest says of the base: `hash` in hexadecimal digits, and a `path` beside the file, or a bare name.

    The path is a hint: it may lead nowhere.
    """

    __pydantic_config__: ClassVar = {"strict": True, "extra": "forbid"}

    hash: str
    path: str = ""

    def __post_init__(self) -> None:
        if len(self.hash) != HASH_DIGITS or not set(self.hash) <= set("0123456789abcdef"):
            raise ValueError(f"a base with the hash {self.hash!r:.80}")
        if len(self.path) > LONGEST_PATH:
            raise ValueError(f"a path of {len(self.path):,} characters to the base")

    def described(self) -> str:
        """The base as messages call it."""
        return f"{self.hash}" + (f" ({self.path!r:.200} when it was compressed)" if self.path else "")


@dataclass(frozen=True)
class BaseTensor:
    """A tensor of a base: its dtype, its shape, and the hash of its bytes (`pqcli.core.digests`)."""

    dtype: str
    shape: tuple[int, ...]
    digest: bytes


@dataclass(frozen=True)
class Naming:
    """All that is known of a base while a file is made: the hint, and the tensors that the two share, by name."""

    path: str
    tensors: Mapping[str, BaseTensor]

    def name_for(self, records: Sequence[Record]) -> BaseName | None:
        """What the manifest of these records says of the base; None where none of them needs it."""
        used = [(record.name, self.tensors[record.name]) for record in records if record.needs_base]
        return BaseName(hash_of(used), self.path) if used else None


def hash_of(tensors: Iterable[tuple[str, BaseTensor]]) -> str:
    """The hash of a base by the tensors used, in the order of their records."""
    found = hashlib.blake2b(digest_size=HASH_DIGITS // 2)
    for name, tensor in tensors:
        head = json.dumps([name, tensor.dtype, list(tensor.shape)], separators=(",", ":"), ensure_ascii=False)
        found.update(head.encode())
        found.update(tensor.digest)
    return found.hexdigest()


def hint_to(base: Path, file: Path) -> str:
    """The hint that `file` has to its base: the way from its folder where it lies there or below, else its name.

    Where it lies otherwise is the user's own.
    """
    folder, found = file.absolute().parent, base.absolute()
    path = found.relative_to(folder).as_posix() if found.is_relative_to(folder) else found.name
    return path if is_followed(path) else found.name[:LONGEST_PATH]


def is_followed(hint: str) -> bool:
    """Whether a hint leads to a place beside its file and nowhere else: no way up, no root, no drive, no URL."""
    parts = PurePosixPath(hint).parts
    return (
        bool(parts)
        and len(hint) <= LONGEST_PATH
        and hint.isprintable()
        and not PurePosixPath(hint).is_absolute()
        and not {"..", "~"} & set(parts)
        and not set("\\:") & set(hint)
    )


def hinted(file: Path, hint: str) -> Path | None:
    """The place that a file's hint leads to, where something lies there; None for a hint that leads elsewhere.

    Symbolic links are followed only where they end below the file's folder.
    """
    if not is_followed(hint):
        return None
    try:
        folder = file.absolute().parent.resolve()
        place = (folder / hint).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):
        return None
    return place if place.is_relative_to(folder) and (place.is_file() or place.is_dir()) else None
