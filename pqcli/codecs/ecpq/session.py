"""Encoding with entropy-constrained PQ: samples that are drawn once, and a model for each level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from pqcli.codecs.base import (
    Draft,
    Session,
    StreamPiece,
    Streams,
    Survey,
    Tell,
    TensorTask,
    Weights,
    as_matrix,
)
from pqcli.codecs.rate.budget import error_bound
from pqcli.codecs.rate.steps import RATE_WEIGHT, Steps, steps_of
from pqcli.core.digests import seed_of
from pqcli.core.ecpq import ecpq
from pqcli.core.feeding import Inputs
from pqcli.core.threads import lone_blas
from pqcli.core.trellis.feedback import Feedback, RowSteps

if TYPE_CHECKING:
    from pqcli.recipe.recipe import Recipe
    from pqcli.tensors.records import Record

SEED_BYTES = 7
WORKING_COPIES = 4
FED_NEAR = 1.12
"""Levels within this factor feed errors of about the same size forward."""


@dataclass(frozen=True)
class EcpqJob(TensorTask):
    """Encode one tensor with a model; `price` is what a bit may cost, in squared units of scaled weights."""

    index: int
    record: Record
    weights: Weights
    model: ecpq.Model
    price: float
    scale: float
    seed: int
    felt: ecpq.Felt | None = None

    @property
    def n_bytes(self) -> int:
        """Copies of the tensor in float32."""
        return WORKING_COPIES * 4 * self.n_weights

    def run(self, device: torch.device) -> StreamPiece:  # noqa: ARG002 - symbols are searched for on the CPU
        """The tensor's stream."""
        matrix = _matrix(self.weights, self.record)
        with nullcontext() if self.felt is None else lone_blas():
            encoded = ecpq.encode(matrix, self.model, self.price, scale=self.scale, seed=self.seed, felt=self.felt)
        return StreamPiece(self.index, encoded.payload)


