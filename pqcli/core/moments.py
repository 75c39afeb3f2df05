"""Optimizer moments in eight bits a value: blocks that share a scale, and steps that are fine near zero.

An optimizer's step is about first moment / sqrt(second moment), element by element. So a first moment m is spaced by
squares, and so is the square root of a second moment v, which then is spaced by fourth powers:

    m = scale * sign(c) * (c / 127)^2    c from -127 to 127
    v = scale * (c / 255)^4              c from 0 to 255

That leaves a second moment 32 octaves below the largest one of its block. A second moment that is not zero never
becomes zero, by which a step would be divided: what is smaller still takes the smallest step.

Shapes: values (n,), codes (n,) uint8, scales (ceil(n / BLOCK),) uint16: the high half of a float32, rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from pqcli.core.dtypes import saturated

if TYPE_CHECKING:
    from torch import Tensor

BLOCK: Final = 128
"""Values that share a scale."""
SCALE_BYTES: Final = 2
FIRST, SECOND = "first", "second"
FORMS: Final = (FIRST, SECOND)
"""First moments have signs. Second moments have none, and their roots are divided by."""
_ZERO_CODE: Final = 128
"""The code of a first moment that is zero."""
_LARGEST_SCALE: Final = 0x7F7F
"""The high half of the largest float32 that ends in zeros."""
_CHUNK: Final = 1 << 20
"""Values that are worked on at a time; a multiple of `BLOCK`."""


@dataclass(frozen=True)
class Coded:
    """A tensor's moments: a code a value, and a scale a block."""

    codes: NDArray[np.uint8]
    scales: NDArray[np.uint16]


def n_blocks(n: int) -> int:
    """Scales that so many values have."""
    return -(-n // BLOCK)


def n_bytes(n: int) -> int:
    """Bytes of the codes and scales of so many values, before they are coded without loss."""
    return n + SCALE_BYTES * n_blocks(n)


def can_code(moments: Tensor, form: str) -> bool:
    """Whether a tensor holds what moments of this form may be: finite numbers, and no negative second moments."""
    from pqcli.core.pq import pq

    if not pq.is_finite(moments):
        return False
    return form == FIRST or bool((moments >= 0).all())


def encode(moments: Tensor, form: str) -> Coded:
    """The codes of a tensor for which `can_code` holds."""
    flat = moments.reshape(-1)
    codes, scales = [], []
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK]
        values = part.float().numpy()
        scale = _scales(values)
        code = _nearest(values, scale, form)
        if form == SECOND:
            _raise_vanished(code, scale, part)
        codes.append(code)
        scales.append(scale)
    nothing = [np.zeros(0, np.uint8)], [np.zeros(0, np.uint16)]
    return Coded(np.concatenate(codes or nothing[0]), np.concatenate(scales or nothing[1]))


def decode(coded: Coded, form: str) -> NDArray[np.float32]:
    """The values (n,). Raises ValueError for codes and scales that `encode` does not give."""
    if coded.scales.size and int(coded.scales.max()) > _LARGEST_SCALE:
        raise ValueError("a scale of moments that is negative or not finite")
    if form == FIRST and coded.codes.size and not coded.codes.all():
        raise ValueError("a first moment with the code 0")
    values = np.empty(coded.codes.size, np.float32)
    for start in range(0, values.size, _CHUNK):
        stop = min(start + _CHUNK, values.size)
        scales = coded.scales[start // BLOCK : n_blocks(stop)]
        values[start:stop] = _values(coded.codes[start:stop], _spread(scales, stop - start), form)
    return values


def _values(codes: NDArray[np.uint8], scales: NDArray[np.float32], form: str) -> NDArray[np.float32]:
    """What codes stand for, each with its scale: one multiplication in float32."""
    return scales * _TABLES[form][codes]


def _spread(scales: NDArray[np.uint16], n: int) -> NDArray[np.float32]:
    """The scale of each of `n` values."""
    whole = (scales.astype(np.uint32) << 16).view(np.float32)
    return np.repeat(whole, BLOCK)[:n]


def _scales(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The largest magnitude of every block, rounded up to 16 bits."""
    blocks = np.zeros(n_blocks(values.size) * BLOCK, np.float32)
    blocks[: values.size] = np.abs(values)
    words = blocks.reshape(-1, BLOCK).max(axis=1).view(np.uint32)
    scales: NDArray[np.uint16] = np.minimum((words.astype(np.uint64) + 0xFFFF) >> 16, _LARGEST_SCALE).astype(np.uint16)
    return scales


def _nearest(values: NDArray[np.float32], scales: NDArray[np.uint16], form: str) -> NDArray[np.uint8]:
    """The codes whose roots (second, or fourth) are nearest to those of the values."""
    spread = _spread(scales, values.size).astype(np.float64)
    share = np.minimum(np.abs(values) / np.where(spread == 0, 1, spread), 1)
    if form == FIRST:
        codes = _ZERO_CODE + np.copysign(np.rint(127 * np.sqrt(share)), values)
    else:
        steps = np.rint(255 * np.sqrt(np.sqrt(share)))
        codes = np.where((values > 0) & (steps == 0), 1, steps)
    found: NDArray[np.uint8] = codes.astype(np.uint8)
    return found


def _raise_vanished(codes: NDArray[np.uint8], scales: NDArray[np.uint16], moments: Tensor) -> None:
    """Raise, in place, the codes of those that are not zero and would become zero in the tensor's dtype."""
    dtype = str(moments.dtype).removeprefix("torch.")
    spread = _spread(scales, codes.size)
    is_something = (moments != 0).numpy()
    (at,) = np.nonzero(is_something)
    while at.size:
        decoded = saturated(_values(codes[at], spread[at], SECOND), dtype)
        at = at[(decoded == 0) & (codes[at] < 255)]
        codes[at] += 1


def _tables() -> dict[str, NDArray[np.float32]]:
    """What each of the 256 codes stands for where the scale is 1."""
    unsigned = np.arange(256, dtype=np.int64)
    signed = unsigned - _ZERO_CODE
    return {
        FIRST: (signed * np.abs(signed) / 127**2).astype(np.float32),
        SECOND: (unsigned**4 / 255**4).astype(np.float32),
    }


_TABLES: Final = _tables()
