"""The vectors of a weight that memory should not hold: read anew, a piece at a time, for every pass over them.

`encode` finds what `pq.encode` finds, to the last bit: samples are the same vectors, and sums are added up slab by
slab, as the kernel cuts and adds them where the vectors lie in memory. What needs all vectors at once (few distinct
ones, empty clusters) raises NotHeldError: then the weight must be read as a whole after all.

Shapes: vectors (n, d), codebook (k, d), assignments (n,) uint8 where that holds them, else
int32.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, NoReturn, cast

import torch
from torch import Tensor

from pqcli.core import kernels
from pqcli.core.lookahead import in_order
from pqcli.core.pq import em, pq
from pqcli.core.pq.blocks import Blocks

NARROW: Final = 256
"""Centroids that a byte can tell apart."""
PIECE: Final = 1 << 17
"""Vectors read at a time where nothing else says how many; a multiple of what `metrics.compare` takes at a time."""


TRIMMED: Final = 1 << 22
"""So many vectors further on, the memory of pieces that are no longer needed is given back."""


class NotHeldError(Exception):
    """Something needs all vectors of a weight at once."""


@dataclass(frozen=True)
class Far:
    """Vectors in a place from which some can be read: `read(start, stop)` gives (stop - start, d), of any float dtype.

    Stands where `em` expects a tensor, and does what `em` asks of one there, or raises NotHeldError.
    """

    read: Callable[[int, int], Tensor]
    shape: tuple[int, int]

    device = torch.device("cpu")

    def __len__(self) -> int:
        return self.shape[0]

    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def __getitem__(self, place: slice) -> Tensor:
        if not isinstance(place, slice):
            raise NotHeldError
        start, stop, _ = place.indices(len(self))
        if start // TRIMMED < stop // TRIMMED:
            give_back()
        return self.read(start, stop)

    def __add__(self, other: object) -> NoReturn:
        raise NotHeldError

    def double(self) -> NoReturn:
        """A copy of all: that is what is not wanted."""
        raise NotHeldError

    def pieces(self) -> Iterator[tuple[int, Tensor]]:
        """All vectors in order, a piece at a time, each with its beginning."""
        for start in range(0, len(self), PIECE):
            yield start, self[start : start + PIECE]

    def picked(self, chosen: Tensor) -> Tensor:
        """The vectors of these places (m,), which rise, in float32."""
        edges = torch.arange(0, len(self) + PIECE, PIECE)
        bounds = torch.searchsorted(chosen, edges).tolist()
        # made first: small results between the large pieces that are read would keep the memory of these from reuse
        found = torch.empty(len(chosen), self.shape[1])
        for i, (begin, end) in enumerate(pairwise(bounds)):
            if begin < end:
                piece = self[i * PIECE : (i + 1) * PIECE]
                found[begin:end] = piece.index_select(0, chosen[begin:end] - i * PIECE)
        return found

    def sweep(self, codebook: Tensor, bias: Tensor, *, accumulate: bool) -> kernels.Pass:
        """`kernels.sweep` over all vectors."""
        from pqcli.core.kernels import cpu

        bounds = cpu.slabs(len(self), *codebook.shape)
        # of a billion weights they are what takes the most memory
        assignments = torch.empty(len(self), dtype=torch.uint8 if len(codebook) <= NARROW else torch.int32)

        def work(place: tuple[int, int]) -> kernels.Pass:
            found = cpu.sweep(self[slice(*place)], codebook, bias, None, accumulate, is_slab=True)
            assignments[slice(*place)] = found.assignments
            return found

        places = list(pairwise(bounds))
        n_threads = max(1, torch.get_num_threads())
        sums = counts = None
        score = 0.0
        for found in in_order(places, work, n_threads, ahead=2 * n_threads):
            score += found.score
            if found.sums is not None and found.counts is not None:
                sums = found.sums if sums is None else sums.add_(found.sums)
                counts = found.counts if counts is None else counts.add_(found.counts)
        return kernels.Pass(assignments, sums, counts, score)


class FarBlocks(Blocks):
    """Blocks whose body is far; there is no tail."""

    @classmethod
    def of(cls, far: Far) -> FarBlocks:
        """A matrix one block wide."""
        n, d = far.shape
        return cls(body=cast("Tensor", far), tail=torch.zeros(0, 0), rows=n, columns=d)

    def pick(self, chosen: Tensor) -> Blocks:
        """The blocks of these places, which rise."""
        body = cast("Far", self.body).picked(chosen)
        return Blocks(body, self.tail, rows=len(chosen), columns=self.columns)


@dataclass(frozen=True)
class Encoded:
    """A codebook as it is stored, and the assignments (n,)."""

    codebook: Tensor
    assignments: Tensor


def give_back() -> None:
    """Give the system what the C library keeps of freed memory: between passes over a gigabyte it may be as much."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def peak(far: Far) -> float:
    """The largest magnitude; NaN where there is one."""
    peaks = [pq.largest(piece) for _, piece in far.pieces()]
    return math.nan if any(map(math.isnan, peaks)) else max(peaks)


def encode(far: Far, options: em.Options, codebook_dtype: torch.dtype) -> Encoded:
    """What `pq.encode` makes of these vectors, whose `peak` is ordinary. Raises NotHeldError, and as `em.fit` does."""
    blocks = FarBlocks.of(far)
    codebook, dtype = pq.rounded(em.fit(blocks, options).codebook, 0, codebook_dtype)
    return Encoded(codebook.to(dtype), em.assign(blocks, codebook))
