"""Compressing a whole checkpoint with a codec that shares what it learns, at a level or to a budget.

    survey    read every tensor once: which can be coded at all, and how large are its weights
    search    encode at one level after another until the budget is met (once, where a level is given)
    measure   decode what was encoded, compare it with the original, and take its hash

Tensors are read anew for each step, one at a time, so that memory does not grow with the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.codecs.coders import RATE_WEIGHT, Coded, Coder, Decoder, Steps, decoder
from pqcli.codecs.rate.budget import LARGEST, QUALITY_STEPS, SMALLEST, BudgetError, Goal, Trial, search
from pqcli.container import Record, tensor_hash
from pqcli.container.layout import (
    KEPT_CODED,
    entropies_entry,
    header,
    make_manifest,
    shared_entries,
    tensor_entries,
    worth_entropies,
)
from pqcli.container.records import SHORT_HASH_BYTES
from pqcli.core import metrics
from pqcli.core.pq import pq
from pqcli.recipe.recipe import Recipe

LARGEST_STEP: Final = 2.0
"""Largest step of a tensor by its own rms, in units of the typical step by the typical rms; see `Survey.steps`."""
CEILING: Final = 1.4
"""Largest step of a tensor by its own rms: a relative MSE of at most about 0.5."""
LOUDEST: Final = 2.0**20
"""Tensors that hold values so many times their spread are kept: no step would serve both."""
SMALLEST_STEP: Final = 2.0**-10
"""Likewise the smallest: what no trained tensor needs, and where weights in steps still are numbers a coder holds."""
HEAVIEST_TAIL: Final = 2.0
"""Root mean squares above this multiple of the robust estimate are the work of outliers; trained layers reach 1.8."""
GAUSSIAN_ROOT: Final = 0.822179
"""Mean of sqrt(|x|) for a standard Gaussian x."""
SIZE_WEIGHT: Final = 0.5
"""How much steps grow with a tensor's size, between the two ends of the objective; see `Survey.steps`."""
DEFAULT_QUALITY: Final = "balanced"

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Survey:
    """What was found out about the tensors that will be coded: their records and their `spread`."""

    records: tuple[Record, ...]
    rms: dict[str, float]

    @property
    def unit(self) -> float:
        """The typical magnitude of a weight, the yardstick of levels: the geometric mean of the tensors' rms, by size.

        A few tensors that hold most of the energy hardly move it. 1 where all weights are zero.
        """
        sizes = [(record.info.numel, self.rms[record.name]) for record in self.records if self.rms[record.name]]
        n = sum(size for size, _ in sizes)
        return math.exp(sum(size * math.log(rms) for size, rms in sizes) / n) if n else 1.0

    def steps(self, objective: float) -> Steps:
        """How steps differ between tensors: as rms ** objective, and slightly with size.

        A tensor adds noise to a network's output about in proportion to its relative error, whatever its size; to keep
        the sum of these small, a bit is better spent on a small tensor than on a large one. At either end of the scale
        (0: one absolute error, 1: one relative error) the user has said otherwise, and sizes do not matter. Short of
        the absolute end, no tensor's step is more than `LARGEST_STEP` times the typical one relative to its weights:
        the weak tensors of a model whose energy sits in a few strong ones are not lost. Nor is any step above
        `CEILING` times the tensor's own rms, however small the budget.
        """
        unit, mean_size = self.unit, sum(r.info.numel for r in self.records) / max(len(self.records), 1)
        size_exponent = objective * (1 - objective) * SIZE_WEIGHT
        found = {}
        for record in self.records:
            relative = (self.rms[record.name] or unit) / unit
            scale = relative**objective * (record.info.numel / mean_size) ** size_exponent
            bounded = min(scale, LARGEST_STEP * relative) if objective else scale
            found[record.name] = max(bounded, SMALLEST_STEP * relative)
        ceilings = {name: CEILING * rms if rms and objective else math.inf for name, rms in self.rms.items()}
        return Steps(found, ceilings)


