"""The loops of entropy-constrained PQ that are not `kernels.sweep` (`ecpq.c`).

The bits beside the entropy-coded symbols ("side bits") lie least significant first. After an orbit: one sign bit for
each of its non-zero magnitudes. After an escape, for each value: 5 bits L; L = 0 is the value 0; L in 1..24 is a sign
bit and the L - 1 low bits of an integer n of L bits, for the value n * step; L = 31 is a sign bit and 31 bits of a
float32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pqcli.core.native.library import function, reads, writes

MAX_SIDE_BITS = 37
"""The most side bits that one value can take."""

_settle = function(
    "settle",
    int, int, int, reads(np.float32), int, int, reads(np.float32), reads(np.uint8), reads(np.uint16), reads(np.float64),
    float, float, writes(np.uint16), writes(np.float64),
)  # fmt: skip
_count_bits = function(
    "count_bits",
    int, int, int, int, reads(np.uint16), reads(np.int64), reads(np.uint8), reads(np.float64), writes(np.float64),
)  # fmt: skip
_write_side = function(
    "write_side",
    int, int, int, reads(np.float32), int, int, reads(np.uint16), reads(np.uint16), int, float, writes(np.uint8),
    returns=int,
)  # fmt: skip
_read_side = function(
    "read_side",
    int, int, int, reads(np.uint8), int, int, int, reads(np.uint16), reads(np.float32), np.float32, np.float32, int,
    int, writes(np.float32),
    returns=int,
)  # fmt: skip


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
    totals = np.empty(2)
    magnitudes = np.ascontiguousarray(magnitudes)  # those that were read from a file lie the other way round
    _settle(
        *vectors.shape, bits.shape[1], vectors, *importance.shape, importance, classes, magnitudes, bits, rate_weight,
        step, symbols, totals,
    )  # fmt: skip
    return float(totals[0]), float(totals[1])


def count_bits(
    symbols: NDArray[np.uint16],
    which: NDArray[np.int64],
    tables: NDArray[np.uint8],
    bits: NDArray[np.float64],
    totals: NDArray[np.float64],
) -> None:
    """Add to `totals` (m,) the bits of all symbols where vector i has table `tables[j, which[i]]`, for each of m j."""
    _count_bits(totals.size, symbols.size, tables.shape[1], bits.shape[1], symbols, which, tables, bits, totals)


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
    sizes = symbols.size, magnitudes.shape[1], matrix.shape[1]
    magnitudes = np.ascontiguousarray(magnitudes)
    found: int = _write_side(*sizes, matrix, first_column, start, symbols, magnitudes, per_row, step, out)
    return found


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
    sizes = symbols.size, values.shape[1], matrix.shape[1]
    values = np.ascontiguousarray(values)
    found: int = _read_side(
        *sizes, side, n_bits, first_column, start, symbols, values, grid, scale, step, per_row, matrix
    )
    return found
