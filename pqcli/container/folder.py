"""A compressed folder: containers (`NAME.pq.safetensors`) where the weights were, all else as it was.

A container in several files stands for itself by its index (`NAME.pq.safetensors.index.json`).

Nothing in it says so but the containers themselves: a folder is a compressed one if a container lies in it or in a
folder of it. Several containers are told apart by labels, which are made of their paths alone: the sub-folder (`unet`),
or with several in one place the sub-folder and the stem. A tensor of the folder is called LABEL/NAME, and NAME where
the label is empty, as that of a lone container at the top is.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pqcli.checkpoint.walking import walk
from pqcli.container import notebook
from pqcli.container.header import INDEX_SUFFIX, SHARD_NAME, SUFFIX
from pqcli.errors import CheckpointError, ContainerError

if TYPE_CHECKING:
    import torch

    from pqcli.container.reader import Container
    from pqcli.core.dtypes import Array
    from pqcli.limits import Limits
    from pqcli.tensors.info import TensorInfo
    from pqcli.tensors.records import Record, StoredError


@dataclass(frozen=True)
class CompressedFolder:
    """What lies in a compressed folder, all by paths in it with `/` between.

    `containers` are labels with the paths of containers; `side` the other files with their sizes; `folders`, `links`
    and `refused` are as `pqcli.checkpoint.walking.Walk` has them.
    """

    path: Path
    containers: dict[str, str]
    side: dict[str, int]
    folders: tuple[str, ...]
    links: dict[str, str]
    refused: dict[str, str]

    @property
    def side_bytes(self) -> int:
        """What the files beside the containers have together."""
        return sum(self.side.values())

    def place(self, label: str) -> str:
        """The sub-folder that a container lies in; "" for the top."""
        return posixpath.dirname(self.containers[label])


def compressed_folder(path: str | Path) -> CompressedFolder:
    """What lies in the folder. Raises ContainerError where there is no container in it."""
    path = Path(path)
    try:
        found = walk(path)
    except CheckpointError as error:
        raise ContainerError(str(error)) from error
    indices = [name for name in found.files if name.endswith(INDEX_SUFFIX)]
    parts = {name for name in found.files if index_of(name) in indices}
    containers = [name for name in found.files if name in indices or (name.endswith(SUFFIX) and name not in parts)]
    if not containers:
        raise ContainerError(
            f"{path}: a folder without a {SUFFIX} file in it; `pqcli compress` makes a compressed folder of a folder "
            "with weights"
        )
    side = {name: n_bytes for name, n_bytes in found.files.items() if name not in containers and name not in parts}
    by_label = {label: name for name, label in labels(containers).items()}
    return CompressedFolder(path, by_label, side, found.folders, found.links, found.refused)


def labels(containers: Iterable[str]) -> dict[str, str]:
    """The label of each of these paths of containers."""
    paths = list(containers)
    crowded = Counter(posixpath.dirname(path) for path in paths)
    return {path: posixpath.dirname(path) if crowded[posixpath.dirname(path)] == 1 else stem_of(path) for path in paths}


def stem_of(path: str) -> str:
    """The path of a container without the ending of its name."""
    return path.removesuffix(INDEX_SUFFIX).removesuffix(SUFFIX)


def index_of(path: str) -> str | None:
    """The path of the index of a container of which this may be one of several files."""
    place, name = posixpath.split(path)
    found = SHARD_NAME.fullmatch(name)
    return posixpath.join(place, found[1] + INDEX_SUFFIX) if found else None


def full_name(label: str, name: str) -> str:
    """What a tensor is called in the folder."""
    return f"{label}/{name}" if label else name


class Containers:
    """The open containers of a folder, by label; their tensors by full names. Use as a context manager."""

    def __init__(
        self,
        folder: CompressedFolder,
        limits: Limits | None = None,
        base: str | Path | Sequence[str | Path] = (),
    ) -> None:
        from pqcli.container.reader import open_container

        self.path = folder.path
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.containers: dict[str, Container] = {
                label: stack.enter_context(open_container(folder.path / name, limits=limits, base=base))
                for label, name in folder.containers.items()
            }
            self._stack = stack.pop_all()
        self._places = {
            full_name(label, record.name): (container, record)
            for label, container in self.containers.items()
            for record in container.records
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def __repr__(self) -> str:
        return notebook.folder_line(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return notebook.folder_page(self)

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The tensors of all containers, by their full names."""
        return tuple(
            replace(
                record.info,
                name=full_name(label, record.name),
                alias_of=None if record.info.alias_of is None else full_name(label, record.info.alias_of),
            )
            for label, container in self.containers.items()
            for record in container.records
        )

    def record(self, name: str) -> Record:
        """The record of a tensor, as its container has it."""
        return self._place(name)[1]

    def error(self, name: str) -> StoredError | None:
        """The error that compression measured; None for a tensor that is not quantized."""
        container, record = self._place(name)
        return container.error(record.name)

    def decode(self, name: str, *, check: bool = True) -> torch.Tensor:
        """The dense tensor; see `Container.decode`."""
        container, record = self._place(name)
        return container.decode(record.name, check=check)

    def numpy(self, name: str, *, check: bool = True) -> Array:
        """The dense tensor as an array; see `Container.numpy`."""
        container, record = self._place(name)
        return container.numpy(record.name, check=check)

    def _place(self, name: str) -> tuple[Container, Record]:
        if name not in self._places:
            raise ContainerError(
                f"{self.path}: no tensor {name!r}; `pqcli inspect` lists the {len(self._places)} there are"
            )
        return self._places[name]


def open_compressed(
    path: str | Path, *, limits: Limits | None = None, base: str | Path | Sequence[str | Path] = ()
) -> Container | Containers:
    """The container at `path`, or in it where there is one; of a folder with several, `Containers`."""
    from pqcli.container.reader import open_container

    if not Path(path).is_dir():
        return open_container(path, limits=limits, base=base)
    folder = compressed_folder(path)
    if len(folder.containers) == 1:
        return open_container(folder.path / next(iter(folder.containers.values())), limits=limits, base=base)
    return Containers(folder, limits, base)
