"""`plan`: what compressing would do, and the size that it would give; nothing is written."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pqcli.checkpoint.hub import located
from pqcli.codecs.base import record_of
from pqcli.container.peek import SUFFIX
from pqcli.container.shards import cut
from pqcli.defaults import SHARD_BYTES
from pqcli.jobs import notebook, opening
from pqcli.jobs.folders.embedding import check_embedding, small_files
from pqcli.jobs.folders.outputs import check_folder_output, goes_to_folder
from pqcli.jobs.opening import NO_FILES, Files
from pqcli.limits import Limits
from pqcli.plan import plan as plans
from pqcli.plan.plan import Plan
from pqcli.recipe.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pqcli.checkpoint import Checkpoint
    from pqcli.codecs.auto.choosing import Choice
    from pqcli.jobs.executors import Threads
    from pqcli.jobs.prediction import Prediction


class Foretold(Protocol):
    """Called with a prediction before the work that it is of, if previewing `is_long` too: as long as compressing."""

    def __call__(self, found: Prediction, *, is_long: bool) -> None:
        """Tell it."""


@dataclass(frozen=True)
class Preview:
    """What `compress` would do: the plan, and the size that the file would have.

    With plain PQ the size is exact unless the weights hold a surprise that headers do not show (NaN, fewer distinct
    blocks than centroids, weights that float16 cannot hold, zeros, tensors with the same bytes); with the other codecs
    it is exact. That of a folder counts the `n_carried` that lie beside its weights, which have `carried_bytes`.
    `prediction` tells about how long it would take, and how much memory; None where that is not worth finding out, or
    is up to a cluster.
    """

    source: Path
    output: Path
    original_bytes: int
    predicted_bytes: int
    plan: Plan
    dropped: tuple[str, ...]
    carried_bytes: int = 0
    n_carried: int = 0
    prediction: Prediction | None = None

    def __repr__(self) -> str:
        return notebook.preview_line(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return notebook.preview_page(self)


def preview(
    source: str | Path,
    output: str | Path | None = None,
    recipe: Recipe | None = None,
    *,
    with_copies: bool = False,
    embed_files: bool = False,
    shard_bytes: int = SHARD_BYTES,
    base: str | Path | Sequence[str | Path] = (),
    device: str = "auto",
    ray: str | None = None,
    workers: int | None = None,
    foretold: Foretold | None = None,
    limits: Limits | None = None,
) -> Preview:
    """What `compress` with the same arguments would do.

    Plain PQ needs the headers alone. What codecs with streams will do, and what a base spares, depends on the weights:
    they are rehearsed, which takes as long as compressing. How long that is, and how much memory it takes, is found out
    from something small (`pqcli.jobs.prediction`), and told to `foretold` before any long work.
    """
    recipe = recipe or Recipe()
    place = located(source)
    source, output = place.path, output or place.output()

    def predicted(plan: Plan) -> Prediction | None:
        from pqcli.jobs.devices import resolve_device  # with torch, which plans do without
        from pqcli.jobs.prediction import predict

        found = None if ray is not None else predict(plan, recipe, resolve_device(device), workers)
        if found is not None and foretold is not None:
            foretold(found, is_long=_is_rehearsed(plan, bool(bases)))
        return found

    bases = opening.bases_of(base)
    if embed_files:
        check_embedding(source, output)
    if goes_to_folder(source, output):
        from pqcli.jobs.folders.compressing import preview_folder  # which needs this module

        where = Path(output) if output else None
        return preview_folder(
            source, where, recipe, predicted, with_copies=with_copies, shard_bytes=shard_bytes, base=base,
            limits=limits,
        )  # fmt: skip
    files = small_files(source, limits) if embed_files else {}
    with opening.opened(source, recipe, limits) as checkpoint:
        plan = plans.make(recipe, checkpoint.tensors)
        prediction = predicted(plan)
        return replace(preview_opened(checkpoint, output, plan, bases=bases, files=files), prediction=prediction)


def preview_opened(
    checkpoint: Checkpoint,
    output: str | Path | None,
    plan: Plan,
    *,
    bases: Sequence[Path] = (),
    files: Files = NO_FILES,
    shard_bytes: int | None = None,
) -> Preview:
    """What compressing an open checkpoint by this plan would do; all else is as for `compress_opened`."""
    opening.check_stats(plan.recipe)
    seen = _from_headers(checkpoint, output, plan, files, shard_bytes)
    is_known = not _is_rehearsed(seen.plan, bool(bases))
    has_state = opening.has_state(seen.plan) or any(entry.action == "moments" for entry in seen.plan.entries)
    if is_known and not has_state:
        return seen
    return _rehearsed(checkpoint, seen, bases, files, shard_bytes, of_state=is_known)


def _is_rehearsed(plan: Plan, has_base: bool) -> bool:
    """Whether headers alone do not tell what becomes of the tensors that are coded."""
    coded = [entry for entry in plan.entries if entry.action not in opening.NOT_CODED]
    return has_base or not all(entry.scheme for entry in coded)


def check_possible(seen: Preview, device: str, *, force: bool = False) -> None:
    """Raise what `compress` would raise before it does any work: no such device, or an output that may not be."""
    if device != "auto":
        from pqcli.jobs.devices import resolve_device  # with torch, which plans do without

        resolve_device(device)
    if goes_to_folder(seen.source, seen.output):
        check_folder_output(seen.output, seen.source, force=force)
    else:
        opening.check_place(seen.output, seen.source, force=force)


def explain(
    source: str | Path,
    recipe: Recipe | None = None,
    *,
    base: str | Path | Sequence[str | Path] = (),
    limits: Limits | None = None,
) -> list[Choice]:
    """How `--codec auto` decides: for every tensor the candidates with their measured bits, error and cost."""
    from pqcli.codecs.auto.choosing import choose
    from pqcli.jobs.compress import compression

    recipe = replace(recipe or Recipe(), codec="auto")
    with opening.opened(located(source).path, recipe, limits) as checkpoint:
        plan = plans.make(recipe, checkpoint.tensors)
        bases = opening.bases_of(base)
        with compression(checkpoint, plan, recipe, _here(recipe), _nowhere(), bases=bases) as work:
            survey = work.prepared()
            return choose(survey, work.weights, recipe.objective, work.first_level(survey))


def _from_headers(
    checkpoint: Checkpoint,
    output: str | Path | None,
    plan: Plan,
    files: Files,
    shard_bytes: int | None,
) -> Preview:
    about = opening.about(checkpoint, plan.recipe, files=files)
    manifest = about.manifest([record_of(entry) for entry in plan.entries])
    target = Path(output) if output else opening.default_output(checkpoint.path)
    return Preview(
        source=checkpoint.path,
        output=target,
        original_bytes=checkpoint.n_bytes,
        predicted_bytes=cut(manifest, None, shard_bytes, target.name.removesuffix(SUFFIX)).n_bytes,
        plan=plan,
        dropped=opening.dropped(checkpoint, files),
    )


def _rehearsed(
    checkpoint: Checkpoint,
    seen: Preview,
    bases: Sequence[Path],
    files: Files,
    shard_bytes: int | None,
    *,
    of_state: bool,
) -> Preview:
    """What comes of compressing, without a file; `of_state`: of training state alone, headers tell of the rest."""
    from pqcli.jobs.compress import compression  # with torch, as weights are read here

    target = _nowhere(seen.output.name)
    with compression(
        checkpoint,
        seen.plan,
        seen.plan.recipe,
        _here(seen.plan.recipe),
        target,
        files=files,
        shard_bytes=shard_bytes,
        bases=bases,
        rehearsed=seen.output,
    ) as work:
        survey = work.prepared()
        n_bytes = work.bytes_with(survey.records) if of_state else work.file_bytes(work.coded(survey))
        tensors = {tensor.name: tensor for tensor in work.tensor_reports()}
    entries = tuple(
        replace(entry, action=found.action, reason=found.reason, predicted_bytes=found.bytes)
        if (found := tensors.get(entry.info.name))
        else entry
        for entry in seen.plan.entries
    )
    return replace(seen, plan=replace(seen.plan, entries=entries), predicted_bytes=n_bytes)


def _here(recipe: Recipe) -> Threads:
    import torch

    from pqcli.jobs.executors import Threads

    return Threads.within(torch.device("cpu"), recipe.max_memory)


def _nowhere(name: str = f"rehearsal{SUFFIX}") -> Path:
    """A target that is never written. Beside it lies what is coded meanwhile, in a file without a name."""
    return Path(tempfile.gettempdir()) / name
