"""Weight <-> short vectors: how a tensor is cut into blocks, and put together again.

A weight is seen as a matrix of `rows` x `columns`: a row is everything that makes one output (Linear: `in_features`
values, Conv: `in_channels / groups * kernel` values, Embedding: one entry). Each row is cut into blocks of
`block_size` neighbouring values. Where `block_size` does not divide `columns`, the last block of every row is short.
Short blocks are kept apart as the *tail*, so that the missing values take part in nothing: not in distances, not in
centroids, not in errors.

Shapes
    matrix (rows, columns) -> body (rows * full_blocks, block_size), tail (rows, columns % block_size) or (0, ...)
    assignments (rows * blocks_per_row,), row by row: block b of row r is entry `r * blocks_per_row + b`
    codebook (n_centroids, block_size)

fairseq, kill-the-bits and their `PQLinear` order assignments the other way round (block by block over all rows);
`to_block_major` and `from_block_major` translate at that border.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from pqcli.core.importance import Importance

_JOIN_ELEMENTS = 1 << 22
"""Weights put together at a time: the padded blocks of a large tensor would be one more copy of it."""


@dataclass(frozen=True)
class Blocks:
    """The vectors of one weight in float32: full blocks in `body`, short last blocks in `tail`.

    `importance` holds, cut likewise, how much the squared error of each value counts (None: all alike). Where only rows
    differ, its vectors have a single value.
    """

    body: Tensor
    tail: Tensor
    rows: int
    columns: int
    importance: Blocks | None = None

    @property
    def block_size(self) -> int:
        """Length of a full block."""
        return self.body.shape[1]

    @property
    def blocks_per_row(self) -> int:
        """Blocks in one row, the short one included."""
        return -(-self.columns // self.block_size)

    @property
    def n_vectors(self) -> int:
        """Number of assignments: rows times blocks per row."""
        return self.rows * self.blocks_per_row

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The non-empty groups of equally long vectors: the body, then the tail."""
        return tuple(part for part in (self.body, self.tail) if part.numel())

    @property
    def importance_parts(self) -> tuple[Tensor, ...] | tuple[None, ...]:
        """For each of the parts its values' importance, or None."""
        return (None,) * len(self.parts) if self.importance is None else self.importance.parts

    def pick(self, chosen: Tensor) -> Blocks:
        """The full blocks of these indices (n,), as the rows of a matrix one block wide."""
        importance = None if self.importance is None else self.importance.pick(chosen)
        body, tail = self.body.index_select(0, chosen), self.tail[:0]
        return Blocks(body, tail, rows=len(chosen), columns=self.block_size, importance=importance)

    def join(self, per_part: list[Tensor]) -> Tensor:
        """One value per vector, given part by part, in the order of `assignments`."""
        if len(per_part) == 1:
            return per_part[0]
        body, tail = per_part
        return torch.cat([body.view(self.rows, -1), tail.view(self.rows, 1)], dim=1).flatten()


def cut(matrix: Tensor, block_size: int, importance: Importance | None = None) -> Blocks:
    """The blocks of `matrix` (rows, columns), any floating dtype, in float32.

    Shares memory with a float32 `matrix` whose columns divide; copies otherwise. `importance`, unless it is uniform,
    takes as much memory again; only its ratios matter. Raises ValueError where it is that of another shape.
    """
    rows, columns = matrix.shape
    weighed = None
    if importance is not None:
        if importance.shape != (rows, columns):
            raise ValueError(f"importance of {importance.shape} for a matrix {rows} x {columns}")
        if not importance.is_uniform:
            known = importance.normalised()
            by_row, by_column = (torch.from_numpy(f).to(matrix.device) for f in (known.rows, known.columns))
            if bool((by_column == by_column[0]).all()):
                weighed = _by_vector(by_row, columns, block_size)
            else:
                weighed = cut(torch.outer(by_row, by_column), block_size)
    n_full = columns // block_size
    width = n_full * block_size
    # not matrix.float() first: of a large half-precision tensor that would be one more copy
    body = _float32(matrix[:, :width]).view(rows * n_full, block_size)
    return Blocks(body=body, tail=_float32(matrix[:, width:]), rows=rows, columns=columns, importance=weighed)


def _by_vector(by_row: Tensor, columns: int, block_size: int) -> Blocks:
    """Importance (rows,) of rows as that of their blocks."""
    rows = len(by_row)
    n_full, n_left = divmod(columns, block_size)
    body = by_row[:, None].expand(rows, n_full).reshape(-1, 1)
    tail = by_row[:, None] if n_left else by_row.new_empty(rows, 0)
    return Blocks(body=body, tail=tail, rows=rows, columns=columns)


def _float32(part: Tensor) -> Tensor:
    """`part` as contiguous float32: itself where it is, else one copy."""
    if part.dtype == torch.float32 and part.is_contiguous():
        return part
    return torch.empty(part.shape, dtype=torch.float32, device=part.device).copy_(part)


def join(codebook: Tensor, assignments: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix (rows, columns) that `assignments` (rows * blocks_per_row,) spell, in the codebook's dtype.

    On the codebook's device, for who trains there; files are decoded by `decoding.join`, from arrays.
    """
    block_size = codebook.shape[1]
    per_row = -(-columns // block_size)
    grid = assignments.view(rows, per_row)
    matrix = torch.empty(rows, columns, dtype=codebook.dtype, device=codebook.device)
    step = max(1, _JOIN_ELEMENTS // max(1, per_row * block_size))
    for start in range(0, rows, step):
        part = grid[start : start + step]
        matrix[start : start + step] = _looked_up(codebook, part)[:, :columns]
    return matrix


def _looked_up(codebook: Tensor, grid: Tensor) -> Tensor:
    """The centroids that `grid` (rows, blocks) names, as (rows, blocks * block_size)."""
    places = grid.reshape(-1)
    if places.dtype == torch.uint8:
        places = places.int()
    return codebook.index_select(0, places).view(len(grid), grid.shape[1] * codebook.shape[1])


def to_block_major(assignments: Tensor, rows: int) -> Tensor:
    """Row-by-row assignments in fairseq's order: entry `block * rows + row`."""
    return assignments.view(rows, -1).t().reshape(-1)


def from_block_major(assignments: Tensor, rows: int) -> Tensor:
    """Fairseq's block-by-block assignments in this project's order: entry `row * blocks_per_row + block`."""
    return assignments.view(-1, rows).t().reshape(-1)
