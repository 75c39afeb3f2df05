"""Logistic mixing in integers: one probability from several, weighted by how well each has done.

Predictions are mixed as logarithms of odds, where the surest counts most; the weights follow the gradient of the code
length. Logarithms are to base 2 and in 1/256 octaves throughout, and every table follows from whole numbers, so that
every machine mixes the same. The method is that of the PAQ compressors (Mahoney 2005). Mixing itself is in C, for the
loops that mix to build in (`mixing.h`); here are its tables.

    models (n, 2) int32: probability of a one in 1/65536, count, as in `pqcli.core.entropy.rangecoder`
    weights (n_sets, N_INPUTS) int64: of each input in 1/65536
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

N_INPUTS = 3
FIRST_WEIGHT = 22_000
"""Where weights start: a little more than a share of one, as inputs that know different things add up."""

_OCTAVE = 256
_LARGEST = 12 * _OCTAVE
"""Log odds are cut off at 12 octaves."""
_SQUASH_SHIFT = 2


def _fractions() -> NDArray[np.int64]:
    """floor(256 log2(1 + i / 256))."""
    return np.array([((_OCTAVE + i) ** _OCTAVE).bit_length() - 8 * _OCTAVE - 1 for i in range(_OCTAVE)], np.int64)


def _powers() -> NDArray[np.int64]:
    """floor(2^(16 + i / 256)): eight square roots, each rounded down, are one 256th root rounded down."""
    found = [1 << (16 * _OCTAVE + i) for i in range(_OCTAVE)]
    for _ in range(8):
        found = [math.isqrt(value) for value in found]
    return np.array(found, np.int64)


_LOG2 = _fractions()
_EXP2 = _powers()


def _stretched() -> NDArray[np.int64]:
    """Log odds of the probabilities in [16 i, 16 i + 16), taken at the middle: of two whole numbers' logarithms."""
    logs = [(value**_OCTAVE).bit_length() - 1 for value in range(8, 1 << 16, 16)]
    return np.array([log - other for log, other in zip(logs, reversed(logs), strict=True)], np.int64)


def _squashed() -> NDArray[np.int64]:
    """The probability at the middle of each quarter of 1/64 octave of log odds, from -12 octaves on; the inverse."""
    positive = []
    for distance in range(2, _LARGEST, 1 << _SQUASH_SHIFT):
        odds = int(_EXP2[distance % _OCTAVE]) << (distance // _OCTAVE)
        positive.append(min((odds << 16) // (odds + (1 << 16)), 65504))
    return np.array([(1 << 16) - p for p in reversed(positive)] + positive, np.int64)


_STRETCH = _stretched()
_SQUASH = _squashed()
TABLES = np.concatenate([_LOG2, _EXP2, _STRETCH, _SQUASH])
"""What `mixing.h` looks up."""
