"""The course of a job: what share of its time each of its stages is expected to take.

A stage knows how much of itself is done, and not what comes after it. What comes is known beforehand, roughly, by the
codec and the number of weights (`Codec.costs`): so each event of a stage can say where in the whole it lies. The
machine's speed does not matter, as only the stages' costs relative to each other do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

from pqcli.jobs.events import Event, Hook


@dataclass
class Course:
    """Hands events on to `hook`, with their place in the whole.

    `costs` are the stages in their order, each with its cost, and `repeats` how often a stage is expected to be gone
    through. What was not expected takes no share. Places only move forward.
    """

    hook: Hook
    costs: Mapping[str, float]
    repeats: Mapping[str, int] = field(default_factory=dict)
    _at: float = 0.0
    _stage: str = ""
    _place: tuple[float, float] = (0.0, 0.0)
    _times: Counter[str] = field(default_factory=Counter)

    def __call__(self, event: Event) -> None:
        """An event of some stage."""
        if event.stage != self._stage or (event.done == event.resumed and self._at > self._place[0]):
            self._stage = event.stage
            self._place = self._next(event.stage)
        before, share = self._place
        placed = replace(event, before=before, share=share)
        self._at = max(self._at, placed.fraction)
        self.hook(placed)

    def _next(self, stage: str) -> tuple[float, float]:
        """Where the stage begins that is gone into now, and its share."""
        if stage not in self.costs:
            return self._at, 0.0
        names, ends = list(self.costs), list(accumulate(self.costs.values()))
        whole, end = ends[-1] or 1.0, ends[names.index(stage)]
        start, end = (end - self.costs[stage]) / whole, end / whole
        time, expected = self._times[stage], self.repeats.get(stage, 1)
        self._times[stage] += 1
        before = max(self._at, start + (end - start) * min(time / expected, 1.0))
        after = start + (end - start) * min((time + 1) / expected, 1.0)
        return before, max(after - before, 0.0)


def parts(hook: Hook, sizes: Mapping[str, int]) -> dict[str, Hook]:
    """A hook for each of the jobs that make up a larger one, done one after the other, by their sizes."""
    whole = max(sum(sizes.values()), 1)
    ends = accumulate(sizes.values())
    return {
        name: _placed(hook, (end - size) / whole, size / whole)
        for (name, size), end in zip(sizes.items(), ends, strict=True)
    }


def at_the_end(hook: Hook) -> Hook:
    """A hook for what is done after all of them, in next to no time."""
    return _placed(hook, 1.0, 0.0)


def _placed(hook: Hook, before: float, share: float) -> Hook:
    def placed(event: Event) -> None:
        hook(replace(event, before=before + share * event.before, share=share * event.share))

    return placed
