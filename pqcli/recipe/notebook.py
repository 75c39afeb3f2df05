"""How a recipe shows itself in a Python session: what it says that the default does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pqcli.notebook import page
from pqcli.recipe.settings import settings_of


def call_of(item: Any) -> str:
    """The call that makes it, such as `Recipe(block_size=4)`: settings at their defaults are left out."""
    given = ", ".join(f"{name}={value!r}" for name, value in _said(item).items())
    return f"{type(item).__name__}({given})"


def recipe_page(recipe: Any) -> str:
    """The recipe as a notebook shows it: a row a setting that is not at its default, then a row a rule."""
    known = settings_of(type(recipe))
    said = {name: value for name, value in _said(recipe).items() if name not in ("rules", "name", "description")}
    rows = [(name, str(value), known[name].help) for name, value in said.items()]
    rows += [(f"rule {i}", call_of(rule), rule.why or "") for i, rule in enumerate(recipe.rules, 1)]
    facts = [recipe.description] if recipe.description else []
    facts += [] if rows else ["every setting at its default"]
    return page(f"recipe {recipe.name}", facts, ("setting", "value", "meaning"), rows, len(rows))


def _said(item: Any) -> Mapping[str, Any]:
    return {
        name: getattr(item, name)
        for name, made in settings_of(type(item)).items()
        if getattr(item, name) != made.default
    }
