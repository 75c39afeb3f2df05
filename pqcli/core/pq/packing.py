"""Assignments <-> bytes: `n_bits` per assignment, dense, least significant bit first.

Assignment i occupies the bits `[i * n_bits, (i + 1) * n_bits)` of the byte string, bit 0 being the lowest bit of byte
0. So 8 bits are plain bytes, 16 bits are little-endian words, and a codebook with a single centroid costs nothing at
all.

Eight assignments always fill `n_bits` whole bytes; packing works on such groups, in one or two 64-bit words.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 16


def n_bits(n_centroids: int) -> int:
    """Bits that one assignment takes: ceil(log2 n_centroids), 0 for a single centroid."""
    return (n_centroids - 1).bit_length()


def packed_bytes(n: int, bits: int) -> int:
    """Length in bytes of `n` packed assignments."""
    return -(-n * bits // 8)


def pack(assignments: NDArray[np.integer], bits: int) -> NDArray[np.uint8]:
    """The packed bytes of `assignments` (n,), every one below `2 ** bits`.

    Raises ValueError if an assignment does not fit, or if `bits` is not within 0..16.
    """
    _check_bits(bits)
    n = assignments.size
    if n and (int(assignments.min()) < 0 or int(assignments.max()) >> bits):
        raise ValueError(f"assignments from {assignments.min()} to {assignments.max()} do not fit {bits} bits")
    if bits == 8:
        return assignments.astype(np.uint8)
    if bits == 16:
        return assignments.astype("<u2").view(np.uint8)
    groups = np.zeros((-(-n // 8), 8), np.uint64)
    groups.reshape(-1)[:n] = assignments
    words = np.zeros((len(groups), 2), "<u8")
    for i in range(8):
        _put(words, groups[:, i], i * bits)
    return words.view(np.uint8)[:, :bits].reshape(-1)[: packed_bytes(n, bits)].copy()


def unpack_narrow(data: NDArray[np.uint8], n: int, bits: int) -> NDArray[np.int32] | NDArray[np.uint8]:
    """The same as `unpack`, in bytes where that is how they lie."""
    return data if bits == 8 and data.size == n else unpack(data, n, bits)


def unpack(data: NDArray[np.uint8], n: int, bits: int) -> NDArray[np.int32]:
    """The `n` assignments (int32) that `data` holds.

    Raises ValueError if `data` is not exactly `packed_bytes(n, bits)` long.
    """
    _check_bits(bits)
    if data.size != packed_bytes(n, bits):
        raise ValueError(f"{data.size} bytes where {n} assignments of {bits} bits take {packed_bytes(n, bits)}")
    if bits == 0:
        return np.zeros(n, np.int32)
    if bits == 8:
        return data.astype(np.int32)
    if bits == 16:
        return np.ascontiguousarray(data).view("<u2").astype(np.int32)
    n_groups = -(-n // 8)
    padded = np.zeros(n_groups * bits, np.uint8)
    padded[: data.size] = data
    words = np.zeros((n_groups, 16), np.uint8)
    words[:, :bits] = padded.reshape(n_groups, bits)
    pairs = words.view("<u8")
    out = np.empty((n_groups, 8), np.int32)
    for i in range(8):
        out[:, i] = _get(pairs, i * bits, bits)
    return out.reshape(-1)[:n]


def _check_bits(bits: int) -> None:
    if not 0 <= bits <= MAX_BITS:
        raise ValueError(f"{bits} bits per assignment; between 0 and {MAX_BITS} are possible")


def _put(words: NDArray[np.uint64], values: NDArray[np.uint64], at: int) -> None:
    """OR `values` into bit position `at` of the 128-bit `words` (n, 2)."""
    word, shift = divmod(at, 64)
    if word >= 2:
        return
    words[:, word] |= values << np.uint64(shift)
    if shift and word == 0:
        words[:, 1] |= values >> np.uint64(64 - shift)


def _get(words: NDArray[np.uint64], at: int, bits: int) -> NDArray[np.uint64]:
    """The `bits` bits from position `at` of the 128-bit `words` (n, 2)."""
    word, shift = divmod(at, 64)
    values = words[:, word] >> np.uint64(shift)
    if shift + bits > 64 and word == 0:
        values |= words[:, 1] << np.uint64(64 - shift)
    return values & np.uint64((1 << bits) - 1)
