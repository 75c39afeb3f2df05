"""Statistics under other names: those of a model's parameters become those of a checkpoint's tensors.

A library may hold weights in another form than the file does: under other names, several matrices stacked or put below
one another. Inputs stay what they are; of what is known row by row each tensor gets its own rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pqcli.stats.moments import Statistics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pqcli.stats.sums import WeightSums


@dataclass(frozen=True)
class Place:
    """Where a tensor of a checkpoint lies in a model: a parameter, or a part of it.

    index       which matrix of a stacked parameter; None where it is not stacked, or the whole stack is meant
    rows        first row and the row after the last, where it is some rows of the matrix; else None
    is_turned   whether it is that matrix transposed
    """

    parameter: str
    index: int | None = None
    rows: tuple[int, int] | None = None
    is_turned: bool = False

    @property
    def watched(self) -> str:
        """What a collection calls it."""
        return self.parameter if self.index is None else stacked_name(self.parameter, self.index)


def stacked_name(parameter: str, index: int) -> str:
    """What a collection that tells stacked matrices apart calls one of them."""
    return f"{parameter}[{index}]"


def renamed(statistics: Statistics, places: Mapping[str, Place]) -> Statistics:
    """Statistics by the names of `places`: each tensor's name, and where it was while they were collected."""
    weights: dict[str, WeightSums] = {}
    aliases: dict[str, str] = {}
    first: dict[Place, str] = {}
    for name, place in places.items():
        owner = statistics.aliases.get(place.watched, place.watched)
        sums = statistics.weights.get(owner)
        if sums is None:
            continue
        whole = replace(place, parameter=owner, index=None)
        if whole in first:
            aliases[name] = first[whole]
            continue
        first[whole] = name
        weights[name] = _part(sums, place)
    return Statistics(weights, aliases, statistics.n_sites, statistics.site, statistics.outline)


def _part(sums: WeightSums, place: Place) -> WeightSums:
    axis = 1 - sums.axis if place.is_turned and sums.axis in (0, 1) else sums.axis
    if place.index is not None and axis < 0:
        axis = 1 if (axis == -1) != place.is_turned else 0
    gradient, lookups = sums.gradient, sums.lookups
    if place.rows is not None:
        start, stop = place.rows
        if gradient is not None and len(gradient) > 1:
            gradient = gradient[start:stop]
        if lookups is not None:
            lookups = lookups[start:stop]
    return replace(sums, axis=axis, gradient=gradient, lookups=lookups)
