"""What an error message asks when a name is nearly one of those there are."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def close_names(name: str, options: Iterable[str]) -> str:
    """A question to append to an error message, such as ` (did you mean 'n_iter'?)`, or nothing."""
    found = difflib.get_close_matches(name.lower(), list(options), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""
