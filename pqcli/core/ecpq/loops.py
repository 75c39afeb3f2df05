"""The loops of entropy-constrained PQ that are not `kernels.sweep`, compiled. Importing this module imports llvmlite.

The bits beside the entropy-coded symbols ("side bits") lie least significant first. After an orbit: one sign bit for
each of its non-zero magnitudes. After an escape, for each value: 5 bits L; L = 0 is the value 0; L in 1..24 is a sign
bit and the L - 1 low bits of an integer n of L bits, for the value n * step; L = 31 is a sign bit and 31 bits of a
float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pqcli.core.compiled.jit import kernel

MAX_LENGTH = 24
"""Bits of the largest integer after an escape; larger values are stored as float32."""
RAW = 31
MAX_SIDE_BITS = 37
"""The most side bits that one value can take."""


@kernel
def settle(
    vectors: NDArray[np.float32],
    importance: NDArray[np.float32],
    classes: NDArray[np.uint8],
    magnitudes: NDArray[np.uint16],
    bits: NDArray[np.float64],
    rate_weight: float,
    step: float,
    symbols: NDArray[np.uint16],
) -> tuple[float, float]:
    """Turn a symbol into an escape (0) where that costs less; the bits of all vectors, and their squared error.

    vectors (n, d) are magnitudes in grid units; symbols arrive as found by the sweep. Squared errors count times their
    importance, (n, d), (1, d) or (1, 1).
    """
    d = vectors.shape[1]
    is_weighed = importance.shape[0] > 1 or importance.shape[1] > 1
    is_by_vector = importance.shape[0] > 1
    q = np.float64(importance[0, 0])
    total_bits = 0.0
    total_error = 0.0
    for i in range(vectors.shape[0]):
        s = symbols[i]
        error = 0.0
        cost = bits[classes[i], s]
        if s > 0:
            for t in range(d):
                e = np.float64(vectors[i, t]) - magnitudes[s - 1, t]
                if is_weighed:
                    q = np.float64(importance[i if is_by_vector else 0, t])
                error += q * e * e
        if s == 0 or error > rate_weight * 5 * d:
            escape_error = 0.0
            escape_cost = bits[classes[i], 0]
            for t in range(d):
                x = np.float64(vectors[i, t])
                n = np.floor(x / step + 0.5)
                if n >= 1 << MAX_LENGTH:
                    escape_cost += MAX_SIDE_BITS
                else:
                    escape_cost += 5
                    e = x - n * step
                    if is_weighed:
                        q = np.float64(importance[i if is_by_vector else 0, t])
                    escape_error += q * e * e
                    whole = np.int64(n)
                    escape_cost += 1 if whole > 0 else 0
                    while whole > 1:
                        escape_cost += 1
                        whole >>= 1
            if s == 0 or escape_error + rate_weight * escape_cost < error + rate_weight * cost:
                symbols[i] = 0
                error = escape_error
                cost = escape_cost
        total_bits += cost
        total_error += error
    return total_bits, total_error


@kernel
def count_bits(
    symbols: NDArray[np.uint16],
    which: NDArray[np.int64],
    tables: NDArray[np.uint8],
    bits: NDArray[np.float64],
    totals: NDArray[np.float64],
) -> None:
    """Add to `totals` (m,) the bits of all symbols where vector i has table `tables[j, which[i]]`, for each of m j."""
    for j in range(totals.size):
        for i in range(symbols.size):
            totals[j] += bits[tables[j, which[i]], symbols[i]]


@kernel
def put(bits: NDArray[np.uint8], at: int, value: int, n: int) -> int:
    """Write the `n` low bits of `value` at bit position `at` of zeroed bytes; the position behind them."""
    for i in range(n):
        bits[(at + i) >> 3] |= np.uint8(((value >> i) & 1) << ((at + i) & 7))
    return at + n


@kernel
def take(bits: NDArray[np.uint8], at: int, n: int) -> int:
    """The `n` bits at position `at`."""
    value = np.int64(0)
    for i in range(n):
        value |= np.int64((bits[(at + i) >> 3] >> ((at + i) & 7)) & 1) << i
    return int(value)


@kernel
def write_side(
    matrix: NDArray[np.float32],
    first_column: int,
    start: int,
    symbols: NDArray[np.uint16],
    magnitudes: NDArray[np.uint16],
    per_row: int,
    step: float,
    out: NDArray[np.uint8],
) -> int:
    """Write the side bits of the vectors `start ...` of `matrix` (unscaled) to zeroed `out`; how many bits they are."""
    d = magnitudes.shape[1]
    at = 0
    for i in range(symbols.size):
        r = (start + i) // per_row
        c = first_column + (start + i) % per_row * d
        s = symbols[i]
        for t in range(d):
            x = matrix[r, c + t]
            negative = 1 if x < 0 else 0
            if s > 0:
                if magnitudes[s - 1, t] > 0:
                    at = put(out, at, negative, 1)
                continue
            n = np.floor(np.abs(np.float64(x)) / step + 0.5)
            if n >= 1 << MAX_LENGTH:
                at = put(out, at, RAW, 5)
                at = put(out, at, negative, 1)
                raw = np.empty(1, np.float32)
                raw[0] = np.abs(x)
                at = put(out, at, np.int64(raw.view(np.uint32)[0]), 31)
                continue
            whole = np.int64(n)
            length = 0
            while whole >> length:
                length += 1
            at = put(out, at, length, 5)
            if length:
                at = put(out, at, negative, 1)
                at = put(out, at, whole, length - 1)
    return at


@kernel
def read_side(
    side: NDArray[np.uint8],
    n_bits: int,
    first_column: int,
    start: int,
    symbols: NDArray[np.uint16],
    values: NDArray[np.float32],
    grid: np.float32,
    scale: np.float32,
    step: int,
    per_row: int,
    matrix: NDArray[np.float32],
) -> int:
    """Fill the vectors `start ...` of `matrix` from symbols and side bits; the bits read, -1 if they do not suffice.

    values (k, d) are the orbits' magnitudes times grid, in float32.
    """
    d = values.shape[1]
    at = 0
    for i in range(symbols.size):
        r = (start + i) // per_row
        c = first_column + (start + i) % per_row * d
        s = symbols[i]
        for t in range(d):
            if s > 0:
                x = values[s - 1, t]
                if x > 0:
                    if at >= n_bits:
                        return -1
                    if (side[at >> 3] >> (at & 7)) & 1:
                        x = -x
                    at += 1
                matrix[r, c + t] = x * scale
                continue
            if at + 5 > n_bits:
                return -1
            length = take(side, at, 5)
            at += 5
            if length == 0:
                matrix[r, c + t] = 0
                continue
            needed = 32 if length == RAW else length
            if (length > MAX_LENGTH and length != RAW) or at + needed > n_bits:
                return -1
            negative = take(side, at, 1)
            if length == RAW:
                raw = np.empty(1, np.uint32)
                raw[0] = take(side, at + 1, 31)
                x = raw.view(np.float32)[0]
            else:
                whole = (np.int64(1) << (length - 1)) | take(side, at + 1, length - 1)
                x = np.float32(whole * step) * grid
            at += needed
            matrix[r, c + t] = (-x if negative else x) * scale
    return at
