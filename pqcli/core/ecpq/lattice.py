"""Where entropy-constrained EM starts: the points of the best lattice that the vectors live on.

At a high rate the best entropy-coded codebook is a lattice (Gersho 1979), the same points everywhere, and only their
probabilities follow the data: Z for single values, the hexagonal lattice for pairs, D4 and E8 for blocks of 4 and 8
(Conway and Sloane, "Sphere Packings, Lattices and Groups"). EM moves the points from there; it would not find this
arrangement from random ones.

Shapes: vectors (n, d), points (n, d).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

MOMENT = {1: 1 / 12, 2: 0.08019, 4: 0.07660, 8: 0.07168}
"""Normalised second moment: the mean squared error per coordinate of a cell of volume 1."""


def scale(block_size: int, rate_weight: float) -> float:
    """The factor on the lattice's points that makes one bit worth `rate_weight` of squared error.

    A cell of volume V gives the error D = moment * V^(2/d) per coordinate, and dD / d(rate) = -2 ln 2 * D.
    """
    edge = math.sqrt(rate_weight / (2 * math.log(2) * MOMENT[block_size]))
    return float(edge / _VOLUME[block_size] ** (1 / block_size))


def nearest(vectors: Tensor) -> Tensor:
    """The lattice point nearest to each vector; the lattice goes by the block size 1, 2, 4 or 8."""
    return _NEAREST[vectors.shape[1]](vectors)


def _cubic(x: Tensor) -> Tensor:
    return x.round()


def _hexagonal(x: Tensor) -> Tensor:
    step = torch.tensor([1.0, math.sqrt(3)])
    return _nearer(x, (x / step).round() * step, ((x / step - 0.5).round() + 0.5) * step)


def _checkerboard(x: Tensor) -> Tensor:
    """D_d: integer points of even sum. Where rounding makes it odd, the least certain coordinate goes the other way."""
    rounded = x.round()
    error = x - rounded
    worst = error.abs().argmax(1, keepdim=True)
    step = torch.where(error.gather(1, worst) >= 0, 1.0, -1.0) * (rounded.sum(1, keepdim=True) % 2)
    return rounded.scatter_add(1, worst, step)


def _gosset(x: Tensor) -> Tensor:
    return _nearer(x, _checkerboard(x), _checkerboard(x - 0.5) + 0.5)


def _nearer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    a_is_nearer = (x - a).square().sum(1, keepdim=True) <= (x - b).square().sum(1, keepdim=True)
    return torch.where(a_is_nearer, a, b)


_NEAREST: dict[int, Callable[[Tensor], Tensor]] = {1: _cubic, 2: _hexagonal, 4: _checkerboard, 8: _gosset}
_VOLUME = {1: 1.0, 2: math.sqrt(3) / 2, 4: 2.0, 8: 1.0}
