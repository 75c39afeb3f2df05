"""Tasks in other processes: sent largest first, a bounded number at a time, and again when a worker is lost.

What differs between processes of this machine and those of a cluster is a *pool*: how a task is sent, waited for and
taken back. What is the same stands here. A task is pickled, so its weights are a path, and each worker reads what it
needs from there; only results come back, and the caller alone writes.
"""

from __future__ import annotations

import pickle
import socket
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch

from pqcli.codecs.base import Found, Task
from pqcli.core import threads
from pqcli.errors import PQError, UsageError, WorkerError
from pqcli.jobs.devices import at_work
from pqcli.version import __version__

MOST_ATTEMPTS: Final = 4
"""A task whose worker is lost so many times ends the run: it may be what kills them."""
TASKS_A_WORKER: Final = 2
"""One runs, and the next is there when it ends."""


class LostWorkerError(Exception):
    """A worker is gone, and what it did with it."""


@dataclass(frozen=True)
class Answer:
    """What a worker sends back: what its task found, or the error that ended it, where it was, and its pqcli."""

    found: Any = None
    error: BaseException | None = None
    host: str = ""
    version: str = __version__


class Pool(Protocol):
    """Workers, as far as it matters here. Handles are whatever it likes, if they can be keys of a dict."""

    @property
    def n_workers(self) -> int:
        """How many there are at the moment."""

    def send(self, task: bytes, n_bytes: int) -> Any:
        """Have a pickled task, which takes so much memory, done by some worker; its handle."""

    def first(self, handles: Sequence[Any]) -> Any:
        """The handle of a task that is done, or lost; waits for one."""

    def take(self, handle: Any) -> Answer:
        """What came of it. Raises LostWorkerError where its worker is gone."""

    def cancel(self, handles: Sequence[Any]) -> None:
        """Nobody wants these any longer."""


def results(pool: Pool, tasks: Sequence[Task[Found]], in_flight_bytes: int) -> Iterator[tuple[int, Found]]:
    """The result of every task with its place among them, as they come.

    A task is sent when it and all those not yet given out together stay within `in_flight_bytes` a worker, or when it
    would be alone. Raises what the first task raises that fails, naming the host where that is another one; and
    WorkerError where workers are lost with one task again and again.
    """
    left = deque(sorted(range(len(tasks)), key=lambda place: tasks[place].n_bytes, reverse=True))
    waiting: dict[Any, int] = {}
    lost: Counter[int] = Counter()
    held = 0
    try:
        while left or waiting:
            while left and len(waiting) < TASKS_A_WORKER * pool.n_workers:
                n_bytes = tasks[left[0]].n_bytes
                if waiting and held + n_bytes > in_flight_bytes * pool.n_workers:
                    break
                place = left.popleft()
                waiting[pool.send(_pickled(tasks[place]), n_bytes)] = place
                held += n_bytes
            handle = pool.first(list(waiting))
            place = waiting.pop(handle)
            try:
                answer = pool.take(handle)
            except LostWorkerError as error:
                lost[place] += 1
                if lost[place] == MOST_ATTEMPTS:
                    raise WorkerError(
                        f"{tasks[place].name!r}: {MOST_ATTEMPTS} workers were lost with it ({error}); has one of them "
                        f"less memory than the {tasks[place].n_bytes:,} B that it takes, beside 0.5 GB of its own?"
                    ) from None
                left.appendleft(place)
                held -= tasks[place].n_bytes
                continue
            if answer.version != __version__:
                raise WorkerError(
                    f"{answer.host} has pqcli {answer.version}, this is {__version__}; install the same everywhere"
                )
            if answer.error is not None:
                raise _with_host(answer.error, answer.host)
            yield place, answer.found
            held -= tasks[place].n_bytes
    finally:
        pool.cancel(list(waiting))


def run_pickled(task: bytes, device: str, n_threads: int | None = None) -> Answer:
    """What a worker does with what it is sent; `n_threads` is its share of the machine's cores."""
    if n_threads is not None:
        take_share(n_threads)
    host = socket.gethostname()
    try:
        on = torch.device(device)
        with at_work(on):
            return Answer(pickle.loads(task).run(on), None, host, __version__)  # noqa: S301 - made by `results`, of this run
    except PQError as error:
        return Answer(None, error, host, __version__)


def take_share(n_threads: int) -> None:
    """This process is one of several workers, and has so many of the machine's cores."""
    threads.limit(n_threads)
    torch.set_num_threads(n_threads)


def _pickled(task: Task[Any]) -> bytes:
    try:
        return pickle.dumps(task, pickle.HIGHEST_PROTOCOL)
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        raise UsageError(
            f"{task.name!r} cannot be given to another process ({error}); a base that is a container is one cause: "
            "decode it and name the result as --base, or run without --ray and --workers"
        ) from error


def _with_host(error: BaseException, host: str) -> BaseException:
    if not isinstance(error, PQError) or host == socket.gethostname():
        return error
    return type(error)(f"on {host}: {error} (workers must see the checkpoint, its base and statistics where you do)")
