"""The trellis codec: rotations, trellis-coded quantization and adaptive arithmetic coding (`pqcli.core.trellis`).

A job is a stream. What tensors share are rotations, fitted for the first level that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pqcli.codecs.base import Run, StreamCodec, Streams, Survey, Tell, Weights

if TYPE_CHECKING:
    from pqcli.codecs.base import Decoder
    from pqcli.codecs.trellis.session import TrellisSession
    from pqcli.core.trellis.sources import Source
    from pqcli.plan.plan import PlanEntry
    from pqcli.recipe.recipe import Recipe


class TrellisCodec(StreamCodec):
    """The smallest file for an error, at the price of random access."""

    takes_blocks = True

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
