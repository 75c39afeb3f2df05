"""Folders of torch.distributed.checkpoint: one tensor is in pieces, each in the file of the process that held it.

`.metadata` is a pickle: the shape and the chunks of every tensor, and for every chunk the file (`__0_0.distcp`), the
position and the length of a torch.save archive that holds it. Values that are no tensors are archives of their own.
Both are read as data, like any pickle. A folder is read whole or refused: every entry of the metadata must be there,
and every file must be mentioned.

The checkpoint is the nested dict that was saved, as torch's own `dcp_to_torch` would give it. It comes back as a `.pt`.
"""

from __future__ import annotations

import io
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import prod
from typing import TYPE_CHECKING, Any, cast

from pqcli.checkpoint.bytesource import ByteSource, Region, Strided, Window, check_fits
from pqcli.checkpoint.folder import bare_name
from pqcli.checkpoint.opened import Checkpoint
from pqcli.checkpoint.pt.objects import Instance
from pqcli.checkpoint.pt.pickles import PickleReader
from pqcli.checkpoint.pt.reader import layout_of, load_value, read_zip, value_of_zip
from pqcli.checkpoint.pt.torch_objects import Constant, StorageRef, TensorRef
from pqcli.checkpoint.pt.tree import Dropped
from pqcli.errors import CheckpointError
from pqcli.tensors.info import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from pqcli.checkpoint.asked import Asked
    from pqcli.checkpoint.opened import Layout
    from pqcli.checkpoint.stamps import Stamp
    from pqcli.core.dtypes import Array

METADATA = ".metadata"
ENDING = ".distcp"
_TORCH = "torch.distributed.checkpoint."
_COMPARED = 512
"""Chunks of one tensor that are compared pair by pair; more must lie in one row."""


@dataclass(frozen=True)
class Piece:
    """A chunk of a tensor: where it belongs in it, and where it lies in which file."""

    offsets: tuple[int, ...]
    file: str
    view: Strided


@dataclass(frozen=True)
class Assembled:
    """A tensor that is put together from pieces, which fill it exactly."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


class Pieces:
    """The open files of a folder; gives arrays as `ByteSource` does, from `Assembled` in place of `Strided`."""

    def __init__(self, path: Path, files: Mapping[str, ByteSource], metadata: ByteSource) -> None:
        self.path = path
        self._files = dict(files)
        self._metadata = metadata
        self.n_bytes = metadata.n_bytes + sum(file.n_bytes for file in files.values())

    @property
    def stamps(self) -> tuple[Stamp, ...]:
        """The files, as they were when they were opened."""
        return tuple(stamp for file in (self._metadata, *self._files.values()) for stamp in file.stamps)

    def array(self, view: Assembled) -> Array:
        """The tensor, contiguous, in memory of its own; holds one piece beside it."""
        import numpy as np

        from pqcli.core.dtypes import dtype_of

        if len(view.pieces) == 1:
            (piece,) = view.pieces
            return self._files[piece.file].array(piece.view)
        whole = np.empty(view.shape, dtype_of(view.dtype))
        for piece in view.pieces:
            place = tuple(slice(at, at + n) for at, n in zip(piece.offsets, piece.view.shape, strict=True))
            whole[place] = self._files[piece.file].array(piece.view)
        return whole

    def flat(self, view: Assembled, start: int, stop: int) -> Array:
        """Elements [start, stop) in row-major order; reads them alone where the tensor is in one piece."""
        if len(view.pieces) == 1:
            (piece,) = view.pieces
            return self._files[piece.file].flat(piece.view, start, stop)
        return self.array(view).reshape(-1)[start:stop].copy()

    def close(self) -> None:
        """Close the files; may be called twice."""
        for file in (self._metadata, *self._files.values()):
            file.close()


def is_distributed(names: Sequence[str]) -> bool:
    """Whether a folder with files of these names is one of torch.distributed.checkpoint."""
    return any(name.endswith(ENDING) for name in names)


def open_distributed(folder: Path, names: Sequence[str], side_files: Mapping[str, int], asked: Asked) -> Checkpoint:
    """The checkpoint of a folder; where it is not understood `CheckpointError` says how torch converts it."""
    with ExitStack() as stack:
        try:
            pieces, layout = _read(folder, names, asked, stack)
        except CheckpointError as error:
            raise CheckpointError(
                f"'{folder}' is a torch distributed checkpoint that pqcli cannot read: {error}. torch converts it: "
                f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} out.pt"
            ) from error
        stack.pop_all()
    note = Dropped("(the folder)", "a torch distributed checkpoint: comes back as one .pt")
    layout = replace(layout, dropped=(*layout.dropped, note))
    return Checkpoint(folder, "pt", ((pieces, layout),), {"source": "pt", **layout.skeleton}, side_files, asked=asked)


def _read(folder: Path, names: Sequence[str], asked: Asked, stack: ExitStack) -> tuple[Pieces, Layout]:
    if not (folder / METADATA).is_file():
        raise CheckpointError("it has no .metadata; it was not saved to its end, or only a part of it is here")
    metadata = ByteSource(folder / METADATA, asked)
    stack.callback(metadata.close)
    metadata.budget.length(metadata.n_bytes, "its .metadata")
    text = io.BytesIO(metadata.bytes_at(0, metadata.n_bytes))
    with _damage():
        told = _fields(load_value(PickleReader(metadata.budget), text), f"{_TORCH}metadata.Metadata")
        storage = _stored(told["storage_data"])
        files = _open_files(folder, names, storage, asked, stack)
        value, views = _assemble(told, storage, files)
    regions = {name: Region(number, _n_bytes(view)) for number, (name, view) in enumerate(views.items())}
    layout = layout_of(value, lambda storage_ref: regions[storage_ref.key], metadata.budget)
    if not layout.tensors:
        raise CheckpointError("it holds no tensors")
    by_number = list(views.values())
    places = cast("Mapping[str, Strided]", layout.views)
    located = {name: by_number[view.region.start] for name, view in places.items()}
    return Pieces(folder, files, metadata), replace(layout, views=located)


# -- the metadata ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """Where one archive lies."""

    file: str
    start: int
    n_bytes: int


_Storage = dict[tuple[str, tuple[int, ...] | None], _Stored]


class _damage:  # noqa: N801 - used as a statement
    """What a stranger's metadata provokes is its fault."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)):
            raise CheckpointError(f"its .metadata is damaged ({type(error).__name__}: {str(error)[:100]})") from error


