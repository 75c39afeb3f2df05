"""A standard torch.save file, written as a stream.

`torch.save` wants every tensor in memory and writes in place. Here the pickle is made first, from tensor *slots* (shape
and dtype are known), and the storages follow one by one. The result is what torch itself writes: an uncompressed zip
with correct checksums, records aligned to 64 bytes, loadable with `weights_only=True` and with `mmap=True`. Tied
tensors share a storage.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

from pqcli.checkpoint.pt.rebuilding import TensorSlot
from pqcli.checkpoint.pt.torch_objects import DTYPE_OF_STORAGE
from pqcli.checkpoint.rawbytes import as_announced, write_bytes
from pqcli.errors import OutputError
from pqcli.tensors.info import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pqcli.checkpoint.rawbytes import Read
    from pqcli.tensors.info import TensorInfo

_STORAGE_OF_DTYPE = {dtype: name for name, dtype in DTYPE_OF_STORAGE.items()}
_NOT_IN_NUMPY = {dtype for dtype in ITEM_BYTES if dtype.startswith(("bfloat", "float8", "complex32"))}
"""An array converted to one of these is written as a tensor."""
_ALIGNMENT = 64
_ZIP64_FROM = 1 << 30
"""Records this large get 64-bit sizes; zipfile itself would insist on it at 2 GiB, and cannot know in advance."""
_LOCAL_HEADER_BYTES = 30
_ZIP64_EXTRA_BYTES = 20
_PROTOCOL = 2  # the one that torch uses, and that every version reads


def write_pt(file: BinaryIO, value: Any, tensors: Sequence[TensorInfo], read: Read) -> int:
    """Write `value`, whose tensors are `TensorSlot`s, as a `.pt`; returns the size.

    `read` is called once per tensor that is no alias, and one tensor is held at a time; but numpy arrays, which
    stand in the pickle, are held until it is written.
    """
    owners = [info for info in tensors if info.alias_of is None]
    keys = {info.name: str(number) for number, info in enumerate(owners)}
    buffer = io.BytesIO()
    try:
        pickler = _SlotPickler(buffer, keys, read)
        pickler.dump(value)
    except RecursionError as error:
        raise OutputError("the checkpoint's structure is nested too deeply for a .pt") from error
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, content in (
            ("data.pkl", buffer.getvalue()),
            (".format_version", b"1"),
            (".storage_alignment", str(_ALIGNMENT).encode()),
            ("byteorder", b"little"),
        ):
            _write_record(archive, file, name, len(content), lambda record, content=content: record.write(content))  # type: ignore[misc]
        for info in owners:
            if info.name in pickler.arrays:
                continue  # it is in the pickle
            _write_tensor(archive, file, f"data/{keys[info.name]}", info, read)
        _write_record(archive, file, "version", 2, lambda record: record.write(b"3\n"))
    return file.tell()


def _write_tensor(archive: zipfile.ZipFile, file: BinaryIO, name: str, info: TensorInfo, read: Read) -> None:
    _write_record(archive, file, name, info.n_bytes, lambda record: write_bytes(record, read(info.name), info))


def _write_record(
    archive: zipfile.ZipFile, file: BinaryIO, name: str, n_bytes: int, write: Callable[[Any], object]
) -> None:
    """One record whose data begin at a multiple of 64 bytes, as mmap and SIMD like it."""
    entry = zipfile.ZipInfo(f"archive/{name}")  # with zip's zero date: equal input gives equal bytes
    zip64 = n_bytes >= _ZIP64_FROM
    start = file.tell() + _LOCAL_HEADER_BYTES + len(entry.filename) + (_ZIP64_EXTRA_BYTES if zip64 else 0)
    padding = -start % _ALIGNMENT
    if 0 < padding < 4:  # the smallest extra field has a header of 4 bytes
        padding += _ALIGNMENT
    if padding:
        entry.extra = b"FB" + (padding - 4).to_bytes(2, "little") + b"Z" * (padding - 4)  # torch's own filler
    with archive.open(entry, "w", force_zip64=zip64) as record:
        write(record)
    entry.extra = b""  # the directory needs no filler


@dataclass(frozen=True)
class _StorageSlot:
    """Stands for a storage while pickling; `n_elements` counts items of `storage_class`."""

    storage_class: Any
    key: str
    n_elements: int


class _SlotPickler(pickle.Pickler):
    """Pickles `TensorSlot`s exactly as torch pickles the tensors they stand for."""

    def __init__(self, file: BinaryIO, keys: dict[str, str], read: Read) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self.arrays: dict[str, Any] = {}
        self._keys = keys
        self._read = read

    def persistent_id(self, obj: Any) -> Any:
        """Storages live outside the pickle, in records of the zip."""
        if isinstance(obj, _StorageSlot):
            return ("storage", obj.storage_class, obj.key, "cpu", obj.n_elements)
        return None

    def reducer_override(self, obj: Any) -> Any:
        """The calls that torch.load makes to build a tensor."""
        import torch

        if not isinstance(obj, TensorSlot):
            return NotImplemented
        if obj.numpy and obj.info.dtype not in _NOT_IN_NUMPY:
            return self._array(obj.info).__reduce__()
        if obj.parameter:
            plain = TensorSlot(obj.info)
            return torch._utils._rebuild_parameter, (plain, obj.grad, OrderedDict())  # noqa: SLF001
        info = obj.info
        storage = self._storage(info)
        arguments: tuple[Any, ...] = (storage, 0, info.shape, _strides(info.shape), obj.grad, OrderedDict())
        if storage.storage_class is torch.UntypedStorage:
            return torch._utils._rebuild_tensor_v3, (*arguments, getattr(torch, info.dtype))  # noqa: SLF001
        return torch._utils._rebuild_tensor_v2, arguments  # noqa: SLF001

    def _array(self, info: TensorInfo) -> Any:
        """The array itself: it stands in the pickle."""
        name = info.alias_of or info.name
        if name not in self.arrays:
            self.arrays[name] = as_announced(self._read(name), info)
        return self.arrays[name]

    def _storage(self, info: TensorInfo) -> _StorageSlot:
        import torch

        key = self._keys[info.alias_of or info.name]
        name = _STORAGE_OF_DTYPE.get(info.dtype)  # none for dtypes younger than these classes (fp8, uint16 ...)
        if name is None:
            return _StorageSlot(torch.UntypedStorage, key, info.numel * ITEM_BYTES[info.dtype])
        return _StorageSlot(getattr(torch, name), key, info.numel)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(1, prod(max(1, size) for size in shape[axis + 1 :])) for axis in range(len(shape)))
