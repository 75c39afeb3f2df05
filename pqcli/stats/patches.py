"""The inputs of a convolution as rows: one patch for each place where the kernel is laid.

A patch (c,) is flattened as the weight is, (in / groups, *kernel), so that output = patch . weight.flatten(1).
Groups are pooled: each place gives one patch for every group.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_PLACES = 256
"""Places of one example that are looked at, drawn at random where there are more: neighbours say much the same."""


def patches(
    x: torch.Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Patches (examples, places * groups, c) of `x` (examples, channels, *space).

    `padding` gives zeros before and after in each dimension. At most `MAX_PLACES` places, the same for all examples.
    """
    flat_padding = [n for pair in reversed(padding) for n in pair]
    x = torch.nn.functional.pad(x, flat_padding)
    sizes = [
        (size - d * (k - 1) - 1) // s + 1 for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    n_places = 1
    for size in sizes:
        n_places *= size
    places = torch.arange(n_places)
    if n_places > MAX_PLACES:
        places = torch.randperm(n_places, generator=generator)[:MAX_PLACES].sort().values
    corners = []
    for size, s in zip(reversed(sizes), reversed(list(stride)), strict=True):
        corners.append((places % size * s).to(x.device))
        places = places // size
    corners.reverse()
    everything: list[slice | torch.Tensor] = [slice(None), slice(None)]  # examples, channels
    taps = [
        x[tuple(everything + _places_of(corners, tap, dilation))] for tap in product(*(range(k) for k in kernel))
    ]  # each (examples, channels, places)
    rows = torch.stack(taps, dim=2)  # (examples, channels, taps, places)
    n, channels, n_taps, count = rows.shape
    rows = rows.view(n, groups, channels // groups, n_taps, count)
    return rows.permute(0, 4, 1, 2, 3).reshape(n, count * groups, -1)


def _places_of(corners: list[torch.Tensor], tap: Sequence[int], dilation: Sequence[int]) -> list[slice | torch.Tensor]:
    """Where the tap of the kernel lies when its first one lies at the corners."""
    return [corner + t * d for corner, t, d in zip(corners, tap, dilation, strict=True)]
