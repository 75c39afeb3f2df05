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
import torch
from numpy.typing import NDArray

from pqcli.core import kernels
from pqcli.core.ecpq.model import BLOCK_SIZES, ESCAPE_STEP, Codebook
from pqcli.core.ecpq.search import (
    FARTHEST,
    HIGHEST_SCALE,
    LOWEST_SCALE,
    Scales,
    in_grid_units,
    quarter_octaves,
)
from pqcli.core.feeding import Inputs, coded_order, factored, fed_forward, groups_of, places_of, within
from pqcli.core.importance import Importance

if TYPE_CHECKING:
    from pqcli.core.ecpq.ecpq import Part

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
            for group in order.groups(d):
                own = within(order.factor, group)
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
    is_by_column = felt.inputs.axis == 1
    coder = (_Columns if is_by_column else _Rows)(parts, of, grid, rate_weight, felt, np.empty_like(weights))
    ordered = np.ascontiguousarray((weights.T if is_by_column else weights)[order.places])

    def one(_i: int, group: slice, reached: Matrix) -> Matrix:
        own = within(order.factor, group)
        target = ordered[group] + (np.linalg.inv(own).T @ reached if len(own) > 1 else reached)
        return coder.code(int(order.places[group.start]), target.T).T

    fed_forward(ordered, order.factor, order.groups(parts[0].codebook.block_size), one)
    return Fed(coder.targets, tuple(found.reshape(-1) for found in coder.symbols), coder.scales)


class _Coder:
    """Codes groups of inputs as their turn comes, into arrays of the whole matrix."""

    def __init__(
        self, parts: Sequence[Part], of: Scales, grid: float, rate_weight: float, felt: Felt, targets: Matrix
    ) -> None:
        self.parts, self.grid, self.rate_weight, self.targets = parts, grid, rate_weight, targets
        self.importance = [felt.importance[part.codebook.block_size] for part in parts]
        self.orbits = [part.codebook.magnitudes.astype(np.float32) for part in parts]
        self.prices = [(-0.5 * rate_weight * part.codebook.bits[:, 1:]).astype(np.float32) for part in parts]
        self.scales = replace(of, rows=of.rows.copy(), blocks=of.blocks.copy())
        self.symbols = [np.empty((part.rows, part.per_row), np.uint16) for part in parts]

    def chosen(
        self, number: int, values: Matrix, scale: NDArray[np.integer], importance: NDArray[np.float32]
    ) -> NDArray[np.uint16]:
        """Symbols of vectors (n, d) of part `number`, of that scale and importance (d,)."""
        from pqcli.core.ecpq import loops

        codebook, root = self.parts[number].codebook, np.sqrt(importance)
        vectors = in_grid_units(values, self.grid)
        classes = codebook.classes(scale)
        order = np.argsort(classes, kind="stable")
        orbits = self.orbits[number] * root
        lengths = -0.5 * np.square(orbits).sum(1)
        near = np.minimum(vectors, np.float32(FARTHEST * float(self.orbits[number].max(initial=1)))) * root
        grouped, codewords = torch.from_numpy(near[order]), torch.from_numpy(orbits)
        symbols = np.empty(len(vectors), np.uint16)
        start = 0
        for c, n in enumerate(np.bincount(classes)):
            if n:
                bias = torch.from_numpy(self.prices[number][c] + lengths)
                best = kernels.sweep(grouped[start : start + n], codewords, bias, accumulate=False, backend="cpu")
                symbols[order[start : start + n]] = best.assignments.numpy() + 1
            start += n
        loops.settle(
            vectors,
            np.ascontiguousarray(np.broadcast_to(importance, vectors.shape)),
            classes,
            codebook.magnitudes,
            codebook.bits,
            self.rate_weight,
            float(ESCAPE_STEP),
            symbols,
        )
        return symbols

    def decoded(self, values: Matrix, symbols: NDArray[np.uint16], codebook: Codebook) -> Matrix:
        """What the symbols of vectors (n, d) decode to."""
        found = codebook.magnitudes[np.maximum(symbols, 1) - 1].astype(np.float32) * np.float32(self.grid)
        escaped = symbols == 0
        if escaped.any():
            step = self.grid * ESCAPE_STEP
            found[escaped] = np.floor(np.abs(values[escaped]) / step + 0.5) * step
        signed: Matrix = np.copysign(found, values)
        return signed


class _Columns(_Coder):
    """Groups are blocks of columns; a block's scale is that of its targets."""

    def code(self, column: int, target: Matrix) -> Matrix:
        """Code the columns (rows, d) from `column` on; what they decode to."""
        d = target.shape[1]
        number = 0 if column < self.parts[0].per_row * self.parts[0].codebook.block_size else 1
        part = self.parts[number]
        place = (column - part.first_column) // d
        block = column // self.parts[0].codebook.block_size
        rows = self.scales.base + self.scales.rows.astype(np.int32)
        if number == 0:
            relative = np.mean(np.square(target, dtype=np.float64).mean(1) / (self.grid**2 * 2.0 ** (rows / 2)))
            self.scales.blocks[block] = quarter_octaves(np.array([relative]))[0]
        of = self.importance[number]
        importance = of.columns[column : column + d] * of.rows[0]
        symbols = self.chosen(number, target, rows + self.scales.blocks[block], importance)
        if number == 0:
            self.scales.blocks[block] = self._cheapest(rows, int(self.scales.blocks[block]), symbols, part.codebook)
        self.symbols[number][:, place] = symbols
        self.targets[:, column : column + d] = target
        return self.decoded(target, symbols, part.codebook)

    @staticmethod
    def _cheapest(rows: NDArray[np.int32], block: int, symbols: NDArray[np.uint16], codebook: Codebook) -> int:
        """The scale of a block whose tables spell its symbols in the fewest bits."""
        tried = np.clip(block + TRIED_SHIFTS, LOWEST_SCALE, HIGHEST_SCALE)
        bits = codebook.bits[codebook.classes(rows[None, :] + tried[:, None]), symbols[None, :]].sum(1)
        return int(tried[int(np.argmin(bits))])


class _Rows(_Coder):
    """Groups are single rows, of weights stored transposed; a row's scale is that of its targets."""

    def code(self, row: int, target: Matrix) -> Matrix:
        """Code a row, given as (columns, 1); what it decodes to, likewise."""
        values = target[:, 0]
        self.targets[row] = values
        mean_square = np.mean(np.square(values, dtype=np.float64)) / self.grid**2
        own = int(quarter_octaves(np.array([mean_square]))[0]) - self.scales.base
        self.scales.rows[row] = np.clip(own, LOWEST_SCALE, HIGHEST_SCALE)
        found = np.empty_like(values)
        for number, part in enumerate(self.parts):
            d, blocks = part.codebook.block_size, part.blocks(self.scales)
            inside = slice(part.first_column, part.first_column + part.per_row * d)
            vectors = values[inside].reshape(-1, d)
            scale = self.scales.base + int(self.scales.rows[row]) + blocks.astype(np.int32)
            of = self.importance[number]
            importance = np.full(d, of.rows[row] * of.columns[0], np.float32)
            symbols = self.chosen(number, vectors, scale, importance)
            self.symbols[number][row] = symbols
            found[inside] = self.decoded(vectors, symbols, part.codebook).reshape(-1)
        return found[:, None]
