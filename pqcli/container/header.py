"""The safetensors header of a container: which entries there are, and where. Read by the specification, without torch.

The plain library is not used: it accepts a name twice, and says nothing of bytes that no entry describes. Here the
entries cover the data exactly, one behind the other, or the file is refused.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Final

from pqcli.container.limits import Limits, parse_json
from pqcli.errors import ContainerError, DamagedError
from pqcli.limits import OverLimitError
from pqcli.recipe.suggestions import close_files
from pqcli.tensors.info import ITEM_BYTES

SUFFIX: Final = ".pq.safetensors"
INDEX_SUFFIX: Final = SUFFIX + ".index.json"
"""How the name of the index ends that a container in several files has."""
SHARD_NAME: Final = re.compile(r"(.+)-\d{5}-of-\d{5}" + re.escape(SUFFIX))
"""How its files are called."""
MANIFEST: Final = "pqcli.manifest"
METADATA: Final = "__metadata__"
OTHER_SHARD: Final = "shard"
"""What the header of a file of a sharded container but the first says in place of features."""
LARGEST: Final = 1 << 60
"""No size, count or length in a file is larger: their products still fit Python's and numpy's arithmetic."""
MOST_DIMENSIONS: Final = 64
"""What torch allows."""
SAFETENSORS_DTYPES: Final = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_DTYPES: Final = {code: dtype for dtype, code in SAFETENSORS_DTYPES.items()}
_LARGEST_HEADER: Final = 100_000_000
"""What the safetensors library allows."""


@dataclass(frozen=True)
class Place:
    """One entry of a file: what it holds, and where its bytes lie in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """What precedes the data: the bytes themselves, the metadata, the entries in the order of their data."""

    raw: bytes
    metadata: dict[str, str]
    entries: dict[str, Place]


def open_file(path: Path) -> BinaryIO:
    """A regular file, open for reading. Raises ContainerError: a folder or a pipe is no container."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ContainerError(f"{path}: a folder, not a {SUFFIX} file; `pqcli compress` makes one of it")
        if not stat.S_ISREG(mode):
            raise ContainerError(f"{path}: a pipe or a device, not a {SUFFIX} file; copy it to a file first")
        return path.open("rb")
    except FileNotFoundError:
        raise ContainerError(f"{path}: no such file{close_files(path)}") from None
    except (OSError, ValueError) as error:
        raise ContainerError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def read_header(path: Path, file: BinaryIO, limits: Limits, *, is_shard: bool = False) -> Header:
    """The header of an open file. Raises ContainerError where it is none of pqcli's, DamagedError where it lies."""
    raw, head, n_bytes = recognised(path, file, limits, is_shard=is_shard)
    try:
        return Header(raw, _metadata(head.pop(METADATA, {})), _entries(head, len(raw), n_bytes))
    except ValueError as error:
        raise DamagedError(f"{path}: {error}; the file is damaged") from None


def recognised(
    path: Path, file: BinaryIO, limits: Limits, *, is_shard: bool = False
) -> tuple[bytes, dict[str, Any], int]:
    """A header's bytes, its JSON, and the size of the file. Raises ContainerError where it is none of pqcli's."""
    try:
        n_bytes = os.fstat(file.fileno()).st_size
        raw = file.read(8)
        length = int.from_bytes(raw, "little")
        is_plausible = len(raw) == 8 and 2 <= length <= min(_LARGEST_HEADER, n_bytes - 8)
        text = file.read(length) if is_plausible else b""
    except OSError as error:
        raise ContainerError(f"{path}: cannot be read: {error.strerror or error}") from error
    what, head = "no JSON object", None
    try:
        head = parse_json(text, limits.json_bytes) if text[:1] == b"{" else None
    except OverLimitError as error:
        raise ContainerError(f"{path}: its header is {error}") from None
    except ValueError as error:
        what = str(error)
    if head is None:
        raise ContainerError(
            f"{path}: not a {SUFFIX} file, or a damaged one; `pqcli compress` makes one of a checkpoint "
            f"(its header is {what})"
        )
    about = head.get(METADATA)
    is_other = isinstance(about, dict) and about.get("format") == "pqcli" and about.get("features") == OTHER_SHARD
    if is_other and not is_shard:
        raise ContainerError(
            f"{path}: one of several files of one container; name its index, which ends in {INDEX_SUFFIX}, or the "
            "folder"
        )
    if MANIFEST not in head and not is_other:
        raise ContainerError(f"{path}: a safetensors file, but not compressed by pqcli; `pqcli compress` does that")
    return raw + text, head, n_bytes


def is_size(value: Any) -> bool:
    """Whether a value of JSON is a count that files may hold."""
    return type(value) is int and 0 <= value <= LARGEST


def is_shape(value: Any) -> bool:
    """Whether it is the shape of a tensor whose elements can be counted, those of dimensions without any included."""
    return (
        isinstance(value, list | tuple)
        and len(value) <= MOST_DIMENSIONS
        and all(is_size(extent) for extent in value)
        and prod(extent for extent in value if extent) <= LARGEST
    )


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError(f"{METADATA} is no table of texts")
    return found


def _entries(head: dict[str, Any], start: int, n_bytes: int) -> dict[str, Place]:
    """The entries, sorted by where they lie. Raises ValueError unless they cover the data exactly."""
    places = [(key, _place(key, about, start)) for key, about in head.items()]
    places.sort(key=lambda item: (item[1].start, item[1].n_bytes))
    end = start
    for key, place in places:
        if place.start != end:
            raise ValueError(
                f"entry {key!r} begins at byte {place.start:,} of the file, and the one before ends at {end:,}"
            )
        end += place.n_bytes
    if end != n_bytes:
        raise ValueError(f"its header describes {end:,} bytes, and it has {n_bytes:,}")
    return dict(places)


def _place(key: str, about: Any, start: int) -> Place:
    if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"entry {key!r} has no dtype, shape and offsets")
    code, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ValueError(f"entry {key!r} is of an unknown dtype, {code!r:.40}")
    if not is_shape(shape):
        raise ValueError(f"entry {key!r} has the shape {shape!r:.80}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise ValueError(f"entry {key!r} lies at {offsets!r:.80}")
    length = ITEM_BYTES[dtype] * prod(shape)
    if offsets[1] - offsets[0] != length:
        raise ValueError(f"entry {key!r} has {offsets[1] - offsets[0]:,} bytes where its shape takes {length:,}")
    return Place(dtype, tuple(shape), start + offsets[0], length)
