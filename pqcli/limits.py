"""`Limits`: how much understanding a stranger's file may cost. What hits a limit is refused, with its name and number.

A small file can describe a very large structure: a pickle that doubles what it remembers, nested JSON, a manifest that
inflates to gigabytes. Every reader checks a budget before each step, not after it. Nothing here is met by an ordinary
file; who trusts a larger one raises the limit that the message names: `--limit n_entries=5e6` on the command line,
`Limits(n_entries=5_000_000)` in Python.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from pqcli.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """What the structure of one file may cost, beside its tensors' data.

    Of a checkpoint: `n_operations` of a pickle (20 million: about a million tensors); `n_entries` of the structure
    after everything that occurs several times is written out, and of them `expansion` for every operation of the
    pickle (a few hundred thousand are free); `depth` of its nesting; `n_bytes` of its pickle or index, and of the text
    and binary data outside tensors, written out likewise; `view_bytes` of a tensor that is larger than its whole file,
    because it repeats what it holds; `seconds` for understanding it.

    Of a `.pq.safetensors` file: `json_bytes` of memory that its header, its manifest, or what is packed in that may
    take, each; `decoded_bytes` of all its dense tensors, beside 4,000 for every byte of the file.
    """

    n_operations: int = 20_000_000
    n_entries: int = 2_000_000
    expansion: int = 20
    depth: int = 100
    n_bytes: int = 256 << 20
    view_bytes: int = 64 << 20
    seconds: float = 60.0
    json_bytes: int = 1 << 28
    decoded_bytes: int = 1 << 30


class OverLimitError(ValueError):
    """The fact that something is more than a limit allows; the border makes an error of pqcli's of it."""


def hint(name: str) -> str:
    """The end of a message about a limit that was hit: how to raise it, for a file that is trusted."""
    return f"refused (where you trust the file, raise it: --limit {name}=N, in Python Limits({name}=N))"


def limits_of(texts: Iterable[str]) -> Limits:
    """The limits that texts such as `n_entries=5e6` set, the others at their defaults. Raises UsageError."""
    names = [field.name for field in fields(Limits)]
    given: dict[str, Any] = {}
    for text in texts:
        name, _, number = (part.strip() for part in text.partition("="))
        if name not in names:
            raise UsageError(f"--limit {text}: the limits are {', '.join(names)}, as in n_entries=5e6")
        try:
            value = float(number.replace("_", "").replace(",", ""))
        except ValueError:
            value = math.nan
        if not (0 < value < math.inf):
            raise UsageError(f"--limit {text}: give a positive number, as in {name}={getattr(Limits(), name) * 10:.0f}")
        given[name] = value if name == "seconds" else int(value)
    return Limits(**given)
