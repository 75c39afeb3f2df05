"""Where the work runs. An executor changes how long compression takes, never a byte of what it writes.

`ordered` runs jobs on threads and yields their results in the order of the jobs. The kernels release the interpreter
lock, so reading one tensor, learning the codebook of another and writing a third overlap. Memory is bounded by bytes in
flight, not by a number of jobs: many small tensors share the cores, a large one has the machine to itself.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

IN_FLIGHT_BYTES = 128 << 20
"""Dense bytes of the tensors being worked on at one time, unless a single tensor is larger."""


def ordered(
    jobs: Sequence[Job],
    run: Callable[[Job], Result],
    n_bytes: Callable[[Job], int],
    *,
    n_workers: int | None = None,
    in_flight_bytes: int = IN_FLIGHT_BYTES,
) -> Iterator[Result]:
    """`run(job)` for every job, results in the order of `jobs`.

    A job starts when it and all unfinished or not yet consumed ones together stay within `in_flight_bytes`, or when it
    would be alone. The first exception ends the iteration; jobs that have not started then never do.
    """
    waiting: deque[tuple[Future[Result], int]] = deque()
    held = 0
    pool = ThreadPoolExecutor(n_workers or os.cpu_count() or 1)
    try:
        for job in jobs:
            size = n_bytes(job)
            while waiting and held + size > in_flight_bytes:
                future, freed = waiting.popleft()
                yield future.result()
                held -= freed
            waiting.append((pool.submit(run, job), size))
            held += size
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt does not wait for a long EM to end
