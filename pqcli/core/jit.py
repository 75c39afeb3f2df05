"""`kernel`: numba's compiler with this project's settings. Importing this module imports numba, so import it lazily.

Compiled code is cached on disk where a place can be written to, and compiled anew in each process where none can.
Threads run kernels side by side (the interpreter lock is released). Never `fastmath`: what a decoder computes must be
the same number on every machine, and without it the compiler may neither reorder sums nor fuse a product into an
addition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

_Function = TypeVar("_Function", bound=Callable[..., Any])


def kernel(function: _Function) -> _Function:
    """`function`, compiled at its first call."""
    try:
        compiled: _Function = njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found no folder to cache in (a read-only home)
        compiled = njit(nogil=True)(function)
    return compiled
