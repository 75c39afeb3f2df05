"""Entropy coding of assignments: symbols <-> bytes with asymmetric numeral systems (rANS; Duda 2013) and static tables.

A table gives every symbol an integer frequency; the frequencies of a table sum to `TOTAL`, and a symbol of frequency f
costs log2(TOTAL / f) bits. Several tables serve one sequence: symbol i is coded with table `classes[i]`, which both
sides know. `frequencies` makes tables from small integer levels with integer arithmetic alone, so that every machine
makes the same ones.

The coder's state x stays in [2^30, 2^62). Coding symbol s of frequency f and cumulative frequency F turns x into
`(x // f) * TOTAL + F + x % f`; before that, while x >= f * 2^47, the low 32 bits of x go out as one word. Decoding
undoes both steps in the opposite order. The encoder starts with x = 2^30 at the *last* symbol, so the decoder, which
starts at the first, must end with x = 2^30 and no word left: damage shows.

Shapes: symbols (n,) uint16, classes (n,) uint8, levels and frequencies (n_classes, n_symbols).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

PRECISION = 15
TOTAL = 1 << PRECISION
"""Sum of the frequencies of one table."""
OCTAVE = 16
"""Steps of a level per factor of two."""
MAX_SYMBOLS = 4096
STATE_BYTES = 8

# round(2 ** (30 - i / OCTAVE)), spelt out: a power function may differ in its last digit from machine to machine.
_WEIGHTS = np.array(
    [
        1073741824, 1028218693, 984625594, 942880699, 902905651, 864625413, 827968132, 792865000,
        759250125, 727060411, 696235434, 666717336, 638450708, 611382493, 585461881, 560640218,
    ],
    np.int64,
)  # fmt: skip


@dataclass(frozen=True)
class Tables:
    """`n_classes` tables over the same symbols. A symbol of frequency 0 is absent from that table."""

    frequencies: NDArray[np.int32]

    def __post_init__(self) -> None:
        if self.frequencies.ndim != 2 or not 0 < self.frequencies.shape[1] <= MAX_SYMBOLS:
            raise ValueError(f"tables of shape {self.frequencies.shape}; at most {MAX_SYMBOLS} symbols are possible")
        if (self.frequencies < 0).any() or (self.frequencies.sum(1) != TOTAL).any():
            raise ValueError(f"the frequencies of a table must sum to {TOTAL}")

    @cached_property
    def cumulative(self) -> NDArray[np.int32]:
        """(n_classes, n_symbols): the sum of the frequencies of all earlier symbols."""
        return (np.cumsum(self.frequencies, axis=1) - self.frequencies).astype(np.int32)

    @cached_property
    def lookup(self) -> NDArray[np.uint16]:
        """(n_classes, TOTAL): the symbol that owns each slot."""
        symbols = np.arange(self.frequencies.shape[1], dtype=np.uint16)
        return np.stack([np.repeat(symbols, row) for row in self.frequencies])

    @cached_property
    def bits(self) -> NDArray[np.float64]:
        """(n_classes, n_symbols): what a symbol costs in bits; infinite where it is absent."""
        with np.errstate(divide="ignore"):
            return np.asarray(PRECISION - np.log2(self.frequencies.astype(np.float64)))


def frequencies(levels: NDArray[np.integer], essential: int = 0) -> NDArray[np.int32]:
    """Frequencies (n_classes, n_symbols) proportional to `2 ** (level / OCTAVE)`, each row summing to `TOTAL`.

    A symbol whose share rounds to nothing is absent; symbol `essential` never is. What rounding leaves over, or takes
    too much, the most frequent symbol (the first of equals) absorbs. Integer arithmetic only: the same on every
    machine.
    """
    levels = levels.astype(np.int64)
    below = levels.max(axis=1, keepdims=True) - levels
    weights = _WEIGHTS[below % OCTAVE] >> np.minimum(below // OCTAVE, 62)
    total = weights.sum(axis=1, keepdims=True)
    rounded = (weights * (2 * TOTAL) + total) // (2 * total)
    rounded[:, essential] = np.maximum(rounded[:, essential], 1)
    for row in rounded:
        while (excess := int(row.sum()) - TOTAL) != 0:
            top = int(row.argmax())
            row[top] -= min(excess, int(row[top]) // 2)
    return np.ascontiguousarray(rounded, np.int32)


def encode(symbols: NDArray[np.uint16], classes: NDArray[np.uint8], tables: Tables) -> bytes:
    """`symbols` (n,) as bytes: the final state (8 bytes), then 32-bit words, all little-endian.

    Raises ValueError if a symbol is absent from its table.
    """
    from pqcli.core.entropy import ans_loops

    words = np.empty(symbols.size + 2, np.uint32)
    state, n_words = ans_loops.encode(symbols, classes, tables.frequencies, tables.cumulative, words)
    if n_words < 0:
        raise ValueError("a symbol that is absent from its table cannot be coded")
    return int(state).to_bytes(STATE_BYTES, "little") + words[:n_words][::-1].astype("<u4").tobytes()


def decode(data: bytes | memoryview, classes: NDArray[np.uint8], tables: Tables) -> NDArray[np.uint16]:
    """The symbols that `data` holds, one per entry of `classes`.

    Raises ValueError if `data` is not what `encode` gives.
    """
    from pqcli.core.entropy import ans_loops

    if len(data) < STATE_BYTES or len(data) % 4:
        raise ValueError(f"a stream of {len(data)} bytes; it takes {STATE_BYTES} and a multiple of 4")
    state = int.from_bytes(data[:STATE_BYTES], "little")
    if not 1 << 30 <= state < 1 << 62:
        raise ValueError(f"a stream that starts in state {state}")
    words = np.frombuffer(data, "<u4", offset=STATE_BYTES).astype(np.uint32, copy=False)
    symbols = np.empty(classes.size, np.uint16)
    intact = ans_loops.decode(state, words, classes, tables.frequencies, tables.cumulative, tables.lookup, symbols)
    if not intact:
        raise ValueError("a damaged stream: its symbols and its words do not end together")
    return symbols
