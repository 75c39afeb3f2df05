"""Decoding plain PQ: the centroids that assignments name, row by row.

Shapes: codebook (k, block_size), assignments (rows * blocks_per_row,), matrix (rows, columns); see `blocks`.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_ELEMENTS: Final = 1 << 17
"""Weights put together at a time: what is looked up, and the assignments as indices, stay in the cache."""


def join(codebook: NDArray[Any], assignments: NDArray[np.integer], rows: int, columns: int) -> NDArray[Any]:
    """The matrix that `assignments` spell, in the codebook's dtype. All of them must be below k."""
    block_size = codebook.shape[1]
    per_row = -(-columns // block_size)
    matrix = np.empty((rows, columns), codebook.dtype)
    if per_row * block_size == columns:
        blocks = matrix.reshape(-1, block_size)
        step = max(1, _ELEMENTS // max(1, block_size))
        for start in range(0, len(blocks), step):
            # "clip" looks at every index once, and not beforehand, as "raise" does
            codebook.take(assignments[start : start + step], 0, blocks[start : start + step], "clip")
        return matrix
    grid = assignments.reshape(rows, per_row)
    step = max(1, _ELEMENTS // max(1, per_row * block_size))
    for start in range(0, rows, step):
        part = codebook.take(grid[start : start + step], 0, mode="clip")
        matrix[start : start + step] = part.reshape(len(part), -1)[:, :columns]
    return matrix
