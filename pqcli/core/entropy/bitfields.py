"""Small integers <-> bytes: variable-length integers for headers, Rice codes for the scales of rows and columns.

A varint holds 7 bits a byte, lowest first, the high bit set on all but the last (LEB128); at most five bytes. Signed
values are folded first (zigzag: 0, -1, 1, -2 -> 0, 1, 2, 3).

A Rice run is one byte k, a varint with the length of the rest, then one bit string (least significant bit first): for
each folded value v the unary part, `v >> k` zeros and a one; after all of these, each value's low k bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MAX_VARINT_BYTES = 5
_MAX_K = 15


class Reader:
    """A cursor over untrusted bytes: everything it gives was there, or it raises ValueError."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self._at = 0

    @property
    def remaining(self) -> int:
        """Bytes not yet read."""
        return len(self._data) - self._at

    def take(self, n: int) -> memoryview:
        """The next `n` bytes."""
        if n > self.remaining:
            raise ValueError(f"{self.remaining} bytes left where {n} are due")
        self._at += n
        return self._data[self._at - n : self._at]

    def varint(self) -> int:
        """The next unsigned varint."""
        value = 0
        for i in range(_MAX_VARINT_BYTES):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                return value
        raise ValueError("a varint of more than five bytes")

    def signed(self) -> int:
        """The next zigzag varint."""
        folded = self.varint()
        return (folded >> 1) ^ -(folded & 1)

    def rice(self, n: int) -> NDArray[np.int16]:
        """The next Rice run, which holds `n` values."""
        k = self.take(1)[0]
        data = self.take(self.varint())
        if k > _MAX_K or n > 8 * len(data):
            raise ValueError(f"{len(data)} bytes cannot hold {n} Rice codes of {k} low bits")
        bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        ends = np.flatnonzero(bits)[:n]
        start = int(ends[-1]) + 1 if n else 0
        if len(ends) != n or -(-(start + n * k) // 8) != len(data):
            raise ValueError(f"a damaged run of {n} Rice codes")
        high = np.diff(ends, prepend=-1) - 1
        low = bits[start : start + n * k].reshape(n, k) @ (1 << np.arange(k, dtype=np.int64))
        folded = (high << k) + low
        if n and int(folded.max()) >= 1 << 16:
            raise ValueError(f"a Rice code of {folded.max()}")
        return ((folded >> 1) ^ -(folded & 1)).astype(np.int16)


def varint(value: int) -> bytes:
    """An unsigned integer below 2^35."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def signed(value: int) -> bytes:
    """A signed integer below 2^34 in magnitude."""
    return varint(value << 1 if value >= 0 else (-value << 1) - 1)


def rice(values: NDArray[np.int16]) -> bytes:
    """A Rice run of `values` (n,), with the k that makes it shortest."""
    wide = values.astype(np.int64)
    folded = (wide << 1) ^ (wide >> 63)
    lengths = [int((folded >> k).sum()) + folded.size * (1 + k) for k in range(_MAX_K + 1)]
    k = int(np.argmin(lengths))
    ends = np.cumsum((folded >> k) + 1) - 1
    bits = np.zeros(lengths[k], np.uint8)
    bits[ends] = 1
    if k:
        bits[lengths[k] - folded.size * k :] = ((folded[:, None] >> np.arange(k)) & 1).reshape(-1)
    packed = np.packbits(bits, bitorder="little").tobytes()
    return bytes([k]) + varint(len(packed)) + packed
