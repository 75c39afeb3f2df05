"""`compress` and `plan` of a folder: containers in the places of its weights, all else copied, in a new folder.

Every component is compressed by itself, with the same recipe. A size that is asked for is the size of the whole folder:
what lies beside the weights is taken off, and the rest is shared among the components by their size.
"""

from __future__ import annotations

import posixpath
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pqcli import checkpoint as checkpoints
from pqcli.atomic import atomic_folder
from pqcli.checkpoint import Checkpoint
from pqcli.checkpoint.components import Component, Components, components_of, with_optimizers
from pqcli.checkpoint.folder import is_of_training
from pqcli.checkpoint.opened import LEFT_OUT
from pqcli.checkpoint.pt.tree import Dropped
from pqcli.claim import check_space, claimed
from pqcli.codecs.rate.budget import BudgetError
from pqcli.container.folder import full_name, labels
from pqcli.container.header import SUFFIX
from pqcli.errors import CheckpointError, UsageError
from pqcli.jobs.course import at_the_end, parts
from pqcli.jobs.events import Hook, ignore
from pqcli.jobs.folders.copying import copy_files, make_folders
from pqcli.jobs.folders.outputs import check_folder_output, default_folder
from pqcli.jobs.opening import bases_of, of_model
from pqcli.jobs.preview import Preview, preview_opened
from pqcli.limits import Limits
from pqcli.plan import plan as plans
from pqcli.plan.plan import Plan, PlanEntry
from pqcli.recipe import documents
from pqcli.recipe.recipe import Recipe
from pqcli.reports.figures import Report
from pqcli.reports.folders import folder_report
from pqcli.tensors.info import TensorInfo

if TYPE_CHECKING:
    from pqcli.jobs.executors import Executor
    from pqcli.jobs.journal.keeping import Keeping
    from pqcli.jobs.prediction import Prediction


@dataclass(frozen=True)
class OpenFolder:
    """A folder whose weights are open: its components, by the paths that their containers get."""

    path: Path
    checkpoints: dict[str, Checkpoint]
    parts: Components

    @property
    def original_bytes(self) -> int:
        """What is carried: the weights and the files beside them."""
        return sum(one.n_bytes for one in self.checkpoints.values()) + self.parts.side_bytes

    def tensors_beside(self, path: str) -> list[TensorInfo]:
        """The tensors of all components but one."""
        return [info for other, one in self.checkpoints.items() if other != path for info in one.tensors]


def compress_folder(
    source: Path,
    output: Path | None,
    recipe: Recipe,
    executor: Executor,
    *,
    with_copies: bool = False,
    shard_bytes: int | None = None,
    base: str | Path | Sequence[str | Path] = (),
    force: bool = False,
    verify: bool = True,
    keeping: Keeping,
    hook: Hook | None = None,
    limits: Limits | None = None,
) -> Report:
    """Compress the folder at `source` into a folder, by default `FOLDER.pq` beside it, which appears whole.

    Raises what `compress` raises.
    """
    from pqcli.jobs.compress import compress_opened  # with torch, which plans do without
    from pqcli.jobs.journal.keeping import told

    started = time.perf_counter()
    target = output or default_folder(source)
    check_folder_output(target, source, force=force)
    with (
        opened_folder(source, recipe, with_copies=with_copies, limits=limits) as folder,
        claimed(target),
        keeping.journal(
            target,
            hook or ignore,
            [*folder.checkpoints.values()],
            recipe,
            bases=bases_of(base),
            shard_bytes=shard_bytes,
            with_copies=with_copies,
            root=source,
        ) as journal,
    ):
        recipes = shared_recipes(folder, recipe)
        check_space(target, folder.parts.side_bytes)
        reports = {}
        hooks = parts(hook or ignore, {path: one.n_bytes for path, one in folder.checkpoints.items()})
        with atomic_folder(target, force=force, may_go=lambda path: SUFFIX in path) as temporary:
            make_folders(temporary, folder.parts.folders, folder.parts.links)
            for path, checkpoint in folder.checkpoints.items():
                (temporary / path).parent.mkdir(parents=True, exist_ok=True)
                others = [
                    other for one in folder.checkpoints.values() if one is not checkpoint for other in one.tensors
                ]
                report = compress_opened(
                    checkpoint,
                    temporary / path,
                    recipes[path],
                    executor,
                    others=others,
                    shard_bytes=shard_bytes,
                    bases=_bases_for(folder, checkpoint, base),
                    verify=verify,
                    journal=journal,
                    scope=path if len(folder.checkpoints) > 1 else "",
                    hook=hooks[path],
                    limits=limits,
                )
                reports[path] = replace(report, output=str(target / Path(report.output).relative_to(temporary)))
            copy_files(source, temporary, folder.parts.side, at_the_end(hook or ignore), verify=verify)
        report = folder_report(
            _by_label(reports),
            source=str(source),
            output=str(target),
            side=folder.parts.side,
            recipe=documents.to_json(recipe),
            seconds=time.perf_counter() - started,
        )
    return told(report, journal)


