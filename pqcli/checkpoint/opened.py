"""`Checkpoint`: an opened input of any format, known from its headers; tensors are fetched one at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pqcli.checkpoint.bytesource import ByteSource, Strided, check_fits
from pqcli.checkpoint.pt.tree import Dropped, without
from pqcli.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import torch

    from pqcli.checkpoint.pt.tree import Json
    from pqcli.tensors.info import TensorInfo

LEFT_OUT = "training state, left out as asked"
"""How the reason for a dropped entry begins where `Checkpoint.model_only` dropped it."""


@dataclass(frozen=True)
class Layout:
    """What a file's header tells: its tensors in file order, where each one lies, and everything else as JSON."""

    tensors: tuple[TensorInfo, ...]
    views: Mapping[str, Strided]
    skeleton: Json
    dropped: tuple[Dropped, ...] = ()


class Checkpoint:
    """A checkpoint whose headers are read and whose weights are not; a context manager.

    Fields: `path`; `format`, one of "pt", "safetensors", "folder"; `tensors` in file order, tied ones with `alias_of`
    set; `skeleton`, everything that is not tensor data as plain JSON, for `write`; `dropped`, entries that JSON cannot
    carry; `side_files`, the files of a folder that are not weights and are not carried; `n_bytes`, the size of the
    weight files on disk.
    """

    def __init__(
        self,
        path: Path,
        format: str,  # noqa: A002 - the word of the interface
        parts: tuple[tuple[ByteSource, Layout], ...],
        skeleton: Json,
        side_files: tuple[str, ...] = (),
    ) -> None:
        self.path = path
        self.format = format
        self.skeleton = skeleton
        self.side_files = side_files
        self.tensors = tuple(info for _, layout in parts for info in layout.tensors)
        self.dropped = tuple(item for _, layout in parts for item in layout.dropped)
        self.n_bytes = sum(source.n_bytes for source, _ in parts)
        self._parts = parts
        self._sources = [source for source, _ in parts]
        self._places = {name: (source, view) for source, layout in parts for name, view in layout.views.items()}

    def read(self, name: str) -> torch.Tensor:
        """The tensor, contiguous, on the CPU, in memory of its own, with the dtype of the file.

        Costs its own size in memory (a strided view: also the span it touches). Raises `CheckpointError` where the
        file is damaged or has shrunk.
        """
        if name not in self._places:
            raise CheckpointError(f"'{self.path}' has no tensor '{name}'")
        source, view = self._places[name]
        try:
            return source.tensor(view)
        except CheckpointError as error:
            raise CheckpointError(f"tensor '{name}' of '{source.path}': {error}") from error
        except MemoryError as error:
            raise CheckpointError(f"tensor '{name}' of '{source.path}' does not fit in memory") from error

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """TEMP."""
        return self.read(name).reshape(-1)[start:stop]

    def model_only(self) -> Checkpoint:
        """This checkpoint without training state: tensors whose role is not the model's.

        What is left out is told in `dropped`, and not counted in `n_bytes`. Shares the open files. Raises
        `CheckpointError` where no tensor is left.
        """
        parts = tuple((source, _of_model(layout)) for source, layout in self._parts)
        skeleton = dict(self.skeleton)
        if self.format == "folder":
            skeleton["shards"] = [
                {**shard, **layout.skeleton, "n": len(layout.tensors)}
                for shard, (_, layout) in zip(skeleton["shards"], parts, strict=True)
            ]
        else:
            skeleton |= parts[0][1].skeleton
        model = Checkpoint(self.path, self.format, parts, skeleton, self.side_files)
        if not model.tensors:
            raise CheckpointError(f"'{self.path}' holds training state only, no tensor of a model")
        model.n_bytes -= _own_bytes(self.tensors) - _own_bytes(model.tensors)
        if "index" in skeleton:
            skeleton["index"] = {**skeleton["index"], "n_bytes": _own_bytes(model.tensors)}
        return model

    def close(self) -> None:
        """Close the files; may be called twice."""
        for source in self._sources:
            source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _own_bytes(tensors: Sequence[TensorInfo]) -> int:
    return sum(info.n_bytes for info in tensors if info.alias_of is None)


def _of_model(layout: Layout) -> Layout:
    """The layout without training state; what remains of tensors that are tied to some is tied among itself."""
    gone = {info.name: info for info in layout.tensors if info.role != "model"}
    if not gone:
        return layout
    heirs: dict[str, str] = {}
    tensors = []
    for info in layout.tensors:
        if info.name in gone:
            continue
        if info.alias_of in gone:
            heir = heirs.setdefault(info.alias_of or "", info.name)
            info = replace(info, alias_of=None if heir == info.name else heir)
        tensors.append(info)
    views = {name: view for name, view in layout.views.items() if name not in gone}
    skeleton = layout.skeleton
    if "tree" in skeleton:
        skeleton = {**skeleton, "tree": without(skeleton["tree"], layout.tensors, set(gone))}
    return Layout(tuple(tensors), views, skeleton, (*layout.dropped, *_told(gone.values())))


def _told(tensors: Iterable[TensorInfo]) -> list[Dropped]:
    """What is left out, by the entry of the checkpoint that it stands in."""
    entries: dict[str, list[TensorInfo]] = {}
    for info in tensors:
        entries.setdefault(info.name.partition(".")[0], []).append(info)
    return [
        Dropped(
            entry,
            f"{LEFT_OUT}: {len(infos)} tensor{'s' * (len(infos) > 1)}, {_own_bytes(infos):,} B",
        )
        for entry, infos in entries.items()
    ]


def check_layout(layout: Layout, source: ByteSource) -> None:
    """Raise `CheckpointError`, naming the tensor, unless every tensor lies inside the file."""
    for name, view in layout.views.items():
        try:
            check_fits(view, source.n_bytes)
        except CheckpointError as error:
            raise CheckpointError(f"tensor '{name}' of '{source.path}': {error}") from error
