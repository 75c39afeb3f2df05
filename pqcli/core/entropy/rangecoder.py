"""An adaptive binary range coder in integers: the same bytes, and the same symbols back, on every machine.

A range coder narrows an interval [low, low + range) once per binary decision, in proportion to the decision's
probability; any number in the last interval, written in base 256, is the message. Probabilities adapt to what was
coded before, alike in the coder and the decoder, so that no tables are sent. Everything is an int64:

    window (5,): low, range, code, position, length     what one coder carries from decision to decision
    buffer (length,) uint8                              the bytes written or read
    models (n, 2) int32: probability, count             P(decision = 1) in 1/65536, decisions seen up to a limit

`range` lies in [2^32, 2^48] between decisions and two bytes move at a time. A model's k-th adaptation moves its
probability by RATES[k] / 65536 of the way to the decision: fast at first, then slow. Encoder and decoder are one
function each way with an `encoding` flag, so that the two cannot drift apart; they are in C (`rangecoder.h`).
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray

from pqcli.core.native.library import function, reads, writes

COUNT_LIMIT = 500
RATES = np.array([int(655360 // (10 * n + 16)) for n in range(COUNT_LIMIT + 1)], np.int64)
"""RATES[n] = floor(65536 / (n + 1.6)): the share of the way a probability moves at its n-th decision."""

_FULL = 1 << 48
_WINDOW_BYTES = 6
N_INTEGER_MODELS = 33
"""Models that one kind of integer uses (see `RangeCoder.integer`)."""


_code_integer = function(
    "code_integer",
    bool, int, writes(np.int32), int, reads(np.int64), writes(np.int64), writes(np.uint8),
    returns=int,
)  # fmt: skip
"""(encoding, value, models, first, rates, window, buffer): the integer."""

_code_decision = function(
    "code_decision",
    bool, int, writes(np.int32), int, reads(np.int64), writes(np.int64), writes(np.uint8),
    returns=int,
)  # fmt: skip
"""(encoding, bit, models, index, rates, window, buffer): the decision."""


class RangeCoder:
    """One stream being written or read. The verbs take the value to write and return the value written or read.

    Code that describes a layout is therefore written once and serves both ways; when reading, the values handed in
    are ignored. Reading past the end gives zero bytes; `finish` tells whether that happened.
    """

    def __init__(self, *, encoding: bool, buffer: NDArray[np.uint8], n_models: int) -> None:
        self.encoding = encoding
        self.buffer = buffer
        self.models = np.empty((n_models, 2), np.int32)
        self.models[:, 0] = 32768
        self.models[:, 1] = 0
        self.window = np.array([0, _FULL, 0, 0, len(buffer)], np.int64)

    @classmethod
    def writer(cls, capacity: int, n_models: int) -> Self:
        """A coder that writes; `capacity` bytes must suffice (untouched memory costs nothing)."""
        return cls(encoding=True, buffer=np.empty(capacity + 16, np.uint8), n_models=n_models)

    @classmethod
    def reader(cls, data: bytes, n_models: int) -> Self:
        """A coder that reads `data`, whatever it holds."""
        coder = cls(encoding=False, buffer=np.frombuffer(bytearray(data), np.uint8), n_models=n_models)
        coder.window[2] = int.from_bytes(data[:_WINDOW_BYTES].ljust(_WINDOW_BYTES, b"\0"), "big")
        coder.window[3] = _WINDOW_BYTES
        return coder

    def bit(self, model: int, bit: int = 0) -> int:
        """One decision; adapts one model."""
        found: int = _code_decision(self.encoding, bit, self.models, model, RATES, self.window, self.buffer)
        return found

    def integer(self, first_model: int, value: int = 0) -> int:
        """One integer in [0, 2^32 - 2]; adapts the N_INTEGER_MODELS models from `first_model` on."""
        found: int = _code_integer(self.encoding, value, self.models, first_model, RATES, self.window, self.buffer)
        return found

    def signed(self, first_model: int, value: int = 0) -> int:
        """One integer of either sign, |value| < 2^31, small ones cheap: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
        folded = self.integer(first_model, 2 * value if value >= 0 else -2 * value - 1)
        return -((folded + 1) >> 1) if folded & 1 else folded >> 1

    def finish(self) -> bytes:
        """The bytes of a writer; of a reader nothing, once it is sure that the stream ended where the symbols did.

        Raises ValueError when a stream read was too short or too long for its symbols.
        """
        low, span, _, position, length = (int(v) for v in self.window)
        if not self.encoding:
            if not position - _WINDOW_BYTES <= length <= position:
                raise ValueError(f"coded stream of {length} bytes; its symbols take {position - _WINDOW_BYTES}")
            return b""
        n_zero_bits = span.bit_length() - 1
        while ((low + span - 1) >> n_zero_bits) << n_zero_bits < low:
            n_zero_bits -= 1
        number = ((low + span - 1) >> n_zero_bits) << n_zero_bits
        head = int.from_bytes(self.buffer[:position].tobytes(), "big") if number >= _FULL else None
        if head is None:
            written = self.buffer[:position].tobytes()
        else:
            written = (head + 1).to_bytes(position, "big")
            number -= _FULL
        return written + number.to_bytes(_WINDOW_BYTES, "big").rstrip(b"\0")
