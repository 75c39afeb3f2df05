"""The reference of all settings, as the Markdown that the documentation shows."""

from __future__ import annotations

import json
from collections.abc import Iterable

from pqcli.recipe.recipe import Recipe, Rule
from pqcli.recipe.settings import PANELS, Setting, options_of, settings_of


def reference() -> str:
    """Every setting of a recipe and of a rule with its option, values, default and meaning, as tables in Markdown."""
    options = options_of(Recipe)
    parts = [f"### {panel}\n\n{_table((o for o in options if o.panel == panel), option=True)}" for panel in PANELS]
    no_options = (made for made in settings_of(Recipe).values() if made.panel is None)
    parts.append("### In YAML and Python only\n\n" + _table(no_options, option=False))
    parts.append("### A rule\n\n" + _table(settings_of(Rule).values(), option=False))
    return "\n".join(parts)


def _table(settings: Iterable[Setting], *, option: bool) -> str:
    columns = ["setting", *(["option"] if option else []), "values", "default", "meaning"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(_cells(made, option=option))} |" for made in settings]
    return "\n".join(lines) + "\n"


def _cells(made: Setting, *, option: bool) -> list[str]:
    values = "|".join(made.choices()) if made.choices else made.metavar
    default = "" if made.default in (None, (), "") else f"`{json.dumps(made.default).strip(chr(34))}`"
    flag = [f"`{made.flag}`"] if option else []
    return [f"`{made.name}`", *flag, "`" + values.replace("|", "\\|") + "`", default, made.help.replace("|", "\\|")]
