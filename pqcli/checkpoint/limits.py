"""`Budget`: what reading the structure of one checkpoint may still cost, checked before each step and not after it.

Every reader spends from a `Budget` as it goes on; what hits a limit is refused with the limit's number and name
(`pqcli.limits`).
"""

from __future__ import annotations

import json
import re
import time
from typing import Any

from pqcli.errors import CheckpointError
from pqcli.limits import Limits, hint

__all__ = ["Budget", "Limits"]

_FREE_ENTRIES = 200_000
_TICKS = 1 << 12
"""The clock is looked at once in so many steps."""
_SEPARATORS = re.compile(rb"[\[{,]")
_JSON_SLICE = 1 << 20


class Budget:
    """The limits of one file, and what has been spent of them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.n_operations = self.n_entries = self.n_bytes = 0
        self._steps = 0
        self._deadline = time.monotonic() + limits.seconds

    def operation(self) -> None:
        """One operation of a pickle."""
        self.n_operations += 1
        if self.n_operations > self.limits.n_operations:
            raise _exceeded(f"its pickle has more than {self.limits.n_operations:,} operations", "n_operations")
        self._tick()

    def entries(self, n: int = 1) -> None:
        """So many entries of the structure that a pickle describes."""
        self._count(n)
        written_out = _FREE_ENTRIES + self.limits.expansion * self.n_operations
        if self.n_entries > written_out:
            raise _exceeded(
                f"its structure has more than {written_out:,} entries, written out from {self.n_operations:,} "
                "operations of its pickle",
                "expansion",
            )

    def _count(self, n: int) -> None:
        self.n_entries += n
        if self.n_entries > self.limits.n_entries:
            raise _exceeded(f"its structure has more than {self.limits.n_entries:,} entries", "n_entries")
        self._tick()

    def text(self, n_bytes: int) -> None:
        """So many bytes that will be written out."""
        self.n_bytes += n_bytes
        if self.n_bytes > self.limits.n_bytes:
            raise _exceeded(
                f"its structure holds more than {self.limits.n_bytes:,} bytes of text and data outside its tensors",
                "n_bytes",
            )

    def length(self, n_bytes: int, what: str) -> None:
        """A part of the header that is read whole, and that many bytes long; `what` it is."""
        if n_bytes > self.limits.n_bytes:
            raise _exceeded(f"{what} has {n_bytes:,} bytes, more than {self.limits.n_bytes:,}", "n_bytes")

    def level(self, depth: int) -> None:
        """An entry at this depth."""
        if depth > self.limits.depth:
            raise _exceeded(f"its structure is nested more than {self.limits.depth} levels deep", "depth")

    def json(self, text: bytes, **options: Any) -> Any:
        """The value of a JSON text (as `json.loads`), whose entries are counted before any of them is built.

        Raises what `json.loads` raises (ValueError, RecursionError) and `CheckpointError`.
        """
        self.text(len(text))
        for start in range(0, len(text), _JSON_SLICE):
            self._count(len(_SEPARATORS.findall(text[start : start + _JSON_SLICE])))
        return json.loads(text.decode("utf-8"), **options)

    def _tick(self) -> None:
        self._steps += 1
        if self._steps % _TICKS == 0 and time.monotonic() > self._deadline:
            raise _exceeded(f"its structure takes more than {self.limits.seconds:g} seconds to understand", "seconds")


def _exceeded(fact: str, name: str) -> CheckpointError:
    return CheckpointError(f"{fact}; {hint(name)}")
