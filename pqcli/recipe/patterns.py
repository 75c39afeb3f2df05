r"""Patterns that choose tensors by name.

A pattern is a glob over the whole name (`*` also crosses dots, case counts), or a regular expression that must match
all of it (`re:decoder\.fc[12]\.weight`). Either may name the module instead: `fc` finds `fc.weight`.
"""

from __future__ import annotations

import fnmatch
import re
from functools import lru_cache


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (glob or `re:`) means the tensor of this name, by its own name or by its module's."""
    expression = compiled(pattern)
    return bool(expression.fullmatch(name) or expression.fullmatch(name.removesuffix(".weight")))


@lru_cache(maxsize=4096)
def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression of a pattern; raises `re.error` for one that is none."""
    if pattern.startswith("re:"):
        return re.compile(pattern[3:])
    return re.compile(fnmatch.translate(pattern))
