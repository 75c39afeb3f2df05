"""What the tensors of a file share in entropy-constrained PQ: codebooks of magnitudes, and how likely each entry is.

Weights are as often negative as positive, so a codebook holds magnitudes only, and signs are sent as they are: a row of
a codebook (an *orbit*) stands for all vectors that differ from it in signs. So a codebook of 500 orbits of block size 4
does the work of 8,000 centroids, costs as little as 500 to store, to learn and to search, and needs as little data.
Zeros have no sign and cost no sign bit.

How likely an orbit is goes by the *class* of a vector: its expected scale, in quarter-octaves. Stored are two slopes
per class, over the squared length and over the sum of an orbit's magnitudes (a Gaussian and a Laplacian source are such
tilts), one correction per orbit, and one per orbit and class (mostly 0). Tables follow from them by integer arithmetic.

All lengths are integers in units of `grid`, so nothing depends on the scale of the weights. FORMAT.md has every byte.

Shapes: magnitudes (k, d), slopes (n_classes, 2), levels (n_classes, 1 + k) with the escape symbol first.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pqcli.core.entropy import ans

BLOCK_SIZES = (1, 2, 4, 8)
ESCAPE_STEP = 24
"""Step of the uniform quantizer for vectors that no orbit represents, in units of the grid."""
GRID_PER_RATE = 8
"""Grid points per square root of the rate weight: fine enough to cost 0.01 dB."""
MAX_CLASSES = 64
_FINE = ans.OCTAVE // 4
_HEADER = struct.Struct("<BBf")
_CODEBOOK = struct.Struct("<BHbB")
_VERSION = 1


@dataclass(frozen=True)
class Codebook:
    """One codebook and its tables. Levels are logarithms of probabilities, in quarter-octaves.

    `low` is the lowest class; `slopes`, `escapes` and `corrections` have a row for each class from there on.
    """

    magnitudes: NDArray[np.uint16]
    low: int
    slopes: NDArray[np.int16]
    escapes: NDArray[np.int16]
    levels: NDArray[np.int16]
    corrections: NDArray[np.int16]

    @property
    def block_size(self) -> int:
        """Length of a vector."""
        return int(self.magnitudes.shape[1])

    @property
    def n_orbits(self) -> int:
        """Rows of the codebook."""
        return int(self.magnitudes.shape[0])

    @property
    def n_classes(self) -> int:
        """Number of tables."""
        return int(self.slopes.shape[0])

    @cached_property
    def n_signs(self) -> NDArray[np.uint8]:
        """(1 + k,): the sign bits that follow a symbol; 0 for the escape, whose signs are its own affair."""
        return np.concatenate([[0], (self.magnitudes > 0).sum(1)]).astype(np.uint8)

    @cached_property
    def tables(self) -> ans.Tables:
        """The coder's tables, one per class; symbol 0 is the escape, symbol j + 1 is orbit j."""
        tilt = (self.slopes.astype(np.int64) @ features(self.magnitudes).T) >> 16
        orbit = _FINE * (self.levels + self.corrections.astype(np.int64)) + tilt + ans.OCTAVE * self.n_signs[1:]
        escape = _FINE * self.escapes.astype(np.int64)[:, None]
        return ans.Tables(ans.frequencies(np.concatenate([escape, orbit], axis=1)))

    @cached_property
    def bits(self) -> NDArray[np.float64]:
        """(n_classes, 1 + k): the cost of a symbol with its signs; for the escape, of the symbol alone."""
        return self.tables.bits + self.n_signs

    def classes(self, scale: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Table numbers for vectors of the given scales (quarter-octaves, any shape)."""
        return np.asarray(np.clip(scale - self.low, 0, self.n_classes - 1), np.uint8)


def features(magnitudes: NDArray[np.uint16]) -> NDArray[np.int64]:
    """(k, 2): squared length and sum of each orbit, in 65536ths of the largest."""
    m = magnitudes.astype(np.int64)
    raw = np.stack([(m * m).sum(1), m.sum(1)], axis=1)
    return np.asarray((raw << 16) // raw.max(axis=0, initial=1), np.int64)


@dataclass(frozen=True)
class Model:
    """All that the tensors of one file have in common. `grid` is a float32; there is always a codebook for d = 1."""

    grid: float
    codebooks: tuple[Codebook, ...]

    def codebook(self, block_size: int) -> Codebook:
        """The codebook for vectors of that length. Raises ValueError if there is none."""
        for codebook in self.codebooks:
            if codebook.block_size == block_size:
                return codebook
        raise ValueError(f"the model has no codebook for block size {block_size}")

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """The block sizes there are codebooks for, ascending."""
        return tuple(codebook.block_size for codebook in self.codebooks)

    def to_bytes(self) -> bytes:
        """The model, self-contained and compressed."""
        return _HEADER.pack(_VERSION, len(self.codebooks), self.grid) + b"".join(
            _codebook_bytes(codebook) for codebook in self.codebooks
        )

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Model:
        """The model that `to_bytes` wrote. Raises ValueError for anything else."""
        data = bytes(data)
        if len(data) < _HEADER.size:
            raise ValueError(f"a model of {len(data)} bytes")
        version, n_codebooks, grid = _HEADER.unpack_from(data)
        if version != _VERSION:
            raise ValueError(f"a model of version {version}; this reads version {_VERSION}")
        if not is_grid(grid):
            raise ValueError(f"a model with grid {grid}")
        at, codebooks = _HEADER.size, []
        for _ in range(n_codebooks):
            codebook, at = _read_codebook(data, at)
            codebooks.append(codebook)
        sizes = [codebook.block_size for codebook in codebooks]
        if at != len(data) or sizes != sorted(set(sizes)) or sizes[:1] != [1]:
            raise ValueError(f"a model with codebooks for block sizes {sizes} and {len(data) - at} bytes left over")
        return cls(grid, tuple(codebooks))


def is_grid(grid: float) -> bool:
    """Whether lengths can be counted in this unit: a normal float32 with room above."""
    return bool(np.float32(1e-30) <= grid <= np.float32(1e30))


# --- bytes -----------------------------------------------------------------------------------------------------------


def _codebook_bytes(codebook: Codebook) -> bytes:
    """Header, then a compressed run of integers: each array zigzag, low bytes then high bytes."""
    corrections = np.diff(codebook.corrections.astype(np.int64), axis=0, prepend=0)
    slopes = np.diff(codebook.slopes.astype(np.int64), axis=0, prepend=0)
    escapes = np.diff(codebook.escapes.astype(np.int64), prepend=0)
    arrays = (codebook.magnitudes.T, slopes.T, escapes, codebook.levels, corrections)
    body = zlib.compress(b"".join(_planes(np.asarray(array, np.int64)) for array in arrays), 9)
    header = _CODEBOOK.pack(codebook.block_size, codebook.n_orbits, codebook.low, codebook.n_classes)
    return header + struct.pack("<I", len(body)) + body


def _read_codebook(data: bytes, at: int) -> tuple[Codebook, int]:
    if len(data) < at + _CODEBOOK.size + 4:
        raise ValueError("a model cut short")
    d, k, low, n_classes = _CODEBOOK.unpack_from(data, at)
    if d not in BLOCK_SIZES or not 0 < k < ans.MAX_SYMBOLS or not 0 < n_classes <= MAX_CLASSES:
        raise ValueError(f"a codebook of {k} orbits of block size {d} with {n_classes} classes")
    (n_bytes,) = struct.unpack_from("<I", data, at + _CODEBOOK.size)
    at += _CODEBOOK.size + 4
    shapes = ((d, k), (2, n_classes), (n_classes,), (k,), (n_classes, k))
    sizes = [int(np.prod(shape)) for shape in shapes]
    body = _inflate(data[at : at + n_bytes], 2 * sum(sizes))
    arrays, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        arrays.append(_unplanes(body[start : start + 2 * size]).reshape(shape))
        start += 2 * size
    magnitudes, slopes, escapes, levels, corrections = arrays
    codebook = Codebook(
        magnitudes=np.ascontiguousarray(magnitudes.T, np.uint16),
        low=low,
        slopes=np.cumsum(slopes.T, axis=0).astype(np.int16),
        escapes=np.cumsum(escapes).astype(np.int16),
        levels=levels.astype(np.int16),
        corrections=np.cumsum(corrections, axis=0).astype(np.int16),
    )
    return codebook, at + n_bytes


def _inflate(data: bytes, size: int) -> bytes:
    """Exactly `size` bytes out of the zlib stream `data`, never more memory than that."""
    stream = zlib.decompressobj()
    try:
        body = stream.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"a damaged model: {error}") from None
    if len(body) != size or not stream.eof or stream.unused_data:
        raise ValueError(f"a damaged model: {len(body)} bytes where {size} are due")
    return body


def _planes(values: NDArray[np.int64]) -> bytes:
    """Zigzag 16-bit integers (modulo 2^16) as all low bytes, then all high bytes."""
    values = values.astype(np.int16).astype(np.int64)
    folded = ((values << 1) ^ (values >> 63)).astype("<u2").reshape(-1)
    return folded.view(np.uint8).reshape(-1, 2).T.tobytes()


def _unplanes(data: bytes) -> NDArray[np.int64]:
    folded = np.frombuffer(data, np.uint8).reshape(2, -1).T.copy().view("<u2").reshape(-1).astype(np.int64)
    return (folded >> 1) ^ -(folded & 1)
