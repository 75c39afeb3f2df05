"""`Checkpoint`: an opened input of any format, known from its headers; tensors are fetched one at a time."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from pqcli.checkpoint.asked import Asked
from pqcli.checkpoint.bytesource import ByteSource, Strided, check_fits
from pqcli.checkpoint.overlaps import overlapping
from pqcli.checkpoint.pt.rebuilding import without
from pqcli.checkpoint.pt.tree import Dropped
from pqcli.checkpoint.reopening import reopened
from pqcli.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import torch

    from pqcli.checkpoint.pt.tree import Json
    from pqcli.checkpoint.stamps import Stamp
    from pqcli.core.dtypes import Array
    from pqcli.tensors.info import TensorInfo

LEFT_OUT = "training state, left out as asked"
"""How the reason for a dropped entry begins where `Checkpoint.model_only` dropped it."""


class View(Protocol):
    """Where a tensor lies: understood by the source that it belongs to."""

    @property
    def numel(self) -> int:
        """Number of elements."""


class Source(Protocol):
    """What tensors are read from: a `ByteSource`, or several that belong together."""

    path: Path
    n_bytes: int

    @property
    def stamps(self) -> tuple[Stamp, ...]:
        """The files, as they were when they were opened."""

    def array(self, view: Any) -> Array:
        """The tensor, contiguous, in memory of its own."""

    def flat(self, view: Any, start: int, stop: int) -> Array:
        """Elements [start, stop) of the tensor in row-major order."""

    def close(self) -> None:
        """Close the files; may be called twice."""


@dataclass(frozen=True)
class Layout:
    """What a file's header tells: its tensors in file order, where each one lies, and everything else as JSON."""

    tensors: tuple[TensorInfo, ...]
    views: Mapping[str, View]
    skeleton: Json
    dropped: tuple[Dropped, ...] = ()

    def with_overlaps(self) -> Layout:
        """The same, with `overlaps` of its tensors set."""
        owners = {info.name for info in self.tensors if info.alias_of is None}
        groups = overlapping(
            {name: view for name, view in self.views.items() if name in owners and isinstance(view, Strided)}
        )
        if not groups and not any(info.overlaps for info in self.tensors):
            return self
        tensors = tuple(replace(info, overlaps=groups.get(info.alias_of or info.name)) for info in self.tensors)
        return replace(self, tensors=tensors)


