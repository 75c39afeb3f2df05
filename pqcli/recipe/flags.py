"""The flags of a command line, which have the last word over a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pqcli.errors import RecipeError, UsageError
from pqcli.recipe.recipe import Recipe, Rule, rule_settings
from pqcli.recipe.settings import settings_of
from pqcli.recipe.suggestions import close_names


def override(recipe: Recipe, **flags: Any) -> Recipe:
    """The recipe with some fields replaced; a flag that is None, or an empty list of patterns, changes nothing.

    A flag is the last word: it also replaces what the recipe's rules say about its field. `include` and `exclude` add
    to the recipe's own patterns. A value may be the text that a command line gives. Raises `UsageError` that names the
    flag and the value.
    """
    known = settings_of(Recipe)
    changes: dict[str, Any] = {}
    for name, value in flags.items():
        if value is None:
            continue
        if name not in known:
            raise UsageError(f"--{name.replace('_', '-')}: a recipe has no such field{close_names(name, known)}")
        made = known[name]
        try:
            changes[name] = made.check(made.parse(value) if isinstance(value, str) else value)
        except RecipeError as error:
            raise UsageError(f"{flag_of(name)}: {error}") from error
    if changes.get("model_only") and changes.get("training_state") not in (None, "drop"):
        raise UsageError(
            f"--model-only means --training-state drop, and --training-state {changes['training_state']} says "
            "otherwise; give one of them"
        )
    if "training_state" in changes:
        changes.setdefault("model_only", False)
    elif changes.get("model_only"):
        changes["training_state"] = None
    for name in ("include", "exclude"):
        changes[name] = tuple(dict.fromkeys((*getattr(recipe, name), *changes.get(name, ()))))
    _refuse_two_budgets(recipe, changes)
    settings = {name: changes[name] for name in rule_settings() if name in changes}
    rules = tuple(_with_settings(rule, settings) for rule in changes.pop("rules", recipe.rules))
    return replace(recipe, **changes, rules=rules)


def _refuse_two_budgets(recipe: Recipe, changes: Mapping[str, Any]) -> None:
    """Raise `UsageError` for two ways to say how much to spend, one of which the recipe may have."""
    known = settings_of(Recipe)
    given = [flag_of(name) for name, made in known.items() if made.spends and changes.get(name) is not None]
    given += [f"the {name} of recipe {recipe.name!r}" for name in recipe.spending if name not in changes]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)}: each says how much to spend; give one of them")


def flag_of(name: str) -> str:
    """The option of a setting, or what it would be called."""
    return settings_of(Recipe)[name].flag or "--" + name.replace("_", "-")


def _with_settings(rule: Rule, settings: Mapping[str, Any]) -> Rule:
    """The rule with those settings replaced that it has an opinion on."""
    return replace(rule, **{name: value for name, value in settings.items() if getattr(rule, name) is not None})
