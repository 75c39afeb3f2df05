"""Lossless coding of what is kept: norms, biases, buffers, many small tensors bundled together.

Tensors of one item size form a group. Its words are optionally rearranged (a float's exponent in one byte, its sign at
the head of the next; or differences of integers, for counters and position ids) and cut into byte planes, the most
significant first, since exponents are predictable and mantissas noise. Each plane is stored in the smallest of four
ways: as it is, as one byte that fills it, by zstd, or by an adaptive model of its bytes, which beats zstd on tensors
of a few hundred elements.

Only bytes matter here: a spec is (item size in bytes, number of elements), and any other dtype of that size would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Spec = tuple[int, int]
"""Item size in bytes and number of elements."""

ITEM_SIZES = (1, 2, 4, 8, 16)

_AS_IS, _FLOAT, _DIFFERENCES = range(3)
_RAW, _ZSTD, _MODEL, _CONSTANT = range(4)
_MODEL_LIMIT = 1 << 21
"""Planes of more bytes than this are left to zstd, which is faster by far ..."""
_ZSTD_EFFORT = ((1 << 22, 22), (1 << 25, 12))
"""... and itself works less hard on large planes: (bytes at most, level)."""
_ZSTD_LEAST = 5
_ZSTD_QUICK = 12
_REGULAR = 1 / 16
_REGULAR_BYTES = 1 << 13
"""A larger plane of which the quick level leaves so little, such as a mask, repeats itself: the best level finds no
more there, and takes a hundred times as long."""
_MODEL_BYTES_PER_BYTE = 1_500
"""No model codes more bytes in one."""
_CONSTANT_LIMIT = 1 << 24
_ZSTD_BYTES_PER_BYTE = 40_000
_QUICK_EFFORT = 3
_QUICK_SAMPLE = 1 << 16
"""Words from which a quick compression tells how to arrange them."""
_WORTH_BITS = 7.9
"""Planes of more bits a byte at their order-0 entropy stay raw in a quick compression, unlooked at."""
_CHUNK = 1 << 20
"""Words that are rearranged at a time."""
_START_COUNT = 24
"""Lower planes' models start as if they had seen this much, lest they learn from noise."""


def compress(arrays: Sequence[NDArray[np.generic]], *, quick: bool = False) -> bytes:
    """`arrays` as bytes, at most a few more than they have (one per byte of item size, and a handful).

    A `quick` compression is some fifty times faster, to read ten times, and a few percent larger: each group is
    arranged as a sample of it asks for, and bytes that hardly get fewer are left as they are.
    """
    parts: list[bytes] = []
    for size in ITEM_SIZES:
        group = [np.ascontiguousarray(a).reshape(-1) for a in arrays if a.itemsize == size and a.size]
        unknown = next((a.itemsize for a in arrays if a.itemsize not in ITEM_SIZES), None)
        if unknown is not None:
            raise ValueError(f"elements of {unknown} bytes")
        if group:
            words = group[0].view(np.uint8) if len(group) == 1 else np.concatenate([a.view(np.uint8) for a in group])
            starts = _starts([a.size for a in group])
            if quick:
                parts.append(_pack(words, size, starts, _likely_arrangement(words, size), quick=True))
                continue
            parts.append(min((_pack(words, size, starts, arrangement) for arrangement in _arrangements(size)), key=len))
    return b"".join(parts)


def decompress(data: bytes, specs: Sequence[Spec]) -> list[NDArray[np.uint8]]:
    """The bytes of each tensor, in the order of `specs`.

    Raises ValueError for bytes that `compress` did not write for these specs.
    """
    found: dict[int, NDArray[np.uint8]] = {}
    at = 0
    for size, n in specs:
        if size not in ITEM_SIZES or n < 0:
            raise ValueError(f"{n} elements of {size} bytes")
    for size in ITEM_SIZES:
        counts = [n for item_size, n in specs if item_size == size and n]
        if counts:
            found[size], at = _unpack(data, at, size, _starts(counts))
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes too many")
    taken = dict.fromkeys(found, 0)
    result = []
    for size, n in specs:
        if n == 0:
            result.append(np.zeros(0, np.uint8))
            continue
        result.append(found[size][taken[size] : taken[size] + size * n].copy())
        taken[size] += size * n
    return result


