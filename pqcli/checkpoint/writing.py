"""Writing a dense checkpoint, in any of the formats, from tensors that come one at a time.

All checks come first (does the skeleton fit the tensors, can the format hold them, is the target free), then the
writing, through `atomic_writer`: a file appears whole or not at all. A new folder is filled beside its target and
moved into place; into an existing one (`force`) the files go one by one, the index last.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from pqcli.atomic import (
    atomic_writer,
    check_target,
    final_path,
    move,
    output_errors,
    run_check,
    sync_folder,
    temporary_beside,
)
from pqcli.checkpoint import formats
from pqcli.checkpoint.folder import bare_name, is_weights_name
from pqcli.checkpoint.opening import open_checkpoint
from pqcli.errors import ContainerError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from pqcli.atomic import Check
    from pqcli.checkpoint.pt.tree import Json
    from pqcli.checkpoint.rawbytes import Read
    from pqcli.limits import Limits
    from pqcli.tensors.info import TensorInfo


def write(
    target: Path,
    tensors: Sequence[TensorInfo],
    read: Read,
    skeleton: Json,
    *,
    format: str,  # noqa: A002 - the word of the interface
    force: bool = False,
    verify: bool = False,
    limits: Limits | None = None,
) -> int:
    """Write the checkpoint and return its size in bytes.

    `tensors` must be in the order of the `Checkpoint.tensors` that the skeleton came with; their dtypes are the ones
    written and `read` must give. `read` is called once per tensor that is no alias; one tensor is held at a time.

    "pt" restores the nesting where the skeleton has one, else writes a flat dict; tied tensors share their storage.
    "safetensors" writes flat names, and tied tensors as copies. "folder" restores the shards and the index of a
    folder, else writes `model.safetensors`.

    With `verify`, each file is read again before it is put in place: its bytes must be those that were written, and it
    must open, within `limits`, as a checkpoint of these shapes and dtypes.

    Raises `OutputError` where the target or the format will not take it, `ContainerError` where the skeleton does not
    fit the tensors.
    """
    if format == formats.FOLDER:
        return _write_folder(target, _folder_jobs(tensors, read, skeleton, limits), limits, force=force, verify=verify)
    check_target(target, force=force)
    job = _file_job(target.name, format, tensors, read, _own_skeleton(skeleton, format), limits)
    return _write_job(target, job, force=force, verify=verify)


def write_into(
    folder: Path,
    name: str,
    tensors: Sequence[TensorInfo],
    read: Read,
    skeleton: Json,
    *,
    format: str,  # noqa: A002 - the word of the interface
    verify: bool = False,
    limits: Limits | None = None,
) -> int:
    """As `write`, into a folder that is there and becomes whole elsewhere; returns the bytes written.

    "folder" gives the files that the skeleton names; any other format one file called `name`. Raises `OutputError`
    where there is a file of such a name.
    """
    if format == formats.FOLDER:
        jobs = _folder_jobs(tensors, read, skeleton, limits)
    else:
        jobs = [_file_job(name, format, tensors, read, _own_skeleton(skeleton, format), limits)]
    return sum(_write_job(folder / job.name, job, force=False, verify=verify) for job in jobs)


@dataclass(frozen=True)
class _Job:
    """One file to write; everything that can be checked beforehand has been."""

    name: str
    write: Callable[[BinaryIO], int]
    check: Check


def _own_skeleton(skeleton: Json, format_: str) -> dict[str, Json]:
    """The skeleton where it describes the format that is written, else nothing."""
    with _trusting_nothing():
        return dict(skeleton) if skeleton and skeleton["source"] == format_ else {}


def _file_job(
    name: str,
    format_: str,
    tensors: Sequence[TensorInfo],
    read: Read,
    skeleton: dict[str, Json],
    limits: Limits | None,
) -> _Job:
    _check_aliases(tensors)
    row = formats.named(format_)
    with _trusting_nothing():
        return _Job(name, row.prepare(tensors, read, skeleton), lambda path: _check_tensors(path, tensors, limits))


def _check_tensors(path: Path, tensors: Sequence[TensorInfo], limits: Limits | None) -> None:
    """Raise an error unless the file at `path` opens and has tensors of these shapes and dtypes."""
    if not tensors:
        return  # nothing to open
    with open_checkpoint(path, limits=limits) as written:
        found = Counter((info.shape, info.dtype) for info in written.tensors)
    expected = Counter((info.shape, info.dtype) for info in tensors)
    if found != expected:
        raise OutputError(f"{found.total()} tensors, where {expected.total()} of other shapes or dtypes were written")


def _check_aliases(tensors: Sequence[TensorInfo]) -> None:
    """Raise `ContainerError` unless every alias names an owner of its own shape and dtype."""
    owners = {info.name: (info.shape, info.dtype) for info in tensors if info.alias_of is None}
    for info in tensors:
        if info.alias_of is not None and owners.get(info.alias_of) != (info.shape, info.dtype):
            raise ContainerError(
                f"tensor '{info.name}' is tied to '{info.alias_of}', which is no tensor of the same shape and dtype"
            )


@contextlib.contextmanager
def _trusting_nothing() -> Any:
    """The skeleton may come from a damaged or hostile file: what goes wrong in here is its fault."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, zlib.error) as error:
        raise ContainerError(
            f"the stored structure of the checkpoint does not fit its tensors ({type(error).__name__}: "
            f"{str(error)[:160]}); the file is damaged"
        ) from error


