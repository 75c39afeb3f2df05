"""Where the work runs. An executor changes how long compression takes, never a byte of what it writes.

`Threads` runs tasks on the threads of one process. The kernels release the interpreter lock, so reading one tensor,
learning the codebook of another and writing a third overlap. Memory is bounded by bytes in flight, not by a number of
tasks: many small tensors share the cores, a large one has the machine to itself. With several devices each task takes
one that is free; the largest tasks start first, so that no device is left alone with a long one at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

import torch

from pqcli.codecs.base import Found, Run, Task, Weights
from pqcli.core import progress
from pqcli.core.lookahead import in_order
from pqcli.defaults import BASE_MEMORY_BYTES, IN_FLIGHT_BYTES
from pqcli.jobs.devices import at_work, workers
from pqcli.jobs.events import Hook, Stage
from pqcli.jobs.journal.journal import Journal

Item = TypeVar("Item")
Result = TypeVar("Result")
Device = TypeVar("Device")


Hear = Callable[[int, float], None]
"""`hear(place, fraction)`: so much of the task at that place is done."""


def unheard(place: int, fraction: float) -> None:
    """For those who do not want to know."""


class Executor(Protocol):
    """A place where tasks run."""

    def results(self, tasks: Sequence[Task[Found]], hear: Hear = unheard) -> Iterator[tuple[int, Found]]:
        """The result of every task with its place among them, in any order. The first exception ends it.

        `hear` may be told, from any thread, how much of a task is done before all of it is.
        """


@dataclass(frozen=True)
class Threads:
    """Threads of this process: as many as `device` has workers, within `in_flight_bytes` of memory."""

    device: torch.device
    in_flight_bytes: int = IN_FLIGHT_BYTES

    @classmethod
    def within(cls, device: torch.device, max_memory: int | None) -> Threads:
        """Threads for a process that may take so much memory, in bytes; None: the usual."""
        return cls(device) if max_memory is None else cls(device, max(max_memory - BASE_MEMORY_BYTES, 0))

    def results(self, tasks: Sequence[Task[Found]], hear: Hear = unheard) -> Iterator[tuple[int, Found]]:
        """The largest first."""

        def work(item: tuple[int, Task[Found]], device: torch.device) -> tuple[int, Found]:
            with at_work(device), progress.heard(partial(hear, item[0])):
                return item[0], item[1].run(device)

        return largest_first(
            list(enumerate(tasks)), work, lambda item: item[1].n_bytes, workers(self.device), self.in_flight_bytes
        )


def running(executor: Executor, hook: Hook) -> Run:
    """Tasks run by the executor, while the hook is told of what is done of each stage."""

    def run(tasks: Sequence[Task[Found]], stage: str) -> Iterator[tuple[int, Found]]:
        done = _Parts(Stage(hook, stage, sum(task.n_weights for task in tasks)), tasks)
        for place, found in executor.results(tasks, done.hear):
            yield place, found
            done.hear(place, 1.0)

    return run


def resuming(executor: Executor, hook: Hook, journal: Journal, scope: str, weights: Weights) -> Run:
    """The same, where what the journal has is taken from it, and what is found goes into it.

    `scope` tells what is compressed from other things in the same journal, `weights` are what its results mean.
    """

    def run(tasks: Sequence[Task[Found]], stage: str) -> Iterator[tuple[int, Found]]:
        known = journal.round(tasks, stage, scope, weights)
        left = [place for place in range(len(tasks)) if place not in known.found]
        n_resumed = sum(tasks[place].n_weights for place in known.found)
        done = Stage(hook, stage, sum(task.n_weights for task in tasks), n_resumed)
        for place in known.found:
            try:
                found: Found = known.result(place)
            except (ValueError, OSError):  # it is there no longer: the task runs again
                left.append(place)
                continue
            yield place, found
        remaining = [tasks[place] for place in left]
        parts = _Parts(done, remaining)
        for i, found in executor.results(remaining, parts.hear):
            known.add(left[i], found)
            yield left[i], found
            parts.hear(i, 1.0)

    return run


class _Parts:
    """Counts for a stage what is done of each task, and never less than was told before."""

    def __init__(self, done: Stage, tasks: Sequence[Task[Any]]) -> None:
        self._done, self._tasks = done, tasks
        self._told = [0] * len(tasks)

    def hear(self, place: int, fraction: float) -> None:
        """So much of the task at that place is done. A task is told of in one thread at a time."""
        task = self._tasks[place]
        n_weights = int(min(fraction, 1.0) * task.n_weights)
        more = n_weights - self._told[place]
        if more > 0 or fraction >= 1:
            self._told[place] = max(n_weights, self._told[place])
            self._done(max(more, 0), task.name)


def largest_first(
    items: Sequence[Item],
    work: Callable[[Item, Device], Result],
    n_bytes: Callable[[Item], int],
    devices: Sequence[Device],
    in_flight_bytes: int = IN_FLIGHT_BYTES,
) -> Iterator[Result]:
    """`work(item, device)` for every item, the largest first; results in that order.

    `devices` has an entry per worker. An item starts when it and all unfinished or not yet consumed ones together stay
    within `in_flight_bytes`, or when it would be alone. The first exception ends the iteration; items that have not
    started then never do.
    """
    free: SimpleQueue[Device] = SimpleQueue()
    for device in devices:
        free.put(device)

    def on_free(item: Item) -> Result:
        device = free.get()
        try:
            return work(item, device)
        finally:
            free.put(device)

    ordered = sorted(items, key=n_bytes, reverse=True)
    # without join: an interrupt does not wait for a long EM to end
    return in_order(ordered, on_free, len(devices), cost=n_bytes, budget=in_flight_bytes, join=False)
