"""What the trellis encoder is asked, the trellises there are, and the constants that several modules share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POLYNOMIALS = {
    1: (0, 0),
    4: (0o5, 0o2),
    8: (0o13, 0o4),
    16: (0o23, 0o4),
    32: (0o45, 0o10),
    64: (0o103, 0o24),
    128: (0o235, 0o126),
    256: (0o515, 0o362),
    512: (0o1315, 0o406),
    1024: (0o2513, 0o1606),
    2048: (0o5303, 0o2232),
}
"""Parity-check polynomials (h0, h1) for one-dimensional signals, by number of states: Ungerboeck's up to 256, beyond
those that quantized Gaussian weights best among some hundreds drawn at random."""

N_STATES = tuple(n for n in POLYNOMIALS if n > 1)
"""What `TrellisParams.n_states` may be."""

LABEL_GROUP = 16
"""Columns that share a label where there are no kernel positions."""
WEIGHTS_PER_BYTE = 12_000
"""No stream holds more weights per byte: the surest decision has a probability of 1 - 32/65536."""
LARGEST_STEP = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class TrellisParams:
    """What the encoder is asked.

    `step` is the distance of neighbouring levels; `rate_weight` what a bit may cost in squared steps; more `n_states`
    find less error for more time (decoding takes no longer); a stream holds about `stream_weights` weights, a power
    of two. A stream's levels are coded by mixing, three times as slow to decode, where that saves more than
    `mixing_gain` of its bytes: with 0 wherever it is smaller, with 1 never.
    """

    step: float
    n_states: int = 256
    rate_weight: float = 0.3
    stream_weights: int = 1 << 20
    mixing_gain: float = 0.0

    def __post_init__(self) -> None:
        if not (0.0 < float(np.float32(self.step)) < LARGEST_STEP):
            raise ValueError(f"step {self.step} is not a positive float32")
        if self.n_states not in N_STATES:
            raise ValueError(f"{self.n_states} states; a trellis has one of {', '.join(map(str, N_STATES))}")
        if self.stream_weights < 1 or self.stream_weights & (self.stream_weights - 1):
            raise ValueError(f"{self.stream_weights} weights per stream is not a power of two")


def next_states(n_states: int) -> NDArray[np.int64]:
    """The trellis as a table (n_states, 2): the next state, by state and branch.

    It is Ungerboeck's systematic feedback encoder. With one state every level is even; rotations are coded so.
    """
    h0, h1 = POLYNOMIALS[n_states]
    table = np.zeros((n_states, 2), np.int64)
    for state in range(n_states):
        for bit in range(2):
            shifted = state >> 1
            if state & 1:
                shifted ^= h0 >> 1
            if bit:
                shifted ^= h1 >> 1
            table[state, bit] = shifted
    return table
