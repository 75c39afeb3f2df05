"""Plain PQ: every tensor by itself, a codebook and packed assignments in entries of its own, random access.

A job is a tensor. Nothing is shared, so there is nothing to fit and no level to find.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.codecs import values, zeros
from pqcli.codecs.base import (
    Codec,
    Draft,
    Piece,
    Run,
    Session,
    StreamPiece,
    Survey,
    Tell,
    TensorTask,
    Use,
    Weights,
    record_of,
)
from pqcli.codecs.kept import KeptJob
from pqcli.codecs.plain import large
from pqcli.codecs.rate.survey import NOT_FINITE
from pqcli.core import metrics
from pqcli.core.arrays import as_array, as_tensor
from pqcli.core.digests import seed_of, tensor_bytes, tensor_hash
from pqcli.core.feeding import Inputs
from pqcli.core.importance import Importance
from pqcli.core.pq import em, packing, pq
from pqcli.core.second_order import Moments, RowImportance
from pqcli.errors import PQError
from pqcli.tensors.records import Plain, Record

if TYPE_CHECKING:
    from pqcli.codecs.statistics import Reading
    from pqcli.plan.plan import PlanEntry
    from pqcli.recipe.recipe import Recipe

WORKING_COPIES = 2
"""Memory that encoding a tensor takes, in copies of the tensor: the weights, and what they decode to."""
FED_COPIES = 4
"""And in copies in float32 where errors are fed forward: weights in coded order, errors, and what these are felt as."""

DOUBT: Final = 0.3
"""How far the mean squares of inputs are doubted (`feeding.Inputs`). Measured with tests/benchmarks/pq_statistics.py:
with it statistics of noise do not harm ResNet-20; those of images gain about 1 dB less, of 6 to 9, at its outputs.
Entropy-constrained PQ only loses by it."""


@dataclass(frozen=True)
class PlainJob(TensorTask):
    """Learn a tensor's codebook, and keep the tensor where that turns out not to pay.

    `statistics` know what the inputs of some tensors' layers look like.
    """

    record: Record
    weights: Weights
    options: em.Options
    is_compact: bool = False
    statistics: Reading | None = None

    @property
    def n_bytes(self) -> int:
        """Working copies of the tensor; of a large one, what is held of it."""
        if self.statistics is None and large.is_large(self.record, self.options, torch.device("cpu")):
            return large.held_bytes(self.record)
        n_bytes = WORKING_COPIES * self.record.info.n_bytes
        return n_bytes if self.statistics is None else n_bytes + FED_COPIES * 4 * self.n_weights

    def run(self, device: torch.device) -> Piece:
        """The tensor as plain PQ; EM runs on `device`."""
        if self._is_alone and large.is_large(self.record, self.options, device):
            piece = large.piece(self.record, self.weights, self.options)
            if piece is not None:
                return piece
        weight = self.weights.coded(self.record.name)
        if not pq.is_finite(weight):
            return self._kept(NOT_FINITE)
        exact = (
            None if self.record.difference else values.exact_or_none(self.record, weight, is_compact=self.is_compact)
        )
        if exact is not None:
            return exact
        encoded = self._encoded(weight, device)
        tensor, decoded, error = encoded.tensor, encoded.decoded, encoded.error
        record = replace(self.record, coding=_fitted(self.record, tensor))
        if record.difference:
            weight = self.weights.original(record.name)
            decoded = as_tensor(self.weights.restored(record, as_array(decoded)))
            error = metrics.compare(weight, decoded)
        held = zeros.held(record, weight)
        if held is not None:
            record = replace(record, zero_bytes=len(held))
            decoded = as_tensor(zeros.restored(as_array(decoded), record, held))
            error = metrics.compare(weight, decoded)
        if record.payload_bytes >= record.info.n_bytes:
            return self._kept(f"would not get smaller: {record.payload_bytes} B as PQ, {record.info.n_bytes} B dense")
        packed = packing.pack(tensor.assignments.numpy(), packing.n_bits(tensor.n_centroids))
        entries: list[tuple[str, bytes | NDArray[np.uint8]]] = [
            (f"pq/{record.name}/codebook", tensor_bytes(tensor.codebook)),
            (f"pq/{record.name}/assignments", packed),
        ]
        if held is not None:
            entries.append((zeros.key(record.name), held))
        damage = None if self.statistics is None else self.statistics.damage(record, weight, decoded)
        return Piece(record, tensor_hash(decoded), tuple(entries), error=error, use=use_of(tensor), damage=damage)

    @property
    def _is_alone(self) -> bool:
        """Whether all weights of the tensor count alike, as far as anybody knows."""
        return self.statistics is None and self.weights.importance(self.record.name) is None

    def _encoded(self, weight: torch.Tensor, device: torch.device) -> pq.Encoded:
        coding = self.record.coding
        if not isinstance(coding, Plain):
            raise TypeError(f"a plain job for a tensor that is {coding}")
        dtype = getattr(torch, coding.codebook_dtype)
        importance, inputs = self._known()
        try:
            return pq.encode(
                weight,
                self.record.matrix_shape,
                coding.block_size,
                self.options,
                dtype,
                device,
                importance=importance,
                inputs=inputs,
            )
        except PQError as error:
            raise type(error)(f"tensor {self.record.name!r}: {error}") from None

    def _known(self) -> tuple[Importance | None, Inputs | None]:
        """Which errors matter: the importance of rows and columns, or, of a layer, the moments of its inputs."""
        known = None if self.statistics is None else self.statistics.known(self.record)
        if self.statistics is not None and isinstance(known, Moments):
            return None, Inputs(known.matrix, known.shrinkage(), self.statistics.axis(self.record), DOUBT)
        if isinstance(known, RowImportance):
            return Importance.of_rows(known.rows.astype(np.float32), self.record.matrix_shape[1]), None
        return self.weights.importance(self.record.name), None

    def _kept(self, reason: str) -> Piece:
        return KeptJob(self.record.kept(reason), self.weights, self.is_compact).run(torch.device("cpu"))


def _fitted(record: Record, tensor: pq.PQTensor) -> Plain:
    """How the tensor is coded after all: EM may have found fewer centroids, or none that float16 can hold."""
    rows = record.coding.rows if isinstance(record.coding, Plain) else None
    return Plain(tensor.block_size, tensor.n_centroids, str(tensor.codebook.dtype).removeprefix("torch."), rows)


def use_of(tensor: pq.PQTensor) -> Use:
    """How the tensor's assignments are spread over its centroids."""
    counts = torch.bincount(tensor.assignments, minlength=tensor.n_centroids)
    entropy = metrics.entropy(counts)
    return Use(int((counts > 0).sum()), entropy, entropy * tensor.assignments.numel())


