"""`decode` and `load`: container -> dense checkpoint, or dense tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pqcli import checkpoint as checkpoints
from pqcli.atomic import atomic_folder, check_output, output_errors
from pqcli.checkpoint import formats
from pqcli.checkpoint.folder import is_weights_name
from pqcli.checkpoint.writing import write_into
from pqcli.claim import check_space, claimed
from pqcli.container.folder import compressed_folder, full_name, stem_of
from pqcli.container.header import INDEX_SUFFIX
from pqcli.container.manifest import Source
from pqcli.container.peek import SUFFIX
from pqcli.container.reader import Container, open_container
from pqcli.core import dtypes
from pqcli.errors import ContainerError, OutputError, UsageError
from pqcli.jobs.bars import Progress, hook_of, showing
from pqcli.jobs.events import Stage
from pqcli.jobs.folders.embedding import write_files
from pqcli.limits import Limits
from pqcli.plan import plan as plans
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.records import Alias, Copy

if TYPE_CHECKING:
    import torch


@showing
def decode(
    file: str | Path,
    output: str | Path | None = None,
    *,
    dtype: str | None = None,
    force: bool = False,
    verify: bool = True,
    base: str | Path | Sequence[str | Path] = (),
    progress: Progress = None,
    limits: Limits | None = None,
) -> Path:
    """Rebuild the dense checkpoint: same keys, order, shapes and dtypes, kept tensors bit-identical.

    `output` says the format by its suffix (.safetensors, .pt and its kin, none for a folder); by default it is
    `STEM.decoded` with the source's suffix. `dtype` converts all floating tensors. With `verify`, what was
    written is read again before it is put in place. `base` says where to find the base of a file that holds
    differences, and that one's own (`pqcli.container.bases`). Returns the path written. A compressed folder becomes the
    folder that it was made from, by default `NAME.decoded`; one with a single container may become a file as well.
    """
    if dtype is not None and dtype not in plans.QUANTIZABLE_DTYPES:
        raise UsageError(f"dtype {dtype!r}: use one of {', '.join(sorted(plans.QUANTIZABLE_DTYPES))}")
    hook = hook_of(progress)
    if Path(file).is_dir():
        from pqcli.jobs.folders import decoding as folders  # which needs this module

        where = Path(output) if output else None
        lone = folders.lone_container(Path(file), where)
        if lone is None:
            return folders.decode_folder(
                Path(file),
                where,
                dtype=dtype,
                force=force,
                verify=verify,
                base=base,
                hook=hook,
                limits=limits,
            )
        file = lone
    with open_container(file, limits=limits, base=base) as container:
        if container.needs_base:
            container.base()
        source = container.manifest.source
        target = Path(output) if output else _default_output(Path(file), source)
        _check_place(target, Path(file), force=force)
        format_ = formats.by_suffix(target) if output else source.format
        infos = [converted(info, dtype) for info in container.infos]
        read = dense_reader(container, dtype, Stage(hook, "decoding", container.n_weights))
        with claimed(target):
            check_space(target, sum(info.n_bytes for info in infos if info.alias_of is None))
            if format_ == formats.FOLDER and container.manifest.files:
                with atomic_folder(target, force=force, may_go=is_weights_name) as new:
                    write_into(new, "", infos, read, source.skeleton, format=format_, verify=verify, limits=limits)
                    write_files(new, container.files())
            else:
                checkpoints.write(
                    target, infos, read, source.skeleton, format=format_, force=force, verify=verify, limits=limits
                )
        return target


def load(
    file: str | Path, *, base: str | Path | Sequence[str | Path] = (), limits: Limits | None = None
) -> dict[str, torch.Tensor]:
    """The dense tensors of a container by name; tied tensors share their memory. `base` as for `decode`.

    Of a compressed folder with several, those of all; their names begin with the sub-folder.
    """
    if Path(file).is_dir():
        folder = compressed_folder(file)
        return {
            full_name(label, name): tensor
            for label, path in folder.containers.items()
            for name, tensor in load(folder.path / path, base=base, limits=limits).items()
        }
    with open_container(file, limits=limits, base=base) as container:
        tensors: dict[str, torch.Tensor] = {}
        for record in container.records:
            owner = record.coding.of if isinstance(record.coding, Alias | Copy) else None
            if owner not in tensors:
                tensors[record.name] = container.decode(record.name)
            else:
                tensors[record.name] = tensors[owner] if isinstance(record.coding, Alias) else tensors[owner].clone()
        return tensors


def _check_place(target: Path, file: Path, *, force: bool) -> None:
    """Refuse to write over the container, by its own name or by that of a shard in its folder."""
    with output_errors(target):
        is_folder = target.is_dir()
    if not is_folder:
        check_output(target, file, force=force)
    elif not file.name.endswith(SUFFIX) and (target / file.name).exists() and (target / file.name).samefile(file):
        raise OutputError(f"'{target}' holds the input, '{file.name}'; use -o to write elsewhere")


def dense_reader(container: Container, dtype: str | None, done: Stage) -> Callable[[str], dtypes.Array]:
    """What gives the dense tensors of a container, floating ones as `dtype` where that is given, and tells `done`."""

    def read(name: str) -> dtypes.Array:
        array = container.numpy(name)
        if dtype and dtypes.is_floating(dtypes.name_of(array.dtype)):
            array = dtypes.converted(array, dtype)
        done(array.size, name)
        return array

    return read


def converted(info: TensorInfo, dtype: str | None) -> TensorInfo:
    """The tensor as it is written: as `dtype` where that is given and it is a floating one."""
    return replace(info, dtype=dtype) if dtype and dtypes.is_floating(info.dtype) else info


def default_file_suffix(file: Path, source: Source) -> str:
    """The suffix that a file has that is decoded to the format of its source; "" for a folder."""
    if source.format != formats.FOLDER and source.format not in formats.FORMATS:
        raise ContainerError(
            f"{file}: made of a checkpoint in the format {source.format!r:.40}, which this pqcli does not write; "
            "say where to with -o, as in -o model.pt"
        )
    return checkpoints.default_suffix(source.format, source.skeleton)


def _default_output(file: Path, source: Source) -> Path:
    name = stem_of(file.name) if file.name.endswith((SUFFIX, INDEX_SUFFIX)) else file.stem
    return file.with_name(f"{name}.decoded{default_file_suffix(file, source)}")
