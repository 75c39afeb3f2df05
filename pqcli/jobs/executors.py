"""Where the work runs. An executor changes how long compression takes, never a byte of what it writes.

`largest_first` runs jobs on threads. The kernels release the interpreter lock, so reading one tensor, learning the
codebook of another and writing a third overlap. Memory is bounded by bytes in flight, not by a number of jobs: many
small tensors share the cores, a large one has the machine to itself. With several devices each job takes one that is
free; the largest jobs start first, so that no device is left alone with a long one at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import TypeVar

from pqcli.core.lookahead import in_order

Job = TypeVar("Job")
Result = TypeVar("Result")
Device = TypeVar("Device")

IN_FLIGHT_BYTES = 128 << 20
"""Dense bytes of the tensors being worked on at one time, unless a single tensor is larger."""


def largest_first(
    jobs: Sequence[Job],
    run: Callable[[Job, Device], Result],
    n_bytes: Callable[[Job], int],
    devices: Sequence[Device],
    in_flight_bytes: int = IN_FLIGHT_BYTES,
) -> Iterator[Result]:
    """`run(job, device)` for every job, the largest first; results in that order.

    `devices` has an entry per worker. A job starts when it and all unfinished or not yet consumed ones together stay
    within `in_flight_bytes`, or when it would be alone. The first exception ends the iteration; jobs that have not
    started then never do.
    """
    free: SimpleQueue[Device] = SimpleQueue()
    for device in devices:
        free.put(device)

    def work(job: Job) -> Result:
        device = free.get()
        try:
            return run(job, device)
        finally:
            free.put(device)

    ordered = sorted(jobs, key=n_bytes, reverse=True)
    # without join: an interrupt does not wait for a long EM to end
    return in_order(ordered, work, len(devices), cost=n_bytes, budget=in_flight_bytes, join=False)
