"""The header of a torch.save file, zip (since torch 1.6) or legacy pickle: what is in it, and where.

A zip `.pt` is an uncompressed zip: `NAME/data.pkl` is a pickle whose tensors point at records `NAME/data/KEY`. A legacy
`.pt` is five pickles in a row (magic number, protocol, system, the object, the list of storage keys) with the storages
behind them. Both give the same `Layout`; no storage is read for it.

torch itself checks little: no CRC, no record size under mmap, and compressed records are inflated blindly. Here
the zip's directory is checked before anything else.
"""

from __future__ import annotations

import io
import struct
import zipfile
from typing import IO, TYPE_CHECKING, Any, cast

from pqcli.checkpoint.bytesource import AsFile, ByteSource, Region, Strided, Window, reading
from pqcli.checkpoint.opened import Layout
from pqcli.checkpoint.pt.naming import tensors_in
from pqcli.checkpoint.pt.numpy_objects import NumpyArray
from pqcli.checkpoint.pt.pickles import PickleReader
from pqcli.checkpoint.pt.tree import describe
from pqcli.errors import CheckpointError
from pqcli.tensors.info import ITEM_BYTES, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from pqcli.checkpoint.limits import Budget
    from pqcli.checkpoint.pt.torch_objects import StorageRef, TensorRef

_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_SHOWN_GLOBALS = 5
_MAX_LINE = 1 << 16
_LEGACY_END = "it ends in the middle of a storage; it is truncated, fetch it again"


def read_zip(source: ByteSource | Window) -> Layout:
    """The layout of a zip `.pt`. Messages are bare facts ("its record ..."): the caller adds the path."""
    value, region_of = _opened_zip(source)
    return layout_of(value, region_of, source.budget, from_module=source.asked.from_module)


def value_of_zip(source: ByteSource | Window) -> Any:
    """The value of a zip `.pt` that holds no tensors, as the interpreter gives it."""
    value, _ = _opened_zip(source)
    if any(True for _ in tensors_in(value, source.budget.entries)):
        raise CheckpointError("it holds tensors where it should hold none")
    return value


def _opened_zip(source: ByteSource | Window) -> tuple[Any, Callable[[StorageRef], Region]]:
    """The value of a zip's pickle, and where its storages lie."""
    entries = _directory(AsFile(source))
    records = _checked_records(entries, source)
    prefix = _prefix(records)
    order = records.get(f"{prefix}byteorder")
    if order and source.bytes_at(order.start, min(order.n_bytes, 16)) != b"little":
        raise CheckpointError("it was written on a big-endian machine; save it again on an ordinary one")
    data = records[f"{prefix}data.pkl"]
    source.budget.length(data.n_bytes, "its pickle")
    source.check_region(data)
    reader = PickleReader(source.budget)
    value = load_value(reader, io.BytesIO(source.bytes_at(data.start, data.n_bytes)))

    def region_of(storage: StorageRef) -> Region:
        region = records.get(f"{prefix}data/{storage.key}")
        if region is None:
            raise CheckpointError(f"its record data/{storage.key} is missing; the file is damaged")
        needed = _storage_bytes(storage)
        if region.n_bytes < needed:
            raise CheckpointError(
                f"its record data/{storage.key} has {region.n_bytes:,} bytes where the pickle promises {needed:,}; "
                "the file is damaged"
            )
        return region

    return value, region_of


def read_legacy(source: ByteSource) -> Layout:
    """The layout of a legacy `.pt` (before torch 1.6). Storages are found by position; none is read."""
    reader = PickleReader(source.budget)
    with reading(source.path), source.path.open("rb") as raw:
        file = cast("IO[bytes]", _Bounded(raw, min(source.n_bytes, source.budget.limits.n_bytes)))
        magic, protocol, system = (load_value(reader, file) for _ in range(3))
        if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
            raise CheckpointError(f"it has the protocol {str(protocol)[:40]} of an unknown torch")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise CheckpointError("it was written on a big-endian machine; save it again on an ordinary one")
        value = load_value(reader, file)
        storages = dict(reader.storages)
        keys = load_value(reader, file)
        position = file.tell()
    if not isinstance(keys, list) or any(not isinstance(key, str) for key in keys):
        raise CheckpointError("its list of storages is damaged")
    regions = _legacy_regions(keys, storages, position, source)

    def region_of(storage: StorageRef) -> Region:
        if storage.key not in regions:
            raise CheckpointError(f"its storage {storage.key} is missing; the file is damaged")
        return regions[storage.key]

    return layout_of(value, region_of, source.budget, from_module=source.asked.from_module)


