"""Dtypes by torch's names ("bfloat16"), as numpy has them, and conversions between them that give torch's bits.

numpy alone has no bfloat16 and no float8; `ml_dtypes` adds them. A complex32, which neither has, is a pair of float16.

Conversions go through float32 and round to the nearest, ties to even. numpy, ml_dtypes and torch agree on every number;
on NaN they do not, and there this follows torch where it converts a whole vector at once, because hashes in files were
made of what it gave.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_OWN: Final = {
    name: np.dtype(getattr(ml_dtypes, name))
    for name in (
        "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
    )
} | {"complex32": np.dtype([("real", "<f2"), ("imag", "<f2")])}  # fmt: skip
_NAMES: Final = {dtype: name for name, dtype in _OWN.items()}
_LARGEST: Final = {
    "float64": float(np.finfo(np.float64).max),
    "float32": float(np.finfo(np.float32).max),
    "float16": float(np.finfo(np.float16).max),
    "bfloat16": (2 - 2.0**-7) * 2.0**127,
}
"""The largest finite number of each dtype that something may be converted to."""
_CHUNK: Final = 1 << 16
"""Values that are converted at a time: what is made in between stays in the cache."""
_QUIET: Final = 0x400000
"""The bit of a float32 that tells quiet NaNs."""
_NAN_OF_FLOAT8: Final = {
    "float8_e4m3fn": 0x7FF00000,
    "float8_e4m3fnuz": 0x7F800001,
    "float8_e5m2fnuz": 0x7F800001,
    "float8_e8m0fnu": 0x7F800001,
}
"""NaN as a float32; that of the first has a sign."""


def dtype_of(name: str) -> np.dtype[Any]:
    """The dtype of numpy that torch calls so. Raises TypeError where there is none."""
    return _OWN.get(name) or np.dtype(name)


def name_of(dtype: np.dtype[Any]) -> str:
    """What torch calls a dtype of numpy."""
    return _NAMES.get(dtype) or str(dtype)


def is_floating(name: str) -> bool:
    """Whether it is a floating dtype; complex ones are none."""
    return "float" in name


def converted(values: Array, name: str) -> Array:
    """Floating `values` as float64, float32, float16 or bfloat16; themselves where they are that already.

    What is too large for the dtype becomes infinite.
    """
    return values if name_of(values.dtype) == name else _in_chunks(values, name, lambda part: part)


def saturated(values: Array, name: str) -> Array:
    """The same, but that a large finite value becomes the largest one there is and not infinity."""
    own = name_of(values.dtype)
    if own == name:
        return values
    if _LARGEST[name] >= _LARGEST[own]:
        return _in_chunks(values, name, lambda part: part)
    limit = np.asarray(_LARGEST[name], values.dtype)  # of a bfloat16, 65504 is 65536, and becomes infinite after all
    return _in_chunks(values, name, lambda part: _clipped(part, limit))


def _in_chunks(values: Array, name: str, prepared: Callable[[Array], Array]) -> Array:
    out = np.empty(values.shape, dtype_of(name))
    flat, into = values.reshape(-1), out.reshape(-1)
    with np.errstate(all="ignore"):
        for start in range(0, flat.size, _CHUNK):
            into[start : start + _CHUNK] = _rounded(prepared(flat[start : start + _CHUNK]), name)
    return out


def _clipped(values: Array, limit: Array) -> Array:
    found: Array = np.clip(values, -limit, limit).astype(values.dtype, copy=False)
    if values.dtype.itemsize == 2:  # a bfloat16, which torch clips as float32 and rounds again
        found.view(np.uint16)[np.isnan(found)] = 0xFFFF
    return found


def _rounded(values: Array, name: str) -> Array:
    single = _as_float32(values)
    if name in {"float32", "float64"}:
        return single.astype(name, copy=False)
    found = single.astype(dtype_of(name))
    is_nan = np.isnan(single)
    if is_nan.any():
        bits = single.view(np.uint32)[is_nan]
        if name == "float16":
            nan = (bits >> 16 & 0x8000) | 0x7E00 | (bits >> 13 & 0x3FF)
        else:
            nan = np.full_like(bits, 0x7FC0 if values.dtype.itemsize < 4 else 0xFFFF)
        found.view(np.uint16)[is_nan] = nan
    return found


def _as_float32(values: Array) -> NDArray[np.float32]:
    """Exactly, but for float64, which is rounded."""
    own = name_of(values.dtype)
    if own == "float8_e5m2":  # the upper half of a float16
        values, own = (values.view(np.uint8).astype(np.uint16) << 8).view(np.float16), "float16"
    single: NDArray[np.float32] = values.astype(np.float32)
    if own == "float16" or own in _NAN_OF_FLOAT8:
        is_nan = np.isnan(single)
        if is_nan.any():
            bits = single.view(np.uint32)
            if own == "float16":
                bits[is_nan] |= _QUIET
            else:
                sign = bits[is_nan] & 0x80000000 if own == "float8_e4m3fn" else 0
                bits[is_nan] = sign | _NAN_OF_FLOAT8[own]
    return single
