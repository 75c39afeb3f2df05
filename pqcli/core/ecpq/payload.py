"""The payload of one tensor in entropy-constrained PQ: its bytes, and the matrix that they spell.

A head tells the size of its blocks and the scales of its rows and blocks; streams of symbols follow, each with the side
bits of its symbols (signs, and what escapes stand for). FORMAT.md has every byte.

Shapes: matrix (rows, columns) float32, any shape, zeros included.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from pqcli.core.ecpq.model import BLOCK_SIZES, ESCAPE_STEP, Codebook, Model
from pqcli.core.entropy import ans, bitfields
from pqcli.core.lookahead import in_order
from pqcli.core.threads import n_threads

STREAM_SYMBOLS: Final = 1 << 20
_HAS_ROWS, _HAS_BLOCKS, _HAS_SCALE = 4, 8, 16
_CHUNK: Final = 1 << 21
"""Classes that are worked out at a time."""

_T = TypeVar("_T")
_R = TypeVar("_R")


def decode(payload: bytes | memoryview, model: Model, rows: int, columns: int) -> NDArray[np.float32]:
    """The matrix (rows, columns) in `payload`. Bitwise the same on every machine.

    Raises ValueError if `payload` is not intact. Allocates in proportion to rows * columns and the payload only.
    """
    if not rows * columns:
        if len(payload):
            raise ValueError(f"{len(payload)} bytes for an empty matrix")
        return np.zeros((rows, columns), np.float32)
    scale, of, jobs = _read_payload(payload, model, rows, columns)
    out = np.empty((rows, columns), np.float32)
    for part, streams in jobs:
        mapped(_StreamReader(part, part.classes(of), model.grid, scale, out), streams)
    return out


def entropy(payload: bytes | memoryview, model: Model, rows: int, columns: int) -> float:
    """Bits that the payload's symbols would take at their order-0 entropy, one table for the tensor, and side bits.

    Raises ValueError if `payload` is not intact.
    """
    from pqcli.core import metrics  # with torch, which decoding does without

    if not rows * columns:
        return 0.0
    bits = 0.0
    _, of, jobs = _read_payload(payload, model, rows, columns)
    for part, streams in jobs:
        classes = part.classes(of)
        counts = np.zeros(len(part.codebook.n_signs), np.int64)
        for stream in streams:
            start, stop = stream.span
            symbols = ans.decode(stream.coded, classes[start:stop], part.codebook.tables)
            counts += np.bincount(symbols, minlength=len(counts))
            bits += 8 * len(stream.side)
        bits += int(counts.sum()) * metrics.entropy(counts.tolist())
    return bits


@dataclass(frozen=True)
class Scales:
    """The scales of a matrix in quarter-octaves: vector (r, b) has `base + rows[r] + blocks[b]`."""

    base: int
    rows: NDArray[np.int16]
    blocks: NDArray[np.int16]

    def flat(self, *, rows: bool, blocks: bool) -> Scales:
        """These scales with the rows' or the blocks' share kept or left out."""
        return Scales(self.base, self.rows if rows else self.rows * 0, self.blocks if blocks else self.blocks * 0)


@dataclass(frozen=True)
class Part:
    """Equally long vectors of a matrix: `per_row` of them in each row, from `first_column` on."""

    rows: int
    first_column: int
    per_row: int
    codebook: Codebook

    @property
    def streams(self) -> list[tuple[int, int]]:
        """The vectors (first, behind the last) of each stream."""
        n = self.rows * self.per_row
        n_streams = -(-n // STREAM_SYMBOLS)
        return [(i * n // n_streams, (i + 1) * n // n_streams) for i in range(n_streams)]

    def blocks(self, of: Scales) -> NDArray[np.int16]:
        """The share of the scale that a vector has by its place in a row, (per_row,)."""
        is_tail = self.codebook.block_size == 1 and self.first_column > 0
        # The columns of the tail share the scale of the last, short block.
        return np.repeat(of.blocks[-1:], self.per_row) if is_tail else of.blocks[: self.per_row]

    def classes(self, of: Scales) -> NDArray[np.uint8]:
        """The table of every vector, (rows * per_row,)."""
        blocks = self.blocks(of)
        step = max(1, _CHUNK // max(self.per_row, 1))
        out = np.empty((self.rows, self.per_row), np.uint8)
        for start in range(0, self.rows, step):
            rows = of.rows[start : start + step, None].astype(np.int32)
            out[start : start + step] = self.codebook.classes(of.base + rows + blocks)
        return out.reshape(-1)


def _read_payload(
    payload: bytes | memoryview, model: Model, rows: int, columns: int
) -> tuple[np.float32, Scales, list[tuple[Part, list[_Stream]]]]:
    """The scale, the scales of rows and blocks, and the parts with their streams."""
    reader = bitfields.Reader(payload)
    block_size, scale, of = _read_head(reader, rows, columns)
    parts = parts_of(rows, columns, block_size, model)
    jobs = [(part, [_Stream.read(reader, span) for span in part.streams]) for part in parts]
    if reader.remaining:
        raise ValueError(f"{reader.remaining} bytes left over")
    return scale, of, jobs


def parts_of(rows: int, columns: int, block_size: int, model: Model) -> list[Part]:
    """The full blocks, then the columns left over as blocks of one."""
    n_full, n_left = divmod(columns, block_size)
    parts = [Part(rows, 0, n_full, model.codebook(block_size))] if n_full else []
    if n_left:
        parts.append(Part(rows, n_full * block_size, n_left, model.codebook(1)))
    return parts


def head_of(block_size: int, scales: Scales, scale: float, *, has_rows: bool, has_blocks: bool) -> bytes:
    """Everything before the streams."""
    flags = BLOCK_SIZES.index(block_size)
    flags |= _HAS_ROWS * has_rows | _HAS_BLOCKS * has_blocks | _HAS_SCALE * (scale != 1)
    head = bytes([flags]) + bitfields.signed(scales.base)
    if scale != 1:
        head += struct.pack("<f", scale)
    if has_rows:
        head += bitfields.rice(scales.rows)
    if has_blocks:
        head += bitfields.rice(scales.blocks)
    return head


def _read_head(reader: bitfields.Reader, rows: int, columns: int) -> tuple[int, np.float32, Scales]:
    """Block size, scale and scales."""
    flags = reader.take(1)[0]
    if flags >> 5:
        raise ValueError(f"a payload with unknown flags {flags:#04x}")
    block_size = BLOCK_SIZES[flags & 3]
    n_blocks = -(-columns // block_size)
    base = max(-(1 << 20), min(1 << 20, reader.signed()))
    scale = np.frombuffer(reader.take(4), "<f4")[0] if flags & _HAS_SCALE else np.float32(1)
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"a payload with scale {scale}")
    of_rows = reader.rice(rows) if flags & _HAS_ROWS else np.zeros(rows, np.int16)
    of_blocks = reader.rice(n_blocks) if flags & _HAS_BLOCKS else np.zeros(n_blocks, np.int16)
    return block_size, np.float32(scale), Scales(base, of_rows, of_blocks)


@dataclass(frozen=True)
class _Stream:
    """One stream's bytes, checked for presence only."""

    span: tuple[int, int]
    coded: memoryview
    side: memoryview

    @classmethod
    def read(cls, reader: bitfields.Reader, span: tuple[int, int]) -> _Stream:
        n_words, n_side = reader.varint(), reader.varint()
        return cls(span, reader.take(ans.STATE_BYTES + 4 * n_words), reader.take(n_side))


@dataclass(frozen=True)
class _StreamReader:
    """Bytes -> weights, one stream at a time, into `out`."""

    part: Part
    classes: NDArray[np.uint8]
    grid: float
    scale: np.float32
    out: NDArray[np.float32]

    def __call__(self, stream: _Stream) -> None:
        from pqcli.core.ecpq import loops

        start, stop = stream.span
        codebook = self.part.codebook
        grid = np.float32(self.grid)
        symbols = ans.decode(stream.coded, self.classes[start:stop], codebook.tables)
        side = np.frombuffer(stream.side, np.uint8)
        n_bits = loops.read_side(
            side,
            8 * side.size,
            self.part.first_column,
            start,
            symbols,
            codebook.magnitudes.astype(np.float32) * grid,
            grid,
            self.scale,
            ESCAPE_STEP,
            self.part.per_row,
            self.out,
        )
        if n_bits < 0 or -(-n_bits // 8) != side.size:
            raise ValueError("a damaged stream: its symbols and its side bits do not end together")


def mapped(function: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
    """`function` of every item, in threads where there is more than one."""
    if len(items) < 2:
        return [function(item) for item in items]
    return list(in_order(items, function, n_threads()))
