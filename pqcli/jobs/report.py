"""`report` and `inspect`: what a container says of itself, or what two files say of each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pqcli import checkpoint as checkpoints
from pqcli.atomic import atomic_writer
from pqcli.checkpoint import Checkpoint
from pqcli.codecs import registry
from pqcli.codecs.base import Use
from pqcli.codecs.rate.budget import error_bound
from pqcli.codecs.rate.protection import warnings_of_tensors
from pqcli.container.manifest import StoredRecord
from pqcli.container.naming import BaseName
from pqcli.container.reader import Container, open_container
from pqcli.errors import CheckpointError, RecipeError, UsageError
from pqcli.jobs.bars import Progress, hook_of, showing
from pqcli.jobs.events import Stage
from pqcli.limits import Limits
from pqcli.plan.paper import paper_bytes
from pqcli.recipe import documents
from pqcli.reports.figures import INT4_GROUP, BaseReport, Report, TensorReport, state_of
from pqcli.stats.damage import Damage
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.records import (
    Alias,
    Coded,
    Copy,
    Kept,
    Moments,
    Plain,
    Record,
    Same,
    StoredError,
    with_bundle_shares,
)

if TYPE_CHECKING:
    import torch

    from pqcli.codecs.statistics import Reading


@showing
def report(
    file: str | Path,
    against: str | Path | None = None,
    *,
    weights: tuple[str, ...] | None = None,
    base: str | Path | Sequence[str | Path] = (),
    stats: str | Path | None = None,
    progress: Progress = None,
    limits: Limits | None = None,
) -> Report:
    """Size and error of every tensor of a container, as compression measured them; the entropy of its assignments.

    With `against`, the original checkpoint, every error is measured again from the two files, and that of int4. Only
    for that a `base` is needed, which is found as `decode` finds it. Where the original is a folder, `weights` may name
    the files of it that are meant. With `stats`, statistics of the layers' inputs, what these errors do to the output
    of each layer, and to the network's, is predicted too. Of a compressed folder, what its containers add up to.
    """
    if stats is not None and against is None:
        raise UsageError("what errors do is predicted from the errors themselves: give the original with --against")
    if Path(file).is_dir():
        from pqcli.jobs.folders.reading import report_folder  # which needs this module

        where = Path(against) if against else None
        return report_folder(Path(file), where, base=base, stats=stats, progress=hook_of(progress), limits=limits)
    with open_container(file, limits=limits, base=base) as container:
        container.check_figures()
        records = with_bundle_shares(list(container.records), container.bundle_bytes)
        if against is None:
            tensors = tuple(_stored_report(container, record) for record in records)
        else:
            stage = Stage(hook_of(progress), "measuring", container.n_weights)
            with original_of(container, against, limits, weights) as original:
                known = None if stats is None else _opened(stats, records)
                tensors = tuple(_measured_reports(container, records, original, stage, known))
        source = container.manifest.source
        return Report(
            source=str(against or ""),
            output=str(file),
            original_bytes=source.n_bytes,
            compressed_bytes=container.n_bytes,
            tensors=tensors,
            dropped=tuple(f"{path} ({reason})" for path, reason in source.dropped),
            recipe=container.manifest.recipe,
            paper_bytes=paper_bytes_of(container.records),
            base=base_report(container.manifest.base, records),
            warnings=_warnings(container.manifest.recipe, tensors),
            side_bytes=source.side_bytes,
        )


def _warnings(recipe: Mapping[str, Any], tensors: Sequence[TensorReport]) -> tuple[str, ...]:
    """What compression said of tensors that a budget of error gave up, as far as a file tells."""
    try:
        bound = error_bound(documents.from_json(recipe))
    except RecipeError:  # of a stranger, or of a newer pqcli: it is not needed for anything else
        return ()
    errors = {tensor.name: tensor.relative_mse for tensor in tensors if tensor.quantized and tensor.relative_mse}
    return () if bound is None else warnings_of_tensors(bound, errors)


def inspect(file: str | Path, names: Sequence[str] | None = None, *, limits: Limits | None = None) -> dict[str, Any]:
    """What a container says of itself: version, features, source, recipe, and the records of `names` or of all."""
    if Path(file).is_dir():
        from pqcli.jobs.folders.reading import inspect_folder  # which needs this module

        return inspect_folder(Path(file), names, limits=limits)
    with open_container(file, limits=limits) as container:
        records = [container.record(name) for name in names] if names else container.records
        source = container.manifest.source
        base = base_report(container.manifest.base, container.records)
        state = state_of([_told(container, record) for record in container.records])
        return {
            "file": str(file),
            "file_bytes": container.n_bytes,
            "version": container.manifest.version,
            "features": list(container.manifest.features),
            "source": {
                "format": source.format,
                "n_bytes": source.n_bytes,
                "dropped": source.dropped,
                "side_bytes": source.side_bytes,
            },
            "warnings": list(_warnings(container.manifest.recipe, [_told(container, r) for r in container.records])),
            "recipe": container.manifest.recipe,
            "files": dict(container.manifest.files.files) if container.manifest.files else {},
            **({"base": asdict(base)} if base else {}),
            **({"state": asdict(state)} if state else {}),
            "tensors": [{**asdict(StoredRecord.of(record)), "bytes": record.payload_bytes} for record in records],
        }


def dropped_of(file: Path, limits: Limits | None = None) -> list[tuple[str, str]]:
    """What was not taken into a container: places, each with the reason."""
    with open_container(file, limits=limits) as container:
        return container.manifest.source.dropped


def write_text(path: Path, text: str, *, force: bool = False) -> None:
    """Write a text file whole or not at all."""
    with atomic_writer(path, force=force) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def original_of(
    container: Container, against: str | Path, limits: Limits | None, weights: tuple[str, ...] | None = None
) -> Checkpoint:
    """The checkpoint that a container is compared with, read as it was read when it was compressed."""
    from_module = container.manifest.recipe.get("from_module") is True
    return checkpoints.open(against, limits=limits, from_module=from_module, weights=weights)


def describe(info: TensorInfo) -> str:
    """A tensor's dtype and shape, as messages say it."""
    return f"{info.dtype} {'x'.join(map(str, info.shape)) or 'scalar'}"


