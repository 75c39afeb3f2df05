"""What is said of words that no command takes: Typer's messages made plainer, and what to do instead."""

from __future__ import annotations

import re

from pqcli.recipe.suggestions import close_names

_HINTS = (
    (r"plan .*option: --dry-run", "plan never writes; leave it out"),
    (r"plan .*option: (-o|--output)\b", "plan never writes; --json prints the plan as a document"),
    (r"(plan|compress) .*option: --clamp\b", "clamp is set in a recipe: --config FILE"),
    (r"(verify|report) .*extra argument", "the original checkpoint is named with --against"),
    (r"(compress|decode) .*extra argument", "one input at a time, and the output is named with -o"),
    (r"inspect .*extra argument", "tensors are named with --tensor"),
    (r"plan .*extra argument", "one checkpoint at a time; plan never writes"),
)
"""What to do, by the command and what it was told."""


def plainer(message: str) -> str:
    """What is wrong with a value, without the words of the library that found out."""
    found = re.fullmatch(r"Value error, '(.*)' is not one of (.*?)\.?", message, re.DOTALL)
    if found:
        options = re.findall(r"'([^']*)'", found[2])
        *first, last = map(repr, options)
        return f"must be {', '.join(first)} or {last}; got {found[1]!r}{close_names(_in_full(found[1]), options)}"
    if message.startswith("Input should be a valid integer"):
        return "must be a whole number"
    if message.startswith("Input should be a valid number"):
        return "must be a number"
    return message


def hint(command: str | None, message: str) -> str:
    """What to do, to be put behind a message; nothing where nothing is known."""
    told = f"{command} {' '.join(message.split())}"
    return next((f" ({said})" for pattern, said in _HINTS if re.match(pattern, told)), "")


def _in_full(name: str) -> str:
    """`float16` of `fp16`, and so on."""
    return re.sub(r"^(bf|fp|f)(?=\d+$)", lambda short: "bfloat" if short[1] == "bf" else "float", name)