@dataclass
class EcpqSession(Session):
    """Samples and the newest model, from which the next level's is learned."""

    survey: Survey
    weights: Weights
    seed: int
    steps: Steps
    felt: Mapping[str, ecpq.Felt] = field(default_factory=dict)
    _samples: dict[tuple[str, float], ecpq.Sample] = field(default_factory=dict)
    _targets: dict[tuple[str, float], ecpq.Sample] = field(default_factory=dict)
    _fed_level: float | None = None
    _model: ecpq.Model | None = None

    @classmethod
    def fitted(cls, survey: Survey, weights: Weights, recipe: Recipe, tell: Tell) -> EcpqSession:
        """A session; its models follow from the levels.

        Raises StatsError where the recipe names statistics that are none, or not of this checkpoint.
        """
        steps = steps_of(survey, recipe.objective, error_bound(recipe))
        if recipe.stats is None:
            return cls(survey, weights, recipe.seed, steps)
        from pqcli.codecs.statistics import learned

        plan, steps = learned(recipe.stats, survey, steps, tell)
        shapes = {record.name: record.matrix_shape for record in survey.records}
        with lone_blas():
            felt = {name: _felt(rows, shapes[name]) for name, rows in plan.rows.items()}
        return cls(survey, weights, recipe.seed, steps, felt)

    def jobs(self, level: float) -> list[EcpqJob]:
        """Learn the level's model; then a job for every tensor."""
        samples, model, price = self._learned(level)
        return [
            EcpqJob(i, record, self.weights, model, price, scale, self._seed(record.name), sample.felt)
            for i, (record, ((_, scale), sample)) in enumerate(zip(self.survey.records, samples.items(), strict=True))
        ]

    def finish(self, level: float, pieces: Sequence[StreamPiece]) -> Streams:  # noqa: ARG002 - the model is the level's
        """The model, then the tensors' streams."""
        if self._model is None:
            raise ValueError("streams without a model: call jobs first")
        streams = [piece.data for piece in sorted(pieces, key=lambda piece: piece.index)]
        sizes = {record.name: len(stream) for record, stream in zip(self.survey.records, streams, strict=True)}
        return Streams(self._model.to_bytes(), streams, sizes)

    def draft(self, level: float) -> Draft:
        """From the samples that codebooks are learned from."""
        samples, model, price = self._learned(level)
        n_bytes, error, energy = float(len(model.to_bytes())), 0.0, 0.0
        for (key, scale), sample in samples.items():
            estimate = ecpq.estimate([sample], model, price)
            n_bytes += estimate.bits / 8
            error += scale**2 * estimate.squared_error
            coded = scale**2 * sample.factor * float(np.sum(np.square(sample.pieces, dtype=np.float64)))
            energy += self.survey.own_energy(key, coded)
        return Draft(n_bytes, error / energy if energy else 0.0)

    def _learned(self, level: float) -> tuple[dict[tuple[str, float], ecpq.Sample], ecpq.Model, float]:
        """Samples by key and scale, the model for this level (that of the level before is its start), a bit's price."""
        price = RATE_WEIGHT * level**2
        scales = {key: step / level for key, step in self.steps.at(level).items()}
        if self.felt:  # what is drawn for one level then serves the next: without its last bits a scale is the same
            scales = {key: float(np.float32(scale)) for key, scale in scales.items()}
        records = {record.name: record for record in self.survey.records}
        before = {key: (scale, sample) for (key, scale), sample in self._samples.items()} if self.felt else {}
        self._samples = {
            (key, scale): self._samples.get((key, scale))
            or (before[key][1].times(before[key][0] / scale) if key in before else self._drawn(records[key], scale))
            for key, scale in scales.items()
        }
        if any(felt.inputs is not None for felt in self.felt.values()):
            with lone_blas():
                return self._fed(level, records), self._model or ecpq.fit([], price), price
        self._model = ecpq.fit(self._samples.values(), price, start=self._model)
        return self._samples, self._model, price

    def _fed(self, level: float, records: Mapping[str, Record]) -> dict[tuple[str, float], ecpq.Sample]:
        """Samples of what feedback makes of the tensors at about this level; and the model is learned from them."""
        price = RATE_WEIGHT * level**2
        if self._fed_level is None or not 1 / FED_NEAR <= level / self._fed_level <= FED_NEAR:
            known = self._targets or self._samples
            model = ecpq.fit(known.values(), price, start=self._model)
            self._targets = {
                (key, scale): ecpq.fed(_matrix(self.weights, records[key]), sample, model, price, scale=scale)
                for (key, scale), sample in self._samples.items()
            }
            self._fed_level, self._model = level, model
        else:
            self._targets = {
                (key, scale): sample if scale == before else sample.times(before / scale)
                for ((key, before), sample), (_, scale) in zip(self._targets.items(), self._samples, strict=True)
            }
        self._model = ecpq.fit(self._targets.values(), price, start=self._model)
        return self._targets

    def _drawn(self, record: Record, scale: float) -> ecpq.Sample:
        key = record.name
        return ecpq.draw(_matrix(self.weights, record), scale=scale, seed=self._seed(key), felt=self.felt.get(key))

    def _seed(self, key: str) -> int:
        return seed_of(self.seed, key, n_bytes=SEED_BYTES)


def _felt(rows: RowSteps, shape: tuple[int, int]) -> ecpq.Felt:
    """How much the errors of a tensor are felt, from the steps that statistics made of its rows."""
    if isinstance(rows, Feedback):
        return ecpq.Felt.by_inputs(Inputs(rows.moments, rows.shrinkage, 1 if rows.is_transposed else 0), shape)
    return ecpq.Felt.by_rows(rows.steps**-2.0, shape[1])


def _matrix(weights: Weights, record: Record) -> torch.Tensor:
    return torch.from_numpy(as_matrix(weights.coded(record.name), record))
