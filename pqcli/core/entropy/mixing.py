"""Logistic mixing in integers: one probability from several, weighted by how well each has done.

Predictions are mixed as logarithms of odds, where the surest counts most; the weights follow the gradient of the code
length. Logarithms are to base 2 and in 1/256 octaves throughout, and every table follows from whole numbers, so that
every machine mixes the same. The method is that of the PAQ compressors (Mahoney 2005).

    models (n, 2) int32: probability of a one in 1/65536, count, as in `pqcli.core.entropy.rangecoder`
    weights (n_sets, N_INPUTS) int64: of each input in 1/65536
"""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, check-untyped-defs=False

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pqcli.core.compiled.jit import kernel
from pqcli.core.entropy.rangecoder import adapt, code_bit

N_INPUTS = 3
FIRST_WEIGHT = 22_000
"""Where weights start: a little more than a share of one, as inputs that know different things add up."""

_LEARNING = 220
"""Weights move by 220 / 2^24 of (error in 1/65536) * (log odds in 1/256)."""
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


@kernel
def log2(value):
    """floor(log2 value) octaves, and the fraction from the next eight bits, for 0 < value < 2^53."""
    bits = np.float64(value).view(np.int64)  # its exponent and mantissa; exact
    return ((bits >> 52) - 1023) * 256 + _LOG2[(bits >> 44) & 255]


@kernel
def exp2(log):
    """About 2^(log / 256), for 0 <= log < 40 octaves."""
    return (_EXP2[log & 255] << (log >> 8)) >> 16


@kernel
def code_mixed(encoding, bit, models, a, b, c, weights, which, rates, low, span, code, position, length, buffer):
    """One decision predicted by models a, b and c, all of which learn, as do the weights of set `which`.

    (bit, low, span, code, position) afterwards. A weight moves by less than 2^12 at a time, and log odds stay below
    2^12: no sum overflows within 2^38 decisions.
    """
    log_a = _STRETCH[models[a, 0] >> 4]
    log_b = _STRETCH[models[b, 0] >> 4]
    log_c = _STRETCH[models[c, 0] >> 4]
    dot = weights[which, 0] * log_a + weights[which, 1] * log_b + weights[which, 2] * log_c
    probability = _SQUASH[(min(max(dot >> 16, -_LARGEST), _LARGEST - 1) + _LARGEST) >> _SQUASH_SHIFT]
    bit, low, span, code, position = code_bit(encoding, bit, probability, low, span, code, position, length, buffer)
    error = ((bit << 16) - probability) * _LEARNING
    weights[which, 0] += (error * log_a + (1 << 23)) >> 24
    weights[which, 1] += (error * log_b + (1 << 23)) >> 24
    weights[which, 2] += (error * log_c + (1 << 23)) >> 24
    adapt(models, a, bit, rates)
    adapt(models, b, bit, rates)
    adapt(models, c, bit, rates)
    return bit, low, span, code, position
