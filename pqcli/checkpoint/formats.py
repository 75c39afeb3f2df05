"""The formats of a weights file: one row each, which says all that the rest of pqcli knows about it.

A new format is one module, with the three functions of a row, and the row. A folder is no format but an arrangement of
files that have one (see `folder`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pqcli.checkpoint import safetensors_io
from pqcli.checkpoint.pt import torch_save
from pqcli.errors import OutputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import BinaryIO

    from pqcli.checkpoint.bytesource import ByteSource
    from pqcli.checkpoint.opened import Layout
    from pqcli.checkpoint.pt.tree import Json
    from pqcli.checkpoint.rawbytes import Read
    from pqcli.tensors.info import TensorInfo

    Write = Callable[[BinaryIO], int]

FOLDER = "folder"
"""What the arrangement in a folder is called where a format is asked for."""

_SUFFIX = re.compile(r"\.[A-Za-z0-9_]{1,15}")


@dataclass(frozen=True)
class Format:
    """A format of weights files.

    `title` is what a list of formats in a message calls it; `suffixes` are the usual ones, the default first.

    - `begins(head, n_bytes)`: whether a file of that size, with these first bytes, is meant to be of the format; cheap.
    - `read(source)`: the `Layout`, from the header alone. Its `CheckpointError`s are bare facts ("its header ..."): the
      caller adds the path. The caller also checks that the tensors lie inside the file.
    - `prepare(tensors, read, skeleton)`: checks all that can be checked beforehand, and gives the function that writes
      the file to a stream and returns its size. `skeleton` is the one that the tensors came with in this format, or
      `{}`; it may come from a hostile file, and whatever it provokes is reported as its fault. Raises `OutputError`
      where the format cannot hold the tensors.
    """

    name: str
    title: str
    suffixes: tuple[str, ...]
    begins: Callable[[bytes, int], bool]
    read: Callable[[ByteSource], Layout]
    prepare: Callable[[Sequence[TensorInfo], Read, dict[str, Json]], Write]


_ROWS = (
    Format(
        "safetensors",
        ".safetensors",
        (".safetensors",),
        safetensors_io.begins,
        safetensors_io.read_safetensors,
        safetensors_io.prepare,
    ),
    Format(
        "pt",
        ".pt/.pth/.th/.bin/.ckpt of torch.save",
        (".pt", ".pth", ".th", ".bin", ".ckpt"),
        torch_save.begins,
        torch_save.read,
        torch_save.prepare,
    ),
)
FORMATS: dict[str, Format] = {row.name: row for row in _ROWS}
"""Every format by its name, in the order in which messages list them."""


def named(name: str) -> Format:
    """The row of a format; raises `OutputError` where there is none of that name."""
    if name not in FORMATS:
        raise OutputError(f"unknown output format '{name}'; use {', '.join(FORMATS)} or {FOLDER}")
    return FORMATS[name]


def recognised(head: bytes, n_bytes: int) -> Format | None:
    """The format of a file of that size that begins with `head`, or None."""
    return next((row for row in FORMATS.values() if row.begins(head, n_bytes)), None)


def by_suffix(path: Path) -> str:
    """The name of the format that a path asks for by its suffix; "folder" for a folder or where it has no suffix.

    Raises `UsageError` for a suffix that is none of a format.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or not suffix:
        return FOLDER
    for row in FORMATS.values():
        if suffix in row.suffixes:
            return row.name
    raise UsageError(f"{path}: unknown suffix {suffix!r}; use {', '.join(all_suffixes())}, or none for a folder")


def all_suffixes() -> tuple[str, ...]:
    """The suffixes of all formats."""
    return tuple(suffix for row in FORMATS.values() for suffix in row.suffixes)


def unusual_suffix(path: Path, name: str) -> str | None:
    """The suffix of a file of the format, where it is worth remembering because it is not the default."""
    return path.suffix if path.suffix != FORMATS[name].suffixes[0] and _SUFFIX.fullmatch(path.suffix) else None


def default_suffix(name: str, skeleton: Json) -> str:
    """The suffix that a file of the format gets by default: the source's own where the format is the source's."""
    remembered: Any = None
    if isinstance(skeleton, dict) and skeleton.get("source") == name:
        remembered = skeleton.get("suffix")
    # the skeleton may come from a stranger's file: a suffix must not lead anywhere
    if isinstance(remembered, str) and _SUFFIX.fullmatch(remembered):
        return remembered
    return "" if name == FOLDER else FORMATS[name].suffixes[0]
