"""Which rules apply to which tensors, and a refusal of patterns and rules that apply to none."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence

from pqcli.errors import RecipeError
from pqcli.readable import plural
from pqcli.recipe.patterns import matches
from pqcli.recipe.recipe import Recipe, Rule
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.kinds import belongs, kind_of, rows_and_columns

NumberedRules = tuple[tuple[int, Rule], ...]


def holds(rule: Rule, names: Sequence[str]) -> bool:
    """Whether what the rule asks of the checkpoint as a whole is so."""
    if rule.if_present is not None and not any(matches(rule.if_present, name) for name in names):
        return False
    return rule.if_absent is None or not any(matches(rule.if_absent, name) for name in names)


def applies(rule: Rule, info: TensorInfo, names: Sequence[str]) -> bool:
    """Whether the rule's own conditions hold for a tensor that answers to all these names."""
    if rule.kind is not None and not any(belongs(kind_of(info), wanted) for wanted in rule.kind.split(",")):
        return False
    if rule.columns is not None and rule.columns != rows_and_columns(info)[1]:
        return False
    return any(matches(rule.match, name) for name in names)


def refuse_idle_patterns(recipe: Recipe, names: Sequence[str]) -> None:
    """Raise `RecipeError` for a pattern of `include` or `exclude` that matches no tensor."""
    for flag, patterns in (("include", recipe.include), ("exclude", recipe.exclude)):
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                raise RecipeError(f"{flag} {_idle(pattern, names)}")


def refuse_idle_rules(recipe: Recipe, rules: NumberedRules, tensors: Sequence[TensorInfo]) -> None:
    """Raise `RecipeError` for a rule that applies to no tensor, unless it is optional."""
    names = [info.name for info in tensors]
    for number, rule in rules:
        if rule.optional or any(applies(rule, info, [info.name]) for info in tensors):
            continue
        place = f"rule {number} of {recipe.name}: match"
        if not any(matches(rule.match, name) for name in names):
            raise RecipeError(f"{place} {_idle(rule.match, names)}")
        wanted = [f"kind {rule.kind}"] if rule.kind else []
        wanted += [f"{rule.columns:,} columns"] if rule.columns else []
        found = Counter(kind_of(info) for info in tensors if matches(rule.match, info.name))
        kinds = ", ".join(f"{count} {kind}" for kind, count in found.most_common(6))
        raise RecipeError(
            f"{place} {rule.match!r} finds no tensor of {' with '.join(wanted)} (it finds {kinds}); "
            "correct the rule, or add 'optional: true'"
        )


def _idle(pattern: str, names: Sequence[str]) -> str:
    """What to say about a pattern that matches nothing."""
    hint = _wider(pattern, names)
    if not hint:
        close = _names_like(pattern, names)
        hint = f"; close names: {', '.join(map(repr, close))}" if close else ""
    return f"{pattern!r} matches none of the {len(names):,} tensors{hint}; `pqcli plan SRC` lists all names"


def _wider(pattern: str, names: Sequence[str]) -> str:
    """A hint at the pattern with stars around it, which people who write a part of a name mean; or nothing."""
    if pattern.startswith("re:"):
        return ""
    wider = f"*{pattern.strip('*')}*"
    found = sum(matches(wider, name) for name in names)
    what = plural(found, "tensor")
    if found:
        return f"; a pattern must match the whole name: {wider!r} matches {what}"
    lower = wider.lower()
    found = 0 if lower == wider else sum(matches(lower, name) for name in names)
    return f"; upper and lower case count: {lower!r} matches {plural(found, 'tensor')}" if found else ""


def _names_like(pattern: str, names: Sequence[str]) -> list[str]:
    """Up to three names with a stretch of dotted parts that resembles the pattern's longest literal piece."""
    pieces = re.split(r"[^\w.-]+", pattern.removeprefix("re:").replace("\\d+", "0").replace("\\", ""))
    literal = max(pieces, key=len).strip(".").lower()
    length = literal.count(".") + 1
    owners: dict[str, str] = {}
    for name in names:
        parts = name.lower().split(".")
        for start in range(max(len(parts) - length, 0) + 1):
            owners.setdefault(".".join(parts[start : start + length]), name)
    found = difflib.get_close_matches(literal, list(owners), n=3, cutoff=0.5)
    return list(dict.fromkeys(owners[stretch] for stretch in found))
