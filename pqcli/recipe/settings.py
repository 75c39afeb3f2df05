"""What a field of a recipe is to a person: one `Setting` a field, from which everything that names the fields is made.

The options of `compress` and `plan` with their help, the checks of YAML and Python, and the reference in the docs are
generated from these. A new setting is one line in `Recipe`:

    n_iter: int = setting(20, check=whole(1), metavar="I", panel=PLAIN, help="Most EM iterations.")
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from pqcli.errors import RecipeError
from pqcli.recipe.checks import Check, choice, show

MAIN = "Options"
BUDGET = "How much to spend (one of these, --quality or --target-size)"
KNOWN = "What is known of the network"
TENSORS = "Which tensors"
PLAIN = "For experts: plain PQ"
CODED = "For experts: codecs for whole checkpoints"
PANELS = (MAIN, BUDGET, KNOWN, TENSORS, PLAIN, CODED)
"""Panels of the help, in this order; a field without a panel is no option of the command line."""

Parse = Callable[[str], object]


@dataclass(frozen=True)
class Setting:
    """One field. `flag` and `panel` are None where it is no option; `place` orders the options of a panel.

    `parse` turns the text of a command line into the value that `check` takes. `choices` gives the words to choose
    from, where only words are meant. `spends` marks the settings that say how much to spend.
    """

    name: str
    default: Any
    check: Check
    help: str
    metavar: str
    parse: Parse
    flag: str | None
    panel: str | None
    place: int
    choices: Callable[[], Sequence[str]] | None
    spends: bool


def setting(
    default: object,
    *,
    help: str,  # noqa: A002 - named like the option's
    check: Check | None = None,
    choices: Callable[[], Sequence[str]] | None = None,
    metavar: str = "",
    parse: Parse | None = None,
    flag: str | None = None,
    panel: str | None = None,
    place: int = 0,
    spends: bool = False,
    compare: bool = True,
) -> Any:
    """A dataclass field with its metadata; give `check`, or `choices` that make one.

    Without a `flag`, the option is called like the field.
    """
    if check is None:
        if choices is None:
            raise TypeError("a setting has a check, or choices that make one")
        check, parse = choice(choices), parse or str
    metadata = {
        "check": check,
        "help": help,
        "metavar": metavar,
        "parse": parse or number,
        "flag": flag,
        "panel": panel,
        "place": place,
        "choices": choices,
        "spends": spends,
    }
    return dataclasses.field(default=default, compare=compare, metadata=metadata)


def settings_of(cls: type) -> Mapping[str, Setting]:
    """The settings of a dataclass whose fields are made by `setting`, in its order, by name."""
    return _settings_of(cast("Hashable", cls))  # mypy takes the class for one of its instances, which have no hash


def options_of(cls: type) -> tuple[Setting, ...]:
    """The settings that are options of the command line, in the order in which help shows them."""
    options = [item for item in settings_of(cls).values() if item.panel is not None]
    return tuple(sorted(options, key=lambda item: (PANELS.index(item.panel or MAIN), item.place)))


def check_fields(item: Any) -> None:
    """Check every field of an instance, and keep what its check returns; raises `RecipeError` that names the field."""
    for name, made in settings_of(type(item)).items():
        value = getattr(item, name)
        if value == made.default and type(value) is type(made.default):
            continue
        try:
            object.__setattr__(item, name, made.check(value))
        except RecipeError as error:
            raise RecipeError(f"{name}: {error}") from error


@cache
def _settings_of(cls: Any) -> Mapping[str, Setting]:
    found = {}
    for item in dataclasses.fields(cls):
        metadata = dict(item.metadata)
        if metadata["panel"] is not None:
            metadata["flag"] = metadata["flag"] or "--" + item.name.replace("_", "-")
        found[item.name] = Setting(name=item.name, default=item.default, **metadata)
    return found


# ------------------------------------------------------------------------------------------------- from text


def number(text: str) -> object:
    """The number that a text spells; a text that spells none stays as it is, for the check to judge."""
    stripped = text.strip()
    if re.fullmatch(r"[-+]?\d{1,40}", stripped, re.ASCII):
        return int(stripped)
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", stripped[:40], re.ASCII):
        return float(stripped)
    return text


def size(text: str) -> object:
    """Bytes of a size such as 6MB, 512kB, 1.5MiB or 53152; raises `RecipeError` for anything else."""
    digits = text.strip().rstrip("bBiIkKmMgGtT")
    unit = text.strip()[len(digits) :].strip().lower().removesuffix("b")
    scales = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
    scales |= {f"{letter}i": 2 ** (10 * power) for power, letter in enumerate("kmgt", 1)}
    try:
        n_bytes = int(float(digits) * scales[unit])
    except (ValueError, KeyError, OverflowError):
        raise RecipeError(f"give a size such as 6MB, 512kB, 1.5MiB, or a number of bytes; got {show(text)}") from None
    if n_bytes < 1:
        raise RecipeError(f"must be at least one byte; got {show(text)}")
    return n_bytes
