"""`--codec auto`: which way of coding serves each tensor best, measured on a sample, at one price for bits.

Every way is charged for the error it makes and for the bits it takes: cost = squared error / step^2 + 0.3 * bits, by
weight. The same price holds for all tensors, so the choices add up to the best file. The ways:

    trellis    wins nearly everywhere
    exact      plain PQ whose codebook holds every distinct block: no error; wins for weights of few distinct values
    keep       the tensor itself, coded without loss
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.codecs.base import Matrix, Survey, Tell, Weights, as_matrix, source_of
from pqcli.codecs.difference import exact_difference
from pqcli.codecs.kept import KeptJob, as_words
from pqcli.codecs.plain import PlainJob
from pqcli.codecs.rate.steps import RATE_WEIGHT, steps_of
from pqcli.codecs.trellis.session import DRAFT_STATES
from pqcli.core.digests import seed_of, tensor_bytes
from pqcli.core.entropy import lossless
from pqcli.core.pq import em, packing
from pqcli.core.trellis.params import TrellisParams
from pqcli.core.trellis.rotation import fit_rotations
from pqcli.core.trellis.trellis import encode
from pqcli.tensors.records import Coded, Plain, Record

if TYPE_CHECKING:
    from pqcli.codecs.base import Job

SAMPLE_WEIGHTS: Final = 1 << 16
FEW_VALUES: Final = 256
"""Tensors with more distinct values than this in a sample are not tried as exact PQ."""
EXACT_BLOCK_SIZES: Final = (1, 2, 4, 8)


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
    """The candidates for one tensor, the cheapest first."""

    name: str
    candidates: tuple[Candidate, ...] = field(default_factory=tuple)

    @property
    def winner(self) -> Candidate:
        """The way that is taken."""
        return self.candidates[0]


def choose(survey: Survey, weights: Weights, objective: float, level: float, tell: Tell | None = None) -> list[Choice]:
    """The choice for every surveyed tensor at a level (in weight units)."""
    steps = steps_of(survey, objective).at(level)
    choices = []
    for record in survey.records:
        choices.append(_choice(record, weights, steps[record.name]))
        if tell is not None:
            tell(record.info.numel, record.name)
    return choices


def job_of(record: Record, winner: Candidate, weights: Weights, seed: int) -> Job:
    """The job of a tensor that is held exactly, or kept."""
    if winner.way == "keep":
        reason = f"keeping it costs no more than coding it ({winner.bits_per_weight:.1f} bits)"
        return KeptJob(record.kept(reason), weights, is_compact=True)
    options = em.Options(n_centroids=winner.n_centroids or 1, seed=seed_of(seed, record.name))
    return PlainJob(exact_record(record, winner), weights, options, is_compact=True)


def exact_record(record: Record, candidate: Candidate) -> Record:
    """The record of a tensor that plain PQ holds exactly."""
    rows = record.coding.rows if isinstance(record.coding, Coded) else None
    dtype = "float16" if record.info.dtype == "float16" else "float32"
    coding = Plain(candidate.block_size or 1, candidate.n_centroids or 1, dtype, rows)
    return replace(record, coding=coding, reason=f"{record.reason}; few distinct values, held exactly")


def _choice(record: Record, weights: Weights, step: float) -> Choice:
    original = weight = weights.coded(record.name)
    matrix = _sampled(as_matrix(weight, record), source_of(record).kernel)
    judged = matrix
    if record.difference:
        original = weights.original(record.name)
        judged = _sampled(as_matrix(original, record), source_of(record).kernel)
    energy = max(float(np.square(judged, dtype=np.float64).sum()), 1e-300)

    def candidate(
        way: str, bits: float, squared_error: float, block: int | None = None, k: int | None = None
    ) -> Candidate:
        cost = (squared_error / step**2 + RATE_WEIGHT * bits) / matrix.size
        return Candidate(way, bits / matrix.size, squared_error / energy, cost, block, k)

    found = [candidate("trellis", *_trellis_cost(record, matrix, step))]
    scale = matrix.size / record.info.numel
    exact = None if record.difference else _exact(weight, record)
    if exact is not None:
        block_size, k, n_bytes = exact
        found.append(candidate("exact", 8 * n_bytes * scale, 0.0, block_size, k))
    some = tensor_bytes(original)[: matrix.size * original.element_size()]
    kept_bytes = len(lossless.compress([as_words(some, record.info.dtype)]))
    base = weights.base(record.name)
    if base is not None and base.element_size() == original.element_size():
        other = exact_difference(some, base.reshape(-1)[: matrix.size], record.info.dtype)
        kept_bytes = min(kept_bytes, len(lossless.compress([as_words(other, record.info.dtype)])))
    found.append(candidate("keep", 8 * kept_bytes, 0.0))
    return Choice(record.name, tuple(sorted(found, key=lambda item: item.cost)))


def _sampled(matrix: Matrix, kernel: int) -> Matrix:
    """Rows spread over the matrix, about `SAMPLE_WEIGHTS` weights of them; whole kernels where it is a single row."""
    rows, columns = matrix.shape
    n_rows = max(1, min(rows, SAMPLE_WEIGHTS // max(columns, 1)))
    columns = min(columns, -(-SAMPLE_WEIGHTS // kernel) * kernel)
    chosen = np.linspace(0, rows - 1, n_rows).astype(np.int64)
    return np.ascontiguousarray(matrix[chosen, :columns])


def _trellis_cost(record: Record, matrix: Matrix, step: float) -> tuple[float, float]:
    rows, columns = matrix.shape
    source = replace(source_of(record), rows=rows, columns=columns)
    params = TrellisParams(step, DRAFT_STATES, RATE_WEIGHT)

    def read(_key: str) -> NDArray[np.float32]:
        return matrix

    rotations = fit_rotations([source], read, {record.name: step})
    encoded = encode([source], read, params, rotations)
    return 8.0 * encoded.n_bytes, encoded.squared_errors[record.name]


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
