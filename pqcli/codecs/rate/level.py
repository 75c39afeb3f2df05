"""The level of a checkpoint: the one that a recipe names, or the one that meets its budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Final

from pqcli.codecs.base import Session, Streams, Survey
from pqcli.codecs.rate.budget import LARGEST, MOST_DRAFTS, QUALITY_STEPS, SMALLEST, BudgetError, Goal, Trial, search
from pqcli.codecs.rate.measuring import with_shares
from pqcli.codecs.rate.steps import RATE_WEIGHT, steps_of
from pqcli.readable import size
from pqcli.tensors.records import Moments

if TYPE_CHECKING:
    from pqcli.recipe.recipe import Recipe
    from pqcli.tensors.records import Record

LEAST_FILE: Final = 1000
"""A budget of fewer bytes is no budget, but a number without its unit."""
DEFAULT_QUALITY: Final = "balanced"


@dataclass(frozen=True)
class Frame:
    """The file around the streams: all that its size depends on beside them.

    `file_bytes(streams, records)` is the size of the file with these streams in it, to the byte. `kept` are the records
    of the tensors that no level makes smaller, `bundle_bytes` what the small ones among them share.
    """

    original_bytes: int
    bundle_bytes: int
    kept: Sequence[Record]
    file_bytes: Callable[[Streams, Sequence[Record]], int]


def first_level(survey: Survey, recipe: Recipe, frame: Frame) -> float:
    """The level that the recipe asks for; with a budget, the one to start the search from."""
    goal = Goal.of(recipe, frame.original_bytes)
    if goal is not None:
        return _guess(goal, survey, recipe, frame)
    if recipe.rate_weight is not None:
        return math.sqrt(recipe.rate_weight / RATE_WEIGHT) * survey.unit
    return QUALITY_STEPS[recipe.quality or DEFAULT_QUALITY] * survey.unit


def reach(
    session: Session,
    recipe: Recipe,
    frame: Frame,
    encode: Callable[[float], Streams | None],
    relative_mse: Callable[[Streams], float],
    drafted: Callable[[int, int], None],
) -> Streams | None:
    """The session's tensors at the level, or to the budget, that the recipe asks for.

    `encode(level)` runs the session's jobs, `relative_mse` measures what came of them, `drafted(n, most)` is told of
    drafts. None where the codec has no streams.
    """
    survey = session.survey
    start = first_level(survey, recipe, frame)
    goal = Goal.of(recipe, frame.original_bytes)
    if goal is None:
        return encode(start)
    records = survey.records
    n_weights = sum(record.info.numel for record in records)
    nothing = Streams(b"", (), {record.name: 0 for record in records})
    empty_bytes = frame.file_bytes(nothing, with_shares(records, nothing))

    n_drafts = count(1)
    drafted(0, MOST_DRAFTS)

    def draft(level: float) -> float:
        found = session.draft(level)
        drafted(next(n_drafts), MOST_DRAFTS)
        amounts = {
            "bytes": empty_bytes + found.n_bytes,
            "bits": 8 * found.n_bytes / max(n_weights, 1),
            "relative_mse": found.relative_mse,
        }
        return amounts[goal.quantity]

    def attempt(level: float) -> Trial[Streams]:
        streams = encode(level) or nothing
        if goal.quantity == "bytes":
            measured: float = frame.file_bytes(streams, with_shares(records, streams))
        elif goal.quantity == "bits":
            measured = 8 * streams.n_bytes / max(n_weights, 1)
        else:
            measured = relative_mse(streams)
        return Trial(level, measured, streams)

    drafted(0, MOST_DRAFTS)
    try:
        return search(goal, draft, attempt, start, survey.unit).result
    except BudgetError as error:
        raise BudgetError(f"{error}{_of_kept(frame)}{_of_units(recipe)}") from None


def _of_units(recipe: Recipe) -> str:
    """What a message says to those who wrote 6 and meant 6MB."""
    n_bytes = recipe.target_bytes
    if n_bytes is None or n_bytes >= LEAST_FILE:
        return ""
    return f"; --target-size {n_bytes} means {n_bytes} bytes, {n_bytes}MB that many megabytes"


def _of_kept(frame: Frame) -> str:
    """What a message says of the bytes that no level makes fewer."""
    total = sum(record.payload_bytes for record in frame.kept)
    state = [record for record in frame.kept if record.info.role != "model"]
    if not state:
        return f" ({size(total)} of tensors are kept exactly)"
    is_8bit = any(isinstance(record.coding, Moments) for record in state)
    quarter = "" if is_8bit else "--training-state 8bit makes optimizer moments a quarter, "
    return (
        f" ({size(total)} of tensors are kept, {size(sum(record.payload_bytes for record in state))} of which are "
        f"training state: {quarter}--training-state drop leaves it out)"
    )


def _guess(goal: Goal, survey: Survey, recipe: Recipe, frame: Frame) -> float:
    """A level to start from: where a Gaussian model of every tensor meets the goal."""
    unit, steps = survey.unit, steps_of(survey, recipe.objective)
    if goal.quantity == "relative_mse":
        return unit * min(2.0 * math.sqrt(goal.value), 1.5)
    n_weights = sum(record.info.numel for record in survey.records)
    n_bytes = goal.value * n_weights / 8 if goal.quantity == "bits" else max(goal.value - frame.bundle_bytes, 1)
    low, high = SMALLEST, LARGEST
    for _ in range(40):
        middle = math.sqrt(low * high)
        found = steps.at(middle * unit)
        bits = sum(
            r.info.numel * 0.5 * math.log2(1 + 3 * (survey.spreads[r.name] / found[r.name]) ** 2)
            for r in survey.records
        )
        low, high = (middle, high) if bits / 8 > n_bytes else (low, middle)
    return low * unit
