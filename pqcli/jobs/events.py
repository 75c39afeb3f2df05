"""Events: what a long job tells of itself while it runs. A hook takes them; the command line makes a bar of them.

loading     a model being built                              calibrate
naming      weights found in the model                       calibrate
calibrating tokens that have run through the model           calibrate
resuming    the journal of a killed run found              compress
matching    weights compared with those of a base            compress
reading     weights read, to find out about them             compress
keeping     weights kept bit for bit                         compress
choosing    ways tried to code weights                       compress, `--codec auto`
learning    weights looked at for what tensors share         compress
searching   drafts of levels, until a budget is nearly met   compress
encoding    weights quantized and coded                      compress; once for each level tried
checking    weights decoded, to see if a budget is met       compress, to a budget of error
measuring   weights decoded and compared                     compress, report
decoding    weights decoded                                  decode; compress, those of a base
writing     weights of a trained model, written              export
verifying   weights decoded and checked                      verify
comparing   batches that have run through both networks      compare
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """`done` of `total` units of a stage, the last of them on the tensor `name`.

    The unit is weights, tokens, batches, or drafts. `resumed` of those done were done by an earlier run, whose journal
    was found; of the stage "resuming" the `name` says in words what that one had done. Of the time that the whole job
    is expected to take, the fraction `before` lies before this stage and `share` in it (`pqcli.jobs.course`).
    """

    stage: str
    done: int
    total: int
    name: str = ""
    resumed: int = 0
    before: float = 0.0
    share: float = 1.0

    @property
    def fraction(self) -> float:
        """How much of the whole job is done, from 0 to 1, by the time that it is expected to take."""
        return self.before + self.share * min(self.done / max(self.total, 1), 1.0)


Hook = Callable[[Event], None]


def ignore(event: Event) -> None:
    """The hook of those who do not want to know."""


class Stage:
    """Counts what is done of one stage, and tells the hook: from any thread, one after the other, the start too.

    `resumed` units were done by an earlier run.
    """

    def __init__(self, hook: Hook, stage: str, total: int, resumed: int = 0) -> None:
        self._hook, self._stage, self._total, self._resumed = hook, stage, total, resumed
        self._done = resumed
        self._counting = threading.Lock()
        hook(Event(stage, resumed, total, resumed=resumed))

    def __call__(self, amount: int, name: str) -> None:
        """So much more is done."""
        with self._counting:
            self._done += amount
            self._hook(Event(self._stage, self._done, max(self._total, self._done), name, self._resumed))
