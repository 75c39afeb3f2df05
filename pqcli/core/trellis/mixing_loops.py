"""The second coder of the trellis codec's levels: their scale, sign and size are predicted from their neighbours.

`pqcli.core.trellis.loops.code_levels` expects a level of the running mean of its column times a ratio for its row.
Here that scale is corrected by what the levels around it suggest, each *clue* by a share that is learned; a linear
predictor, learned as well, guesses the level itself, and with it the sign. Three models then predict every decision of
a magnitude, three more that of a sign, and `pqcli.core.entropy.mixing` makes one probability of them. The loops are in
C (`trellis_mixing.c`).

It takes three to four times as long. Weights that are independent given their rows and columns, as those of
transformers are, gain next to nothing; small convolutional networks gain a percent, filters that vary smoothly ten or
twenty. Hence every stream says which of the two coded it.

Shapes: levels, guesses (rows, columns) int32; labels (columns,) uint8; weights (rows, columns) float32. Guesses are
levels in 1/65536; clues are in 1/256 octaves, shares and taps in 1/65536.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pqcli.core.entropy.mixing import FIRST_WEIGHT, N_INPUTS, TABLES
from pqcli.core.native.library import function, reads, writes
from pqcli.core.trellis.loops import N_CLASSES, N_UNARY, initial_models

_PER_CLASS = 3 * N_UNARY
_N_CLUES = 6
_N_AGES = 10
"""Shares are learned apart by the number of columns, or rows, seen so far: 0, 1, 2-3, 4-7, ..., 256 and more."""
_LEFT_TAPS = 8
_N_TAPS = _LEFT_TAPS + 7
_N_GUESSES = 8
_N_PHASES = 32
_N_SURE = 16

_BY_GUESS = N_CLASSES * _PER_CLASS
_BY_PHASE = _BY_GUESS + N_CLASSES * _N_GUESSES * _PER_CLASS
_SIGNS = _BY_PHASE + N_CLASSES // 2 * _N_PHASES * _PER_CLASS
_SIGNS_NEAR = _SIGNS + 4 * _N_SURE
_SIGNS_FAR = _SIGNS_NEAR + 2 * 27
_N_MODELS = _SIGNS_FAR + 2 * 27
_SIGN_SET = _PER_CLASS
_SIGN_COUNT = 20

_CODE_LEVELS_MIXED = function(
    "code_levels_mixed",
    bool, writes(np.int32), int, int, reads(np.uint8), reads(np.uint8), int, int, int, reads(np.int64),
    writes(np.int32), *[writes(np.int64)] * 4, writes(np.int32),
    reads(np.int64), reads(np.int64), writes(np.int64), writes(np.uint8), writes(np.int64),
    returns=bool,
)  # fmt: skip
_SHRINK = function("shrink", writes(np.float32), int, int, reads(np.int32), np.float32)


class Mixing(NamedTuple):
    """What the coder of one stream has learned; segments hand it on.

    models (n, 2) int32; weights (46, N_INPUTS); shares (2, clues, ages) and taps (2, taps), of matrices without and
    with kernel positions; seen (1,): weights coded.
    """

    models: NDArray[np.int32]
    weights: NDArray[np.int64]
    shares: NDArray[np.int64]
    taps: NDArray[np.int64]
    seen: NDArray[np.int64]

    @classmethod
    def fresh(cls) -> Self:
        """What a stream starts from: the scale of its row and column, and no idea of signs."""
        by_class = initial_models().reshape(N_CLASSES, _PER_CLASS, 2)
        models = np.empty((_N_MODELS, 2), np.int32)
        models[:_BY_GUESS] = by_class.reshape(-1, 2)
        models[_BY_GUESS:_BY_PHASE] = np.repeat(by_class, _N_GUESSES, axis=0).reshape(-1, 2)
        models[_BY_PHASE:_SIGNS] = np.repeat(by_class[1::2], _N_PHASES, axis=0).reshape(-1, 2)
        models[_SIGNS:] = 32768, _SIGN_COUNT
        shares = np.zeros((2, _N_CLUES, _N_AGES), np.int64)
        shares[:, 0] = 65536
        return cls(
            models,
            np.full((_SIGN_SET + 1, N_INPUTS), FIRST_WEIGHT, np.int64),
            shares,
            np.zeros((2, _N_TAPS), np.int64),
            np.zeros(1, np.int64),
        )


def code_levels_mixed(
    encoding: bool,
    levels: NDArray[np.int32],
    labels: NDArray[np.uint8],
    row_labels: NDArray[np.uint8],
    run_rows: int,
    period: int,
    scale0: int,
    next_state: NDArray[np.int64],
    mixing: Mixing,
    guesses: NDArray[np.int32],
    rates: NDArray[np.int64],
    window: NDArray[np.int64],
    buffer: NDArray[np.uint8],
) -> bool:
    """Write or read the levels of one matrix; False when what is read cannot be a stream. See `code_levels`.

    Updates `mixing`, and fills in the guesses.
    """
    scratch = np.empty(9 * levels.shape[1] + 7 * period + 35, np.int64)
    is_stream: bool = _CODE_LEVELS_MIXED(
        encoding, levels, *levels.shape, labels, row_labels, run_rows, period, scale0, next_state,
        *mixing, guesses, TABLES, rates, window, buffer, scratch,
    )  # fmt: skip
    return is_stream


def shrink(weights: NDArray[np.float32], guesses: NDArray[np.int32], share: np.float32) -> None:
    """Move weights, in steps, by the fraction `share` towards their guesses, at most by `share`. In place."""
    _SHRINK(weights, *weights.shape, guesses, share)
