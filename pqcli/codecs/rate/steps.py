"""Steps: how coarsely each tensor is quantized at a level, so that one level serves a whole checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pqcli.codecs.base import Survey

RATE_WEIGHT: Final = 0.3
"""What a bit may cost, in squared steps: close to the slope of the rate-distortion curve at all rates of interest."""
LARGEST_STEP: Final = 2.0
"""Largest step of a tensor by its own spread, in units of the typical step by the typical spread."""
CEILING: Final = 1.4
"""Largest step of a tensor by its own spread: a relative MSE of at most about 0.5."""
SMALLEST_STEP: Final = 2.0**-10
"""Likewise the smallest: what no trained tensor needs, and where weights in steps still are numbers a coder holds."""
TENSOR_SLACK: Final = 3.0
"""With a budget of error, a tensor's relative MSE may be so many times what the whole is to have ..."""
ROW_SLACK: Final = 4.0
"""... and that of a row so many times, but for the weakest of them."""
SIZE_WEIGHT: Final = 0.5
"""How much steps grow with a tensor's size, between the two ends of the objective."""


@dataclass(frozen=True)
class Steps:
    """The step of every tensor at a level: level * scale, but never above its ceiling, so that no tensor is lost."""

    scales: Mapping[str, float]
    ceilings: Mapping[str, float]

    def at(self, level: float) -> dict[str, float]:
        """Steps by key."""
        return {key: min(level * scale, self.ceilings[key]) for key, scale in self.scales.items()}


def steps_of(survey: Survey, objective: float, bound: float | None = None) -> Steps:
    """How steps differ between tensors: as spread ** objective, and slightly with size.

    A tensor adds noise to a network's output about in proportion to its relative error, whatever its size; to keep the
    sum of these small, a bit is better spent on a small tensor than on a large one. At either end of the scale (0: one
    absolute error, 1: one relative error) the user has said otherwise, and sizes do not matter. Short of the absolute
    end, no tensor's step is more than `LARGEST_STEP` times the typical one relative to its weights: the weak tensors of
    a model whose energy sits in a few strong ones are not lost. Nor is any step above `CEILING` times the tensor's own
    spread, however small the budget.

    `bound` is the relative MSE that is asked for, None where something else is. Then no tensor's step is above what
    gives it `TENSOR_SLACK` times that error, nor above what gives its weak rows (all but the weakest twentieth)
    `ROW_SLACK` times: a few strong tensors, or a strong row, do not use up the budget of all others.

    Errors are those of the tensor also where its difference to a base's is coded, and so is all of this, but that steps
    of differences are `survey.fineness` times as large, and then never above `CEILING` times the difference's spread:
    what a fine-tune has changed is not lost where no budget asks for it.
    """
    records, spreads = survey.records, {record.name: survey.own_spread(record.name) for record in survey.records}
    unit, mean_size = survey.unit, sum(r.info.numel for r in records) / max(len(records), 1)
    size_exponent = objective * (1 - objective) * SIZE_WEIGHT
    found = {}
    for record in records:
        relative = (spreads[record.name] or unit) / unit
        scale = relative**objective * (record.info.numel / mean_size) ** size_exponent
        bounded = min(scale, LARGEST_STEP * relative) if objective else scale
        found[record.name] = max(bounded, SMALLEST_STEP * relative) * survey.fineness_of(record.name)
    ceilings = {name: CEILING * spread if spread and objective else math.inf for name, spread in spreads.items()}
    if survey.fineness < 1:
        for name in survey.originals.keys() & found.keys():
            ceilings[name] = min(ceilings[name], CEILING * survey.spreads[name] or math.inf)
    if bound is not None and objective:
        for name, ceiling in ceilings.items():
            by_tensor = _step_for(TENSOR_SLACK * bound, spreads[name])
            by_row = _step_for(ROW_SLACK * bound, survey.weak_rows.get(name, 0.0))
            ceilings[name] = min(ceiling, by_tensor, by_row)
    return Steps(found, ceilings)


def _step_for(relative_mse: float, spread: float) -> float:
    """The step that gives weights of this spread about this error: steps are deadened, so (step / 2 spread)^2."""
    return 2.0 * math.sqrt(relative_mse) * spread if spread else math.inf
