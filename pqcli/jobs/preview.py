"""`plan`: what compressing would do, and the size that it would give; nothing is written."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pqcli.codecs.base import record_of
from pqcli.container.layout import lay_out
from pqcli.container.manifest import make_manifest
from pqcli.container.peek import SUFFIX
from pqcli.jobs import compress as compressing
from pqcli.jobs.devices import resolve_device
from pqcli.limits import Limits
from pqcli.plan import plan as plans
from pqcli.plan.plan import Plan
from pqcli.recipe.recipe import Recipe

if TYPE_CHECKING:
    from pqcli.checkpoint import Checkpoint
    from pqcli.codecs.auto.choosing import Choice


@dataclass(frozen=True)
class Preview:
    """What `compress` would do: the plan, and the size that the file would have.

    With plain PQ the size is exact unless the weights hold a surprise that headers do not show (NaN, fewer distinct
    blocks than centroids, weights that float16 cannot hold, zeros, tensors with the same bytes); with the other codecs
    it is exact.
    """

    source: Path
    output: Path
    original_bytes: int
    predicted_bytes: int
    plan: Plan
    dropped: tuple[str, ...]


def preview(
    source: str | Path,
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    *,
    base: str | Path | Sequence[str | Path] = (),
    limits: Limits | None = None,
) -> Preview:
    """What `compress` with the same arguments would do.

    Plain PQ needs the headers alone. What codecs with streams will do, and what a base spares, depends on the weights:
    they are rehearsed, which takes as long as compressing.
    """
    recipe = recipe or Recipe()
    with compressing.opened(source, recipe, limits) as checkpoint:
        seen = _from_headers(checkpoint, output, recipe)
        coded = [entry for entry in seen.plan.entries if entry.action not in compressing.NOT_CODED]
        bases = compressing.bases_of(base)
        is_known = all(entry.scheme for entry in coded) and not bases
        return seen if is_known else _rehearsed(checkpoint, seen, recipe, bases)


def check_possible(seen: Preview, device: str, *, force: bool = False) -> None:
    """Raise what `compress` would raise before it does any work: no such device, or an output that may not be."""
    resolve_device(device)
    compressing.check_place(seen.output, seen.source, force=force)


def explain(
    source: str | Path,
    recipe: Recipe | None = None,
    *,
    base: str | Path | Sequence[str | Path] = (),
    limits: Limits | None = None,
) -> list[Choice]:
    """How `--codec auto` decides: for every tensor the candidates with their measured bits, error and cost."""
    from pqcli.codecs.auto.choosing import choose

    recipe = replace(recipe or Recipe(), codec="auto")
    with compressing.opened(source, recipe, limits) as checkpoint:
        plan = plans.make(recipe, checkpoint.tensors)
        bases, device = compressing.bases_of(base), torch.device("cpu")
        with compressing.compression(checkpoint, plan, recipe, device, _nowhere(), bases=bases) as work:
            survey = work.prepared()
            return choose(survey, work.weights, recipe.objective, work.first_level(survey))


def _from_headers(checkpoint: Checkpoint, output: str | Path | None, recipe: Recipe) -> Preview:
    plan = plans.make(recipe, checkpoint.tensors)
    about = compressing.about(checkpoint, recipe)
    manifest = make_manifest(about.source, about.recipe, [record_of(entry) for entry in plan.entries])
    return Preview(
        source=checkpoint.path,
        output=Path(output) if output else compressing.default_output(checkpoint.path),
        original_bytes=checkpoint.n_bytes,
        predicted_bytes=lay_out(manifest).n_bytes,
        plan=plan,
        dropped=compressing.dropped(checkpoint),
    )


def _rehearsed(checkpoint: Checkpoint, seen: Preview, recipe: Recipe, bases: Sequence[Path]) -> Preview:
    device = torch.device("cpu")
    with compressing.compression(checkpoint, seen.plan, recipe, device, _nowhere(), bases=bases) as work:
        n_bytes = work.file_bytes(work.coded(work.prepared()))
        tensors = work.tensor_reports()
    entries = tuple(
        replace(entry, action=found.action, reason=found.reason, predicted_bytes=found.bytes)
        for entry, found in zip(seen.plan.entries, tensors, strict=True)
    )
    return replace(seen, plan=replace(seen.plan, entries=entries), predicted_bytes=n_bytes)


def _nowhere() -> Path:
    """A target that is never written. Beside it lies what is coded meanwhile, in a file without a name."""
    return Path(tempfile.gettempdir()) / f"rehearsal{SUFFIX}"
