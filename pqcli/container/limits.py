"""`Limits`: how much a file may claim, so that a few bytes from a stranger cannot fill memory.

Nothing here is met by a file that pqcli wrote of a checkpoint of up to some 200,000 tensors; who has a larger one
passes other limits: `pqcli.open(file, limits=Limits(json_bytes=1 << 30))`.
"""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import dataclass
from typing import Any, Final

TEXT_SHARE: Final = 4
"""The part of `Limits.json_bytes` that the text may take: objects take several times as much."""
DICT_BYTES, LIST_BYTES, VALUE_BYTES = 200, 100, 60
"""What an object, an array and any other value of JSON take in Python's memory, rounded up."""
TENSOR_BYTES: Final = 1024
"""What the record of one tensor adds to `Limits.json_bytes`: a file with many tensors may have a long manifest."""
DENSE_BYTES_PER_BYTE: Final = 4_000
"""What a byte of the file adds to `Limits.decoded_bytes`. The best that any codec does on real weights is below 100."""
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Limits:
    """What a container may claim to hold.

    `json_bytes`: memory that its header, its manifest, or what is packed in that may take, each. `decoded_bytes`: size
    of all its dense tensors, beside `DENSE_BYTES_PER_BYTE` for every byte of the file.
    """

    json_bytes: int = 1 << 28
    decoded_bytes: int = 1 << 30


def inflate(data: bytes | bytearray, most: int) -> bytes:
    """The content of a zlib stream. Raises ValueError where it is more than `most` bytes, or no whole stream."""
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(f"a damaged zlib stream ({error})") from None
    if len(text) > most:
        raise ValueError(f"{len(data):,} bytes that inflate to more than the {most:,} allowed (Limits.json_bytes)")
    if not stream.eof or stream.unused_data:
        raise ValueError("a zlib stream that does not end where its bytes do")
    return text


def parse_json(text: bytes, most: int) -> Any:
    """The value of a JSON text whose objects take at most about `most` bytes of memory.

    Raises ValueError where they take more, and for a text that is none: not UTF-8, a key twice in one object, nested
    too deeply, a lone surrogate.
    """
    n_bytes = len(text) + sum(
        size * text.count(sign) for size, sign in ((DICT_BYTES, b"{"), (LIST_BYTES, b"["), (VALUE_BYTES, b","))
    )
    if n_bytes > most:
        raise ValueError(
            f"JSON of {len(text):,} bytes that would take {n_bytes:,} bytes of memory, more than the {most:,} allowed "
            "(Limits.json_bytes)"
        )
    try:
        value = json.loads(text.decode(), object_pairs_hook=_object)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except UnicodeError as error:
        raise ValueError(f"JSON that is no valid text ({error})") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("JSON with a key twice in one object")
    return found
