"""Settings that mean nothing to the chosen codec: they are said, so that nobody takes them for heard."""

from __future__ import annotations

from collections.abc import Collection

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
    codec = codec_at_work(recipe)
    return tuple(name for name, made in known.items() if name in given and made.codecs and codec not in made.codecs)


def codec_at_work(recipe: Recipe) -> str:
    """The codec that settings are read by: with a budget, codec "pq" becomes "ecpq"."""
    return recipe.whole_codec or "pq"
