"""Entropy-constrained PQ: codebooks that all tensors share, learned under a price for bits, and coded assignments.

A job is a tensor, whose bytes are a stream of its own. What tensors share is a model, learned anew for each level from
samples that are drawn once (`pqcli.core.ecpq`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pqcli.codecs.base import Run, StreamCodec, Streams, Survey, Tell, Weights
from pqcli.codecs.rate.budget import measurings, trials

if TYPE_CHECKING:
    from pqcli.codecs.base import Decoder
    from pqcli.codecs.ecpq.session import EcpqSession
    from pqcli.core.trellis.sources import Source
    from pqcli.plan.plan import PlanEntry
    from pqcli.recipe.recipe import Recipe


class EcpqCodec(StreamCodec):
    """PQ to a budget."""

    def costs(self, n_weights: int, recipe: Recipe) -> Mapping[str, float]:
        """Drafts learn from a sample."""
        from pqcli.core.ecpq import ecpq

        fed = 1.0 if recipe.stats is None else 3.0
        n_trials = trials(recipe)
        share = max(ecpq.FRACTION, min(1.0, ecpq.LEAST / max(n_weights, 1))) if n_trials > 1 else 0.0
        return {
            "reading": 30.0,
            "keeping": 0.0,
            "learning": 1.0,
            "searching": fed * 7500.0 * share,
            "encoding": fed * 110.0 * n_trials,
            "measuring": 60.0 * measurings(recipe),
        }

    def survey(self, entries: Sequence[PlanEntry], weights: Weights, run: Run) -> Survey:
        """Every tensor read once."""
        from pqcli.codecs.rate.survey import survey_weights

        return survey_weights(entries, weights, run)

    def fit(self, survey: Survey, weights: Weights, recipe: Recipe, first_level: float, tell: Tell) -> EcpqSession:  # noqa: ARG002
        """A session; its models follow from the levels."""
        from pqcli.codecs.ecpq.session import EcpqSession

        return EcpqSession.fitted(survey, weights, recipe, tell)

    def decoder(self, streams: Streams, sources: Sequence[Source], *, counting: bool = False) -> Decoder:  # noqa: ARG002
        """Decodes a tensor when it is asked for; it counts when it is asked to."""
        from pqcli.codecs.ecpq.decoder import EcpqDecoder

        return EcpqDecoder(streams, sources)


CODEC = EcpqCodec()