def _starts(counts: Sequence[int]) -> NDArray[np.int64]:
    """Where each tensor begins in its group, and where the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _arrangements(size: int) -> tuple[int, ...]:
    return (_AS_IS, _FLOAT, _DIFFERENCES) if size in (2, 4, 8) else (_AS_IS,)


def _likely_arrangement(words: NDArray[np.uint8], size: int) -> int:
    """The arrangement in which words from the middle have the least entropy."""
    start = max(0, words.size // size - _QUICK_SAMPLE) // 2 * size
    sample = words[start : start + _QUICK_SAMPLE * size]
    starts = _starts([sample.size // size])

    def bits(arrangement: int) -> float:
        return sum(map(_entropy, _rearrange(sample, size, arrangement, starts)))

    return min(_arrangements(size), key=bits)


def _entropy(plane: NDArray[np.uint8]) -> float:
    """Bits a byte at order 0."""
    shares = np.bincount(plane, minlength=256) / plane.size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


# --- words ------------------------------------------------------------------------------------------------------------


def _rearrange(words: NDArray[np.uint8], size: int, arrangement: int, starts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Planes (size, n), the most significant first."""
    if arrangement == _DIFFERENCES:
        unsigned = words.view(f"<u{size}")
        moved = np.diff(unsigned, prepend=unsigned.dtype.type(0))
        moved[starts[:-1]] = unsigned[starts[:-1]]
        return np.ascontiguousarray(moved.view(np.uint8).reshape(-1, size).T[::-1])
    planes = np.empty((size, words.size // size), np.uint8)
    for start in range(0, planes.shape[1], _CHUNK):  # what is worked with on the way is larger than the words
        part = words[start * size : (start + _CHUNK) * size]
        if arrangement == _FLOAT:
            part = _exponent_first(part.view(f"<u{size}")).view(np.uint8)
        planes[:, start : start + _CHUNK] = part.reshape(-1, size).T[::-1]
    return planes


def _exponent_first(unsigned: NDArray[Any]) -> NDArray[Any]:
    """Words with the sign behind the exponent's eight bits, or what lies where a float32 has these."""
    n_bits = 8 * unsigned.itemsize
    sign = unsigned >> (n_bits - 1)
    exponent = (unsigned >> (n_bits - 9)) & 255
    rest = unsigned & ((1 << (n_bits - 9)) - 1)
    moved: NDArray[Any] = (exponent << (n_bits - 8)) | (sign << (n_bits - 9)) | rest
    return moved


def _restore(planes: NDArray[np.uint8], arrangement: int, starts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The words' bytes; the inverse of `_rearrange`."""
    size = len(planes)
    words = np.ascontiguousarray(planes[::-1].T).reshape(-1)
    if arrangement == _AS_IS:
        return words
    moved = words.view(f"<u{size}")
    if arrangement == _DIFFERENCES:
        sums = np.cumsum(moved, dtype=moved.dtype)
        before = sums[starts[:-1]] - moved[starts[:-1]]
        return np.asarray(sums - np.repeat(before, np.diff(starts))).view(np.uint8)
    n_bits = 8 * size
    exponent = moved >> (n_bits - 8)
    sign = (moved >> (n_bits - 9)) & 1
    rest = moved & ((1 << (n_bits - 9)) - 1)
    restored: NDArray[np.uint8] = ((sign << (n_bits - 1)) | (exponent << (n_bits - 9)) | rest).view(np.uint8)
    return restored


# --- planes -----------------------------------------------------------------------------------------------------------


def _pack(
    words: NDArray[np.uint8], size: int, starts: NDArray[np.int64], arrangement: int, *, quick: bool = False
) -> bytes:
    """A group: how its words are arranged, then each plane as method, length and bytes."""
    parts = [bytes([arrangement])]
    for plane in _rearrange(words, size, arrangement, starts):
        if plane.size <= _CONSTANT_LIMIT and np.all(plane == plane[0]):
            parts.append(bytes([_CONSTANT, plane[0]]))
            continue
        options = [(_RAW, plane.tobytes())]
        if not quick:
            options.append((_ZSTD, _zstd(plane)))
        elif _entropy(plane) < _WORTH_BITS:
            options.append((_ZSTD, _zstd_at(_QUICK_EFFORT, plane)))
        if plane.size <= _MODEL_LIMIT and not quick:
            options.append((_MODEL, _model(plane, starts, len(parts) > 1)))
        method, body = min(options, key=lambda option: len(option[1]))
        parts.append(bytes([method]) + (b"" if method == _RAW else _varint(len(body))) + body)
    return b"".join(parts)


def _unpack(data: bytes, at: int, size: int, starts: NDArray[np.int64]) -> tuple[NDArray[np.uint8], int]:
    """A group's bytes, and where the next one begins."""
    n = int(starts[-1])
    arrangement, at = _take(data, at, 1)
    if arrangement[0] not in _arrangements(size):
        raise ValueError(f"words of {size} bytes arranged in way {arrangement[0]}")
    planes = []
    for index in range(size):
        method, at = _take(data, at, 1)
        if method[0] == _RAW:
            body, at = _take(data, at, n)
            planes.append(np.frombuffer(body, np.uint8))
            continue
        if method[0] == _CONSTANT and n <= _CONSTANT_LIMIT:
            body, at = _take(data, at, 1)
            planes.append(np.broadcast_to(np.frombuffer(body, np.uint8), n))
            continue
        length, at = _parse_varint(data, at)
        body, at = _take(data, at, length)
        if method[0] == _ZSTD:
            planes.append(_unzstd(body, n))
        elif method[0] == _MODEL:
            planes.append(_unmodel(body, starts, index > 0))
        else:
            raise ValueError(f"a byte plane coded by method {method[0]}")
    return _restore(np.stack(planes), arrangement[0], starts), at


def _take(data: bytes, at: int, n: int) -> tuple[bytes, int]:
    if n > len(data) - at:
        raise ValueError(f"{len(data) - at} bytes left where {n} are needed")
    return data[at : at + n], at + n


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first, the high bit set on all but the last."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


def _parse_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for i in range(8):
        byte, at = _take(data, at, 1)
        value |= (byte[0] & 127) << (7 * i)
        if byte[0] < 128:
            return value, at
    raise ValueError("a length of more than eight bytes")


def _zstd(plane: NDArray[np.uint8]) -> bytes:
    level = next((level for limit, level in _ZSTD_EFFORT if plane.size <= limit), _ZSTD_LEAST)
    if level <= _ZSTD_QUICK or plane.size <= _REGULAR_BYTES:
        return _zstd_at(level, plane)
    quick = _zstd_at(_ZSTD_QUICK, plane)
    return quick if len(quick) <= _REGULAR * plane.size else _zstd_at(level, plane)


def _zstd_at(level: int, plane: NDArray[np.uint8]) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=level, write_content_size=True).compress(plane.tobytes())


def _unzstd(body: bytes, n: int) -> NDArray[np.uint8]:
    import zstandard

    if n > (len(body) + 8) * _ZSTD_BYTES_PER_BYTE:
        raise ValueError(f"{len(body)} bytes cannot hold {n} bytes")
    try:
        if zstandard.frame_content_size(body) != n:
            raise ValueError(f"a zstd frame that does not hold {n} bytes")
        plain = zstandard.ZstdDecompressor().decompress(body, max_output_size=n, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"a damaged zstd frame ({error})") from None
    if len(plain) != n:
        raise ValueError(f"a zstd frame of {len(plain)} bytes where {n} are needed")
    return np.frombuffer(plain, np.uint8)


def _model(plane: NDArray[np.uint8], starts: NDArray[np.int64], below: bool) -> bytes:
    from pqcli.core.entropy.lossless_loops import code_plane
    from pqcli.core.entropy.rangecoder import RangeCoder

    coder = RangeCoder.writer(16 * plane.size, 0)
    code_plane(coder, plane, starts, _START_COUNT * below)
    return coder.finish()


def _unmodel(body: bytes, starts: NDArray[np.int64], below: bool) -> NDArray[np.uint8]:
    from pqcli.core.entropy.lossless_loops import code_plane
    from pqcli.core.entropy.rangecoder import RangeCoder

    n = int(starts[-1])
    if n > (len(body) + 8) * _MODEL_BYTES_PER_BYTE:
        raise ValueError(f"{len(body)} bytes cannot hold {n} bytes")
    coder = RangeCoder.reader(body, 0)
    plane = np.empty(n, np.uint8)
    code_plane(coder, plane, starts, _START_COUNT * below)
    coder.finish()
    return plane