def tensor_report(
    record: Record, error: StoredError | None, use: Use | None, damage: Damage | None = None
) -> TensorReport:
    """What became of one tensor."""
    info, coding, payload = record.info, record.coding, record.payload_bytes
    is_alias = isinstance(coding, Alias)
    return TensorReport(
        name=info.name,
        shape=info.shape,
        dtype=info.dtype,
        action=_action(record),
        reason=record.reason,
        scheme=_scheme(record),
        block_size=coding.block_size if isinstance(coding, Plain) else None,
        n_centroids=coding.n_centroids if isinstance(coding, Plain) else None,
        n_weights=info.numel,
        original_bytes=0 if is_alias else info.n_bytes,
        bytes=payload,
        bits_per_weight=8 * payload / info.numel if info.numel and not isinstance(coding, Alias | Copy) else None,
        centroids_used=use.centroids if use else None,
        assignment_entropy=use.entropy if use else None,
        assignment_bytes=record.assignment_bytes if use else None,
        entropy_bytes=math.ceil(use.entropy_bits / 8) if use else None,
        alias_of=info.alias_of,
        copy_of=coding.of if isinstance(coding, Copy) else None,
        kind=record.kind,
        difference=record.difference,
        trained=record.trained,
        role=info.role,
        **(_error_fields(error, record) if error else {}),
        **_damage_fields(damage),
    )


def base_report(name: BaseName | None, records: Sequence[Record]) -> BaseReport | None:
    """What a file's base spares; None for a file without one."""
    if name is None:
        return None
    same = [record for record in records if isinstance(record.coding, Same)]
    differences = [record for record in records if record.difference]
    return BaseReport(
        hash=name.hash,
        path=name.path,
        n_same=len(same),
        same_original_bytes=sum(record.info.n_bytes for record in same),
        n_differences=len(differences),
        differences_original_bytes=sum(record.info.n_bytes for record in differences),
        differences_bytes=sum(record.payload_bytes for record in differences),
    )


