"""Entropy-constrained PQ: shared codebooks and one price of a bit for all tensors, entropy-coded assignments.

    samples = [draw(matrix, seed=...) for each tensor]   a few percent of the weights; the scale of every row and column
    samples = [fed(matrix, sample, model, bit_price) for each]   where errors are fed forward: what comes to be coded
    model   = fit(samples, bit_price)                    codebooks and tables that all tensors share
    encoded = encode(matrix, model, bit_price)           a payload, and the matrix that it decodes to
    matrix  = decode(payload, model, rows, columns)

`bit_price` is what a bit may cost in squared weights: a larger one gives a smaller file and a larger error. Both change
smoothly with it, and `estimate` predicts them from the samples alone. The same price in squared grid units, as the
search counts it, is called `rate_weight`. With `scale`, a tensor is divided by that number before all else and
multiplied by it at the end, which gives the tensor an error of its own at the same price.

A tensor is cut into blocks of the size that costs least, by squared error + bit_price * bits on its sample; columns
that are left over are coded one by one. FORMAT.md describes payload and model byte by byte.

Shapes: matrix (rows, columns) float32, any shape, zeros included.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.core.arrays import as_tensor
from pqcli.core.ecpq import payload as payloads
from pqcli.core.ecpq.feedback import Felt, code
from pqcli.core.ecpq.fit import Vectors, fit_codebook
from pqcli.core.ecpq.model import BLOCK_SIZES, ESCAPE_STEP, GRID_PER_RATE, Model, is_grid
from pqcli.core.ecpq.payload import Part, Scales, entropy, head_of, mapped, parts_of
from pqcli.core.ecpq.search import CHUNK, Moments, choose, in_grid_units, moments, scales
from pqcli.core.entropy import ans, bitfields

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Encoded",
    "Estimate",
    "Felt",
    "Model",
    "Sample",
    "decode",
    "draw",
    "encode",
    "entropy",
    "estimate",
    "fed",
    "fit",
]

PIECE = 8
"""Values in a row that a sample takes together: a multiple of every block size."""
FRACTION = 0.1
LEAST = 1 << 17
MOST = 1 << 20
"""A sample is this fraction of a tensor, but no fewer and no more weights than these."""
FED_LEAST = 1 << 15
"""Likewise a sample for which errors are fed forward, which takes longer."""
WARM = 1
"""Iterations of EM from a known model."""
NEAR = 1.2
"""Grids within this factor (a quarter of a bit per weight) go with the same block sizes."""
CHOOSE_FROM = 1 << 16
"""Weights of the sample that decide a tensor's block size."""