def options_of(entry: PlanEntry, recipe: Recipe) -> em.Options:
    """What the plan of a tensor asks of EM."""
    scheme = entry.scheme
    if scheme is None:
        raise TypeError(f"tensor {entry.info.name!r} was planned without a scheme")
    return em.Options(
        n_centroids=scheme.n_centroids,
        n_iter=scheme.n_iter,
        eps=recipe.eps,
        max_tentatives=recipe.max_tentatives,
        seed=seed_of(recipe.seed, entry.info.name),
        sample=scheme.sample,
        stages=scheme.stages,
        relaxation=em.RELAXATION,
        restarts=recipe.restarts,
    )


@dataclass
class PlainSession(Session):
    """A job a tensor, and no streams to finish."""

    survey: Survey
    weights: Weights
    recipe: Recipe
    is_compact: bool = False
    statistics: Reading | None = None

    def jobs(self, level: float) -> Sequence[PlainJob]:  # noqa: ARG002 - plain PQ has no levels
        """A job for every tensor."""
        return [
            PlainJob(record_of(entry), self.weights, options_of(entry, self.recipe), self.is_compact, self.statistics)
            for entry in self.survey.entries
        ]

    def finish(self, level: float, pieces: Sequence[StreamPiece]) -> None:
        """Nothing: every tensor was finished by its job."""

    def draft(self, level: float) -> Draft:  # noqa: ARG002 - as above
        """The bytes, which are exact; what the error will be, only EM finds out."""
        return Draft(sum(record.payload_bytes for record in self.survey.records), math.nan)


class PlainCodec(Codec):
    """Plain PQ. Its files are not compact unless they have a base, to whose kept tensors theirs are differences."""

    def __init__(self, *, is_compact: bool = False) -> None:
        self.is_compact = is_compact

    def compacted(self) -> PlainCodec:
        """The same codec, for a file that is compact."""
        return PlainCodec(is_compact=True)

    def survey(self, entries: Sequence[PlanEntry], weights: Weights, run: Run) -> Survey:  # noqa: ARG002
        """All of them, unread: whether values can be quantized is found out by the jobs, which read anyway."""
        return Survey(tuple(entries))

    def fit(self, survey: Survey, weights: Weights, recipe: Recipe, first_level: float, tell: Tell) -> PlainSession:  # noqa: ARG002
        """A session; nothing is shared. Raises StatsError where the recipe names statistics of something else."""
        if recipe.stats is None:
            return PlainSession(survey, weights, recipe, self.is_compact)
        from pqcli.codecs.statistics import opened

        reading = opened(recipe.stats, survey.records)
        return PlainSession(survey, weights, recipe, self.is_compact, reading)


CODEC = PlainCodec()