def _told(container: Container, record: Record) -> TensorReport:
    """What the records alone tell of a tensor: no payload is read."""
    return tensor_report(record, container.error(record.name), None, container.damage(record.name))


def paper_bytes_of(records: Sequence[Record]) -> int | None:
    """The papers' size; None where something is coded in a way that they do not count."""
    if any(isinstance(record.coding, Coded) or record.needs_base for record in records):
        return None
    return paper_bytes(
        (
            record.name,
            record.info.numel,
            (record.n_vectors, record.coding.n_centroids, record.coding.block_size)
            if isinstance(record.coding, Plain)
            else None,
        )
        for record in records
        if not isinstance(record.coding, Alias | Copy) and record.info.role == "model"
    )


def _action(record: Record) -> str:
    """What reports call the codec: one that is an ability of another goes by that one's name."""
    if isinstance(record.coding, Coded):
        return registry.row(record.coding.codec).reported_as or record.action
    return record.action


def _scheme(record: Record) -> str:
    """What the tensor is coded as, as a person says it."""
    coding, to_base = record.coding, " to base" if record.difference else ""
    to_base += ", trained" if record.trained else ""
    if isinstance(coding, Plain):
        return f"PQ {coding.block_size}x{coding.n_centroids}" + to_base
    if isinstance(coding, Coded):
        row = registry.row(coding.codec)
        return (row.label or row.name) + to_base
    if isinstance(coding, Copy):
        return f"copy of {coding.of}"
    if isinstance(coding, Same):
        return "as the base"
    if isinstance(coding, Moments):
        return f"8 bits, {coding.form} moments"
    return "kept" + to_base if isinstance(coding, Kept) else f"alias of {coding.of}"


def _error_fields(error: StoredError, record: Record) -> dict[str, Any]:
    return {
        "relative_mse": error.relative_mse,
        "cosine": error.cosine,
        "max_abs_error": error.max_abs_error,
        "energy": error.rms**2 * record.info.numel,
    }


def _stored_report(container: Container, record: Record) -> TensorReport:
    use = None
    if isinstance(record.coding, Plain):
        from pqcli.codecs.plain import use_of  # with torch, which `inspect` does without

        use = use_of(container.pq_tensor(record.name))
    elif isinstance(record.coding, Coded):
        use = Use(None, None, container.entropy(record.name))
    return tensor_report(record, container.error(record.name), use, container.damage(record.name))


def _measured_reports(
    container: Container,
    records: Sequence[Record],
    original: Checkpoint,
    done: Stage,
    stats: Reading | None,
) -> Iterator[TensorReport]:
    from pqcli.core import metrics

    known = {info.name: info for info in original.tensors}
    for record in records:
        info = known.get(record.name)
        if info is None or info.shape != record.info.shape:
            raise CheckpointError(
                f"{original.path}: tensor {record.name!r} is {describe(info) if info else 'missing'}, the container "
                f"has {describe(record.info)}; give the checkpoint that was compressed"
            )
        if not record.quantized:
            yield _stored_report(container, record)
        else:
            weight = original.read(record.name)
            decoded = container.decode(record.name)
            error = metrics.compare(weight, decoded)
            yield replace(
                _stored_report(container, record),
                int4_relative_mse=_int4_error(record, weight),
                **_error_fields(StoredError.of(error), record),
                **_damage_fields(None if stats is None else stats.damage(record, weight, decoded)),
            )
        if not isinstance(record.coding, Alias):
            done(record.info.numel, record.name)


def _int4_error(record: Record, weight: torch.Tensor) -> float | None:
    """What int4 would do to weights; nobody holds moments so."""
    from pqcli.core import rtn

    return None if isinstance(record.coding, Moments) else rtn.error(weight, INT4_GROUP).relative_mse


def _opened(stats: str | Path, records: Sequence[Record]) -> Reading:
    """Statistics of the layers whose weights these are."""
    from pqcli.codecs.statistics import opened

    return opened(str(stats), records)


def _damage_fields(damage: Damage | None) -> dict[str, Any]:
    return {} if damage is None else {"output_mse": damage.output_mse, "damage": damage.damage}