def preview_folder(
    source: Path,
    output: Path | None,
    recipe: Recipe,
    predicted: Callable[[Plan], Prediction | None],
    *,
    with_copies: bool = False,
    shard_bytes: int | None = None,
    base: str | Path | Sequence[str | Path] = (),
    limits: Limits | None = None,
) -> Preview:
    """What `compress_folder` with the same arguments would do; see `preview`.

    `predicted` is asked, of the plan of all containers, before any of them is looked at closely.
    """
    with opened_folder(source, recipe, with_copies=with_copies, limits=limits) as folder:
        recipes = shared_recipes(folder, recipe)
        names = labels(folder.checkpoints)
        planned = {
            path: plans.make(recipes[path], checkpoint.tensors, folder.tensors_beside(path))
            for path, checkpoint in folder.checkpoints.items()
        }
        prediction = predicted(Plan(tuple(entry for plan in planned.values() for entry in plan.entries), recipe))
        seen = {
            path: preview_opened(
                checkpoint,
                source / path,
                planned[path],
                shard_bytes=shard_bytes,
                bases=_bases_for(folder, checkpoint, base),
            )
            for path, checkpoint in folder.checkpoints.items()
        }
        return Preview(
            source=source,
            output=output or default_folder(source),
            original_bytes=folder.original_bytes,
            predicted_bytes=folder.parts.side_bytes + sum(one.predicted_bytes for one in seen.values()),
            plan=Plan(tuple(entry for path, one in seen.items() for entry in _named(names[path], one.plan)), recipe),
            dropped=tuple(what for one in seen.values() for what in one.dropped),
            carried_bytes=folder.parts.side_bytes,
            n_carried=len(folder.parts.side),
            prediction=prediction,
        )


@contextmanager
def opened_folder(
    source: Path, recipe: Recipe, *, with_copies: bool = False, limits: Limits | None = None
) -> Iterator[OpenFolder]:
    """The folder with the weights of all its components open, or as much of them as the recipe asks for."""
    parts = _without_training(components_of(source, limits=limits, with_copies=with_copies), recipe)
    parts = with_optimizers(source, parts) if recipe.state == "8bit" else parts
    with ExitStack() as stack:
        checkpoints: dict[str, Checkpoint] = {}
        side, left_out = dict(parts.side), dict(parts.left_out)
        for component in parts.components:
            try:
                checkpoint = _opened(source, component, recipe, limits)
            except CheckpointError:
                if component.is_main or len(parts.components) == 1:
                    raise
                # not what libraries load: whatever it is, it is carried as it is
                side |= {path: (source / path).stat().st_size for path in _paths(component)}
                continue
            checkpoints[posixpath.join(component.place, component.stem + SUFFIX)] = stack.enter_context(checkpoint)
        if not checkpoints:
            raise CheckpointError(f"'{source}' holds no weights that can be read; name one of its files to see why")
        first = next(iter(checkpoints.values()))
        first.dropped += tuple(Dropped(_printable(path), reason) for path, reason in left_out.items())
        yield OpenFolder(source, checkpoints, replace(parts, side=side))


