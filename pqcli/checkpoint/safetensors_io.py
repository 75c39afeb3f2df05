"""Safetensors, read by its specification and written as a stream.

The format: 8 bytes of length (little-endian), a JSON header with dtype, shape and byte offsets per tensor, the tensors
in one row without gaps. The plain library is not used for two reasons. It accepts duplicate names and writes files
that cannot be read back (a tensor named `__metadata__`); and it wants all tensors in memory to write, while here the
header is written first, from the known sizes, and then one tensor after the other.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

from pqcli.checkpoint.bytesource import ByteSource, Region, Strided
from pqcli.checkpoint.opened import Layout
from pqcli.checkpoint.rawbytes import write_bytes
from pqcli.errors import CheckpointError, OutputError
from pqcli.tensors.info import ITEM_BYTES, TensorInfo
from pqcli.tensors.moments import is_moment_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pqcli.checkpoint.limits import Budget
    from pqcli.checkpoint.rawbytes import Read

DTYPE_OF_CODE = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""The format's dtype codes, as torch calls them."""

CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}

_MAX_HEADER = 100_000_000  # the format's own limit
_METADATA = "__metadata__"
_FOR_TORCH = {"format": "pt"}
"""The metadata without which transformers refuses a safetensors file."""
_CONTAINER = "pqcli"
"""The metadata's `format` in what pqcli itself writes."""


