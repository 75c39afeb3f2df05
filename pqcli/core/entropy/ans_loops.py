"""The loops of `ans` (`ans.c`). Constants: precision 15, words of 32 bits, state in [2^30, 2^62)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pqcli.core.native.library import function, reads, writes

_encode = function(
    "ans_encode",
    int, int, reads(np.uint16), reads(np.uint8), reads(np.int32), reads(np.int32), writes(np.uint32), writes(np.int64),
    returns=int,
)  # fmt: skip
_decode = function(
    "ans_decode",
    int, int, int, int, reads(np.uint32), reads(np.uint8), reads(np.int32), reads(np.int32), reads(np.uint16),
    writes(np.uint16),
    returns=bool,
)  # fmt: skip


def encode(
    symbols: NDArray[np.uint16],
    classes: NDArray[np.uint8],
    frequencies: NDArray[np.int32],
    cumulative: NDArray[np.int32],
    words: NDArray[np.uint32],
) -> tuple[int, int]:
    """The final state and the number of words written (first word first out of the encoder, last into the decoder).

    -1 words if a symbol is absent from its table. A symbol never gives more than one word.
    """
    state = np.zeros(1, np.int64)
    n_symbols = frequencies.shape[1]
    n_words = _encode(symbols.size, n_symbols, symbols, classes, frequencies, cumulative, words, state)
    return int(state[0]), n_words


def decode(
    state: int,
    words: NDArray[np.uint32],
    classes: NDArray[np.uint8],
    frequencies: NDArray[np.int32],
    cumulative: NDArray[np.int32],
    lookup: NDArray[np.uint16],
    symbols: NDArray[np.uint16],
) -> bool:
    """Fill `symbols`; whether the words sufficed, none is left, and the state is the encoder's first."""
    sizes = symbols.size, words.size, frequencies.shape[1]
    found: bool = _decode(state, *sizes, words, classes, frequencies, cumulative, lookup, symbols)
    return found
