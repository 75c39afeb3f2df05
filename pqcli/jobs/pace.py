"""Pace: from the events of a job, how fast it goes and how long it will still take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pqcli.jobs.events import Event

NOTHING = Event("", 0, 1)


@dataclass
class Pace:
    """What is known at the last event; times in seconds, by any clock, counted from the first event on.

    What an earlier run has done took no time of this one's, and tells nothing of how fast this one is.
    """

    FIRST_FRACTION: ClassVar[float] = 0.02
    """Of the whole: nothing is promised from less."""
    OWN: ClassVar[float] = 0.1
    """From so much of a stage on, its own pace tells when it will end; before, that of the whole."""

    started: float | None = None
    stage_started: float = 0.0
    latest: float = 0.0
    event: Event = NOTHING
    fraction: float = 0.0
    """How much of the whole is done; never falls."""
    given: float = 0.0
    """The part of it that an earlier run has done."""

    def see(self, event: Event, now: float) -> None:
        """One more event."""
        before = self.event
        if self.started is None:
            self.started = now
        if (event.stage, event.before) != (before.stage, before.before) or event.done < before.done:
            self.stage_started = now
            self.given += event.share * event.resumed / max(event.total, 1)
        self.event, self.latest = event, now
        self.fraction = max(self.fraction, event.fraction)

    def rate(self) -> float:
        """Units of the stage per second; 0 where none is done."""
        done, taken = self.event.done - self.event.resumed, self.latest - self.stage_started
        return done / taken if done > 0 and taken > 0 else 0.0

    def left(self, now: float) -> float | None:
        """Seconds until the whole job is done; None where nothing can be said.

        Between two events it counts down; nothing is said any more when the next one is overdue.
        """
        event = self.event
        if self.started is None:
            return None
        taken = self.latest - self.started
        if self.fraction >= 1:
            return 0.0
        if self.fraction - self.given < self.FIRST_FRACTION or taken <= 0:
            return None
        pace = taken / (self.fraction - self.given)
        done = (event.done - event.resumed) / max(event.total - event.resumed, 1)
        rest = (event.before + event.share - self.fraction) * pace
        if done >= self.OWN:
            rest = (1 - done) / done * (self.latest - self.stage_started)
        left = max(rest, 0.0) + (1 - event.before - event.share) * pace - (now - self.latest)
        return left if left > 0 else None
