"""Settings that mean nothing to the chosen codec: they are said, so that nobody takes them for heard."""

from __future__ import annotations

from collections.abc import Collection

from pqcli.codecs import registry
from pqcli.recipe.flags import flag_of
from pqcli.recipe.recipe import Recipe, rule_settings
from pqcli.recipe.settings import settings_of


def without_effect(recipe: Recipe, asked: Collection[str] = ()) -> tuple[str, ...]:
    """Names of the settings that are given without effect: as flags (`asked`), by the recipe, or by one of its rules.

    A setting counts as given by the recipe where it differs from its default.
    """
    known = settings_of(Recipe)
    given = {name for name, made in known.items() if getattr(recipe, name) != made.default}
    given |= {name for rule in recipe.rules for name in rule_settings() if getattr(rule, name) is not None}
    given |= set(asked)
    row = registry.chosen(recipe.codec, has_budget=bool(recipe.spending))
    idle = registry.special_settings() - set(row.settings)
    return tuple(name for name in known if name in given and name in idle)


def situation(recipe: Recipe) -> str:
    """The choice that leaves settings without effect, in the user's words: "with codec trellis"."""
    if not registry.row(recipe.codec).with_budget:
        return f"with codec {recipe.codec}"
    budget = flag_of(recipe.spending[0]) if recipe.spending else "no budget"
    return f"with codec {recipe.codec} and {budget}"
