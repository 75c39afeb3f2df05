"""Budgets: finding the level at which a checkpoint takes so many bytes, or has so much error.

Size and error change smoothly with the level (see `codecs`), so a few trials find it: the logarithm of what is measured
is close to linear in the logarithm of the level. Trials are drafts until they are near.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from pqcli.errors import PQError
from pqcli.readable import size
from pqcli.recipe.recipe import Recipe

Result = TypeVar("Result")

QUALITY_STEPS: Final = {"tiny": 0.6, "small": 0.4, "balanced": 0.22, "high": 0.12, "near-lossless": 0.03}
"""Steps in units of the typical weight (`coding.Survey.unit`), chosen with tests/benchmarks/quality.py."""
TOLERANCE: Final = 0.01
FINE_TOLERANCE: Final = 0.003
FINE_ABOVE_BYTES: Final = 5_000_000
ERROR_TOLERANCE: Final = 0.02
MARGIN: Final = 0.002
"""How far below the goal the search aims at most: about what separates one trial from the next."""
MOST_DRAFTS: Final = 4
MOST_TRIALS: Final = 10
NEAR: Final = 0.01
"""A draft within this fraction of the goal ends drafting: the next step along the slope lands close enough."""
SMALLEST, LARGEST = 2.0**-24, 2.0**16
"""Levels tried, in units of the typical weight: wide enough for tensors that are far louder, or far quieter."""


class BudgetError(PQError):
    """A budget that cannot be met."""


@dataclass(frozen=True)
class Goal:
    """What to meet: `quantity` ("bytes" of the file, "bits" per quantized weight, "relative_mse") at most `value`.

    The result lies within the fraction `tolerance` below it.
    """

    quantity: str
    value: float
    tolerance: float

    @staticmethod
    def of(recipe: Recipe, original_bytes: int) -> Goal | None:
        """The goal that a recipe sets; None where it gives a level instead."""
        if recipe.max_relative_mse is not None:
            return Goal("relative_mse", recipe.max_relative_mse, ERROR_TOLERANCE)
        if recipe.min_sqnr is not None:
            return Goal("relative_mse", 10 ** (-recipe.min_sqnr / 10), ERROR_TOLERANCE)
        if recipe.target_bits is not None:
            return Goal("bits", recipe.target_bits, FINE_TOLERANCE)
        n_bytes = recipe.target_bytes
        if recipe.target_ratio is not None:
            n_bytes = int(original_bytes / recipe.target_ratio)
        if n_bytes is None:
            return None
        return Goal("bytes", n_bytes, FINE_TOLERANCE if n_bytes > FINE_ABOVE_BYTES else TOLERANCE)

    @property
    def rises(self) -> bool:
        """Whether the quantity rises with the level."""
        return self.quantity == "relative_mse"

    def described(self, value: float) -> str:
        """An amount of the quantity, as a message says it."""
        if self.quantity == "bytes":
            return f"a file of {size(value)}" + (f" ({value:,.0f} bytes)" if value >= 1000 else "")
        return f"{value:.4g} bits per weight" if self.quantity == "bits" else f"a relative MSE of {value:.4g}"

    def is_met(self, measured: float) -> bool:
        """Whether a measurement is at most the goal's value and close enough to it."""
        return self.value * (1 - self.tolerance) <= measured <= self.value


def trials(recipe: Recipe) -> int:
    """How often all weights are encoded, most of the time: once, or twice where a budget is to be met."""
    return 1 if Goal.of(recipe, 0) is None else 2


def measurings(recipe: Recipe) -> int:
    """How often all weights are decoded: once, and where a budget is one of error after every trial, too."""
    return 1 if error_bound(recipe) is None else 1 + trials(recipe)


def error_bound(recipe: Recipe) -> float | None:
    """The relative MSE that the whole is to have; None where the recipe does not ask for one."""
    goal = Goal.of(recipe, 0)
    return goal.value if goal is not None and goal.rises else None


