"""`function`: a loop in C as a Python function that checks what it is given.

The C sources beside this file are compiled when the package is built (`build.py`), once for each instruction level of
the processor: registers of 128, 256 and 512 bits on x86-64, one level elsewhere. The first call loads the library of
the highest level that this processor has. PQCLI_INSTRUCTIONS=x86-64 (or x86-64-v3, x86-64-v4) takes another one; the
results are the same bytes.

What holds for every function in C
- Arrays arrive as pointers to the first element, and are C-contiguous; their lengths are arguments like any other.
  They need not be aligned to more than their elements are.
- Numbers: bool is int8_t, int is int64_t, float is double, np.float32 is float; a result is one of the first three.
- It allocates nothing: scratch memory comes from the caller, who has numpy raise MemoryError.
- It runs without the interpreter lock, side by side with itself, so it keeps nothing between calls.
- Sums are neither reordered nor fused with products: what a decoder computes is the same number on every machine.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from pqcli.errors import NotBuiltError, UsageError

FOLDER = Path(__file__).parent
OVERRIDE = "PQCLI_INSTRUCTIONS"
_LEVELS = {"x86_64": ("x86-64", "x86-64-v3", "x86-64-v4"), "amd64": ("x86-64", "x86-64-v3", "x86-64-v4")}
"""Instruction levels by what `platform.machine` calls the processor, the lowest first; others have one, `native`."""
_SUFFIXES = {"win32": ".dll", "darwin": ".dylib"}
_NUMBERS: dict[Any, Any] = {
    bool: ctypes.c_int8,
    int: ctypes.c_int64,
    float: ctypes.c_double,
    np.float32: ctypes.c_float,
}
_Memory = ctypes.c_char * 0


@dataclass(frozen=True)
class _Array:
    """An argument that is an array of this dtype."""

    dtype: np.dtype[Any]
    is_written: bool

    def pointer(self, array: Any) -> Any:
        """What ctypes passes on as its address."""
        if array.dtype != self.dtype:
            raise TypeError(f"an array of {array.dtype} where {self.dtype} belongs")
        try:
            return _Memory.from_buffer(array)  # a quarter of the time of `array.ctypes.data`, and checked by ctypes
        except TypeError:
            if not array.flags.c_contiguous:
                raise TypeError(
                    f"an array of shape {array.shape} and strides {array.strides}, not contiguous"
                ) from None
            if self.is_written:
                raise TypeError(f"an array of shape {array.shape} that is to be written cannot be") from None
            return array.ctypes.data


def reads(dtype: DTypeLike) -> Any:
    """A kind of argument: a C-contiguous array that is read."""
    return _Array(np.dtype(dtype), is_written=False)


def writes(dtype: DTypeLike) -> Any:
    """A kind of argument: a C-contiguous array that is written."""
    return _Array(np.dtype(dtype), is_written=True)


class Function:
    """A function of the library, which is loaded when it is first called."""

    def __init__(self, name: str, kinds: tuple[Any, ...], returns: Any) -> None:
        self.name = name
        self.kinds = kinds
        self.returns = returns
        self.arrays = [(i, kind.pointer) for i, kind in enumerate(kinds) if isinstance(kind, _Array)]
        self.call: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """What the function returns."""
        call = self.call or self._bound()
        values = list(arguments)
        try:
            if len(values) != len(self.kinds):  # ctypes lets too many pass
                raise TypeError(f"{len(values)} were given")  # noqa: TRY301 - said below
            for i, pointer in self.arrays:
                values[i] = pointer(values[i])
            return call(*values)
        except (TypeError, AttributeError, IndexError, ctypes.ArgumentError) as error:
            raise TypeError(f"{self.name} of {len(self.kinds)} arguments: {error}") from error

    def _bound(self) -> Any:
        call = getattr(_loaded().library, self.name)
        call.argtypes = [ctypes.c_void_p if isinstance(kind, _Array) else _NUMBERS[kind] for kind in self.kinds]
        call.restype = None if self.returns is None else _NUMBERS[self.returns]
        if self.returns is bool:
            call.errcheck = lambda result, *_: bool(result)
        self.call = call
        return call


_functions: list[Function] = []


def function(name: str, *kinds: Any, returns: Any = None) -> Callable[..., Any]:
    """The C function `name` with arguments of these kinds: reads(dtype), writes(dtype), int, float, np.float32, bool.

    It raises TypeError for arguments of other kinds. A pointer that the caller vouches for is an int.
    """
    found = Function(name, kinds, returns)
    _functions.append(found)
    return found


# --- which library ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    library: ctypes.CDLL
    level: str


_chosen: list[str] = []
"""A level that `at` asks for."""


def levels() -> tuple[str, ...]:
    """The instruction levels that this processor has, the lowest first."""
    known = _LEVELS.get(platform.machine().lower(), ("native",))
    if len(known) == 1:
        return known
    lowest = _open(known[0])
    lowest.highest_level.restype = ctypes.c_int64
    return known[: lowest.highest_level() + 1]


def level() -> str:
    """The instruction level whose functions are called."""
    return _loaded().level


@contextmanager
def at(level: str) -> Iterator[None]:
    """The functions of another level, for as long as it takes: tests compare what they give."""
    _chosen.append(level)
    _forget()
    try:
        yield
    finally:
        _chosen.pop()
        _forget()


def _forget() -> None:
    for known in _functions:
        known.call = None


def _loaded() -> _Loaded:
    return _load(_chosen[-1] if _chosen else os.environ.get(OVERRIDE, ""))


@cache
def _load(wanted: str) -> _Loaded:
    known = levels()
    if wanted and wanted not in known:
        raise UsageError(f"{OVERRIDE}={wanted}: this processor has {', '.join(known)}")
    level = wanted or known[-1]
    return _Loaded(_open(level), level)


@cache
def _open(level: str) -> ctypes.CDLL:
    path = FOLDER / f"loops-{level}{_SUFFIXES.get(sys.platform, '.so')}"
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        reason = str(error) if path.exists() else "it was not built"
        raise NotBuiltError(
            f"pqcli's compiled loops {path} cannot be loaded: {reason}; install pqcli (pip install .), or in a source "
            "tree run: pip install ziglang && python pqcli/core/native/build.py"
        ) from error
