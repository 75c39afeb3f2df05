"""`kernel`: numba's compiler with this project's settings. Importing this module imports numba, so import it lazily.

Compiled code is cached on disk where a place can be written to, and compiled anew in each process where none can.
Threads run kernels side by side (the interpreter lock is released). Never `fastmath`: what a decoder computes must be
the same number on every machine, and without it the compiler may neither reorder sums nor fuse a product into an
addition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, compiled at its first call."""
    compiled: Callable[..., Any]
    try:
        compiled = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found no folder to cache in (a read-only home)
        compiled = njit(nogil=True)(function)
    return compiled
