"""The survey: every tensor is read once, to find out whether it can be coded and how large its weights are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from pqcli.codecs import values, zeros
from pqcli.codecs.base import Original, Survey, Tell, Weights, record_of
from pqcli.core import metrics
from pqcli.core.pq import pq

if TYPE_CHECKING:
    import torch

    from pqcli.plan.plan import PlanEntry

NOT_FINITE: Final = "holds NaN, infinite or out of float32 range values: kept bit-exact"
LARGEST_PEAK: Final = 2.0**20
"""Tensors that hold values so many times their spread are kept: no step would serve both."""
HEAVIEST_TAIL: Final = 2.0
"""Root mean squares above this multiple of the robust estimate are the work of outliers; trained layers reach 1.8."""
WEAKEST_ROWS: Final = 0.05
"""This share of the rows, the weakest, is not protected by a budget of error."""
GAUSSIAN_ROOT: Final = 0.822179
"""Mean of sqrt(|x|) for a standard Gaussian x."""


def survey_weights(entries: Sequence[PlanEntry], weights: Weights, tell: Tell) -> Survey:
    """The survey of the planned tensors; those whose values no codec with streams can take are rejected."""
    taken, spreads, rejected, exact, zeros_of, weak, originals = [], {}, [], [], {}, {}, {}
    for entry in entries:
        name = entry.info.name
        weight, record = weights.coded(name), record_of(entry)
        reason, found = _judged(weight)
        job = None if reason or record.difference else values.job_of(record, weight, weights, is_compact=True)
        if reason:
            rejected.append(record.kept(reason))
        elif job is not None:
            exact.append(job)
        else:
            taken.append(entry)
            spreads[name] = found
            if record.difference:  # errors are judged by the tensor itself
                weight = weights.original(name)
                originals[name] = Original(spread(weight), metrics.compare(weight, weight).energy)
            weak[name] = weak_row(weight.reshape(record.matrix_shape))
            held = zeros.held(record, weight)
            if held is not None:
                zeros_of[name] = held
        tell(entry.info.numel, name)
    return Survey(tuple(taken), spreads, tuple(rejected), tuple(exact), zeros_of, weak, originals)


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
