"""`--codec auto`: the trellis codec, but tensors that cost less when held exactly are set apart (`choosing`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pqcli.codecs.base import Job, Survey, Tell, Weights
from pqcli.codecs.trellis import TrellisCodec

if TYPE_CHECKING:
    from pqcli.recipe.recipe import Recipe


class AutoCodec(TrellisCodec):
    """What serves each tensor best."""

    def costs(self, n_weights: int, recipe: Recipe) -> Mapping[str, float]:
        """What the trellis takes, after all candidates have been tried on a sample of each tensor."""
        costs = super().costs(n_weights, recipe)
        return {"reading": costs["reading"], "keeping": 0.0, "choosing": 2000.0, **costs}

    def set_apart(
        self, survey: Survey, weights: Weights, recipe: Recipe, level: float, choosing: Callable[[], Tell]
    ) -> tuple[Sequence[Job], Survey]:
        """Jobs for the tensors that plain PQ holds exactly, or that are kept, for less than the trellis would take."""
        from pqcli.codecs.auto.choosing import choose, job_of

        choices = choose(survey, weights, recipe.objective, level, choosing())
        records = {record.name: record for record in survey.records}
        chosen = [(records[choice.name], choice.winner) for choice in choices if choice.winner.way != "trellis"]
        jobs = [job_of(record, winner, weights, recipe.seed) for record, winner in chosen]
        return jobs, survey.without(frozenset(record.name for record, _ in chosen))


CODEC = AutoCodec()
