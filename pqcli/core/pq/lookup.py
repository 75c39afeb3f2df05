"""Blocks looked up with a gradient: what lets a codebook be trained while its assignments stay.

Forward, this is what decoding does, bit for bit: the codebook is rounded to the dtype that the file has, then to the
weight's own, every assignment is replaced by its centroid, padding is left out, and exact zeros are set. Rounding and
saturating let gradients through as they are, so that a codebook in float32 gathers steps smaller than a rounding.

Backward, the gradient of a centroid is the *mean* of the gradients of the blocks that are assigned to it, and not their
sum (Stock et al., "And the Bit Goes Down", ICLR 2020, section 3.3): a centroid with a thousand blocks then moves no
further in a step than one with three, and the learning rate of a dense network still fits. Value by value: padding and
exact zeros stand for no weight, give no gradient, and do not count as members; without members the gradient is zero.

Shapes: codebook (k, block_size), packed (bytes,) uint8 as `packing.pack` gives it, matrix (rows, columns), zeros None
or (bytes,) uint8, a bit an element from the lowest on, or (n,) int32 or int64, the places of the zeros in row-major
order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from pqcli.core.pq.blocks import join
from pqcli.core.pq.packing import packed_bytes
from pqcli.core.pq.pq import saturated

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Lookup:
    """How a codebook becomes a weight: all that is neither a tensor nor trained.

    `bits` are those of an assignment, `stored` is the codebook's dtype in the file, `decoded` the weight's there.
    """

    rows: int
    columns: int
    bits: int
    stored: torch.dtype
    decoded: torch.dtype

    def matrix(self, codebook: Tensor, packed: Tensor, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The weight (rows, columns) in `dtype`; differentiable in `codebook`."""
        found: Tensor = _Lookup.apply(codebook, packed, zeros, self, dtype)  # type: ignore[no-untyped-call]
        return found

    def assignments(self, packed: Tensor, block_size: int) -> Tensor:
        """The assignments (rows * blocks_per_row,), on the device of `packed`."""
        return unpacked(packed, self.rows * -(-self.columns // block_size), self.bits)


class _Lookup(torch.autograd.Function):
    """A weight of a codebook."""

    @staticmethod
    def forward(
        ctx: Any, codebook: Tensor, packed: Tensor, zeros: Tensor | None, of: Lookup, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(packed, zeros)
        ctx.of, ctx.shape, ctx.dtype = of, codebook.shape, codebook.dtype
        table = saturated(codebook.to(of.stored), of.decoded)
        matrix = join(table, of.assignments(packed, codebook.shape[1]), of.rows, of.columns)
        return _with_zeros(matrix, zeros).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        packed, zeros = ctx.saved_tensors
        grad = grad.to_dense() if grad.is_sparse else grad  # an embedding's may be
        assignments = ctx.of.assignments(packed, ctx.shape[1])
        mean = mean_by_centroid(grad, assignments, ctx.shape, zeros)
        return mean.to(ctx.dtype), None, None, None, None


def mean_by_centroid(grad: Tensor, assignments: Tensor, shape: torch.Size, zeros: Tensor | None = None) -> Tensor:
    """The mean of `grad` (rows, columns) over the members of each centroid's values: `shape` (k, block_size), float32.

    A value that no element has is zero.
    """
    rows, columns = grad.shape
    k, block_size = shape
    n_missing = -columns % block_size
    places = assignments.long()
    # not grad.float() in place of it: without zeros and in float32 that is the caller's own
    grad = (
        grad.float() if zeros is None else _with_zeros(grad.float().clone(memory_format=torch.contiguous_format), zeros)
    )
    total = _summed(grad, places, n_missing, k, block_size)
    if zeros is None and not n_missing:
        # not torch.bincount, whose length `torch.compile` cannot know
        members = places.new_zeros(k).scatter_add_(0, places, torch.ones_like(places))[:, None]
    else:
        ones = _with_zeros(torch.ones(rows, columns, dtype=torch.int32, device=grad.device), zeros)
        members = _summed(ones, places, n_missing, k, block_size)
    return total / members.clamp(min=1)


def _summed(values: Tensor, places: Tensor, n_missing: int, k: int, block_size: int) -> Tensor:
    blocks = torch.nn.functional.pad(values, (0, n_missing)).reshape(-1, block_size)
    total = torch.zeros(k, block_size, dtype=values.dtype, device=values.device)
    return total.scatter_add_(0, places[:, None].expand_as(blocks), blocks)


def _with_zeros(matrix: Tensor, zeros: Tensor | None) -> Tensor:
    """The matrix with its exact zeros, in place."""
    if zeros is None:
        return matrix
    if zeros.dtype == torch.uint8:
        mask = unpacked(zeros, matrix.numel(), 1).view(matrix.shape)
        return matrix.masked_fill_(mask.bool(), 0)
    matrix.view(-1).index_fill_(0, zeros.long(), 0)
    return matrix


def unpacked(packed: Tensor, n: int, bits: int) -> Tensor:
    """The `n` assignments that `packed` holds, on its device: uint8 where they take 8 bits, else int32.

    The same as `packing.unpack`, in torch. Raises ValueError for another number of bytes.
    """
    if len(packed) != packed_bytes(n, bits):
        raise ValueError(f"{len(packed)} bytes where {n} assignments of {bits} bits take {packed_bytes(n, bits)}")
    if bits == 0:
        return torch.zeros(n, dtype=torch.int32, device=packed.device)
    if bits == 8:
        return packed
    # eight assignments fill whole bytes; two more, so that three bytes can be read wherever one begins
    groups = torch.nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
    wide = torch.nn.functional.pad(groups, (0, 2)).int()
    found = torch.empty(len(groups), 8, dtype=torch.int32, device=packed.device)
    for i in range(8):
        start, shift = divmod(i * bits, 8)
        three = wide[:, start] | wide[:, start + 1] << 8 | wide[:, start + 2] << 16
        found[:, i] = three >> shift & (1 << bits) - 1
    return found.view(-1)[:n]
