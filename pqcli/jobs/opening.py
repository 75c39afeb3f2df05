"""What is known of a compression before any weight is read, and so without torch: from headers, and from the recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pqcli import checkpoint as checkpoints
from pqcli import stats as statistics
from pqcli.atomic import check_output, output_errors
from pqcli.checkpoint import Checkpoint
from pqcli.container.bases import Search
from pqcli.container.files import pack
from pqcli.container.naming import Naming
from pqcli.container.peek import SUFFIX
from pqcli.container.writer import About
from pqcli.errors import CheckpointError, OutputError
from pqcli.limits import Limits
from pqcli.plan.plan import Plan
from pqcli.recipe import documents
from pqcli.recipe.recipe import Recipe
from pqcli.tensors.records import BUNDLED_BYTES

Files = Mapping[str, bytes]
NO_FILES: Files = {}
"""Small files that go into the container, by their paths."""
NOT_CODED = frozenset({"keep", "moments", "alias", "base"})
"""Actions of a plan that no codec takes part in."""


def opened(source: str | Path, recipe: Recipe, limits: Limits | None = None) -> Checkpoint:
    """The checkpoint, or as much of it as the recipe asks for."""
    return of_model(checkpoints.open(source, limits=limits, from_module=recipe.from_module), recipe)


def of_model(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """The checkpoint, without training state where the recipe asks for that."""
    if recipe.state != "drop":
        return checkpoint
    try:
        return checkpoint.model_only()
    except CheckpointError:
        checkpoint.close()
        raise


def check_stats(recipe: Recipe) -> None:
    """Raise StatsError for statistics that cannot be read, before any work is done."""
    if recipe.stats is not None:
        statistics.open(recipe.stats)


def bases_of(base: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """One base, or several, as paths."""
    return Search.among(base).given


def default_output(source: Path) -> Path:
    """`STEM.pq.safetensors` beside a checkpoint file or folder."""
    source = source.resolve() if source.name in {"", ".", ".."} else source
    stem = source.name if source.is_dir() else source.stem
    return source.with_name(stem + SUFFIX)


def check_place(output: Path, source: Path, *, force: bool) -> None:
    """Refuse what cannot be written before any work is done."""
    check_output(output, source, force=force)
    with output_errors(output):
        is_inside = output.exists() and source.is_dir() and output.resolve().parent == source.resolve()
    if is_inside and not output.name.endswith(SUFFIX):
        raise OutputError(f"'{output}' is a part of the input; use -o to write elsewhere")


def about(checkpoint: Checkpoint, recipe: Recipe, naming: Naming | None = None, files: Files = NO_FILES) -> About:
    """What the file of this checkpoint says, and holds, beside its tensors."""
    source = {
        "format": checkpoint.format,
        "n_bytes": checkpoint.n_bytes,
        "skeleton": checkpoint.skeleton,
        "dropped": _left_out(checkpoint, files),
        "side_bytes": sum(left_beside(checkpoint, files).values()),
    }
    names = tuple(info.name for info in checkpoint.tensors)
    packed, predicts = pack(files) if files else None, recipe.stats is not None
    return About(names, source, documents.to_json(recipe), naming, packed, predicts)


def dropped(checkpoint: Checkpoint, files: Files = NO_FILES) -> tuple[str, ...]:
    """What the source holds and the file does not, each with the reason."""
    return tuple(f"{path} ({reason})" for path, reason in _left_out(checkpoint, files))


def _left_out(checkpoint: Checkpoint, files: Files) -> list[list[str]]:
    """What the container does not hold: entries that JSON cannot carry, and files of a folder that are no weights."""
    entries = [[item.path, item.reason] for item in checkpoint.dropped]
    return entries + [
        [name, f"a file beside the weights, {n_bytes:,} B; copy it yourself"]
        for name, n_bytes in left_beside(checkpoint, files).items()
    ]


def left_beside(checkpoint: Checkpoint, files: Files) -> dict[str, int]:
    """The files beside the weights that the container does not hold, with their sizes."""
    return {name: n_bytes for name, n_bytes in checkpoint.side_sizes.items() if name not in files}


def has_state(plan: Plan) -> bool:
    """Whether so much training state is kept that coding it is worth a file whose kept tensors are all coded."""
    kept = [entry.info for entry in plan.entries if entry.action == "keep" and entry.info.role != "model"]
    return sum(info.n_bytes for info in kept) > BUNDLED_BYTES
