"""What an interrupt says of the journal that the run leaves; imports nothing, so that it can be said at once."""

from __future__ import annotations

from typing import Protocol


class Kept(Protocol):
    """A journal of this process."""

    def left(self) -> str:
        """What it holds, in words; nothing where it holds nothing yet."""


LIVE: list[Kept] = []
"""The journals that are open."""


def what_is_left() -> str:
    """What the open journals hold, in words; nothing where they hold nothing."""
    return "; ".join(filter(None, (journal.left() for journal in LIVE)))
