"""The loops of `ans`, compiled. Importing this module imports llvmlite, so `ans` does it where it needs them.

Constants: precision 15, words of 32 bits, state in [2^30, 2^62).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pqcli.core.compiled.jit import kernel


@kernel
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
    x = np.int64(1) << 30
    n_words = 0
    for i in range(symbols.size - 1, -1, -1):
        f = np.int64(frequencies[classes[i], symbols[i]])
        if f == 0:
            return 0, -1
        if x >= f << 47:
            words[n_words] = x & 0xFFFFFFFF
            n_words += 1
            x >>= 32
        q = x // f
        x = (q << 15) + cumulative[classes[i], symbols[i]] + (x - q * f)
    return int(x), n_words


@kernel
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
    x = np.int64(state)
    at = 0
    for i in range(symbols.size):
        c = classes[i]
        slot = x & 0x7FFF
        s = lookup[c, slot]
        symbols[i] = s
        x = np.int64(frequencies[c, s]) * (x >> 15) + slot - cumulative[c, s]
        if x < 1 << 30:
            if at == words.size:
                return False
            x = (x << 32) | np.int64(words[at])
            at += 1
    return at == words.size and x == 1 << 30
