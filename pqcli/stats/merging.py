"""Statistics of several runs or machines, added up.

Sums are added as they are, so that the result is what one run over all the samples would have given, up to the
precision of the stored correlations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pqcli.errors import StatsError
from pqcli.stats.moments import Statistics
from pqcli.stats.sums import SiteSums, WeightSums

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def merge(parts: Sequence[Statistics]) -> Statistics:
    """The sum of the parts, which must come from the same model. A weight may be missing in some of them.

    Raises `StatsError` where a weight's input differs in size or in form between the parts.
    """
    if not parts:
        raise StatsError("there is nothing to merge")
    names = list(dict.fromkeys(name for part in parts for name in part.weights))
    # weights share a site in the sum only where they share one in every part
    keys: dict[tuple[int | None, ...], int] = {}
    weights: dict[str, WeightSums] = {}
    for name in names:
        found = [part.weights.get(name) for part in parts]
        key = tuple(None if weight is None else weight.site for weight in found)
        site = None if all(each is None for each in key) else keys.setdefault(key, len(keys))
        weights[name] = _added_weights(name, [weight for weight in found if weight is not None], site)
    order = list(keys)
    users = {site: name for name, weight in reversed(weights.items()) if (site := weight.site) is not None}

    def site_of(index: int) -> SiteSums:
        sums = [part.site(site) for part, site in zip(parts, order[index], strict=True) if site is not None]
        return _added_sites(users[index], sums)

    aliases = {alias: name for part in parts for alias, name in part.aliases.items() if alias not in weights}
    return Statistics(weights, aliases, len(order), site_of)


def _added_weights(name: str, parts: list[WeightSums], site: int | None) -> WeightSums:
    if len({weight.axis for weight in parts if weight.site is not None}) > 1:
        raise StatsError(f"weight '{name}' is used in different ways; do both files come from the same model?")
    axis = next((weight.axis for weight in parts if weight.site is not None), parts[0].axis)
    return WeightSums(
        site,
        axis,
        _sum(name, [weight.gradient for weight in parts]),
        sum(weight.n_gradient for weight in parts),
        _sum(name, [weight.lookups for weight in parts]),
        sum(weight.lookup_gradient for weight in parts),
        sum(weight.n_lookup_gradient for weight in parts),
    )


def _sum(name: str, parts: list[torch.Tensor | None]) -> Any:
    """The sum of those that are there; None where none is."""
    there = [tensor for tensor in parts if tensor is not None]
    if len({tuple(tensor.shape) for tensor in there}) > 1:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in there)
        raise StatsError(f"weight '{name}' has statistics of shapes {shapes}; do both files come from the same model?")
    total = None
    for tensor in there:
        total = tensor if total is None else total + tensor
    return total


def _added_sites(name: str, parts: list[SiteSums]) -> SiteSums:
    first = parts[0]
    for sums in parts[1:]:
        if (sums.columns, sums.form, sums.width) != (first.columns, first.form, first.width):
            raise StatsError(
                f"weight '{name}' has {first.columns} columns ({first.form}, width {first.width}) in one file and "
                f"{sums.columns} ({sums.form}, width {sums.width}) in another; collect both in the same way"
            )
    partial = any(sums.total is None for sums in parts), any(sums.watched is None for sums in parts)
    return SiteSums(
        first.columns,
        first.form,
        first.width,
        _sum(name, [sums.second for sums in parts]),
        _sum(name, [sums.diagonal for sums in parts]),
        None if partial[0] else _sum(name, [sums.total for sums in parts]),
        None if partial[1] else _sum(name, [sums.watched for sums in parts]),
        [sum(sums.counts[half] for sums in parts) for half in (0, 1)],
    )
