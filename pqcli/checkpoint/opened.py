"""`Checkpoint`: an opened input of any format, known from its headers; tensors are fetched one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pqcli.checkpoint.bytesource import ByteSource, Strided, check_fits
from pqcli.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

    import torch

    from pqcli.checkpoint.tree import Dropped, Json
    from pqcli.tensorinfo import TensorInfo


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


def check_layout(layout: Layout, source: ByteSource) -> None:
    """Raise `CheckpointError`, naming the tensor, unless every tensor lies inside the file."""
    for name, view in layout.views.items():
        try:
            check_fits(view, source.n_bytes)
        except CheckpointError as error:
            raise CheckpointError(f"tensor '{name}' of '{source.path}': {error}") from error