@dataclass(frozen=True)
class Trial(Generic[Result]):
    """What a level gave: the quantity in question, and whatever the caller wants to keep of it."""

    level: float
    measured: float
    result: Result


def search(
    goal: Goal,
    draft: Callable[[float], float],
    attempt: Callable[[float], Trial[Result]],
    start: float,
    unit: float,
) -> Trial[Result]:
    """The trial that meets the goal, or comes closest from below where no level does.

    `attempt(level)` tries a level, `draft(level)` guesses in less time what it would measure; `unit` is the typical
    weight, the yardstick of levels. Raises BudgetError where even the coarsest level does not reach the goal.
    """
    aim = math.log(goal.value * (1 - min(goal.tolerance / 2, MARGIN)))
    bracket = _Bracket(rises=goal.rises)
    level = start
    for _ in range(MOST_DRAFTS):
        found = math.log(max(draft(level), 1e-300))
        bracket.add(math.log(level), found)
        if abs(found - aim) < NEAR:
            break
        level = _within(bracket.next(aim), unit)
    level = _within(bracket.next(aim), unit)
    bracket = _Bracket(rises=goal.rises, slope=bracket.slope)  # drafts say where to look, not what will be found
    best: Trial[Result] | None = None
    before: Trial[Result] | None = None
    for _ in range(MOST_TRIALS):
        trial = attempt(level)
        if before is not None and goal.rises and _is_saturated(before, trial) and trial.measured <= goal.value:
            return trial
        before = trial
        if trial.measured <= goal.value and (best is None or trial.measured > best.measured):
            best = trial
        if goal.is_met(trial.measured):
            return trial
        bracket.add(math.log(level), math.log(max(trial.measured, 1e-300)))
        following = _within(bracket.next(aim), unit)
        if following == level:
            break
        level = following
    return best or _coarsest(goal, attempt, unit)


def _is_saturated(before: Trial[Result], after: Trial[Result]) -> bool:
    """Whether a higher level has made no more error: every tensor is at the largest step that it may have."""
    return after.level > 1.05 * before.level and after.measured <= 1.002 * before.measured


def _within(log_level: float, unit: float) -> float:
    return min(max(math.exp(log_level), SMALLEST * unit), LARGEST * unit)


def _coarsest(goal: Goal, attempt: Callable[[float], Trial[Result]], unit: float) -> Trial[Result]:
    extreme = SMALLEST if goal.rises else LARGEST
    trial = attempt(extreme * unit)
    if trial.measured <= goal.value:
        return trial
    raise BudgetError(
        f"{goal.described(goal.value)} or less cannot be reached: the most extreme setting gives "
        f"{goal.described(trial.measured)}; what is kept exactly, and the file's structure, count too"
    )


class _Bracket:
    """Points (log level, log measured) so far, and where to look next: a secant kept between the nearest two."""

    def __init__(self, *, rises: bool, slope: float | None = None) -> None:
        self.slope = slope if slope is not None else (1.6 if rises else -0.6)
        self._rises = rises
        self._points: list[tuple[float, float]] = []

    def add(self, x: float, y: float) -> None:
        """One more point."""
        if self._points:
            last_x, last_y = self._points[-1]
            slope = (y - last_y) / (x - last_x) if x != last_x else 0.0
            if (slope > 0) == self._rises and 0.02 < abs(slope) < 4:
                self.slope = slope
        self._points.append((x, y))

    def next(self, aim: float) -> float:
        """Where the line through the newest point meets the aim, inside what is known to enclose it."""
        x, y = self._points[-1]
        guess = x + max(-1.4, min(1.4, (aim - y) / self.slope))
        below = [px for px, py in self._points if (py < aim) == self._rises]
        above = [px for px, py in self._points if (py < aim) != self._rises]
        low, high = max(below, default=-math.inf), min(above, default=math.inf)
        if low < high and not low < guess < high:
            return (low + high) / 2 if math.isfinite(low) and math.isfinite(high) else guess
        return guess