@dataclass(frozen=True)
class Sample:
    """Pieces (m, width) of a matrix, where they lie, the moments of the whole, and how much its errors are felt."""

    pieces: NDArray[np.float32]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    shape: tuple[int, int]
    moments: Moments
    felt: Felt | None = None

    @property
    def factor(self) -> float:
        """Weights of the matrix per weight of the sample."""
        return self.shape[0] * self.shape[1] / max(self.pieces.size, 1)

    def times(self, factor: float) -> Sample:
        """The sample of as many times the matrix."""
        moments = Moments(self.moments.rows * factor**2, self.moments.columns)
        return replace(self, pieces=self.pieces * np.float32(factor), moments=moments)

    def head(self, n_weights: int) -> Sample:
        """A sample of this sample: about `n_weights` weights, evenly spread."""
        n = len(self.pieces)
        step = max(1, n * PIECE // max(n_weights, 1))
        at = slice(None, None, step)
        return replace(self, pieces=self.pieces[at], rows=self.rows[at], columns=self.columns[at])


@dataclass(frozen=True)
class Encoded:
    """A payload, and what `decode` makes of it, bit for bit."""

    payload: bytes
    decoded: Tensor


@dataclass(frozen=True)
class Estimate:
    """What encoding would cost: bits of all payloads, and the squared error (of the scaled weights)."""

    bits: float
    squared_error: float


def draw(
    matrix: Tensor,
    *,
    scale: float = 1.0,
    seed: int = 0,
    fraction: float = FRACTION,
    least: int = LEAST,
    most: int = MOST,
    felt: Felt | None = None,
) -> Sample:
    """A random sample of `matrix`: `fraction` of it, at least `least` and at most `most` weights.

    Raises ValueError if `matrix` holds NaN or infinity.
    """
    weights = _scaled(matrix, scale)
    n_rows, n_columns = weights.shape
    width = min(PIECE, n_columns)
    per_row = n_columns // width if width else 0
    n_pieces = n_rows * per_row
    wanted = math.ceil(min(max(least, fraction * weights.size), most) / max(width, 1))
    if wanted >= n_pieces:
        at = np.arange(n_pieces)
    else:
        at = np.sort(np.random.default_rng(seed).integers(n_pieces, size=wanted))
    rows, columns = at // max(per_row, 1), at % max(per_row, 1) * width
    pieces = weights[rows[:, None], columns[:, None] + np.arange(width)]
    return Sample(np.ascontiguousarray(pieces), rows, columns, (n_rows, n_columns), moments(weights), felt)


def fed(
    matrix: Tensor, sample: Sample, model: Model, bit_price: float, *, scale: float = 1.0, least: int = FED_LEAST
) -> Sample:
    """A sample of what is coded in the end of a matrix whose errors are fed forward; other ones as they are.

    The targets are larger than the weights, the more the higher the price: models are better learned from them, and
    estimates come out right. They are those of some outputs, at least `least` weights of them, for outputs go their
    ways apart.
    """
    felt = sample.felt
    if felt is None or felt.inputs is None or sample.pieces.shape[1] < PIECE:
        return sample
    weights = _scaled(matrix, scale)
    is_by_column = felt.inputs.axis == 1
    plan = _plan(sample, model, bit_price)
    n_rows, width = weights.shape[0], weights.shape[1] // PIECE * PIECE
    wanted = min(max(least, FRACTION * weights.size), MOST) / weights.size
    if is_by_column:
        rows, columns = _spread(n_rows, wanted), np.arange(width)
        some, of = weights[rows], replace(plan.scales, rows=plan.scales.rows[rows])
    else:
        starts = PIECE * _spread(width // PIECE, wanted)
        rows, columns = np.arange(n_rows), (starts[:, None] + np.arange(PIECE)).reshape(-1)
        some = weights[:, columns]
        of = replace(plan.scales, blocks=plan.scales.blocks[columns[:: plan.block_size] // plan.block_size])
    parts = parts_of(some.shape[0], some.shape[1], plan.block_size, model)
    found = code(some, parts, of, model.grid, bit_price / model.grid**2, felt).targets
    at_rows = np.repeat(rows, len(columns) // PIECE)
    at_columns = np.tile(columns[::PIECE], len(rows))
    pieces = found[:, : len(columns)].reshape(-1, PIECE)
    return replace(sample, pieces=pieces, rows=at_rows, columns=at_columns, moments=_of_targets(sample, found, rows))


def _spread(n: int, share: float) -> NDArray[np.int64]:
    """Evenly spread ones of n, about that share of them, at least one."""
    wanted = min(max(math.ceil(n * share), 1), n)
    return np.arange(wanted) * n // wanted


def _of_targets(sample: Sample, targets: NDArray[np.float32], rows: NDArray[np.int64]) -> Moments:
    """The moments by which targets of these rows, or of all rows for some columns, get their scales."""
    known = sample.moments
    squares = np.square(targets, dtype=np.float64)
    if sample.felt is not None and sample.felt.inputs is not None and sample.felt.inputs.axis == 0:
        return replace(known, rows=squares.mean(1))
    own = known.rows[rows, None]
    return replace(known, columns=np.divide(squares, own, out=np.zeros_like(squares), where=own > 0).mean(0))


def fit(samples: Iterable[Sample], bit_price: float, start: Model | None = None) -> Model:
    """The model that serves the sampled tensors best at `bit_price`.

    `start` is a model for another `bit_price`, to save time: where that is near, only its block sizes are looked at.
    Nothing in it is left to chance but the samples: EM starts from a lattice.

    Raises ValueError if `bit_price` is not positive or beyond what float32 can count in.
    """
    samples = [sample for sample in samples if sample.pieces.size]
    grid = float(np.float32(math.sqrt(bit_price) / GRID_PER_RATE)) if bit_price > 0 else 0.0
    if not is_grid(grid):
        raise ValueError(f"a rate weight of {bit_price}; it must be positive, and its root within 1e-29 .. 1e31")
    codebooks = []
    near = start is not None and 1 / NEAR <= grid / start.grid <= NEAR
    for d in start.block_sizes if start is not None and near else BLOCK_SIZES:
        parts = [_vectors(sample, d, grid) for sample in samples if sample.pieces.shape[1] >= d]
        if not parts:
            continue
        if start is not None and d in start.block_sizes:
            codebook = fit_codebook(_joined(parts), start.codebook(d), WARM)
        else:
            codebook = fit_codebook(_joined(parts))
        if codebook is not None:
            codebooks.append(codebook)
    if not codebooks:
        nothing = Vectors(np.zeros((1, 1), np.float32), np.zeros(1, np.int16), np.ones(1, np.float32))
        codebook = fit_codebook(nothing)
        return Model(grid, (codebook,) if codebook else ())
    return _thinned(Model(grid, tuple(codebooks)), samples)


def estimate(samples: Iterable[Sample], model: Model, bit_price: float) -> Estimate:
    """Bits and squared error of all sampled tensors, from the samples. The model's own bytes come on top."""
    bits = error = 0.0
    for sample in samples:
        plan = _plan(sample, model, bit_price)
        bits += plan.bits
        error += plan.squared_error * model.grid**2
    return Estimate(bits, error)


def encode(
    matrix: Tensor, model: Model, bit_price: float, *, scale: float = 1.0, seed: int = 0, felt: Felt | None = None
) -> Encoded:
    """`matrix` (rows, columns) as bytes. Needs about three times the matrix in memory; five times where it is `felt`.

    Raises ValueError if `matrix` holds NaN or infinity.
    """
    weights = _scaled(matrix, scale)
    if not weights.size:
        return Encoded(b"", torch.zeros(tuple(matrix.shape)))
    sample = draw(torch.from_numpy(weights), seed=seed, fraction=0.0, least=CHOOSE_FROM, felt=felt)
    plan = _plan(sample, model, bit_price)
    rate_weight = bit_price / model.grid**2
    parts = parts_of(weights.shape[0], weights.shape[1], plan.block_size, model)
    if felt is not None and felt.inputs is not None:
        coded = code(weights, parts, plan.scales, model.grid, rate_weight, felt)
        weights, found = coded.targets, coded.symbols
        plan = replace(plan, scales=coded.scales, has_rows=bool(coded.scales.rows.any()), has_blocks=True)
    else:
        of = None if felt is None else felt.importance[plan.block_size]
        by_row = None if of is None else of.rows * of.columns[0]
        found = tuple(
            _symbols(weights, part, part.classes(plan.scales), model.grid, rate_weight, by_row) for part in parts
        )
    head = _head(plan, scale)
    streams: list[bytes] = []
    for part, symbols in zip(parts, found, strict=True):
        classes = part.classes(plan.scales)
        streams += mapped(_StreamWriter(weights, part, classes, symbols, model.grid), part.streams)
    payload = head + b"".join(streams)
    return Encoded(payload, decode(payload, model, *weights.shape))


def decode(payload: bytes | memoryview, model: Model, rows: int, columns: int) -> Tensor:
    """The matrix (rows, columns) float32 in `payload`, as a tensor; see `payload.decode`."""
    return as_tensor(payloads.decode(payload, model, rows, columns))


# --- choosing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """How a matrix will be cut, and what that is expected to cost (error in grid units)."""

    block_size: int
    scales: Scales
    has_rows: bool
    has_blocks: bool
    bits: float
    squared_error: float


def _plan(sample: Sample, model: Model, bit_price: float) -> _Plan:
    """The cheapest way to cut the sampled matrix: first the block size, then which scales pay for themselves."""
    rate_weight = bit_price / model.grid**2
    width = sample.pieces.shape[1]
    small = sample.head(CHOOSE_FROM)

    def cost(plan: _Plan) -> float:
        return plan.squared_error + rate_weight * plan.bits

    sizes = [d for d in model.block_sizes if d <= width] or [1]
    best = min((_priced(small, model, d, rate_weight, rows=True, blocks=True) for d in sizes), key=cost)
    others = ((True, False), (False, True), (False, False))
    return min(
        [best, *(_priced(small, model, best.block_size, rate_weight, rows=r, blocks=b) for r, b in others)], key=cost
    )


def _priced(sample: Sample, model: Model, block_size: int, rate_weight: float, *, rows: bool, blocks: bool) -> _Plan:
    codebook = model.codebook(block_size)
    of = scales(sample.moments, block_size, model.grid).flat(rows=rows, blocks=blocks)
    vectors = _vectors(sample, block_size, model.grid, of)
    chosen = choose(vectors.values, codebook.classes(vectors.scales), codebook, rate_weight, vectors.importance)
    factor = sample.shape[0] * sample.shape[1] / max(vectors.values.size, 1)
    plan = _Plan(block_size, of, rows, blocks, 0.0, chosen.squared_error * factor)
    return replace(plan, bits=chosen.bits * factor + 8 * (len(_head(plan, 1.0)) + ans.STATE_BYTES))


def _vectors(sample: Sample, block_size: int, grid: float, of: Scales | None = None) -> Vectors:
    """The sample as vectors in grid units, with their scales."""
    of = of or scales(sample.moments, block_size, grid)
    n_blocks = sample.pieces.shape[1] // block_size
    pieces = in_grid_units(sample.pieces[:, : n_blocks * block_size], grid)
    at = sample.columns[:, None] // block_size + np.arange(n_blocks)
    scale = of.base + of.rows[sample.rows, None].astype(np.int32) + of.blocks[at]
    weight = sample.shape[0] * sample.shape[1] / max(pieces.size, 1)
    values = pieces.reshape(-1, block_size)
    weights = np.full(len(values), weight, np.float32)
    return Vectors(values, scale.reshape(-1).astype(np.int16), weights, _importance(sample, block_size, n_blocks))


def _importance(sample: Sample, block_size: int, n_blocks: int) -> NDArray[np.float32] | None:
    """What the squared errors of the sample's vectors count, (n, d)."""
    if sample.felt is None:
        return None
    of = sample.felt.importance[block_size]
    columns = sample.columns[:, None] + np.arange(n_blocks * block_size)
    factors: NDArray[np.float32] = (of.rows[sample.rows, None] * of.columns[columns]).reshape(-1, block_size)
    return factors


def _joined(parts: Sequence[Vectors]) -> Vectors:
    return Vectors(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate([part.weights for part in parts]),
        np.concatenate([_weighed(part) for part in parts]) if any(p.importance is not None for p in parts) else None,
    )


def _weighed(part: Vectors) -> NDArray[np.float32]:
    return np.ones_like(part.values) if part.importance is None else part.importance


def _thinned(model: Model, samples: Sequence[Sample]) -> Model:
    """`model` without the codebooks that cost more than they save; the one for single values always stays."""
    rate_weight = float(GRID_PER_RATE**2)
    model_cost = {
        codebook.block_size: 8 * rate_weight * len(Model(model.grid, (codebook,)).to_bytes())
        for codebook in model.codebooks
    }
    costs = []
    for sample in samples:
        small = sample.head(CHOOSE_FROM)
        plans = [
            _priced(small, model, d, rate_weight, rows=True, blocks=True)
            for d in model.block_sizes
            if d <= sample.pieces.shape[1]
        ]
        costs.append({plan.block_size: plan.squared_error + rate_weight * plan.bits for plan in plans})
    optional = [d for d in model.block_sizes if d > 1]
    subsets = [(1, *chosen) for n in range(len(optional) + 1) for chosen in combinations(optional, n)]

    def total(subset: tuple[int, ...]) -> float:
        paid = sum(model_cost[d] for d in subset)
        return paid + sum(min(cost for d, cost in of.items() if d in subset) for of in costs)

    best = min(subsets, key=total)
    return Model(model.grid, tuple(codebook for codebook in model.codebooks if codebook.block_size in best))


# --- coding ---------------------------------------------------------------------------------------------------------


def _symbols(
    weights: NDArray[np.float32],
    part: Part,
    classes: NDArray[np.uint8],
    grid: float,
    rate_weight: float,
    importance: NDArray[np.float32] | None = None,
) -> NDArray[np.uint16]:
    """The symbol of every vector of `part`, found a chunk at a time; `importance` (rows,) is that of rows."""
    d = part.codebook.block_size
    symbols = np.empty((part.rows, part.per_row), np.uint16)
    by_row = classes.reshape(part.rows, part.per_row)
    wide = max(1, CHUNK // d)
    tall = max(1, CHUNK // (d * part.per_row))
    for r in range(0, part.rows, tall):
        for b in range(0, part.per_row, wide):
            stop = min(b + wide, part.per_row)
            piece = weights[r : r + tall, part.first_column + b * d : part.first_column + stop * d]
            vectors = in_grid_units(piece, grid).reshape(-1, d)
            felt = None if importance is None else np.repeat(importance[r : r + tall], stop - b)[:, None]
            chosen = choose(vectors, by_row[r : r + tall, b:stop].reshape(-1), part.codebook, rate_weight, felt)
            symbols[r : r + tall, b:stop] = chosen.symbols.reshape(-1, stop - b)
    return symbols.reshape(-1)


def _head(plan: _Plan, scale: float) -> bytes:
    return head_of(plan.block_size, plan.scales, scale, has_rows=plan.has_rows, has_blocks=plan.has_blocks)


@dataclass(frozen=True)
class _StreamWriter:
    """Symbols -> bytes, one stream at a time: lengths, coded symbols, side bits."""

    weights: NDArray[np.float32]
    part: Part
    classes: NDArray[np.uint8]
    symbols: NDArray[np.uint16]
    grid: float

    def __call__(self, span: tuple[int, int]) -> bytes:
        from pqcli.core.ecpq import loops

        start, stop = span
        codebook = self.part.codebook
        symbols = self.symbols[start:stop]
        coded = ans.encode(symbols, self.classes[start:stop], codebook.tables)
        escapes = int((symbols == 0).sum())
        most = int(codebook.n_signs[symbols].sum(dtype=np.int64)) + escapes * codebook.block_size * loops.MAX_SIDE_BITS
        side = np.zeros(-(-most // 8), np.uint8)
        n_bits = loops.write_side(
            self.weights,
            self.part.first_column,
            start,
            symbols,
            codebook.magnitudes,
            self.part.per_row,
            self.grid * ESCAPE_STEP,
            side,
        )
        used = side[: -(-n_bits // 8)].tobytes()
        n_words = (len(coded) - ans.STATE_BYTES) // 4
        return bitfields.varint(n_words) + bitfields.varint(len(used)) + coded + used


def _scaled(matrix: Tensor, scale: float) -> NDArray[np.float32]:
    """`matrix` / `scale` as a contiguous float32 array."""
    if not (math.isfinite(scale) and np.float32(scale) > 0):
        raise ValueError(f"a scale of {scale}")
    weights = matrix.detach().float().contiguous().numpy()
    if scale != 1:
        weights = weights / np.float32(scale)
    if weights.size and not math.isfinite(float(weights.max()) - float(weights.min())):
        raise ValueError("NaN or infinite values cannot be quantized")
    return weights
