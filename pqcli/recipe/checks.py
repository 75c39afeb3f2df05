"""Checks of the values that settings take.

A check returns the value in the form that the field keeps, or raises `RecipeError` with the bare fact; whoever knows
the name of the setting puts it in front.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from math import isfinite

from pqcli.errors import RecipeError
from pqcli.recipe.patterns import compiled
from pqcli.recipe.suggestions import close_names
from pqcli.tensors.kinds import KINDS, is_kind

EFFORTS = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)

Check = Callable[[object], object]


def whole(low: int, high: int | None = None, *words: str) -> Check:
    """A check for a whole number in a range, or one of some words instead."""
    bounds = f"of at least {low}" if high is None else f"from {low} to {high:,}"
    wanted = f"must be a whole number {bounds}" + "".join(f" or {word!r}" for word in words)

    def check(value: object) -> object:
        if value in words and isinstance(value, str):
            return value
        if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
            raise RecipeError(f"{wanted}; got {show(value)}")
        return value

    return check


def positive(value: object) -> object:
    """Check for a finite number above 0, which becomes a float."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value <= 0:
        example = " (such as 0.5 or 1e-6)" if isinstance(value, str) else ""
        raise RecipeError(f"must be a number above 0{example}; got {show(value)}")
    return float(value)


def between(low: float, high: float, why: str) -> Check:
    """A check for a number above 0 in a range; `why` tells those who asked for more what stands against it."""

    def check(value: object) -> object:
        found = positive(value)
        if not isinstance(found, float) or not low <= found <= high:
            bound = f"at most {high:g}" if low == 0 else f"at least {low:g}"
            raise RecipeError(f"must be {bound}; got {show(value)}: {why}")
        return found

    return check


def objective(value: object) -> object:
    """Check for a number from 0 to 1, or one of the words for its ends; it becomes a float."""
    named = {"mse": 0.0, "relative": 1.0}
    found = named.get(value, value) if isinstance(value, str) else value
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= 1:
        raise RecipeError(f"must be 'mse', 'relative', or a number from 0 (mse) to 1 (relative); got {show(value)}")
    return float(found)


def states(value: object) -> object:
    """Check for a number of trellis states that there are loops for."""
    if isinstance(value, bool) or value not in EFFORTS:
        raise RecipeError(f"must be one of {', '.join(map(str, EFFORTS))} trellis states; got {show(value)}")
    return value


def choice(names: Callable[[], Sequence[str]]) -> Check:
    """A check for one of some words, which are asked for whenever a value is checked."""

    def check(value: object) -> object:
        options = names()
        if not isinstance(value, str) or value not in options:
            close = close_names(value, options) if isinstance(value, str) else ""
            got = repr(value) if isinstance(value, str) else show(value)
            raise RecipeError(f"must be {_either(options)}; got {got}{close}")
        return value

    return check


def _either(names: Sequence[str]) -> str:
    """`'a'`, `'a' or 'b'`, `'a', 'b' or 'c'`."""
    *first, last = map(repr, names)
    return f"{', '.join(first)} or {last}" if first else last


def text(value: object) -> object:
    """Check for text."""
    if not isinstance(value, str):
        raise RecipeError(f"must be text; got {show(value)} (put quotes around it)")
    return value


def boolean(value: object) -> object:
    """Check for true or false."""
    if not isinstance(value, bool):
        raise RecipeError(f"must be true or false; got {show(value)}")
    return value


def pattern(value: object) -> object:
    """Check for a pattern: a glob, or `re:` before a regular expression."""
    text(value)
    if not value:
        raise RecipeError("a pattern may not be empty; '*' matches every tensor")
    try:
        compiled(str(value))
    except (re.error, RecursionError, OverflowError) as error:
        raise RecipeError(f"{value!r} is no regular expression: {error}") from error
    return value


def patterns(value: object) -> object:
    """Check for a list of patterns, or a single one; it becomes a tuple."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list | tuple):
        raise RecipeError(f"must be a list of patterns; got {show(value)}")
    return tuple(pattern(item) for item in value)


def kinds(value: object) -> object:
    """Check for kinds of tensors, a list or separated by commas; they become one text with commas."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not items:
        raise RecipeError(f"must be a kind of tensor, such as linear, or a list of kinds; got {show(value)}")
    names = [str(text(item)).strip() for item in items]
    for name in names:
        if not is_kind(name):
            close = close_names(name, KINDS)
            raise RecipeError(f"there is no kind {name!r}{close}; kinds: {', '.join(KINDS)}, and other kernel sizes")
    return ",".join(names)


def show(value: object) -> str:
    """A value as the user wrote it, with its type where that is the point."""
    names = {bool: "the boolean", str: "the text", dict: "the mapping", list: "the list", type(None): "nothing"}
    if value is None:
        return "nothing"
    shown = json.dumps(value, default=repr) if isinstance(value, bool | dict | list) else repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{names[type(value)]} {shown}" if type(value) in names else shown
