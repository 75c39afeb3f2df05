"""What an interrupt says of the journal that the run leaves; imports nothing, so that it can be said at once."""

from __future__ import annotations

from typing import Protocol


class Kept(Protocol):
    """A journal of this process."""

    def left(self) -> str:
        """What it holds, in words; nothing where it holds nothing yet."""


LIVE: dict[str, Kept] = {}
"""The journals that are open, by their paths."""
LEFT: list[str] = []
"""What the journal holds that this process has just left to the next run."""


def what_is_left() -> str:
    """What the journals of this process hold, in words; nothing where they hold nothing."""
    return "; ".join(filter(None, (*LEFT, *(journal.left() for journal in [*LIVE.values()]))))