# -- from the pickle's value to a layout -----------------------------------------------------------------------------


def load_value(reader: PickleReader, file: IO[bytes]) -> Any:
    """The value of one pickle; refuses it, naming every global that is not known to be harmless."""
    problem: CheckpointError | None = None
    value = None
    try:
        value = reader.load(file)
    except CheckpointError as error:
        problem = error
    if reader.unknown_globals:
        raise CheckpointError(_refusal(reader.unknown_globals)) from problem
    if problem:
        raise problem
    return value


def _refusal(names: list[str]) -> str:
    shown = ", ".join(ascii(name)[1:-1][:80] for name in names[:_SHOWN_GLOBALS])
    more = f" and {len(names) - _SHOWN_GLOBALS} more" if len(names) > _SHOWN_GLOBALS else ""
    return (
        f"its pickle holds more than tensors: it needs {shown}{more}, which may run code when loaded, "
        "so pqcli refuses it. If you trust the file, "
        "load it once with torch.load(path, weights_only=False) and save only its state dict"
    )


def layout_of(
    value: Any, region_of: Callable[[StorageRef], Region], budget: Budget, *, from_module: bool = False
) -> Layout:
    """The layout of a pickle's value, whose storages lie where `region_of` says."""
    description = describe(value, budget, from_module=from_module)
    infos: list[TensorInfo] = []
    views: dict[str, Strided] = {}
    first: dict[tuple[object, ...], str] = {}
    view: Strided
    key: tuple[object, ...]
    for found in description.tensors:
        ref = found.ref
        if isinstance(ref, NumpyArray):
            view, key = _array_view(ref), (id(ref),)
        else:
            view, key = _view(found.name, ref, region_of), _identity(ref)
        # empty tensors share nothing that could be tied
        alias = first.setdefault(key, found.name) if view.numel else found.name
        infos.append(TensorInfo(found.name, view.shape, view.dtype, None if alias == found.name else alias, found.role))
        views[found.name] = view
    return Layout(tuple(infos), views, {"tree": description.tree}, description.dropped)


def _identity(ref: TensorRef) -> tuple[object, ...]:
    """What two tensors must have in common to be tied."""
    storage = ref.storage
    return storage.key, storage.byte_offset, ref.dtype, ref.offset, ref.shape, ref.strides, ref.conj, ref.neg


def _array_view(array: NumpyArray) -> Strided:
    return Strided(Region(0, len(array.data), data=array.data), array.dtype or "", array.shape)


def _view(name: str, ref: TensorRef, region_of: Callable[[StorageRef], Region]) -> Strided:
    if ref.dtype not in ITEM_BYTES:
        raise CheckpointError(f"tensor '{name}' has the dtype {ref.dtype}, which pqcli does not carry")
    region = region_of(ref.storage)
    item = ITEM_BYTES[ref.dtype]
    if ref.storage.byte_offset % item:
        raise CheckpointError(f"tensor '{name}' lies across element borders of its storage")
    return Strided(
        region=region,
        dtype=ref.dtype,
        shape=ref.shape,
        offset=ref.offset + ref.storage.byte_offset // item,
        strides=ref.strides,
        conj=ref.conj,
        neg=ref.neg,
    )


def _storage_bytes(storage: StorageRef) -> int:
    return storage.size * ITEM_BYTES[storage.dtype or "uint8"]


# -- the zip's directory -----------------------------------------------------------------------------------------------


def _directory(file: AsFile) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(cast("IO[bytes]", io.BufferedReader(file))) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"its zip directory cannot be read ({error}); the file is truncated or damaged, fetch it again"
        ) from error