def shared_recipes(folder: OpenFolder, recipe: Recipe) -> dict[str, Recipe]:
    """The recipe of each component, by the path of its container: a size of the folder becomes sizes of containers."""
    total = recipe.target_bytes
    if recipe.target_ratio is not None:
        total = int(folder.original_bytes / recipe.target_ratio)
    if total is None:
        return dict.fromkeys(folder.checkpoints, recipe)
    recipes, left = {}, total - folder.parts.side_bytes
    for path, one in folder.checkpoints.items():
        if not _has_model(one):
            recipes[path] = replace(recipe, target_ratio=None, target_bytes=None)
            plan = plans.make(recipes[path], one.tensors, folder.tensors_beside(path))
            left -= preview_opened(one, None, plan).predicted_bytes
    if left <= 0:
        raise BudgetError(
            f"'{folder.path}' cannot come to {total:,} bytes: the {len(folder.parts.side):,} files beside its weights "
            f"are copied and take {folder.parts.side_bytes:,}{_beside_optimizers(recipes)}; allow more, or name a lone "
            f"file with -o x{SUFFIX}"
        )
    shared = {path: one.n_bytes for path, one in folder.checkpoints.items() if path not in recipes}
    for path, n_bytes in shared.items():
        share = left * n_bytes // max(sum(shared.values()), 1)
        recipes[path] = replace(recipe, target_ratio=None, target_bytes=share)
    return recipes


def _beside_optimizers(recipes: dict[str, Recipe]) -> str:
    return f", beside {', '.join(recipes)}: --training-state drop leaves it out" if recipes else ""


def _bases_for(folder: OpenFolder, checkpoint: Checkpoint, base: str | Path | Sequence[str | Path]) -> Sequence[Path]:
    """The bases of the lone component, and none of optimizers.

    Raises UsageError where there are several, whose bases nobody can tell apart.
    """
    bases = bases_of(base)
    weights = [path for path, one in folder.checkpoints.items() if _has_model(one)]
    if bases and len(weights) > 1:
        raise UsageError(
            f"--base: '{folder.path}' has {len(weights)} components ({', '.join(weights)}); "
            "compress them one by one, each with its own base"
        )
    return bases if _has_model(checkpoint) else ()


def _opened(source: Path, component: Component, recipe: Recipe, limits: Limits | None) -> Checkpoint:
    place, weights = source / component.place, component.weights
    return of_model(checkpoints.open(place, limits=limits, from_module=recipe.from_module, weights=weights), recipe)


def _without_training(parts: Components, recipe: Recipe) -> Components:
    """Without the files of a trainer, where the recipe wants the model alone."""
    if recipe.state != "drop":
        return parts
    gone = [path for path in parts.side if is_of_training(posixpath.basename(path))]
    return replace(
        parts,
        side={path: n_bytes for path, n_bytes in parts.side.items() if path not in gone},
        left_out={**parts.left_out, **{path: f"{LEFT_OUT}: {parts.side[path]:,} B" for path in gone}},
    )


def _has_model(checkpoint: Checkpoint) -> bool:
    """Whether a component is weights, and not the state of an optimizer alone."""
    return any(info.role == "model" for info in checkpoint.tensors)


def _paths(component: Component) -> Sequence[str]:
    return [posixpath.join(component.place, name) for name in component.weights]


def _named(label: str, plan: Plan) -> Iterator[PlanEntry]:
    """The entries of a plan, with the names that the tensors have in the folder."""
    for entry in plan.entries:
        alias_of = None if entry.info.alias_of is None else full_name(label, entry.info.alias_of)
        yield replace(entry, info=replace(entry.info, name=full_name(label, entry.info.name), alias_of=alias_of))


def _by_label(reports: dict[str, Report]) -> dict[str, Report]:
    names = labels(reports)
    return {names[path]: report for path, report in reports.items()}


def _printable(path: str) -> str:
    """A path as JSON can hold it."""
    return path.encode("utf-8", "backslashreplace").decode()