def _fields(value: Any, name: str) -> dict[str, Any]:
    """The fields of one of torch's dataclasses."""
    if not isinstance(value, Instance) or value.name != name or not isinstance(value.state, dict):
        raise TypeError(f"no {name.rsplit('.', 1)[-1]}")
    return value.state


def _size(value: Any) -> tuple[int, ...]:
    if not isinstance(value, Constant) or not isinstance(value.value, tuple):
        raise TypeError("no size")
    return value.value


def _stored(table: Any) -> _Storage:
    storage: _Storage = {}
    for key, value in dict(table).items():
        index = _fields(key, f"{_TORCH}metadata.MetadataIndex")
        place = _fields(value, f"{_TORCH}filesystem._StorageInfo")
        if place.get("transform_descriptors"):
            raise CheckpointError(f"its data are transformed ({str(place['transform_descriptors'])[:60]})")
        start, n_bytes, file = place["offset"], place["length"], place["relative_path"]
        if type(start) is not int or type(n_bytes) is not int or start < 0 or n_bytes < 0 or not bare_name(file):
            raise ValueError(f"an entry in {ascii(file)[:60]}")
        offset = None if index.get("offset") is None else _size(index["offset"])
        if storage.setdefault((str(index["fqn"]), offset), found := _Stored(file, start, n_bytes)) is not found:
            raise ValueError(f"{ascii(index['fqn'])[:60]} is stored twice")
    return storage


def _open_files(
    folder: Path, names: Sequence[str], storage: _Storage, asked: Asked, stack: ExitStack
) -> dict[str, ByteSource]:
    mentioned = sorted({place.file for place in storage.values()})
    for file in mentioned:
        if file not in names:
            raise CheckpointError(f"its file {file} is missing")
    for name in names:
        if name.endswith(ENDING) and name not in mentioned:
            raise CheckpointError(f"its file {name} is mentioned nowhere in .metadata")
    files = {}
    for file in mentioned:
        files[file] = ByteSource(folder / file, asked)
        stack.callback(files[file].close)
    return files


def _assemble(
    told: dict[str, Any], storage: _Storage, files: Mapping[str, ByteSource]
) -> tuple[Any, dict[str, Assembled]]:
    """The nested value that was saved, with a `TensorRef` for every tensor, and the tensors by their flat names."""
    paths = told.get("planner_data") or {}
    views: dict[str, Assembled] = {}
    used: set[tuple[str, tuple[int, ...] | None]] = set()
    top: dict[Any, Any] = {}
    n_entries = len(told["state_dict_metadata"])
    for name, entry in told["state_dict_metadata"].items():
        if isinstance(entry, Instance) and entry.name == f"{_TORCH}metadata.BytesStorageMetadata":
            used.add((name, None))
            place = storage[name, None]
            item: Any = value_of_zip(_window(files, place))
        else:
            fields = _fields(entry, f"{_TORCH}metadata.TensorStorageMetadata")
            keys = [(name, _size(_fields(chunk, f"{_TORCH}metadata.ChunkStorageMetadata")["offsets"]))
                    for chunk in fields["chunks"]]  # fmt: skip
            used.update(keys)
            views[name] = _tensor(name, fields, [(offsets, storage[key, offsets]) for key, offsets in keys], files)
            item = _reference(name, views[name])
        _put(top, paths.get(name, (name,)), item, n_entries)
    unused = [name for name, _ in storage.keys() - used]
    if unused:
        raise CheckpointError(f"{len(unused)} of its entries belong to nothing ({ascii(unused[0])[:60]})")
    return top, views


