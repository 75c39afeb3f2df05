"""What the pickles of numpy build, as descriptions: dtypes, scalars, arrays.

An array's bytes are in the pickle itself, not in a record behind it. Arrays of numbers are carried as tensors (a
checkpoint's weights may well be numpy arrays) and come back as arrays.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from pqcli.errors import CheckpointError

_NUMBER = re.compile(r"[?biufc](?:1|2|4|8|16)?")
_TORCH_DTYPES = {
    "?": "bool", "b1": "bool", "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64",
    "u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64",
    "f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128",
}  # fmt: skip
_MAX_RANK = 64


@dataclass(frozen=True, eq=False)
class Foreign:
    """A value that is harmless, but that JSON cannot carry; `kind` names its type."""

    kind: str


@dataclass(eq=False)
class NumpyType:
    """A numpy dtype on its way into a scalar or an array."""

    code: str
    order: str = "="


class NumpyArray:
    """A numpy array: empty until BUILD has filled it.

    `dtype` is torch's name, or None where torch has none, and then `kind` says what it is; `data` are its elements in
    row-major order, little-endian.
    """

    def __init__(self) -> None:
        self.dtype: str | None = None
        self.kind = "numpy array"
        self.shape: tuple[int, ...] = ()
        self.data = b""

    def fill(self, state: Any) -> None:
        """BUILD: (version, shape, dtype, Fortran order, bytes)."""
        if not isinstance(state, tuple) or len(state) not in {4, 5}:
            raise TypeError("an array without contents")
        shape, kind, is_fortran, data = state[-4:]
        self._set(shape, kind, data, fortran=is_fortran is True)

    def _set(self, shape: Any, kind: Any, data: Any, *, fortran: bool) -> None:
        if not isinstance(kind, NumpyType) or not isinstance(shape, tuple) or len(shape) > _MAX_RANK:
            raise TypeError("an array without a shape")
        if any(type(size) is not int or not 0 <= size < 2**63 for size in shape):
            raise ValueError("an array of an impossible shape")
        self.kind = f"numpy array of dtype {kind.code[:20]}"
        if kind.code not in _TORCH_DTYPES:
            return
        dtype = _dtype(kind)
        if not isinstance(data, (bytes, bytearray)) or len(data) != prod(shape) * dtype.itemsize:
            raise ValueError("an array of the wrong length")
        array = np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")
        self.data = np.ascontiguousarray(array).astype(dtype.newbyteorder("<"), copy=False).tobytes()
        self.shape = shape
        self.dtype = _TORCH_DTYPES[kind.code]


def numpy_type(code: Any, *_: Any) -> NumpyType:
    """`numpy.dtype("f8")`; the byte order comes by BUILD."""
    return NumpyType(str(code))


def numpy_scalar(kind: Any, data: Any = None) -> Any:
    """A numpy scalar comes back as the equal Python number: it then loads everywhere, `weights_only=True` included."""
    if not isinstance(kind, NumpyType):
        raise TypeError("a numpy scalar without a dtype")
    if not _NUMBER.fullmatch(kind.code) or not isinstance(data, bytes):
        return Foreign(f"numpy scalar of dtype {kind.code[:20]}")
    dtype = _dtype(kind)
    if len(data) != dtype.itemsize:
        raise ValueError("a numpy scalar of the wrong length")
    value = np.frombuffer(data, dtype=dtype)[0].item()
    return value if isinstance(value, (bool, int, float, complex)) else Foreign(f"numpy scalar of dtype {kind.code}")


def numpy_array(*_: Any) -> NumpyArray:
    """`_reconstruct(ndarray, (0,), b"b")`: an array that BUILD fills. A subclass comes back as an array."""
    return NumpyArray()


def numpy_from_buffer(data: Any, kind: Any, shape: Any, order: Any) -> NumpyArray:
    """How protocol 5 writes an array."""
    array = NumpyArray()
    array._set(shape, kind, data, fortran=order == "F")  # noqa: SLF001 - the same as BUILD, in one call
    return array


def _dtype(kind: NumpyType) -> np.dtype[Any]:
    if not _NUMBER.fullmatch(kind.code):
        raise CheckpointError(f"a numpy dtype {kind.code[:20]!r}")
    return np.dtype(kind.code).newbyteorder(">" if kind.order == ">" else "<")
