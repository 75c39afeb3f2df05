"""A recipe as plain data, the way YAML and a manifest's JSON hold it, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import PurePath
from typing import Any

from pqcli.errors import RecipeError
from pqcli.recipe.checks import show
from pqcli.recipe.recipe import Recipe, Rule
from pqcli.recipe.settings import settings_of
from pqcli.recipe.suggestions import close_names


def to_json(recipe: Recipe) -> dict[str, Any]:
    """What differs from the default recipe, as plain data (no description); `from_json` gives the recipe back."""
    data = _differences(recipe)
    data.pop("description", None)
    data.pop("max_memory", None)  # where it ran is not what was done
    if recipe.stats is not None:
        data["stats"] = PurePath(recipe.stats).name  # where it lay is the user's own
    if recipe.rules:
        data["rules"] = [_differences(rule) for rule in recipe.rules]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in data.items()}


def from_json(data: object) -> Recipe:
    """The recipe that `to_json` described; raises `RecipeError` that names the key."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"a recipe is a mapping of settings, not {show(data)}")
    _refuse_unknown(data, settings_of(Recipe))
    settings = dict(data)
    if "rules" in settings:
        settings["rules"] = _rules_from(settings["rules"])
    return Recipe(**settings)


def _rules_from(items: object) -> tuple[Rule, ...]:
    if not isinstance(items, list | tuple):
        raise RecipeError(f"rules: must be a list, each entry starting with a dash; got {show(items)}")
    return tuple(_rule_from(number, item) for number, item in enumerate(items, start=1))


def _rule_from(number: int, item: object) -> Rule:
    if not isinstance(item, Mapping):
        raise RecipeError(
            f"rule {number}: must be a mapping, such as {{match: 'fc*', block_size: 4}}; got {show(item)}"
        )
    try:
        _refuse_unknown(item, settings_of(Rule))
        return Rule(**item)
    except RecipeError as error:
        raise RecipeError(f"rule {number}: {error}") from error


def _refuse_unknown(data: Mapping[Any, Any], known: Iterable[str]) -> None:
    names = list(known)
    for key in data:
        if not isinstance(key, str) or key not in names:
            raise RecipeError(f"{key}: no such key{close_names(str(key), names)}; known: {', '.join(names)}")


def _differences(item: Rule | Recipe) -> dict[str, Any]:
    pairs = ((entry.name, entry.default, getattr(item, entry.name)) for entry in fields(item))
    return {name: value for name, default, value in pairs if value != default}