@dataclass(frozen=True)
class Outcome:
    """The coded bytes, and the records with the share of them that each tensor takes."""

    coded: Coded
    records: tuple[Record, ...]
    level: float


@dataclass(frozen=True)
class Frame:
    """The file around the coded tensors: all that its size depends on beside them."""

    source: dict[str, Any]
    recipe: dict[str, Any]
    records: Sequence[Record]
    kept_bytes: int

    def file_bytes(self, codec: str, coded: Coded, records: Sequence[Record]) -> int:
        """Size of the file with these coded tensors in it, to the byte."""
        shares = {record.name: record for record in records}
        about = {"codec": codec, "shared": len(coded.shared), "streams": [len(stream) for stream in coded.streams]}
        all_records = [shares.get(record.name, record) for record in self.records]
        manifest = make_manifest(self.source, self.recipe, all_records, about, [KEPT_CODED, *coded.features])
        entries = tensor_entries(manifest) + shared_entries(manifest, self.kept_bytes, SHORT_HASH_BYTES)
        if worth_entropies(manifest):
            entries.append(entropies_entry(manifest))
        head, _ = header(entries, manifest.features)
        return len(head) + sum(entry.n_bytes for entry in entries)


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


def as_matrix(weight: torch.Tensor, record: Record) -> NDArray[np.float32]:
    """A tensor as the codecs take it: (rows, columns) float32."""
    return weight.reshape(record.matrix_shape).float().numpy()


def encode(codec: str, survey: Survey, read: Read, recipe: Recipe, frame: Frame, original_bytes: int) -> Outcome:
    """All surveyed tensors at the level or to the budget that the recipe asks for."""
    by_name = {record.name: record for record in survey.records}
    sources = [record.source for record in survey.records]
    steps = survey.steps(recipe.objective)
    coder = Coder.of(
        codec, sources, lambda name: as_matrix(read(name), by_name[name]), steps, recipe.effort, recipe.seed
    )
    goal = Goal.of(recipe, original_bytes)

    def encoded(level: float) -> Outcome:
        coded = coder.encode(level)
        return Outcome(coded, _with_shares(survey.records, coded), level)

    start = first_level(survey, recipe, frame, original_bytes)
    if goal is None:
        return encoded(start)
    nothing = Coded(b"", (), {record.name: 0 for record in survey.records})
    frame_bytes = frame.file_bytes(codec, nothing, _with_shares(survey.records, nothing))

    def draft(level: float) -> float:
        found = coder.draft(level)
        amounts = {
            "bytes": frame_bytes + found.n_bytes,
            "bits": 8 * found.n_bytes / max(coder.n_weights, 1),
            "relative_mse": found.relative_mse,
        }
        return amounts[goal.quantity]

    def attempt(level: float) -> Trial[Outcome]:
        outcome = encoded(level)
        return Trial(level, _measured(goal, codec, outcome, read, frame), outcome)

    try:
        return search(goal, draft, attempt, start, survey.unit).result
    except BudgetError as error:
        raise BudgetError(f"{error}{_of_kept(frame)}") from None


def _of_kept(frame: Frame) -> str:
    """What a message says of the bytes that no level makes fewer."""
    kept = [record for record in frame.records if record.action == "keep"]
    total = sum(record.info.n_bytes for record in kept)
    state = sum(record.info.n_bytes for record in kept if record.role != "model")
    if not state:
        return f" ({total:,} B of tensors are kept exactly)"
    return (
        f" ({total:,} B of tensors are kept exactly, {state:,} B of which are optimizer state and the like: leave "
        "them out with --model-only, or ask for them by name with --include)"
    )


