"""`export`: what became of an attached model, in a container like the one it was attached to.

What is written of a tensor depends on what it is in the file:

    plain PQ, attached   the codebook as it is now, rounded to the dtype that the file has it in; the same assignments
    kept                 the values as they are now
    copies               nothing, as long as they are what they are copies of; else they are kept from now on
    all else             what lies in the file, byte for byte: it cannot have been trained

A tensor that is what it was when it was attached is the file's own, to the bit. One that is not is *trained*: its
record says so, and nothing is told of its error, because the tensor that it comes of is not what it should be like any
more (`FORMAT.md`, feature `trained`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pqcli.atomic import atomic_folder, check_output
from pqcli.claim import check_space, claimed
from pqcli.codecs.base import Piece, Use
from pqcli.codecs.kept import kept_piece, reference_piece
from pqcli.container.folder import compressed_folder
from pqcli.container.header import INDEX_SUFFIX, SUFFIX
from pqcli.container.layout import DAMAGE_FEATURE
from pqcli.container.manifest import KEPT_CODED
from pqcli.container.reader import Container, open_container
from pqcli.container.writer import About, Writer
from pqcli.core.arrays import as_tensor
from pqcli.core.digests import HASH_BYTES, tensor_bytes, tensor_hash
from pqcli.core.pq import pq
from pqcli.errors import ContainerError, UsageError
from pqcli.integrations.assignments import AttachedWeight, attached_in
from pqcli.jobs.attach import owner_of
from pqcli.jobs.bars import Progress, hook_of, showing
from pqcli.jobs.compress import COPIES, check_written
from pqcli.jobs.course import at_the_end
from pqcli.jobs.events import Hook, Stage
from pqcli.jobs.folders.copying import copy_files, make_folders
from pqcli.jobs.folders.outputs import check_folder_output
from pqcli.jobs.loading import lone, places_of
from pqcli.tensors.records import Alias, Coded, Copy, Kept, Plain, Record

if TYPE_CHECKING:
    from pqcli.limits import Limits

AS_TRAINED = "trained since it was compressed"
"""The reason of a tensor that was a copy of another one, and is none any more."""


@showing
def export(
    model: torch.nn.Module,
    file: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    verify: bool = True,
    progress: Progress = None,
    limits: Limits | None = None,
) -> Path:
    """Write an attached model as a container: trained codebooks and kept tensors, the assignments byte for byte.

    `file` is what the model was attached to (`attach`), and has to be the same still. Codebooks are rounded to the
    dtype that they have there, mostly float16, to nearest even, as the attached model rounds them in every forward
    pass: what is decoded is, bit for bit, the weights that it computes with. Kept tensors (biases, norms, statistics of
    batch norms) are written as they are in the model now, in the file's dtype. Training state in the file stays what it
    was. The size is that of `file` but for the manifest and, where kept tensors are coded, their entropy.

    A folder with one container becomes a folder, with all that lies beside it. The output appears whole or not at all;
    with `verify`, it is read again first. Returns its path.

    Raises UsageError where the model is not attached, or to another file; ContainerError where its tensors cannot be
    written so: centroids that are not finite or too large for their dtype, tied or frozen tensors that were changed;
    OutputError as `compress` does.
    """
    target, source, hook = Path(output), Path(file), hook_of(progress)
    attached = {one.name: one for one in attached_in(model)}
    if not attached:
        raise UsageError("the model is attached to no file; `pqcli.attach` attaches it")
    path = lone(source)
    if not source.is_dir():
        if path.name.endswith(INDEX_SUFFIX):
            raise UsageError(f"'{path}' lies in several files; export its folder into a new one")
        check_output(target, path, force=force)
        with open_container(path, limits=limits) as container, claimed(target):
            _write(model, attached, container, target, force=force, verify=verify, hook=hook, limits=limits)
        return target
    folder = compressed_folder(source)
    check_folder_output(target, source, force=force)
    with open_container(path, limits=limits) as container, claimed(target):
        check_space(target, folder.side_bytes)
        with atomic_folder(target, force=force, may_go=lambda name: SUFFIX in name) as new:
            make_folders(new, folder.folders, folder.links)
            inner = new / path.relative_to(source)
            inner = inner.with_name(inner.name.removesuffix(".index.json"))
            _write(model, attached, container, inner, force=False, verify=verify, hook=hook, limits=limits)
            copy_files(source, new, folder.side, at_the_end(hook), verify=verify)
    return target


def _write(
    model: torch.nn.Module,
    attached: Mapping[str, AttachedWeight],
    container: Container,
    target: Path,
    *,
    force: bool,
    verify: bool,
    hook: Hook,
    limits: Limits | None,
) -> None:
    """Write the container to its place."""
    state = _state(model, attached, container)
    manifest = container.manifest
    about = About(
        tuple(record.name for record in container.records),
        vars(manifest.source),
        manifest.recipe,
        files=container.packed_files(),
        predicts=DAMAGE_FEATURE in manifest.features,
    )
    check_space(target, COPIES * container.n_bytes)
    shard_bytes = None if manifest.shards is None else container.largest_file_bytes
    done = Stage(hook, "writing", sum(record.info.numel for record in container.records))
    with Writer(target, about, force, compact=KEPT_CODED in manifest.features, shard_bytes=shard_bytes) as writer:
        for record in container.records:
            writer.add(_piece(state, record))
            done(record.info.numel, record.name)
        streams = container.streams()
        check = partial(check_written, streams, limits=limits) if verify else None
        writer.finish("" if manifest.coded is None else manifest.coded.codec, streams, check)


@dataclass(frozen=True)
class _State:
    """A model beside the container that it is attached to.

    `attached` are its codebooks by the names of the tensors that hold them in the file, `dense` its other tensors by
    the file's names; what the model does not have is in neither.
    """

    container: Container
    attached: Mapping[str, AttachedWeight]
    dense: Mapping[str, torch.Tensor]


def _state(model: torch.nn.Module, attached: Mapping[str, AttachedWeight], container: Container) -> _State:
    """Check that the model is attached to this container and to nothing else, and find its tensors."""
    if any(one.assignments.of != container.identity for one in attached.values()):
        raise UsageError(f"{container.path}: the model was attached to another file, or this one has changed since")
    if not container.is_whole():
        raise ContainerError(
            f"{container.path}: its payloads are not those that were written (checksum); it is damaged"
        )
    dense = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    places = places_of([*dense, *attached], container)
    codebooks: dict[str, AttachedWeight] = {}
    for theirs, ours in places.items():
        if ours in attached:
            owner = owner_of(container, theirs)
            first = codebooks.setdefault(owner, attached[ours])
            if attached[ours].assignments.name != owner or attached[ours].codebook is not first.codebook:
                raise ContainerError(
                    f"{container.path}: {theirs!r} comes back as {owner!r}, and in the model it does not"
                )
    for owner, one in codebooks.items():
        if not torch.equal(as_tensor(container.packed_assignments(owner)), one.assignments.packed.cpu()):
            raise ContainerError(f"{container.path}: the assignments of {owner!r} in the model are others")
    return _State(container, codebooks, {theirs: dense[ours] for theirs, ours in places.items() if ours in dense})


def _piece(state: _State, record: Record) -> Piece:
    """What is written of one tensor."""
    name, coding = record.name, record.coding
    if isinstance(coding, Plain) and name in state.attached:
        return _plain(state, record, state.attached[name])
    if isinstance(coding, Alias | Copy):
        return _reference(state, record, coding)
    if isinstance(coding, Kept) and name in state.dense:
        return _kept(state, record, state.dense[name])
    if record.quantized and name in state.dense:
        _check_unchanged(state, record)
    return _as_it_lies(state.container, record)


def _plain(state: _State, record: Record, one: AttachedWeight) -> Piece:
    """The codebook as it is now."""
    container, before = state.container, state.container.pq_tensor(record.name)
    now = one.codebook.detach().cpu()
    if torch.equal(now, before.codebook.float().to(now.dtype)):
        return _as_it_lies(container, record)
    codebook = now.to(before.codebook.dtype)
    if not codebook.isfinite().all():
        what = "not finite" if not now.isfinite().all() else f"too large for {_short(codebook.dtype)}"
        raise ContainerError(f"{container.path}: the codebook of {record.name!r} holds values that are {what}")
    mask = container.zeros(record.name)
    decoded = pq.decode(replace(before, codebook=codebook))
    if mask is not None:
        decoded.view(record.matrix_shape)[as_tensor(mask)] = 0
    key = f"pq/{record.name}/codebook"
    entries = tuple(
        (name, tensor_bytes(codebook).tobytes() if name == key else data)
        for name, data in container.payloads(record.name)
    )
    return Piece(replace(record, trained=True), tensor_hash(decoded), entries)


def _kept(state: _State, record: Record, now: torch.Tensor) -> Piece:
    """A kept tensor as it is now."""
    value = _trained_value(state, record, now)
    if value is None:
        return _as_it_lies(state.container, record)
    is_compact = KEPT_CODED in state.container.manifest.features
    return kept_piece(replace(record, coding=Kept(), trained=True), value, is_compact=is_compact)


def _reference(state: _State, record: Record, coding: Alias | Copy) -> Piece:
    """Another name, or a copy, of a tensor: as long as it is that still."""
    container, owner = state.container, owner_of(state.container, record.name)
    now, its = state.dense.get(record.name), state.dense.get(owner)
    if now is None or owner in state.attached:
        return reference_piece(record)
    if container.record(owner).quantized:
        _check_unchanged(state, record)
        return reference_piece(record)
    wanted = container.decode(owner) if its is None else its
    if _is_same(now, wanted):
        return reference_piece(record)
    if isinstance(coding, Alias):
        raise ContainerError(
            f"{container.path}: {record.name!r} is tied to {coding.of!r} there, and in the model the two have become "
            "different; tie them before training"
        )
    info, is_compact = record.info, KEPT_CODED in container.manifest.features
    trained = replace(record.kept(AS_TRAINED), trained=True)
    return kept_piece(trained, _in_dtype(now, getattr(torch, info.dtype)), is_compact=is_compact)


def _check_unchanged(state: _State, record: Record) -> None:
    """Raise ContainerError where a quantized tensor that is dense in the model is not what the file holds."""
    if _trained_value(state, record, state.dense[record.name]) is not None:
        raise ContainerError(
            f"{state.container.path}: {record.name!r} is quantized and not attached, so that other values cannot be "
            "written; it was frozen when the model was attached, and has been changed since"
        )


def _trained_value(state: _State, record: Record, now: torch.Tensor) -> torch.Tensor | None:
    """What a tensor of the model is in the file's dtype; None where it is what the file holds."""
    if tuple(now.shape) != record.info.shape:
        raise ContainerError(
            f"{state.container.path}: {record.name!r} is {record.info.shape}, the model's {tuple(now.shape)}"
        )
    before = state.container.decode(record.name)
    return None if _is_same(before, now) else _in_dtype(now, before.dtype)


def _is_same(before: torch.Tensor, now: torch.Tensor) -> bool:
    """Whether `now` is `before` bit for bit, in its own dtype."""
    before, now = before.detach().cpu().to(now.dtype), now.detach().cpu()
    return bool((tensor_bytes(before) == tensor_bytes(now)).all())


def _in_dtype(now: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    now = now.detach().cpu().contiguous()
    return pq.saturated(now, dtype) if now.is_floating_point() and dtype.is_floating_point else now.to(dtype)


def _as_it_lies(container: Container, record: Record) -> Piece:
    """What the file holds of a tensor, and says of it."""
    name, digest = record.name, container.digest(record.name)
    if len(digest) < HASH_BYTES and KEPT_CODED not in container.manifest.features:
        digest = tensor_hash(container.decode(name))  # of another writer, who has shorter ones
    bundled = tensor_bytes(container.decode(name)) if record.is_bundled else None
    use = Use(None, None, container.entropy(name)) if isinstance(record.coding, Coded) else None
    return Piece(
        record,
        digest,
        container.payloads(name),
        bundled=bundled,
        use=use,
        damage=container.damage(name),
        stored=container.error(name),
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
