"""The survey: every tensor is read once, to find out whether it can be coded and how large its weights are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from pqcli.codecs import values, zeros
from pqcli.codecs.base import Job, Original, Run, Survey, TensorTask, Weights, record_of
from pqcli.core import metrics
from pqcli.core.pq import pq

if TYPE_CHECKING:
    import torch

    from pqcli.plan.plan import PlanEntry
    from pqcli.tensors.records import Record

NOT_FINITE: Final = "holds NaN, infinite or out of float32 range values: kept bit-exact"
LARGEST_PEAK: Final = 2.0**20
"""Tensors that hold values so many times their spread are kept: no step would serve both."""
HEAVIEST_TAIL: Final = 2.0
"""Root mean squares above this multiple of the robust estimate are the work of outliers; trained layers reach 1.8."""
WEAKEST_ROWS: Final = 0.05
"""This share of the rows, the weakest, is not protected by a budget of error."""
GAUSSIAN_ROOT: Final = 0.822179
"""Mean of sqrt(|x|) for a standard Gaussian x."""


@dataclass(frozen=True)
class Seen:
    """What was found in one tensor: why it cannot be coded, or a job that holds it exactly, or how large it is."""

    reason: str = ""
    exact: Job | None = None
    spread: float = 0.0
    original: Original | None = None
    weak_row: float = 0.0
    zeros: bytes | None = None


@dataclass(frozen=True)
class SurveyTask(TensorTask):
    """Look at one tensor."""

    record: Record
    weights: Weights

    @property
    def n_bytes(self) -> int:
        """The tensor; of one that is coded as a difference, its base's and the difference too."""
        return (3 if self.record.difference else 1) * self.record.info.n_bytes

    def run(self, device: torch.device) -> Seen:  # noqa: ARG002 - sums are the CPU's
        """What is found in it."""
        record, name = self.record, self.record.name
        weight = self.weights.coded(name)
        reason, found = _judged(weight)
        if reason:
            return Seen(reason)
        exact = None if record.difference else values.job_of(record, weight, self.weights, is_compact=True)
        if exact is not None:
            return Seen(exact=exact)
        original = None
        if record.difference:  # errors are judged by the tensor itself
            weight = self.weights.original(name)
            original = Original(spread(weight), metrics.compare(weight, weight).energy)
        weak = weak_row(weight.reshape(record.matrix_shape))
        return Seen(spread=found, original=original, weak_row=weak, zeros=zeros.held(record, weight))


def survey_weights(entries: Sequence[PlanEntry], weights: Weights, run: Run) -> Survey:
    """The survey of the planned tensors; those whose values no codec with streams can take are rejected."""
    records = [record_of(entry) for entry in entries]
    found = dict(run([SurveyTask(record, weights) for record in records], "reading"))
    seen = {record.name: found[i] for i, record in enumerate(records)}
    taken = {name: about for name, about in seen.items() if not about.reason and about.exact is None}
    return Survey(
        tuple(entry for entry in entries if entry.info.name in taken),
        {name: about.spread for name, about in taken.items()},
        tuple(record.kept(seen[record.name].reason) for record in records if seen[record.name].reason),
        tuple(about.exact for about in seen.values() if about.exact is not None),
        {name: about.zeros for name, about in taken.items() if about.zeros is not None},
        {name: about.weak_row for name, about in taken.items()},
        {name: about.original for name, about in taken.items() if about.original is not None},
    )


def _judged(weight: torch.Tensor) -> tuple[str, float]:
    """Why a tensor cannot be coded (nothing where it can), and its spread."""
    if not pq.is_finite(weight):
        return NOT_FINITE, 0.0
    found = spread(weight)
    if pq.largest(weight) > LARGEST_PEAK * found:
        return "holds values a million times larger than the rest: kept bit-exact", found
    return "", found


def weak_row(matrix: torch.Tensor) -> float:
    """Root mean square of a row of which a twentieth of the rows are weaker still; rows of zeros do not count."""
    step = max(1, metrics.CHUNK // max(matrix.shape[1], 1))
    squares = [
        np.mean(np.square(matrix[start : start + step].double().numpy()), axis=1)
        for start in range(0, matrix.shape[0], step)
    ]
    known = np.concatenate(squares)
    known = known[known > 0]
    return math.sqrt(float(np.quantile(known, WEAKEST_ROWS))) if known.size else 0.0


def spread(weight: torch.Tensor) -> float:
    """Root mean square of a tensor, as it would be without its outliers.

    The square of the mean root hardly notices a few gigantic values. It is taken over nonzero weights, so that a sparse
    tensor does not look like one of outliers, and counts only where the root mean square is far above it.
    """
    count, total, roots, nonzero = weight.numel(), 0.0, 0.0, 0
    flat = weight.reshape(-1)
    for start in range(0, count, metrics.CHUNK):
        # numpy, because torch would start threads for each of these sums, which wait for each other on busy cores
        magnitudes = np.abs(flat[start : start + metrics.CHUNK].double().numpy())
        total += float(np.sum(np.square(magnitudes)))
        nonzero += int(np.count_nonzero(magnitudes))
        roots += float(np.sum(np.sqrt(magnitudes, out=magnitudes)))
    if not total:
        return 0.0
    robust = (roots / nonzero / GAUSSIAN_ROOT) ** 2
    return min(math.sqrt(total / count), HEAVIEST_TAIL * robust)
