"""`--codec auto`: the trellis codec, but tensors that cost less when held exactly are set apart (`choosing`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pqcli.codecs.base import Job, Survey, Weights
from pqcli.codecs.trellis import TrellisCodec

if TYPE_CHECKING:
    from pqcli.recipe.recipe import Recipe


class AutoCodec(TrellisCodec):
    """What serves each tensor best."""

    def set_apart(self, survey: Survey, weights: Weights, recipe: Recipe, level: float) -> tuple[Sequence[Job], Survey]:
        """Jobs for the tensors that plain PQ holds exactly, or that are kept, for less than the trellis would take."""
        from pqcli.codecs.auto.choosing import choose, job_of

        choices = choose(survey, weights, recipe.objective, level)
        records = {record.name: record for record in survey.records}
        chosen = [(records[choice.name], choice.winner) for choice in choices if choice.winner.way != "trellis"]
        jobs = [job_of(record, winner, weights, recipe.seed) for record, winner in chosen]
        return jobs, survey.without(frozenset(record.name for record, _ in chosen))


CODEC = AutoCodec()
