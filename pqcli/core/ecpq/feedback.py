"""Entropy-constrained PQ where errors are not all felt alike: their importance, and errors fed forward.

What an error costs goes by its input (of a layer whose inputs' moments are known) or its row (of an embedding). The
codebooks and the price of a bit stay what all tensors share: where errors are felt little, fewer bits are spent on them
because symbols that take few bits come first there. As plain PQ does (`pqcli.core.feeding`), the blocks of a row are
coded in order with the errors of blocks before fed forward; the scale of a block of columns, which decides its tables,
is then what the targets turned out to need.

Shapes: matrix (rows, columns); targets like it: what is coded in the end; symbols (rows * per_row,) for each part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from pqcli.core.ecpq.model import BLOCK_SIZES, ESCAPE_STEP, Codebook
from pqcli.core.ecpq.payload import Scales
from pqcli.core.ecpq.search import (
    FARTHEST,
    HIGHEST_SCALE,
    LOWEST_SCALE,
    in_grid_units,
    quarter_octaves,
)
from pqcli.core.feeding import Inputs, coded_order, factored, fed_forward, groups_of, places_of, within
from pqcli.core.importance import Importance
from pqcli.core.kernels.repeated import Repeated

if TYPE_CHECKING:
    from pqcli.core.ecpq.payload import Part

Matrix = NDArray[np.float32]

RUN: Final = max(BLOCK_SIZES)
"""Columns that stay together in the order of coding, whatever the block size."""
LEAST: Final = 1e-12
"""The least importance."""
TRIED_SHIFTS: Final = np.arange(-10, 5)
"""Scales of a block that are tried for it once its symbols are known, relative to that of its targets."""


@dataclass(frozen=True)
class Felt:
    """How much errors of a matrix are felt: their importance, by block size; `inputs` where they can be fed forward.

    Importance has geometric mean 1 for single weights; steps finer or coarser than that asks for gain nothing. That of
    larger blocks is higher, because errors within a block do not make up for each other.
    """

    importance: Mapping[int, Importance]
    inputs: Inputs | None = None

    @classmethod
    def by_rows(cls, rows: NDArray[np.float64], n_columns: int) -> Felt:
        """Of an embedding."""
        importance = Importance.of_rows(rows.astype(np.float32), n_columns).normalised()
        return cls(dict.fromkeys(BLOCK_SIZES, importance))

    @classmethod
    def by_inputs(cls, inputs: Inputs, shape: tuple[int, int]) -> Felt:
        """Of a layer."""
        order = _Order.of(inputs)
        found = {}
        for d in BLOCK_SIZES:
            felt = np.empty(len(order.pivots), np.float32)
            groups = order.groups(d)
            for group, own in zip(groups, within(order.factor, groups), strict=True):
                felt[order.places[group]] = np.square(own) @ order.pivots[group]
            felt = np.maximum(felt / order.typical, LEAST).astype(np.float32)
            is_by_column = inputs.axis == 1
            found[d] = Importance.of_columns(felt, shape[0]) if is_by_column else Importance.of_rows(felt, shape[1])
        return cls(found, inputs)


@dataclass(frozen=True)
class _Order:
    """A layer's inputs in the order in which they are coded, and what is fed forward in it."""

    places: NDArray[np.int64]
    factor: Matrix
    pivots: NDArray[np.float64]
    axis: int

    @classmethod
    def of(cls, inputs: Inputs) -> _Order:
        width = RUN if inputs.axis == 1 else 1
        n = len(inputs.moments)
        places = places_of(coded_order(inputs.mean_squares, width), width, n)
        factor, pivots = factored(inputs.believed()[np.ix_(places, places)])
        return cls(places, factor, pivots, inputs.axis)

    @property
    def typical(self) -> float:
        """What the error of a typical input costs."""
        return float(np.exp(np.mean(np.log(np.maximum(self.pivots, 1e-30)))))

    def groups(self, block_size: int) -> list[slice]:
        """Runs of inputs, in coded order, that are coded together: blocks, and single columns that are left over."""
        n = len(self.places)
        if self.axis == 0:
            return groups_of(n, 1)
        blocks = groups_of(n - n % block_size, block_size)
        return blocks + [slice(i, i + 1) for i in range(n - n % block_size, n)]


@dataclass(frozen=True)
class Fed:
    """What feeding errors forward came to: what was coded in the end, its symbols by part, and the scales used."""

    targets: Matrix
    symbols: tuple[NDArray[np.uint16], ...]
    scales: Scales


