"""How many threads there are to work with."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from threadpoolctl import threadpool_limits

_counting = threading.Lock()
_limited: list[threadpool_limits] = []
_users = 0
_most: int | None = None


def n_threads() -> int:
    """Threads that work side by side; no result depends on them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores if _most is None else min(cores, _most)


def limit(most: int) -> None:
    """This process is one of several workers of a machine, and has so many of its cores."""
    global _most
    _most = max(1, most)


@contextmanager
def lone_blas() -> Iterator[None]:
    """BLAS has one thread while any thread is inside: its sums depend on how many it has."""
    global _users
    from threadpoolctl import threadpool_limits  # which decoding does without

    with _counting:
        _users += 1
        if _users == 1:
            _limited.append(threadpool_limits(1, user_api="blas"))
    try:
        yield
    finally:
        with _counting:
            _users -= 1
            if not _users:
                _limited.pop().restore_original_limits()
