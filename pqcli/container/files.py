"""Small files inside a container: what lay beside the weights, so that a lone file can become a folder again.

Their contents lie end to end in one entry, a zlib stream; the manifest has their paths and sizes, in order.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from pqcli.checkpoint.folder import bare_name
from pqcli.container.header import LARGEST
from pqcli.container.limits import inflate
from pqcli.limits import OverLimitError

FEATURE: Final = "files"
FILES: Final = "pqcli.files"
_DEPTH: Final = 32


@dataclass(frozen=True)
class Files:
    """What the manifest says of them: the length of the entry, and path and size of every file."""

    __pydantic_config__: ClassVar = {"strict": True, "extra": "forbid"}

    n_bytes: int
    files: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        if not 0 <= self.n_bytes <= LARGEST or any(not 0 <= n_bytes <= LARGEST for _, n_bytes in self.files):
            raise ValueError("files of such lengths cannot be")
        paths = [path for path, _ in self.files]
        for path in paths:
            if not is_inner_path(path):
                raise ValueError(f"a file called {path!r:.100}")
        folders = {path[:i] for path in paths for i, sign in enumerate(path) if sign == "/"}
        if len({*paths}) != len(paths) or folders & {*paths}:
            raise ValueError("files of which two have one path")


@dataclass(frozen=True)
class Packed:
    """Files as a container holds them."""

    about: Files
    data: bytes


def pack(files: Mapping[str, bytes]) -> Packed:
    """Files by their paths, packed."""
    data = zlib.compress(b"".join(files.values()), 9)
    return Packed(Files(len(data), tuple((path, len(content)) for path, content in files.items())), data)


def unpack(about: Files, data: bytes | bytearray) -> dict[str, bytes]:
    """The files by their paths. Raises ValueError where the entry holds something else."""
    total = sum(n_bytes for _, n_bytes in about.files)
    try:
        contents = inflate(data, total)
    except OverLimitError:
        raise ValueError(f"files of more than the {total:,} bytes that they should have") from None
    if len(contents) != total:
        raise ValueError(f"files of {len(contents):,} bytes, which should have {total:,}")
    files, start = {}, 0
    for path, n_bytes in about.files:
        files[path] = contents[start : start + n_bytes]
        start += n_bytes
    return files


def is_inner_path(path: str) -> bool:
    """Whether a path, with `/` between its parts, cannot lead out of the folder that it is meant in."""
    parts = path.split("/")
    return len(parts) <= _DEPTH and all(map(bare_name, parts))