def code(weights: Matrix, parts: Sequence[Part], of: Scales, grid: float, rate_weight: float, felt: Felt) -> Fed:
    """Symbols for a matrix whose errors are fed forward; `of` are the scales of its weights.

    Raises ValueError where nothing is known of its inputs.
    """
    if felt.inputs is None:
        raise ValueError("there are no inputs along which errors could be fed forward")
    order = _Order.of(felt.inputs)
    coder = (_Columns if felt.inputs.axis == 1 else _Rows)(weights, parts, of, grid, rate_weight, felt)
    ordered = coder.inputs_of(weights)[order.places]
    groups = order.groups(parts[0].codebook.block_size)
    felt_as: list[Matrix] = [np.linalg.inv(own).T for own in within(order.factor, groups)]

    def one(i: int, group: slice, reached: Matrix) -> Matrix:
        target: Matrix = ordered[group] + (felt_as[i] @ reached if len(reached) > 1 else reached)
        return coder.code(int(order.places[group.start]), target)

    fed_forward(ordered, order.factor, groups, one)
    return coder.fed()


class _Searched:
    """A codebook as vectors ask for it whose scale is that of their group plus a share of their own that stays.

    Vectors (n, d) come in the order of that share: those of one table are then a run, and are searched for together.
    """

    def __init__(
        self, codebook: Codebook, shares: NDArray[np.int32], grid: float, rate_weight: float, n_vectors: int
    ) -> None:
        self.codebook, self.grid, self.rate_weight = codebook, grid, rate_weight
        self.shares, starts = np.unique(shares, return_index=True)
        self.ends = np.append(starts[1:], len(shares)).astype(np.int64)
        self.which = np.repeat(np.arange(len(self.shares)), np.diff(self.ends, prepend=0))
        orbits = codebook.magnitudes.astype(np.float32)
        self.lengths = -0.5 * np.square(orbits)
        self.prices = (-0.5 * rate_weight * codebook.bits[:, 1:]).astype(np.float32)
        self.spelt = np.concatenate([np.zeros((1, orbits.shape[1]), np.float32), orbits * np.float32(grid)])
        self.farthest = np.float32(FARTHEST * float(orbits.max(initial=1)))
        self.search = Repeated(orbits, n_vectors)

    def chosen(self, values: Matrix, own: int, importance: NDArray[np.float32]) -> tuple[NDArray[np.uint16], Matrix]:
        """Symbols of the vectors of a group, and what they decode to; importance (d,), of a group whose share is `own`.

        What is searched for is the orbit c that maximises sum of q x c - q c^2 / 2, less half of what its bits cost.
        """
        from pqcli.core.ecpq import loops

        vectors = in_grid_units(values, self.grid)
        weighed = np.minimum(vectors, self.farthest) * importance
        lengths = self.lengths @ importance
        tables = self.codebook.classes(self.shares + own)
        symbols = np.empty(len(vectors), np.uint16)
        start = 0
        for table, stop, following in zip(tables, self.ends.tolist(), [*tables[1:], None], strict=True):
            if table != following:
                bias = self.prices[table] + lengths
                symbols[start:stop] = self.search.assigned(weighed[start:stop], bias) + 1
                start = stop
        loops.settle(
            vectors,
            importance[None, :],
            tables[self.which],
            self.codebook.magnitudes,
            self.codebook.bits,
            self.rate_weight,
            float(ESCAPE_STEP),
            symbols,
        )
        return symbols, self._decoded(values, symbols)

    def _decoded(self, values: Matrix, symbols: NDArray[np.uint16]) -> Matrix:
        found = self.spelt.take(symbols, 0)
        if not symbols.all():
            escaped, step = symbols == 0, self.grid * ESCAPE_STEP
            found[escaped] = np.floor(np.abs(values[escaped]) / step + 0.5) * step
        signed: Matrix = np.copysign(found, values)
        return signed

    def cheapest(self, own: int, symbols: NDArray[np.uint16]) -> int:
        """The share of a group whose tables spell its symbols in the fewest bits."""
        from pqcli.core.ecpq import loops

        tried = np.clip(own + TRIED_SHIFTS, LOWEST_SCALE, HIGHEST_SCALE)
        tables = self.codebook.classes(self.shares[None, :] + tried[:, None])
        bits = np.zeros(len(tried))
        loops.count_bits(symbols, self.which, tables, self.codebook.bits, bits)
        return int(tried[int(np.argmin(bits))])


def _in_order(shares: NDArray[np.integer]) -> NDArray[np.int64]:
    order: NDArray[np.int64] = np.argsort(shares, kind="stable")
    return order


