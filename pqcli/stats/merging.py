"""Statistics of several runs or machines, added up.

Sums are added as they are, so that the result is what one run over all the samples would have given, up to the
precision of the stored correlations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pqcli.errors import StatsError
from pqcli.stats.moments import Statistics
from pqcli.stats.sums import Outline, SiteSums, WeightSums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch


def merge(parts: Sequence[Statistics], names: Sequence[str] | None = None) -> Statistics:
    """The sum of the parts, which must come from the same model. A weight may be missing in some of them.

    Raises `StatsError` where parts have no weight in common, or a weight's input differs in size or in form between
    them. `names` are what messages call the parts.
    """
    if not parts:
        raise StatsError("there is nothing to merge")
    called = list(names) if names else [f"part {i}" for i in range(1, len(parts) + 1)]
    _check_related(parts, called)
    all_names = list(dict.fromkeys(name for part in parts for name in part.weights))
    # weights share a site in the sum only where they share one in every part
    keys: dict[tuple[int | None, ...], int] = {}
    weights: dict[str, WeightSums] = {}
    for name in all_names:
        found = [part.weights.get(name) for part in parts]
        key = tuple(None if weight is None else weight.site for weight in found)
        site = None if all(each is None for each in key) else keys.setdefault(key, len(keys))
        known = {where: weight for where, weight in zip(called, found, strict=True) if weight is not None}
        weights[name] = _added_weights(name, known, site)
    order = list(keys)
    users = {site: name for name, weight in reversed(weights.items()) if (site := weight.site) is not None}

    def outline_of(index: int) -> Outline:
        there = [(where, part, site) for where, part, site in zip(called, parts, order[index], strict=True)]
        known = {where: part.outline(site) for where, part, site in there if site is not None}
        return _added_outlines(users[index], known)

    def site_of(index: int) -> SiteSums:
        outline_of(index)
        sums = [part.site(site) for part, site in zip(parts, order[index], strict=True) if site is not None]
        return _added_sites(sums)

    for index in range(len(order)):
        outline_of(index)  # before anything is read or written
    aliases = {alias: name for part in parts for alias, name in part.aliases.items() if alias not in weights}
    return Statistics(weights, aliases, len(order), site_of, outline_of)


def _check_related(parts: Sequence[Statistics], called: Sequence[str]) -> None:
    for part, where in zip(parts[1:], called[1:], strict=True):
        if not set(part.weights) & set(parts[0].weights):
            theirs, ours = (", ".join(list(each.weights)[:2]) for each in (part, parts[0]))
            raise StatsError(
                f"{where} ({len(part)} weights: {theirs}, ...) and {called[0]} ({len(parts[0])} weights: {ours}, ...) "
                "have no weight in common; only statistics of one model can be added up"
            )


def _added_weights(name: str, parts: Mapping[str, WeightSums], site: int | None) -> WeightSums:
    axes = {where: weight.axis for where, weight in parts.items() if weight.site is not None}
    _check_same(name, "the dimension of its inputs", axes)
    for part in ("gradient", "lookups"):
        shapes = {
            where: len(tensor) for where, weight in parts.items() if (tensor := getattr(weight, part)) is not None
        }
        _check_same(name, f"the number of rows of its {part}", shapes)
    weights = list(parts.values())
    return WeightSums(
        site,
        next(iter(axes.values()), weights[0].axis),
        _sum([weight.gradient for weight in weights]),
        sum(weight.n_gradient for weight in weights),
        _sum([weight.lookups for weight in weights]),
        sum(weight.lookup_gradient for weight in weights),
        sum(weight.n_lookup_gradient for weight in weights),
    )


def _check_same(name: str, what: str, values: Mapping[str, object]) -> None:
    """Raise `StatsError`, saying who has what, unless all are the same."""
    if len(set(values.values())) > 1:
        said = ", ".join(f"{value} in {where}" for where, value in values.items())
        raise StatsError(f"weight '{name}': {what} differs: {said}; do these statistics come from the same model?")


def _added_outlines(name: str, parts: Mapping[str, Outline]) -> Outline:
    _check_same(name, "the number of its inputs", {where: outline.columns for where, outline in parts.items()})
    forms = {where: f"{outline.form} (width {outline.width:,})" for where, outline in parts.items()}
    if len(set(forms.values())) > 1:
        said = ", ".join(f"{form} in {where}" for where, form in forms.items())
        raise StatsError(f"weight '{name}': the form of its moments differs: {said}; collect all in the same way")
    first = next(iter(parts.values()))
    counts = tuple(sum(outline.counts[half] for outline in parts.values()) for half in (0, 1))
    return Outline(first.columns, first.form, first.width, (counts[0], counts[1]))


def _sum(parts: Sequence[torch.Tensor | None]) -> Any:
    """The sum of those that are there; None where none is."""
    total = None
    for tensor in parts:
        if tensor is not None:
            total = tensor if total is None else total + tensor
    return total


def _added_sites(parts: Sequence[SiteSums]) -> SiteSums:
    first = parts[0]
    partial = any(sums.total is None for sums in parts), any(sums.watched is None for sums in parts)
    return SiteSums(
        first.columns,
        first.form,
        first.width,
        _sum([sums.second for sums in parts]),
        _sum([sums.diagonal for sums in parts]),
        None if partial[0] else _sum([sums.total for sums in parts]),
        None if partial[1] else _sum([sums.watched for sums in parts]),
        [sum(sums.counts[half] for sums in parts) for half in (0, 1)],
    )