# -- folders -----------------------------------------------------------------------------------------------------------


def _folder_jobs(tensors: Sequence[TensorInfo], read: Read, skeleton: Json, limits: Limits | None) -> list[_Job]:
    """The files of the folder, the index last."""
    own = _own_skeleton(skeleton, formats.FOLDER)
    if not own:
        return [_file_job("model.safetensors", "safetensors", tensors, read, {}, limits)]
    jobs: list[_Job] = []
    weight_map: dict[str, str] = {}
    with _trusting_nothing():
        waiting = list(tensors)
        for shard in own["shards"]:
            if not bare_name(shard["file"]) or any(job.name == shard["file"] for job in jobs):
                raise ValueError(f"shard name {ascii(shard['file'])[:80]}")
            part, waiting = waiting[: int(shard["n"])], waiting[int(shard["n"]) :]
            weight_map.update((info.name, shard["file"]) for info in part)
            jobs.append(_file_job(shard["file"], shard["format"], part, read, shard, limits))
        if waiting:
            raise ValueError(f"{len(waiting)} tensors belong to no shard")
        if "index" in own:
            jobs.append(_index_job(own["index"], weight_map, tensors))
    return jobs


def _index_job(index: Json, weight_map: dict[str, str], tensors: Sequence[TensorInfo]) -> _Job:
    if not bare_name(index["file"]) or index["file"] in weight_map.values():
        raise ValueError(f"index name {ascii(index['file'])[:80]}")
    metadata = index["metadata"]
    n_bytes = sum(info.n_bytes for info in tensors if info.alias_of is None)
    if isinstance(metadata, dict) and "total_size" in metadata and n_bytes != index["n_bytes"]:
        metadata = {**metadata, "total_size": n_bytes}  # decoded to another dtype
    content = {"weight_map": weight_map} if metadata is None else {"metadata": metadata, "weight_map": weight_map}
    text = (json.dumps(content, indent=2) + "\n").encode()
    return _Job(index["file"], lambda file: file.write(text), lambda _path: None)


def _write_folder(target: Path, jobs: list[_Job], limits: Limits | None, *, force: bool, verify: bool) -> int:
    with output_errors(target):
        exists = target.exists() or target.is_symlink()
        if exists and not target.is_dir():
            raise OutputError(f"cannot write the folder '{target}': a file of that name exists")
        present = {entry.name for entry in target.iterdir()} if exists else set()
    if not present:
        return _write_new_folder(target, jobs, limits, verify=verify)
    if not force:
        raise OutputError(f"'{target}' exists already and is not empty; use --force to write into it, or -o elsewhere")
    stale = sorted(name for name in present if is_weights_name(name) and name not in {job.name for job in jobs})
    if stale:
        raise OutputError(
            f"'{target}' holds other weights ({', '.join(stale[:3])}), which would be mixed with the new ones; "
            "remove them or choose another folder"
        )
    return sum(_write_job(target / job.name, job, force=True, verify=verify) for job in jobs)


def _write_new_folder(target: Path, jobs: list[_Job], limits: Limits | None, *, verify: bool) -> int:
    """Fill a folder beside the target, then move it into place."""
    real = final_path(target)
    with output_errors(target):
        with temporary_beside(real, is_folder=True) as (temporary, _):
            n_bytes = sum(_write_job(temporary / job.name, job, force=False, verify=verify) for job in jobs)
            if verify and len(jobs) > 1:
                run_check(lambda folder: open_checkpoint(folder, limits=limits).close(), temporary, target)
            move(temporary, real)  # an empty folder in its place is replaced too
        sync_folder(target, real.parent)
    return n_bytes


def _write_job(path: Path, job: _Job, *, force: bool, verify: bool) -> int:
    with atomic_writer(path, force=force, check=job.check if verify else None) as file:
        return job.write(file)
