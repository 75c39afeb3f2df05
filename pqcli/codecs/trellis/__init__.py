"""The trellis codec: rotations, trellis-coded quantization and adaptive arithmetic coding (`pqcli.core.trellis`).

A job is a stream. What tensors share are rotations, fitted for the first level that is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pqcli.codecs.base import Run, StreamCodec, Streams, Survey, Tell, Weights
from pqcli.codecs.rate.budget import measurings, trials

if TYPE_CHECKING:
    from pqcli.codecs.base import Decoder
    from pqcli.codecs.trellis.session import TrellisSession
    from pqcli.core.trellis.sources import Source
    from pqcli.plan.plan import PlanEntry
    from pqcli.recipe.recipe import Recipe


class TrellisCodec(StreamCodec):
    """The smallest file for an error, at the price of random access."""

    takes_blocks = True

    def costs(self, n_weights: int, recipe: Recipe) -> Mapping[str, float]:
        """By the number of states; drafts look at some of the weights only."""
        from pqcli.codecs.trellis import session

        fed = 1.0 if recipe.stats is None else 2.0
        n_trials = trials(recipe)
        n_drafted = min(n_weights, session.DRAFT_WEIGHTS) if n_trials > 1 else 0
        encoding = fed * (275.0 + 0.25 * session.n_states(n_weights, recipe.effort))
        return {
            "reading": 30.0,
            "keeping": 0.0,
            "learning": 150.0,
            "searching": fed * 1500.0 * n_drafted / max(n_weights, 1),
            "encoding": encoding * n_trials,
            "measuring": 140.0 * measurings(recipe),
        }

    def survey(self, entries: Sequence[PlanEntry], weights: Weights, run: Run) -> Survey:
        """Every tensor read once."""
        from pqcli.codecs.rate.survey import survey_weights

        return survey_weights(entries, weights, run)

    def fit(self, survey: Survey, weights: Weights, recipe: Recipe, first_level: float, tell: Tell) -> TrellisSession:
        """A session with its rotations."""
        from pqcli.codecs.trellis.session import TrellisSession

        return TrellisSession.fitted(survey, weights, recipe, first_level, tell)

    def decoder(self, streams: Streams, sources: Sequence[Source], *, counting: bool = False) -> Decoder:
        """Decodes several streams at a time."""
        from pqcli.codecs.trellis.decoder import TrellisDecoder

        return TrellisDecoder(streams, sources, counting=counting)


CODEC = TrellisCodec()
