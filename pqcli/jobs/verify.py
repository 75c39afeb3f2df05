"""`verify`: whether a container is what was compressed, and says of it what is so."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pqcli import checkpoint as checkpoints
from pqcli.checkpoint import Checkpoint
from pqcli.container.folder import open_compressed
from pqcli.container.reader import Container, open_container
from pqcli.core.arrays import as_tensor
from pqcli.core.digests import tensor_hash
from pqcli.core.dtypes import Array
from pqcli.errors import BaseError, ContainerError, DamagedError
from pqcli.jobs.bars import Progress, hook_of, showing
from pqcli.jobs.events import Stage
from pqcli.jobs.report import describe, original_of
from pqcli.limits import Limits
from pqcli.tensors.records import Alias, Record, StoredError

REPORTED_WITHIN = 1e-4
SMALLEST_REPORTED = float(np.finfo(np.float32).tiny)
"""Errors are stored in float32: `verify` accepts this relative and this absolute difference."""


@dataclass(frozen=True)
class Finding:
    """One thing that `verify` found wrong: with which tensor (None: the file), and what."""

    name: str | None
    problem: str

    def __str__(self) -> str:
        return self.problem if self.name is None else f"tensor {self.name!r} {self.problem}"


@showing
def verify(
    file: str | Path,
    against: str | Path | None = None,
    *,
    weights: tuple[str, ...] | None = None,
    base: str | Path | Sequence[str | Path] = (),
    progress: Progress = None,
    limits: Limits | None = None,
) -> list[Finding]:
    """What is wrong with a container; an empty list if nothing is.

    Checks its structure, the checksum over every byte, and the hash of every decoded tensor. With `against`, also that
    kept tensors are identical to the original's and that errors are as reported (of tensors that were trained since,
    see `export`, neither is claimed); training state that was left out on
    request is not missed (see `left_out`). `base` as for `decode`. Where the original is a folder, `weights` may name
    the files of it that are meant. Of a compressed folder all containers are checked, and against the original the
    files beside them. Raises ContainerError where the file is no container, or a newer pqcli's, and BaseError where its
    base is missing or another one.
    """
    if Path(file).is_dir():
        from pqcli.jobs.folders.reading import verify_folder  # which needs this module

        where = Path(against) if against else None
        return verify_folder(Path(file), where, base=base, progress=hook_of(progress), limits=limits)
    try:
        container = open_container(file, limits=limits, base=base)
    except DamagedError as error:
        return [Finding(None, str(error))]
    with container:
        if container.needs_base:
            container.base()
        stage = Stage(hook_of(progress), "verifying", container.n_weights)
        if against is None:
            found = [finding for record in container.records for finding in _checked(container, record, None, stage)]
        else:
            with original_of(container, against, limits, weights) as original:
                found = list(_differences(container, original, stage))
        found += _files(container)
        if not container.is_whole():
            found.append(Finding(None, "its payloads are not those that were written (checksum)"))
        return found


def left_out(file: str | Path, *, limits: Limits | None = None) -> tuple[str, ...]:
    """The training state that compression was asked to leave out, entry by entry."""
    if Path(file).is_dir():
        from pqcli.jobs.folders.reading import left_out_of_folder  # which needs this module

        return left_out_of_folder(Path(file), limits=limits)
    try:
        opened = open_container(file, limits=limits)
    except DamagedError:
        return ()  # `verify` tells
    with opened as container:
        if not _is_dropped(container):
            return ()
        dropped = container.manifest.source.dropped
        return tuple(f"{path} ({reason})" for path, reason in dropped if reason.startswith(checkpoints.LEFT_OUT))


def trained_in(file: str | Path, *, limits: Limits | None = None) -> tuple[str, ...]:
    """The tensors that were trained after they had been compressed; of a folder, those of all its containers."""
    try:
        opened = open_compressed(file, limits=limits)
    except DamagedError:
        return ()  # `verify` tells
    with opened:
        containers = [opened] if isinstance(opened, Container) else opened.containers.values()
        return tuple(record.name for one in containers for record in one.records if record.trained)


def _is_dropped(container: Container) -> bool:
    """Whether compression was asked to leave training state out."""
    recipe = container.manifest.recipe
    return recipe.get("model_only") is True or recipe.get("training_state") == "drop"


def _files(container: Container) -> Iterator[Finding]:
    """What is wrong with the small files inside."""
    try:
        container.files()
    except ContainerError as error:
        yield Finding(None, str(error))


def _differences(container: Container, original: Checkpoint, done: Stage) -> Iterator[Finding]:
    is_asked_for = _is_dropped(container)
    known = {info.name: info for info in original.tensors if info.role == "model" or not is_asked_for}
    held = {record.name for record in container.records}
    for name in known:
        if name not in held:
            yield Finding(name, f"is in {original.path} but not in the container")
    for record in container.records:
        info = known.get(record.name)
        if info is None or (info.shape, info.dtype) != (record.info.shape, record.info.dtype):
            has = f"has {describe(info)} there" if info else "is missing there"
            yield Finding(record.name, f"is {describe(record.info)} in the container, and {has} ({original.path})")
            continue
        yield from _checked(container, record, original, done)


def _checked(container: Container, record: Record, original: Checkpoint | None, done: Stage) -> Iterator[Finding]:
    """What is wrong with one tensor. It is decoded once, whatever is asked of it."""
    if isinstance(record.coding, Alias):
        return
    try:
        decoded = container.numpy(record.name, check=False)
    except BaseError:
        raise  # of the base; nothing can be said of this file
    except ContainerError as error:
        yield Finding(record.name, str(error))
        return
    if not container.is_intact(record.name, decoded):
        container.check_base(record)
        yield Finding(record.name, "decodes to other bytes than were compressed")
    if original is not None:
        yield from _compared(container, record, original, decoded)
    done(record.info.numel, record.name)


def _compared(container: Container, record: Record, original: Checkpoint, decoded: Array) -> Iterator[Finding]:
    """What is wrong with a decoded tensor, given the one that was compressed; nothing is said of one trained since."""
    if container.is_trained(record.name):
        return
    weight = original.numpy(record.name)
    stored = container.error(record.name)
    if stored is None:
        if tensor_hash(weight) != tensor_hash(decoded):
            yield Finding(record.name, f"is kept, but differs from {original.path}")
        return
    from pqcli.core import metrics  # with torch, which hashes alone do without

    measured = StoredError.of(metrics.compare(as_tensor(weight), as_tensor(decoded)))
    for key, value in asdict(stored).items():
        actual = getattr(measured, key)
        within = REPORTED_WITHIN * max(abs(actual), abs(value)) + SMALLEST_REPORTED
        if actual != value and not abs(actual - value) <= within:  # an infinite difference is within nothing
            yield Finding(record.name, f"{key} is {actual:.6g} against {original.path}, and {value:.6g} as reported")
