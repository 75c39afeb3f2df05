"""Tensors that share some of their bytes without being the same: views of one storage.

`q = qkv[:256]` saved beside `qkv` is in the file once. Coded apart, the two would come back disagreeing. Here the
tensors of a storage are put into groups such that two that share a byte are in the same group. Views that lie in one
storage side by side, or interleaved, share nothing and are in no group.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from pqcli.tensors.info import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pqcli.checkpoint.bytesource import Strided

_MAX_AXES = 10
_COMPARED = 64
"""So many views at one place are compared one by one; where there are more, they are taken to overlap."""


@dataclass(frozen=True)
class _Extent:
    """The bytes of a tensor: from `begin` to `end`, size and step of every axis, wide ones first, bytes last.

    Without axes it stands for many tensors that are a group already.
    """

    name: str
    begin: int
    end: int
    axes: tuple[tuple[int, int], ...]


def overlapping(views: Mapping[str, Strided]) -> dict[str, str]:
    """The group of every tensor that shares bytes with a different one; a group is called after its first tensor.

    Tied tensors, which share all their bytes, must be given once.
    """
    regions: dict[object, list[_Extent]] = {}
    for name, view in views.items():
        if view.numel and view.region.data is None:
            regions.setdefault(view.region.start, []).append(_extent(name, view))
    groups: dict[str, str] = {}
    for extents in regions.values():
        if len(extents) > 1:
            groups.update(_groups(extents))
    order = {name: number for number, name in enumerate(views)}
    first: dict[str, str] = {}
    for name in sorted(groups, key=order.__getitem__):
        first.setdefault(groups[name], name)
    return {name: first[group] for name, group in groups.items()}


def _extent(name: str, view: Strided) -> _Extent:
    item = ITEM_BYTES[view.dtype]
    begin = view.region.start + view.offset * item
    strides = view.strides if view.strides is not None else _dense_strides(view.shape)
    axes = [(size, step * item) for size, step in zip(view.shape, strides, strict=True) if size > 1 and step]
    return _Extent(name, begin, begin + view.span * item, (*sorted(axes, key=lambda axis: -axis[1]), (item, 1)))


def _dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _groups(extents: Iterable[_Extent]) -> dict[str, str]:
    """Names to a name of their group, for those that overlap with another."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    active: list[_Extent] = []
    for extent in sorted(extents, key=lambda extent: (extent.begin, extent.end)):
        active = [other for other in active if other.end > extent.begin]
        for other in active:
            if _share(other, extent):
                parent[root(extent.name)] = root(other.name)
        active.append(extent)
        if len(active) > _COMPARED or not active[0].axes:  # and then every later one that meets them is one of them
            for other in active:
                parent[root(other.name)] = root(extent.name)
            active = [_Extent(extent.name, active[0].begin, max(other.end for other in active), ())]
    return {name: root(name) for name in parent}


def _share(one: _Extent, two: _Extent) -> bool:
    """Whether two extents whose ranges meet share a byte; True where that is not easily told."""
    if not one.axes or not two.axes:
        return True
    steps = sorted({step for _, step in (*one.axes, *two.axes)}, reverse=True)
    sizes_one, sizes_two = _sizes(one, steps), _sizes(two, steps)
    if len(steps) <= _MAX_AXES and sizes_one is not None and sizes_two is not None:
        return _meet(two.begin - one.begin, list(zip(sizes_one, sizes_two, steps, strict=True)))
    common = gcd(*(step for _, step in (*one.axes[:-1], *two.axes[:-1])))
    width_one, width_two = one.axes[-1][0], two.axes[-1][0]
    if common < width_one + width_two:
        return True
    apart = (two.begin - one.begin) % common
    return apart < width_one or apart > common - width_two


def _meet(distance: int, axes: list[tuple[int, int, int]]) -> bool:
    """Whether two boxes of a grid meet, the second `distance` behind the first; an axis is both sizes and the step."""
    if not axes:
        return distance == 0
    (size_one, size_two, step), *narrower = axes
    whole, rest = divmod(distance, step)
    # what the narrower axes make up is less than a step, in either direction
    return any(
        -size_two < steps < size_one and _meet(left, narrower)
        for steps, left in ((whole, rest), (whole + 1, rest - step))
    )


def _sizes(extent: _Extent, steps: list[int]) -> list[int] | None:
    """The sizes along axes of these steps, 1 where the extent has no such axis.

    None unless every axis steps over all that the narrower ones reach.
    """
    sizes = {step: size for size, step in extent.axes}
    if len(sizes) != len(extent.axes):
        return None
    reach = 1
    for step in reversed(steps):
        if step < reach:
            return None
        reach += (sizes.get(step, 1) - 1) * step
    return [sizes.get(step, 1) for step in steps]