def first_level(survey: Survey, recipe: Recipe, frame: Frame, original_bytes: int) -> float:
    """The level that the recipe asks for; with a budget, the one to start the search from."""
    goal = Goal.of(recipe, original_bytes)
    if goal is None:
        return _level(recipe) * survey.unit
    return _guess(goal, survey, survey.steps(recipe.objective), frame)


@dataclass(frozen=True)
class Measured:
    """A coded tensor: its error, the hash of what it decodes to, and bits at the order-0 entropy of its symbols."""

    record: Record
    error: metrics.Error
    digest: bytes
    entropy_bits: float


def measure(codec: str, outcome: Outcome, read: Read) -> Iterator[Measured]:
    """Every coded tensor, decoded and compared, in order."""
    decoding = decoder(codec, outcome.coded, [record.source for record in outcome.records], counting=True)
    for record in outcome.records:
        decoded = _decoded(decoding, record)
        error = metrics.compare(read(record.name), decoded)
        yield Measured(record, error, tensor_hash(decoded), decoding.entropy(record.name))


def _decoded(decoding: Decoder, record: Record) -> torch.Tensor:
    matrix = torch.from_numpy(decoding.matrix(record.name))
    return pq.saturated(matrix.reshape(record.shape), getattr(torch, record.dtype))


def _with_shares(records: Sequence[Record], coded: Coded) -> tuple[Record, ...]:
    """The records with their bytes: their own streams, and by their weights what all of them share."""
    shared = coded.n_bytes - sum(coded.tensor_bytes.values())
    n_weights = sum(record.info.numel for record in records)
    given, seen, found = 0, 0, []
    for record in records:
        seen += record.info.numel
        upto = shared * seen // max(n_weights, 1)
        found.append(replace(record, coded_bytes=coded.tensor_bytes[record.name] + upto - given))
        given = upto
    return tuple(found)


def _measured(goal: Goal, codec: str, outcome: Outcome, read: Read, frame: Frame) -> float:
    if goal.quantity == "bytes":
        return frame.file_bytes(codec, outcome.coded, outcome.records)
    if goal.quantity == "bits":
        return 8 * outcome.coded.n_bytes / max(sum(record.info.numel for record in outcome.records), 1)
    decoding = decoder(codec, outcome.coded, [record.source for record in outcome.records])
    return metrics.total(
        metrics.compare(read(record.name), _decoded(decoding, record)) for record in outcome.records
    ).relative_mse


def _level(recipe: Recipe) -> float:
    """The level, in units of `Survey.unit`, that a recipe without a budget asks for."""
    if recipe.rate_weight is not None:
        return math.sqrt(recipe.rate_weight / RATE_WEIGHT)
    return QUALITY_STEPS[recipe.quality or DEFAULT_QUALITY]


def _guess(goal: Goal, survey: Survey, steps: Steps, frame: Frame) -> float:
    """A level to start from: where a Gaussian model of every tensor meets the goal."""
    unit = survey.unit
    if goal.quantity == "relative_mse":
        return unit * min(2.0 * math.sqrt(goal.value), 1.5)
    n_weights = sum(record.info.numel for record in survey.records)
    n_bytes = goal.value * n_weights / 8 if goal.quantity == "bits" else max(goal.value - frame.kept_bytes, 1)
    low, high = SMALLEST, LARGEST
    for _ in range(40):
        middle = math.sqrt(low * high)
        found = steps.at(middle * unit)
        bits = sum(
            r.info.numel * 0.5 * math.log2(1 + 3 * (survey.rms[r.name] / found[r.name]) ** 2) for r in survey.records
        )
        low, high = (middle, high) if bits / 8 > n_bytes else (low, middle)
    return low * unit


def kernel_of(shape: tuple[int, ...], rows: int) -> int:
    """Kernel positions of a convolution's weight; 1 for anything else."""
    is_convolution = len(shape) > 2 and rows == shape[0]
    return math.prod(shape[2:]) if is_convolution else 1


__all__ = ["Frame", "Outcome", "Survey", "encode", "kernel_of", "measure"]
