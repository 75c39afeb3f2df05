"""How many threads there are to work with."""

from __future__ import annotations

import os


def n_threads() -> int:
    """Threads that work side by side; no result depends on them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
