"""How far a decoded weight is from the original, and how much information its assignments carry.

All sums are taken in float64 over bounded chunks, so that a weight of any size and dtype is measured alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from pqcli.core.importance import Importance

CHUNK = 1 << 15
"""Elements measured at a time: small enough for the cache, and for torch to stay on one thread."""


@dataclass(frozen=True)
class Error:
    """Sums that describe W - W_hat. They add up over tensors: `a + b` is the error of both together."""

    n: int
    energy: float  # sum of W^2
    decoded_energy: float  # sum of W_hat^2
    squared_error: float  # sum of (W - W_hat)^2
    dot: float  # sum of W * W_hat
    max_abs_error: float

    def __add__(self, other: Error) -> Error:
        """The error of two tensors together."""
        return Error(
            n=self.n + other.n,
            energy=self.energy + other.energy,
            decoded_energy=self.decoded_energy + other.decoded_energy,
            squared_error=self.squared_error + other.squared_error,
            dot=self.dot + other.dot,
            max_abs_error=max(self.max_abs_error, other.max_abs_error),
        )

    @property
    def relative_mse(self) -> float:
        """|W - W_hat|^2 / |W|^2; 0 for a zero error even where W is zero."""
        if self.squared_error == 0:
            return 0.0
        return self.squared_error / self.energy if self.energy else math.inf

    @property
    def cosine(self) -> float:
        """Cosine similarity of W and W_hat; 1 where both are zero."""
        norm = math.sqrt(self.energy) * math.sqrt(self.decoded_energy)
        if norm == 0:
            return 1.0 if self.energy == self.decoded_energy else 0.0
        return max(-1.0, min(1.0, self.dot / norm))


NO_ERROR = Error(0, 0.0, 0.0, 0.0, 0.0, 0.0)


def compare(weight: Tensor, decoded: Tensor) -> Error:
    """The error of `decoded` against `weight`, two tensors of one shape and of any floating dtypes."""
    return compare_pieces([(weight, decoded)])


def compare_pieces(pieces: Iterable[tuple[Tensor, Tensor]]) -> Error:
    """The error of two tensors of which pieces come one after another; of all but the last, whole `CHUNK`s."""
    total = NO_ERROR
    for x, y in _chunks(pieces):
        difference, dot = x - y, float((x * y).sum())
        low, high = difference.aminmax()
        total += Error(
            n=x.numel(),
            energy=float(x.square_().sum()),
            decoded_energy=float(y.square_().sum()),
            squared_error=float(difference.square_().sum()),
            dot=dot,
            max_abs_error=max(-float(low), float(high)),
        )
    return total


def _chunks(pieces: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Copies in float64, `CHUNK` elements at a time."""
    for weight, decoded in pieces:
        a, b = weight.reshape(-1), decoded.reshape(-1)
        for start in range(0, a.numel(), CHUNK):
            yield (
                a[start : start + CHUNK].to(torch.float64, copy=True),
                b[start : start + CHUNK].to(torch.float64, copy=True),
            )


def weighted_squared_error(weight: Tensor, decoded: Tensor, importance: Importance | None) -> float:
    """The squared error of two tensors of one shape, each weight's counted by its importance (None: 1).

    `importance` is that of the tensors seen as a matrix (rows, columns); it is taken as it is, not normalised. Raises
    ValueError where it does not have as many weights.
    """
    if importance is None:
        return compare(weight, decoded).squared_error
    n_rows, n_columns = importance.shape
    if n_rows * n_columns != weight.numel():
        raise ValueError(f"importance of {n_rows} x {n_columns} weights for a tensor of {weight.numel()}")
    rows, columns = (torch.from_numpy(factors).double() for factors in (importance.rows, importance.columns))
    a, b = weight.reshape(n_rows, n_columns), decoded.reshape(n_rows, n_columns)
    step = max(1, CHUNK // max(n_columns, 1))
    found = 0.0
    for start in range(0, n_rows, step):
        difference = a[start : start + step].double() - b[start : start + step].double()
        found += float(difference.square_() @ columns @ rows[start : start + step])
    return found


def total(errors: Iterable[Error]) -> Error:
    """The error of many tensors together."""
    return sum(errors, start=NO_ERROR)


def entropy(counts: Sequence[float] | Tensor) -> float:
    """Order-0 entropy in bits per symbol of a source that emits symbol j `counts[j]` times."""
    p = torch.as_tensor(counts, dtype=torch.float64)
    p = p[p > 0]
    return float(-(p / p.sum() * (p / p.sum()).log2()).sum()) if p.numel() else 0.0