def _window(files: Mapping[str, ByteSource], place: _Stored) -> Window:
    return Window(files[place.file], place.start, place.n_bytes)


def _tensor(
    name: str, fields: dict[str, Any], chunks: list[tuple[tuple[int, ...], _Stored]], files: Mapping[str, ByteSource]
) -> Assembled:
    shape = _size(fields["size"])
    sizes = [_size(chunk.state["sizes"]) for chunk in fields["chunks"]]
    pieces = []
    for (offsets, place), size in zip(chunks, sizes, strict=True):
        layout = read_zip(_window(files, place))
        if len(layout.tensors) != 1 or layout.tensors[0].shape != size:
            raise CheckpointError(f"a chunk of '{name}' is not the tensor of shape {list(size)} that it should be")
        (view,) = cast("Mapping[str, Strided]", layout.views).values()
        shifted = replace(view, region=replace(view.region, start=view.region.start + place.start))
        check_fits(shifted, files[place.file].n_bytes, files[place.file].budget.limits)
        pieces.append(Piece(offsets, place.file, shifted))
    if len({piece.view.dtype for piece in pieces}) != 1 or any(view.conj or view.neg for view in _views(pieces)):
        raise CheckpointError(f"the {len(pieces)} chunks of '{name}' are not of one dtype")
    _check_filled(name, shape, pieces)
    return Assembled(pieces[0].view.dtype, shape, tuple(pieces))


def _views(pieces: Sequence[Piece]) -> list[Strided]:
    return [piece.view for piece in pieces] if len(pieces) > 1 else []


def _check_filled(name: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> None:
    """Raise unless the pieces fill the tensor, and no element twice."""
    problem = CheckpointError(f"the {len(pieces)} chunks of '{name}' do not fill its shape {list(shape)}")
    boxes = [(piece.offsets, piece.view.shape) for piece in pieces]
    for offsets, size in boxes:
        if not len(offsets) == len(size) == len(shape):
            raise problem
        if any(at < 0 or at + n > whole for at, n, whole in zip(offsets, size, shape, strict=True)):
            raise problem
    if sum(prod(size) for _, size in boxes) != prod(shape):
        raise problem
    if len(boxes) > _COMPARED and any(size[1:] != shape[1:] for _, size in boxes):
        raise CheckpointError(f"'{name}' is in {len(boxes)} chunks along several axes")
    if len(boxes) > _COMPARED:
        ordered = sorted(boxes)
        apart = all(one[0][0] + one[1][0] <= two[0][0] for one, two in pairwise(ordered))
    else:
        apart = not any(_meet(one, two) for one, two in combinations(boxes, 2))
    if not apart:
        raise problem


def _meet(one: tuple[tuple[int, ...], tuple[int, ...]], two: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    return all(
        max(a, b) < min(a + n, b + m) for a, n, b, m in zip(*one, *two, strict=True)
    )  # fmt: skip


def _reference(name: str, view: Assembled) -> TensorRef:
    steps = [1]
    for size in reversed(view.shape[1:]):
        steps.append(steps[-1] * size)
    strides = tuple(reversed(steps)) if view.shape else ()
    return TensorRef(StorageRef(name, view.dtype, view.numel, "cpu"), view.dtype, 0, view.shape, strides)


def _n_bytes(view: Assembled) -> int:
    return view.numel * ITEM_BYTES[view.dtype]


def _put(top: dict[Any, Any], path: Any, item: Any, n_entries: int) -> None:
    """Set an item of the nested value; a number in a path is a place in a list."""
    if not isinstance(path, tuple) or not path or any(type(part) not in {str, int} for part in path):
        raise ValueError("a path")
    target: Any = top
    for part, following in pairwise(path):
        empty: Callable[[], Any] = list if type(following) is int else dict
        target = _entry(target, part, empty, n_entries)
    if _entry(target, path[-1], None, n_entries) is not None:
        raise ValueError("two entries at one place")
    target[path[-1]] = item


def _entry(target: Any, key: Any, empty: Callable[[], Any] | None, n_entries: int) -> Any:
    """What is at a place, which is made where it is not there yet."""
    if isinstance(target, list):
        if type(key) is not int or not 0 <= key < n_entries:
            raise ValueError("a place in a list")
        target.extend([None] * (key + 1 - len(target)))
        if target[key] is None and empty:
            target[key] = empty()
        return target[key]
    if not isinstance(target, dict):
        raise TypeError("a path through something that holds nothing")
    return target.setdefault(key, empty()) if empty else target.get(key)
