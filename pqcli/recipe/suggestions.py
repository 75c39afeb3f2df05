"""What an error message asks when a name is nearly one of those there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

MOST = 5000
"""Names among which close ones are looked for: with more it would take seconds."""


def close_names(name: str, options: Iterable[str]) -> str:
    """A question to append to an error message, such as ` (did you mean 'n_iter'?)`, or nothing."""
    known = list(options)
    found = difflib.get_close_matches(name.lower(), known[:MOST], n=3, cutoff=0.6) or difflib.get_close_matches(
        name, known[:MOST], n=3, cutoff=0.6
    )
    found = found or [option for option in known if len(name) > 2 and name.lower() in option.lower()][:3]
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""


def close_files(path: Path) -> str:
    """The same for a file that is not there, from those that lie beside it."""
    try:
        beside = sorted(one.name for one in path.parent.iterdir() if not one.name.startswith("."))
    except (OSError, ValueError):
        return ""
    found = difflib.get_close_matches(path.name, beside[:MOST], n=1, cutoff=0.75)
    return f" (did you mean '{path.with_name(found[0])}'?)" if found else ""
