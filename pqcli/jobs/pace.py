"""Pace: from the events of a job, how fast it goes and how long it will still take."""

from __future__ import annotations

from dataclasses import dataclass

from pqcli.jobs.events import Event

NOTHING = Event("", 0, 1)
FIRST_FRACTION = 0.02
"""Of the whole: nothing is promised from less."""
OWN_PACE = 0.1
"""From so much of a stage on, its own pace tells when it will end; before, that of all that went before it."""


@dataclass
class Pace:
    """What is known at the last event; times in seconds, by any clock.

    What an earlier run has done took no time of this one's, and tells nothing of how fast this one is.
    """

    started: float
    stage: str = ""
    stage_started: float = 0.0
    latest: float = 0.0
    event: Event = NOTHING
    given: float = 0.0
    """The fraction of the whole that an earlier run has done."""

    def see(self, event: Event, now: float) -> None:
        """One more event."""
        if self.is_new(event):
            self.stage, self.stage_started = event.stage, now
            self.given += event.share * event.resumed / max(event.total, 1)
        self.event, self.latest = event, now

    def is_new(self, event: Event) -> bool:
        """Whether this event opens a stage."""
        return (event.stage, event.before) != (self.stage, self.event.before) or event.done < self.event.done

    def rate(self) -> float:
        """Units of the stage per second; 0 where none is done."""
        done, taken = self.event.done - self.event.resumed, self.latest - self.stage_started
        return done / taken if done > 0 and taken > 0 else 0.0

    def left(self, now: float) -> float | None:
        """Seconds until the whole job is done; None where nothing can be said.

        Between two events it counts down; nothing is said any more when the next one is overdue.
        """
        event = self.event
        taken = self.latest - self.started
        if event.fraction - self.given < FIRST_FRACTION or taken <= 0:
            return None
        pace = taken / (event.fraction - self.given)
        total = max(event.total - event.resumed, 1)
        done = (event.done - event.resumed) / total
        own = event.share * (1 - event.resumed / max(event.total, 1))
        rest = (1 - done) * own * pace
        if done >= OWN_PACE:
            rest = (1 - done) / done * (self.latest - self.stage_started)
        left = rest + max(1 - event.before - event.share, 0.0) * pace - (now - self.latest)
        return left if left > 0 else 0.0 if event.fraction >= 1 else None
