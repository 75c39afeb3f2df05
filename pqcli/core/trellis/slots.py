"""Which adaptive models a range coder keeps for which decisions, in a stream and in the side information.

The first models are those of levels. Two single decisions follow, then two kinds of integers, each of which takes
N_INTEGER_MODELS models; then a third kind of integers and two decisions more, of rows. Streams and side information
use them for different things.
"""

from __future__ import annotations

from typing import Final

from pqcli.core.entropy.rangecoder import N_INTEGER_MODELS, RangeCoder
from pqcli.core.trellis.loops import BYTES_PER_LEVEL, N_LEVEL_MODELS, initial_models

_FIRST_DECISION = N_LEVEL_MODELS
_SECOND_DECISION = _FIRST_DECISION + 1
_FIRST_INTEGER = _SECOND_DECISION + 1
_SECOND_INTEGER = _FIRST_INTEGER + N_INTEGER_MODELS
_THIRD_INTEGER = _SECOND_INTEGER + N_INTEGER_MODELS
_THIRD_DECISION = _THIRD_INTEGER + N_INTEGER_MODELS
_N_MODELS = _THIRD_DECISION + 2


class StreamSlots:
    """First models of what a stream holds beside levels. A label's is LABEL, or ROW_LABEL, + the one before it."""

    LABEL: Final = _FIRST_DECISION
    SCALE_CLASS: Final = _FIRST_INTEGER
    POINT: Final = _SECOND_INTEGER
    ROW_EXPONENT: Final = _THIRD_INTEGER
    ROW_LABEL: Final = _THIRD_DECISION


class SideSlots:
    """First models of what the side information holds beside the entries of rotations, which are coded as levels."""

    IS_TRANSPOSED: Final = _FIRST_DECISION
    IS_MIXED: Final = _SECOND_DECISION
    EXPONENT: Final = _FIRST_INTEGER
    ROTATION: Final = _SECOND_INTEGER
    ROW_KIND: Final = _THIRD_INTEGER


def writer(n_levels: int) -> RangeCoder:
    """A coder with room for `n_levels` levels, and some 4 KiB for the rest."""
    return _with_level_models(RangeCoder.writer(BYTES_PER_LEVEL * n_levels + 4096, _N_MODELS))


def reader(data: bytes) -> RangeCoder:
    """A coder that reads what such a writer wrote."""
    return _with_level_models(RangeCoder.reader(data, _N_MODELS))


def _with_level_models(coder: RangeCoder) -> RangeCoder:
    coder.models[:N_LEVEL_MODELS] = initial_models()
    return coder