def _checked_records(entries: list[zipfile.ZipInfo], source: ByteSource | Window) -> dict[str, Region]:
    """Where each record's bytes lie. Refuses what torch would swallow: compression, encryption, doubles, overruns."""
    if not entries:
        raise CheckpointError("it is an empty zip archive")
    if min(entry.header_offset for entry in entries) != 0:
        raise CheckpointError(
            "its zip archive does not begin where the file begins: it is several archives in a row (a file of a torch "
            "distributed checkpoint? then name its folder), or something precedes the archive"
        )
    _check_is_torch([entry.filename for entry in entries])
    promised = any(entry.CRC for entry in entries)  # writers that skip the checksums put 0 everywhere
    records: dict[str, Region] = {}
    for entry in entries:
        name = ascii(entry.filename)[1:-1][:100]
        if entry.filename in records:
            raise CheckpointError(f"its zip record {name} occurs twice; the file is damaged")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise CheckpointError(
                f"its zip record {name} is compressed, which torch.save never does; load and save it again"
            )
        if entry.flag_bits & 1:
            raise CheckpointError(f"its zip record {name} is encrypted")
        start = _data_start(entry, source)
        if start + entry.file_size > source.n_bytes:
            raise CheckpointError(f"its zip record {name} ends behind the end of the file; the file is truncated")
        records[entry.filename] = Region(start, entry.file_size, entry.CRC if promised else None)
    return records


def _data_start(entry: zipfile.ZipInfo, source: ByteSource | Window) -> int:
    """The directory knows where the local header is; the data begin behind its name and its padding."""
    offset = entry.header_offset
    if not 0 <= offset <= source.n_bytes - _LOCAL_HEADER.size:
        raise CheckpointError("its zip directory points outside the file; the file is truncated or damaged")
    magic, *_, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(source.bytes_at(offset, _LOCAL_HEADER.size))
    if magic != b"PK\x03\x04":
        raise CheckpointError(f"its zip directory points to byte {offset:,}, but no record begins there; it is damaged")
    return int(offset + _LOCAL_HEADER.size + name_bytes + extra_bytes)


def _check_is_torch(names: list[str]) -> None:
    """Raise, saying what the zip is instead, unless torch.save wrote it."""
    inner = {name.split("/", 1)[-1] for name in names}
    if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
        raise CheckpointError(
            "it is a TorchScript archive (a program with its weights); save the weights alone with "
            "torch.save(torch.jit.load(path).state_dict(), 'weights.pt')"
        )
    if any(name.endswith("/data.pkl") for name in names):
        return
    if all(name.endswith(".npy") for name in names):
        raise CheckpointError("it is a numpy .npz archive; save the arrays as a dict of tensors first")
    if any(name.endswith((".pt", ".pth", ".bin", ".safetensors", ".ckpt")) for name in names):
        raise CheckpointError("it is a zip archive that contains checkpoints; unpack it first")
    if any(name.endswith("model.weights.h5") for name in names):
        raise CheckpointError("it is a Keras archive; save the weights as .safetensors first")
    shown = ", ".join(ascii(name)[1:-1][:40] for name in names[:3])
    raise CheckpointError(f"it is a zip archive, but not one of torch.save (it holds {shown})")


def _prefix(records: dict[str, Region]) -> str:
    """The folder inside the zip: torch names it after the file it was saved to."""
    found = [name.removesuffix("data.pkl") for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1:
        raise CheckpointError(f"it has {len(found)} records named data.pkl instead of one; the file is damaged")
    return found[0]


# -- the legacy file ---------------------------------------------------------------------------------------------------


class _Bounded:
    """A file whose reads never ask for more than is left: a pickle may claim strings of any length."""

    def __init__(self, file: IO[bytes], n_bytes: int) -> None:
        self._file = file
        self._n_bytes = n_bytes

    def read(self, n: int) -> bytes:
        return self._file.read(max(0, min(n, self._n_bytes - self._file.tell())))

    def readline(self) -> bytes:
        return self._file.readline(_MAX_LINE)

    def tell(self) -> int:
        return self._file.tell()


def _legacy_regions(
    keys: list[str], storages: dict[str, StorageRef], position: int, source: ByteSource
) -> dict[str, Region]:
    """Each storage is its number of elements (8 bytes), then its bytes, in the order of `keys`."""
    regions: dict[str, Region] = {}
    for key in keys:
        storage = storages.get(key)
        if storage is None:
            raise CheckpointError("it lists a storage that its pickle does not mention; the file is damaged")
        if position + 8 > source.n_bytes:
            raise CheckpointError(_LEGACY_END)
        (size,) = struct.unpack("<q", source.bytes_at(position, 8))
        if size != storage.size:
            raise CheckpointError(
                f"its storage {key} has {size:,} elements where the pickle promises {storage.size:,}; it is damaged"
            )
        region = Region(position + 8, _storage_bytes(storage))
        position = region.start + region.n_bytes
        if position > source.n_bytes:
            raise CheckpointError(_LEGACY_END)
        regions[key] = region
    return regions
