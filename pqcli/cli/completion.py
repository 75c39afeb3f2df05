"""What the shell offers when Tab is pressed behind an option: words that this installation, or the file, knows.

Called by the shell on every Tab, so nothing here imports torch, and nothing fails: where nothing is known, the shell
completes names of files as it does by itself.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import typer

from pqcli.errors import PQError

RECIPE_SUFFIXES = (".yaml", ".yml")


def recipes(incomplete: str) -> list[str]:
    """Presets, and below the folder that is typed YAML files and more folders."""
    from pqcli.recipe import loading

    return [name for name in loading.preset_names() if name.startswith(incomplete)] + _files(incomplete)


def devices() -> list[str]:
    """Where work may be done; whether such a device is there, torch alone knows."""
    return ["auto", "cpu", "cuda", "cuda:0", "mps"]


def clusters() -> list[str]:
    """The addresses that are words."""
    return ["auto", "local"]


def sort_keys() -> list[str]:
    """The columns of a report."""
    from pqcli.reports import checks

    return list(checks.SORT_KEYS)


def conditions() -> list[str]:
    """What a report may be held against, up to the number."""
    from pqcli.reports import checks

    return [f"{key}=" for key in (*checks.LAYER_LIMITS, *checks.FILE_LIMITS)]


def limits() -> list[str]:
    """The limits, up to the number."""
    from pqcli.limits import Limits

    return [f"{field.name}=" for field in fields(Limits)]


def tensors(context: typer.Context) -> list[str]:
    """The tensors of the file on the command line; names that no shell line could hold are left out."""
    from pqcli.container.peek import tensor_names

    # what stands before an option that still lacks its value is not parsed yet
    typed = [context.params.get("file"), *context.args]
    try:
        names = next((tensor_names(Path(file)) for file in typed if file and Path(file).exists()), [])
    except (PQError, ValueError, KeyError, TypeError, OSError):  # no such file, or none of pqcli's: nothing to offer
        return []
    return [name for name in names if name.isprintable() and " " not in name]


def _files(incomplete: str) -> list[str]:
    typed = Path(incomplete)
    folder, start = (typed, "") if incomplete.endswith("/") else (typed.parent, typed.name)
    try:
        found = sorted(one for one in folder.iterdir() if one.name.startswith(start))
    except OSError:
        return []
    shown = [one for one in found if start or not one.name.startswith(".")] if incomplete else found
    head = incomplete[: len(incomplete) - len(start)]
    return [
        f"{head}{one.name}{'/' if one.is_dir() else ''}"
        for one in shown
        if one.suffix in RECIPE_SUFFIXES or (one.is_dir() and incomplete)
    ]
