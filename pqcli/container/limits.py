"""What a container's JSON may take in memory: it is inflated and parsed within `pqcli.limits.Limits`.

Nothing here is met by a file that pqcli wrote of a checkpoint of up to some 200,000 tensors.
"""

from __future__ import annotations

import json
import re
import zlib
from typing import Any, Final

from pqcli.limits import Limits, OverLimitError, hint

__all__ = ["DENSE_BYTES_PER_BYTE", "TENSOR_BYTES", "TEXT_SHARE", "Limits", "inflate", "parse_json"]

TEXT_SHARE: Final = 4
"""The part of `Limits.json_bytes` that the text may take: objects take several times as much."""
DICT_BYTES, LIST_BYTES, VALUE_BYTES = 200, 100, 60
"""What an object, an array and any other value of JSON take in Python's memory, rounded up."""
TENSOR_BYTES: Final = 1024
"""What the record of one tensor adds to `Limits.json_bytes`: a file with many tensors may have a long manifest."""
DENSE_BYTES_PER_BYTE: Final = 4_000
"""What a byte of the file adds to `Limits.decoded_bytes`. The best that any codec does on real weights is below 100."""
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def inflate(data: bytes | bytearray, most: int) -> bytes:
    """The content of a zlib stream.

    Raises OverLimitError where it is more than `most` bytes, ValueError where it is no whole stream.
    """
    stream = zlib.decompressobj()
    try:
        text = stream.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(f"a damaged zlib stream ({error})") from None
    if len(text) > most:
        raise OverLimitError(
            f"{len(data):,} bytes that inflate to more than the {most:,} allowed; {hint('json_bytes')}"
        )
    if not stream.eof or stream.unused_data:
        raise ValueError("a zlib stream that does not end where its bytes do")
    return text


def parse_json(text: bytes, most: int) -> Any:
    """The value of a JSON text whose objects take at most about `most` bytes of memory.

    Raises OverLimitError where they take more, and ValueError for a text that is none: not UTF-8, a key twice in one
    object, nested too deeply, a lone surrogate.
    """
    n_bytes = len(text) + sum(
        size * text.count(sign) for size, sign in ((DICT_BYTES, b"{"), (LIST_BYTES, b"["), (VALUE_BYTES, b","))
    )
    if n_bytes > most:
        raise OverLimitError(
            f"JSON of {len(text):,} bytes that would take {n_bytes:,} bytes of memory, more than the {most:,} allowed; "
            f"{hint('json_bytes')}"
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