class Checkpoint:
    """A checkpoint whose headers are read and whose weights are not; a context manager.

    Fields: `path`; `format`, one of "pt", "safetensors", "folder"; `tensors` in file order, tied ones with `alias_of`
    set; `skeleton`, everything that is not tensor data as plain JSON, for `write`; `dropped`, entries that JSON cannot
    carry; `side_files`, the files of a folder that are not weights and are not carried, those in its folders among
    them, and `side_bytes`, their size together; `n_bytes`, the size of the weight files on disk; `stamps`, the files
    it was read from and when they last changed.

    It can be pickled: unpickling opens the same files again, by their path (see `reopening`).
    """

    def __init__(
        self,
        path: Path,
        format: str,  # noqa: A002 - the word of the interface
        parts: tuple[tuple[Source, Layout], ...],
        skeleton: Json,
        side_sizes: Mapping[str, int] | None = None,
        more_stamps: tuple[Stamp, ...] = (),
        asked: Asked | None = None,
    ) -> None:
        self.path = path
        self.format = format
        self.skeleton = skeleton
        self.side_sizes = dict(side_sizes or {})
        self.tensors = tuple(info for _, layout in parts for info in layout.tensors)
        self.dropped = tuple(item for _, layout in parts for item in layout.dropped)
        self.n_bytes = sum(source.n_bytes for source, _ in parts)
        self.stamps = (
            *(stamp for source, _ in parts for stamp in source.stamps),
            *more_stamps,
        )
        self._parts = parts
        self._asked = asked or Asked()
        self._owns_files = True
        self._closed = False
        self._sources = [source for source, _ in parts]
        self._places = {name: (source, view) for source, layout in parts for name, view in layout.views.items()}

    @property
    def side_files(self) -> tuple[str, ...]:
        """Paths, relative to the folder, of the files that are not carried; their sizes are in `side_sizes`."""
        return tuple(self.side_sizes)

    @property
    def side_bytes(self) -> int:
        """What the side files have together."""
        return sum(self.side_sizes.values())

    def read(self, name: str) -> torch.Tensor:
        """The tensor, contiguous, on the CPU, in memory of its own, with the dtype of the file; else as `numpy`."""
        return _as_tensor(self.numpy(name))

    def numpy(self, name: str) -> Array:
        """The tensor as a numpy array, which takes no torch to read; see `pqcli.core.dtypes` for its dtype.

        Costs its own size in memory (a strided view: also the span it touches). Raises `CheckpointError` where the
        file is damaged or has shrunk.
        """
        with self._place(name) as (source, view):
            return source.array(view)

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the tensor in row-major order, of shape (stop - start,); else as `read`.

        Where the tensor lies in the file without gaps only these elements are read. A file with checksums (`.pt`) is
        still checked: free of cost where pieces follow each other from the first to the last, with one pass over the
        tensor's storage where a piece begins elsewhere. Raises `CheckpointError` also for a range that is not inside
        the tensor.
        """
        with self._place(name) as (source, view):
            if not 0 <= start <= stop <= view.numel:
                raise CheckpointError(f"elements {start:,} to {stop:,} are not among its {view.numel:,}")
            return _as_tensor(source.flat(view, start, stop))

    @contextlib.contextmanager
    def _place(self, name: str) -> Iterator[tuple[Source, View]]:
        """Where a tensor lies; errors of the block get the tensor's name and the file's."""
        if name not in self._places:
            raise CheckpointError(f"'{self.path}' has no tensor '{name}'")
        if self._closed:
            raise CheckpointError(f"tensor '{name}': '{self.path}' is closed already")
        source, view = self._places[name]
        try:
            yield source, view
        except CheckpointError as error:
            raise CheckpointError(f"tensor '{name}' of '{source.path}': {error}") from error
        except MemoryError as error:
            raise CheckpointError(f"tensor '{name}' of '{source.path}' does not fit in memory") from error

    def model_only(self) -> Checkpoint:
        """This checkpoint without training state: tensors whose role is not the model's.

        What is left out is told in `dropped`, and not counted in `n_bytes`. Shares the open files. Raises
        `CheckpointError` where no tensor is left.
        """
        parts = tuple((source, _of_model(layout)) for source, layout in self._parts)
        skeleton = dict(self.skeleton)
        if "shards" in skeleton:
            skeleton["shards"] = [
                {**shard, **layout.skeleton, "n": len(layout.tensors)}
                for shard, (_, layout) in zip(skeleton["shards"], parts, strict=True)
            ]
        else:
            skeleton |= parts[0][1].skeleton
        asked = replace(self._asked, model_only=True)
        model = Checkpoint(self.path, self.format, parts, skeleton, self.side_sizes, asked=asked)
        model.stamps = self.stamps
        model._owns_files = self._owns_files
        if not model.tensors:
            raise CheckpointError(f"'{self.path}' holds training state only, no tensor of a model")
        model.n_bytes -= _own_bytes(self.tensors) - _own_bytes(model.tensors)
        if "index" in skeleton:
            skeleton["index"] = {**skeleton["index"], "n_bytes": _own_bytes(model.tensors)}
        return model

    def shared(self) -> Checkpoint:
        """The same checkpoint over the same open files, which stay open when the result is closed."""
        twin = Checkpoint.__new__(Checkpoint)
        vars(twin).update(vars(self), _owns_files=False)
        return twin

    def __reduce__(self) -> tuple[Callable[..., Checkpoint], tuple[str, tuple[Stamp, ...], Asked]]:
        return reopened, (str(self.path.absolute()), self.stamps, self._asked)

    def close(self) -> None:
        """Close the files; may be called twice."""
        self._closed = True
        if self._owns_files:
            for source in self._sources:
                source.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_tensor(array: Array) -> torch.Tensor:
    from pqcli.core.arrays import as_tensor  # with numpy, which headers do without

    return as_tensor(array)


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
    left = Layout(tuple(tensors), views, skeleton, (*layout.dropped, *_told(gone.values())))
    return left.with_overlaps()


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
            if isinstance(view, Strided):
                check_fits(view, source.n_bytes, source.budget.limits)
        except CheckpointError as error:
            raise CheckpointError(f"tensor '{name}' of '{source.path}': {error}") from error
