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

_COMPARED = 256
"""So many views at one place are compared one by one; where there are more, they are taken to overlap."""


@dataclass(frozen=True)
class _Extent:
    """The bytes of a tensor: from `begin` to `end`, in steps of `strides` (size and step per axis, wide ones first)."""

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
        while parent.get(name, name) != name:
            name = parent[name]
        return name

    active: list[_Extent] = []
    for extent in sorted(extents, key=lambda extent: (extent.begin, extent.end)):
        active = [other for other in active if other.end > extent.begin]
        coarse = len(active) > _COMPARED
        for other in active[-_COMPARED:]:
            if coarse or _share(other, extent):
                one, two = root(other.name), root(extent.name)
                parent[one] = parent[two] = parent[other.name] = parent[extent.name] = one
        active.append(extent)
    return {name: root(name) for name in parent}


def _share(one: _Extent, two: _Extent) -> bool:
    """Whether two extents whose ranges meet share a byte; True where that is not easily told."""
    if _steps(one) == _steps(two) and _nested(one) and _nested(two):
        distance = two.begin - one.begin
        for (size_one, step), (size_two, _) in zip(one.axes, two.axes, strict=True):
            # the nearest whole number of steps, and what is left for the narrower axes
            steps, distance = divmod(distance, step)
            if not -size_two < steps < size_one:
                return False
        return True
    common = gcd(*(step for _, step in (*one.axes[:-1], *two.axes[:-1])))
    width_one, width_two = one.axes[-1][0], two.axes[-1][0]
    if common < width_one + width_two:
        return True
    apart = (two.begin - one.begin) % common
    return apart < width_one or apart > common - width_two


def _steps(extent: _Extent) -> tuple[int, ...]:
    return tuple(step for _, step in extent.axes)


def _nested(extent: _Extent) -> bool:
    """Whether every axis steps over all that the narrower ones reach."""
    reach = 1
    for size, step in reversed(extent.axes):
        if step < reach:
            return False
        reach = (size - 1) * step + reach
    return True