def read_safetensors(source: ByteSource) -> Layout:
    """The layout of a `.safetensors`; the skeleton is `{"metadata": {...}}`, or empty where the file has none.

    Messages are bare facts ("its header ..."): the caller adds the path.
    """
    if source.n_bytes < 8:
        raise CheckpointError(f"it has {source.n_bytes} bytes, too few for a safetensors header; it is truncated")
    (header_bytes,) = struct.unpack("<Q", source.bytes_at(0, 8))
    start = 8 + header_bytes
    if header_bytes > _MAX_HEADER:
        raise CheckpointError(f"its header claims {header_bytes:,} bytes, beyond the format's limit of {_MAX_HEADER:,}")
    if start > source.n_bytes:
        raise CheckpointError(
            f"its header claims {header_bytes:,} bytes, it has {source.n_bytes:,}; it is truncated, fetch it again"
        )
    header = _parse(source.bytes_at(8, header_bytes), source.budget)
    metadata = header.pop(_METADATA, None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError("its __metadata__ is not a table of texts; the file is damaged")
    if metadata is not None and metadata.get("format") == _CONTAINER:
        raise CheckpointError(
            "it is compressed already; `pqcli decode` gives back the checkpoint that it was made from"
        )
    entries = sorted(
        ((*_entry(name, record), name) for name, record in header.items()), key=lambda entry: (entry[2], entry[3])
    )
    infos: list[TensorInfo] = []
    views: dict[str, Strided] = {}
    end = 0
    for dtype, shape, begin, stop, name in entries:
        if begin != end:
            raise CheckpointError(
                f"tensor {_quoted(name)} begins at byte {begin:,} of the data, the one before ends at {end:,}; "
                "the file is damaged"
            )
        end = stop
        infos.append(TensorInfo(name, shape, dtype, role="other" if is_moment_name(name) else "model"))
        views[name] = Strided(Region(start + begin, stop - begin), dtype, shape)
    if start + end != source.n_bytes:
        problem = (
            "truncated, fetch it again" if start + end > source.n_bytes else "damaged: bytes trail the last tensor"
        )
        raise CheckpointError(
            f"its header describes {start + end:,} bytes, the file has {source.n_bytes:,}; it is {problem}"
        )
    return Layout(tuple(infos), views, {"metadata": metadata} if metadata is not None else {})


def begins(head: bytes, n_bytes: int) -> bool:
    """Whether a file begins as a safetensors: a plausible length, then a JSON object."""
    if len(head) <= 9 or head[8:9] != b"{":
        return False
    (header_bytes,) = struct.unpack("<Q", head[:8])
    # a length that exceeds the file is a truncated download as long as the length itself is plausible
    return bool(header_bytes <= n_bytes or header_bytes < 1 << 32)


def prepare(tensors: Sequence[TensorInfo], read: Read, skeleton: dict[str, Any]) -> Callable[[BinaryIO], int]:
    """Writes flat names, and the metadata of the skeleton where there is one; tied tensors become copies."""
    check_writable(tensors)
    metadata = skeleton.get("metadata") if skeleton else _FOR_TORCH
    if metadata is not None and any(not isinstance(value, str) for value in metadata.values()):
        raise TypeError("metadata that is no text")
    return lambda file: write_safetensors(file, tensors, read, metadata)


def check_writable(tensors: Sequence[TensorInfo]) -> None:
    """Raise `OutputError` for tensors that safetensors cannot hold."""
    names: set[str] = set()
    for info in tensors:
        if info.dtype not in CODE_OF_DTYPE:
            raise OutputError(
                f"tensor '{info.name}' is {info.dtype}, which safetensors cannot hold; write a .pt instead"
            )
        if info.name == _METADATA:
            raise OutputError(f"a tensor cannot be called {_METADATA} in safetensors; write a .pt instead")
        if info.name in names:
            raise OutputError(f"tensor '{info.name}' occurs twice")
        names.add(info.name)


def write_safetensors(
    file: BinaryIO,
    tensors: Sequence[TensorInfo],
    read: Read,
    metadata: Mapping[str, str] | None,
) -> int:
    """Write the file; returns its size. Tied tensors become copies: the format knows no sharing.

    `check_writable` must have passed. Holds one tensor at a time; `read` is called once per tensor that is no alias.
    """
    header: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    places: dict[str, list[int]] = {}
    position = 0
    for info in tensors:
        header[info.name] = {
            "dtype": CODE_OF_DTYPE[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.n_bytes],
        }
        places.setdefault(info.alias_of or info.name, []).append(position)
        position += info.n_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > _MAX_HEADER:
        raise OutputError(f"the header would have {len(text):,} bytes, beyond the format's limit of {_MAX_HEADER:,}")
    file.write(struct.pack("<Q", len(text)) + text)
    start = 8 + len(text)
    for info in tensors:
        if info.alias_of is None:
            tensor = read(info.name)
            for place in places[info.name]:
                file.seek(start + place)
                write_bytes(file, tensor, info)
            del tensor  # before the next one is read
    file.truncate(start + position)
    return start + position


def _parse(text: bytes, budget: Budget) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"its header has the name {_quoted(twice)} twice; the file is damaged")
        return table

    try:
        header = budget.json(text, object_pairs_hook=unique)
        json.dumps(header, ensure_ascii=False).encode("utf-8")  # lone surrogates, which no other file can hold
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its header is no JSON ({str(error)[:100]}); the file is damaged") from error
    if not isinstance(header, dict):
        raise CheckpointError("its header is no JSON object; the file is damaged")
    return header


def _entry(name: str, record: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, first byte and end of one tensor, checked against each other."""
    try:
        name.encode("utf-8")
        code, shape, (begin, stop) = record["dtype"], record["shape"], record["data_offsets"]
        well_formed = (
            isinstance(code, str)
            and isinstance(shape, list)
            and all(_is_count(number) for number in (*shape, begin, stop))
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"its record of tensor {_quoted(name)} is malformed; the file is damaged") from error
    if not well_formed:
        raise CheckpointError(f"its record of tensor {_quoted(name)} is malformed; the file is damaged")
    if code not in DTYPE_OF_CODE:
        raise CheckpointError(f"tensor {_quoted(name)} has the dtype {_quoted(str(code))}, which pqcli does not carry")
    dtype = DTYPE_OF_CODE[code]
    needed = prod(shape) * ITEM_BYTES[dtype]
    if stop - begin != needed:
        raise CheckpointError(
            f"tensor {_quoted(name)} of shape {shape[:8]} and {dtype} needs {needed:,} bytes, its record has "
            f"{stop - begin:,}; the file is damaged"
        )
    return dtype, tuple(shape), begin, stop


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _quoted(name: str) -> str:
    return ascii(name)[:120]
