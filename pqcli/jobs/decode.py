"""`decode` and `load`: container -> dense checkpoint, or dense tensors in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pqcli import checkpoint as checkpoints
from pqcli.atomic import check_output, output_errors
from pqcli.checkpoint import formats
from pqcli.claim import check_space, claimed
from pqcli.container.manifest import Source
from pqcli.container.peek import SUFFIX
from pqcli.container.reader import open_container
from pqcli.errors import ContainerError, OutputError, UsageError
from pqcli.jobs.events import Hook, Stage, ignore
from pqcli.jobs.report import n_weights
from pqcli.limits import Limits
from pqcli.plan import plan as plans
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.records import Alias, Copy


def decode(
    file: str | Path,
    output: str | Path | None = None,
    *,
    dtype: str | None = None,
    force: bool = False,
    verify: bool = True,
    base: str | Path | Sequence[str | Path] = (),
    progress: Hook | None = None,
    limits: Limits | None = None,
) -> Path:
    """Rebuild the dense checkpoint: same keys, order, shapes and dtypes, kept tensors bit-identical.

    `output` says the format by its suffix (.safetensors, .pt and its kin, none for a folder); by default it is
    `STEM.decoded` with the source's suffix. `dtype` converts all floating tensors. With `verify`, what was
    written is read again before it is put in place. `base` says where to find the base of a file that holds
    differences, and that one's own (`pqcli.container.bases`). Returns the path written.
    """
    if dtype is not None and dtype not in plans.QUANTIZABLE_DTYPES:
        raise UsageError(f"dtype {dtype!r}: use one of {', '.join(sorted(plans.QUANTIZABLE_DTYPES))}")
    with open_container(file, limits=limits, base=base) as container:
        if container.needs_base:
            container.base()
        source = container.manifest.source
        target = Path(output) if output else _default_output(Path(file), source)
        _check_place(target, Path(file), force=force)
        format_ = formats.by_suffix(target) if output else source.format
        infos = [_converted(info, dtype) for info in container.infos]
        done = Stage(progress or ignore, "decoding", n_weights(container))

        def read(name: str) -> torch.Tensor:
            tensor = container.decode(name)
            if dtype and tensor.is_floating_point():
                tensor = tensor.to(getattr(torch, dtype))
            done(tensor.numel(), name)
            return tensor

        with claimed(target):
            check_space(target, sum(info.n_bytes for info in infos if info.alias_of is None))
            checkpoints.write(
                target, infos, read, source.skeleton, format=format_, force=force, verify=verify, limits=limits
            )
        return target


def load(
    file: str | Path, *, base: str | Path | Sequence[str | Path] = (), limits: Limits | None = None
) -> dict[str, torch.Tensor]:
    """The dense tensors of a container by name; tied tensors share their memory. `base` as for `decode`."""
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


def _default_output(file: Path, source: Source) -> Path:
    if source.format != formats.FOLDER and source.format not in formats.FORMATS:
        raise ContainerError(
            f"{file}: made of a checkpoint in the format {source.format!r:.40}, which this pqcli does not write; "
            "say where to with -o, as in -o model.pt"
        )
    name = file.name.removesuffix(SUFFIX) if file.name.endswith(SUFFIX) else file.stem
    return file.with_name(f"{name}.decoded{checkpoints.default_suffix(source.format, source.skeleton)}")


def _converted(info: TensorInfo, dtype: str | None) -> TensorInfo:
    floating = "float" in info.dtype
    return replace(info, dtype=dtype) if dtype and floating else info
