"""`--codec auto`: which way of coding serves each tensor best, measured on a sample, at one price for bits.

Every way is charged for the error it makes and for the bits it takes: cost = squared error / step^2 + 0.3 * bits, by
weight. The same price holds for all tensors, so the choices add up to the best file. The ways:

    trellis    the codec for whole checkpoints; wins nearly everywhere
    ecpq       entropy-constrained PQ, for comparison: one file holds one codec for whole checkpoints
    exact      plain PQ whose codebook holds every distinct block: no error; wins for weights of few distinct values
    keep       the tensor itself, coded without loss
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.codecs.coders import DRAFT_STATES, RATE_WEIGHT
from pqcli.codecs.rate.coding import Survey, as_matrix
from pqcli.container import Record
from pqcli.core.entropy import lossless
from pqcli.core.pq import packing
from pqcli.core.trellis.sources import Source

SAMPLE_WEIGHTS: Final = 1 << 16
FEW_VALUES: Final = 256
"""Tensors with more distinct values than this in a sample are not tried as exact PQ."""
EXACT_BLOCK_SIZES: Final = (1, 2, 4, 8)

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """One way to code a tensor: what it takes and what error it makes, by weight, on the sample."""

    way: str
    bits_per_weight: float
    relative_mse: float
    cost: float
    block_size: int | None = None
    n_centroids: int | None = None


@dataclass(frozen=True)
class Choice:
    """The candidates for one tensor, the cheapest first; `winner` is the cheapest that the file can hold."""

    name: str
    candidates: tuple[Candidate, ...] = field(default_factory=tuple)

    @property
    def winner(self) -> Candidate:
        """The way that is taken."""
        return next(candidate for candidate in self.candidates if candidate.way != "ecpq")


def choose(survey: Survey, read: Read, level: float, objective: float) -> list[Choice]:
    """The choice for every surveyed tensor at a level (in weight units)."""
    steps = survey.steps(objective).at(level)
    matrices = {record.name: _sampled(as_matrix(read(record.name), record), record) for record in survey.records}
    model = _ecpq_model(matrices, steps, level)
    return [_choice(record, read, matrices[record.name], steps[record.name], level, model) for record in survey.records]


def exact_record(record: Record, candidate: Candidate) -> Record:
    """The record of a tensor that plain PQ holds exactly."""
    dtype = "float16" if record.dtype == "float16" else "float32"
    return replace(
        record, action="pq", reason=f"{record.reason}; few distinct values, held exactly", kernel=1,
        block_size=candidate.block_size, n_centroids=candidate.n_centroids, codebook_dtype=dtype,
    )  # fmt: skip


def _choice(
    record: Record, read: Read, matrix: NDArray[np.float32], step: float, level: float, model: object
) -> Choice:
    energy = max(float(np.square(matrix, dtype=np.float64).sum()), 1e-300)

    def candidate(
        way: str, bits: float, squared_error: float, block: int | None = None, k: int | None = None
    ) -> Candidate:
        cost = (squared_error / step**2 + RATE_WEIGHT * bits) / matrix.size
        return Candidate(way, bits / matrix.size, squared_error / energy, cost, block, k)

    found = [candidate("trellis", *_trellis_cost(record, matrix, step))]
    found.append(candidate("ecpq", *_ecpq_cost(matrix, step, level, model)))
    weight = read(record.name)
    scale = matrix.size / record.info.numel
    exact = _exact(weight, record)
    if exact is not None:
        block_size, k, n_bytes = exact
        found.append(candidate("exact", 8 * n_bytes * scale, 0.0, block_size, k))
    kept = lossless.compress(
        [_bytes_of(weight)[: matrix.size * weight.element_size()].view(f"<u{weight.element_size()}")]
    )
    found.append(candidate("keep", 8 * len(kept), 0.0))
    return Choice(record.name, tuple(sorted(found, key=lambda item: item.cost)))


def _sampled(matrix: NDArray[np.float32], record: Record) -> NDArray[np.float32]:
    """Rows spread over the matrix, about `SAMPLE_WEIGHTS` weights of them; whole kernels where it is a single row."""
    rows, columns = matrix.shape
    n_rows = max(1, min(rows, SAMPLE_WEIGHTS // max(columns, 1)))
    columns = min(columns, -(-SAMPLE_WEIGHTS // record.kernel) * record.kernel)
    chosen = np.linspace(0, rows - 1, n_rows).astype(np.int64)
    return np.ascontiguousarray(matrix[chosen, :columns])


def _trellis_cost(record: Record, matrix: NDArray[np.float32], step: float) -> tuple[float, float]:
    from pqcli.core.trellis import trellis

    rows, columns = matrix.shape
    source = Source(record.name, record.shape, rows, columns, record.kernel)
    params = trellis.TrellisParams(step, DRAFT_STATES, RATE_WEIGHT)

    def read(_key: str) -> NDArray[np.float32]:
        return matrix

    rotations = trellis.fit_rotations([source], read, {record.name: step})
    encoded = trellis.encode([source], read, params, rotations)
    return 8.0 * encoded.n_bytes, encoded.squared_errors[record.name]


def _ecpq_model(matrices: dict[str, NDArray[np.float32]], steps: dict[str, float], level: float) -> object:
    from pqcli.core.ecpq import ecpq

    samples = [
        ecpq.draw(torch.from_numpy(matrix), scale=steps[name] / level, least=1 << 13)
        for name, matrix in matrices.items()
    ]
    return ecpq.fit(samples, RATE_WEIGHT * level**2)


def _ecpq_cost(matrix: NDArray[np.float32], step: float, level: float, model: object) -> tuple[float, float]:
    from pqcli.core.ecpq import ecpq

    scale = step / level
    price = RATE_WEIGHT * level**2
    encoded = ecpq.encode(torch.from_numpy(matrix), model, price, scale=scale)  # type: ignore[arg-type]
    error = float(np.square(encoded.decoded.numpy().astype(np.float64) - matrix).sum())
    return 8.0 * len(encoded.payload), error


def _bytes_of(weight: torch.Tensor) -> NDArray[np.uint8]:
    return weight.contiguous().reshape(-1).view(torch.uint8).numpy()


def _exact(weight: torch.Tensor, record: Record) -> tuple[int, int, int] | None:
    """(block_size, n_centroids, bytes) of the smallest plain PQ that holds every block; None where values are many."""
    flat = weight.reshape(-1)
    if any(_n_distinct(part.view(-1, 1)) > FEW_VALUES for part in (flat[: 16 * FEW_VALUES], flat)):
        return None
    rows, columns = record.matrix_shape
    best: tuple[int, int, int] | None = None
    for block_size in EXACT_BLOCK_SIZES:
        if columns % block_size:
            continue
        k = _n_distinct(weight.reshape(-1, block_size))
        if k > 1 << packing.MAX_BITS:
            break
        codebook = k * block_size * (2 if weight.dtype == torch.float16 else 4)
        n_bytes = codebook + packing.packed_bytes(rows * columns // block_size, packing.n_bits(k))
        if best is None or n_bytes < best[2]:
            best = block_size, k, n_bytes
    return best


def _n_distinct(vectors: torch.Tensor) -> int:
    return len(vectors.unique(dim=0))  # type: ignore[no-untyped-call]