class _Columns:
    """Codes blocks of columns as their turn comes; a block's scale is that of its targets.

    Rows are taken in the order of their scales throughout.
    """

    def __init__(
        self, weights: Matrix, parts: Sequence[Part], of: Scales, grid: float, rate_weight: float, felt: Felt
    ) -> None:
        self.parts, self.grid, self.scales = parts, grid, replace(of, blocks=of.blocks.copy())
        self.importance = [felt.importance[part.codebook.block_size] for part in parts]
        self.order = _in_order(of.rows)
        shares = of.base + of.rows[self.order].astype(np.int32)
        self.loudness: NDArray[np.float64] = 1 / (grid**2 * 2.0 ** (shares / 2.0))
        n_rows = weights.shape[0]
        self.searched = [_Searched(part.codebook, shares, grid, rate_weight, n_rows * part.per_row) for part in parts]
        self.targets = np.empty(weights.shape[::-1], np.float32)
        self.symbols = [np.empty((part.per_row, n_rows), np.uint16) for part in parts]

    def inputs_of(self, weights: Matrix) -> Matrix:
        """The weights (columns, rows), rows in order."""
        found: Matrix = weights.T[:, self.order]
        return found

    def code(self, column: int, target: Matrix) -> Matrix:
        """Code the columns (d, rows) from `column` on; what they decode to."""
        d = len(target)
        number = 0 if column < self.parts[0].per_row * self.parts[0].codebook.block_size else 1
        place = (column - self.parts[number].first_column) // d
        block = column // self.parts[0].codebook.block_size
        if number == 0:
            relative = float(np.square(target).mean(0) @ self.loudness) / max(len(self.loudness), 1)
            self.scales.blocks[block] = quarter_octaves(np.array([relative]))[0]
        of = self.importance[number]
        importance = np.asarray(of.columns[column : column + d] * of.rows[0], np.float32)
        own = int(self.scales.blocks[block])
        symbols, decoded = self.searched[number].chosen(np.ascontiguousarray(target.T), own, importance)
        if number == 0:
            self.scales.blocks[block] = self.searched[number].cheapest(own, symbols)
        self.symbols[number][place] = symbols
        self.targets[column : column + d] = target
        return decoded.T

    def fed(self) -> Fed:
        """All of it, in the order of the matrix."""
        back = np.argsort(self.order)
        symbols = tuple(np.ascontiguousarray(found[:, back].T).reshape(-1) for found in self.symbols)
        return Fed(np.ascontiguousarray(self.targets[:, back].T), symbols, self.scales)


class _Rows:
    """Codes single rows, of weights stored transposed; a row's scale is that of its targets."""

    def __init__(
        self, weights: Matrix, parts: Sequence[Part], of: Scales, grid: float, rate_weight: float, felt: Felt
    ) -> None:
        self.parts, self.grid, self.scales = parts, grid, replace(of, rows=of.rows.copy())
        self.importance = [felt.importance[part.codebook.block_size] for part in parts]
        blocks = [part.blocks(of).astype(np.int32) for part in parts]
        self.orders = [_in_order(shares) for shares in blocks]
        self.searched = [
            _Searched(part.codebook, of.base + shares[order], grid, rate_weight, len(weights) * part.per_row)
            for part, shares, order in zip(parts, blocks, self.orders, strict=True)
        ]
        self.targets = np.empty_like(weights)
        self.symbols = [np.empty((part.rows, part.per_row), np.uint16) for part in parts]

    def inputs_of(self, weights: Matrix) -> Matrix:
        """The weights as they are: rows belong to inputs."""
        return weights

    def code(self, row: int, target: Matrix) -> Matrix:
        """Code a row (1, columns); what it decodes to, likewise."""
        values = target[0]
        self.targets[row] = values
        mean_square = np.mean(np.square(values, dtype=np.float64)) / self.grid**2
        own = int(quarter_octaves(np.array([mean_square]))[0]) - self.scales.base
        own = min(max(own, LOWEST_SCALE), HIGHEST_SCALE)
        self.scales.rows[row] = own
        found: Matrix = np.empty_like(target)
        for number, (part, order) in enumerate(zip(self.parts, self.orders, strict=True)):
            d = part.codebook.block_size
            inside = slice(part.first_column, part.first_column + part.per_row * d)
            of = self.importance[number]
            importance = np.full(d, of.rows[row] * of.columns[0], np.float32)
            symbols, decoded = self.searched[number].chosen(values[inside].reshape(-1, d)[order], own, importance)
            self.symbols[number][row, order] = symbols
            found[0, inside].reshape(-1, d)[order] = decoded
        return found

    def fed(self) -> Fed:
        """All of it."""
        return Fed(self.targets, tuple(found.reshape(-1) for found in self.symbols), self.scales)
