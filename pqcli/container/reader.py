"""`Container`: file -> records and tensors, one at a time. Everything in a file is checked before it is believed."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import safetensors
import torch

from pqcli.codecs import registry
from pqcli.codecs.base import Decoder, StreamCodec, Streams, load, source_of
from pqcli.codecs.rate.measuring import dense
from pqcli.container.layout import CODED, ENTROPIES, ERRORS, HASHES, KEPT, entries_of, known_features
from pqcli.container.manifest import KEPT_CODED, VERSION, Manifest, StoredManifest
from pqcli.container.peek import MANIFEST, SUFFIX, check_container
from pqcli.core.digests import HASH_BYTES, tensor_hash
from pqcli.core.entropy import lossless
from pqcli.core.pq import packing, pq
from pqcli.errors import ContainerError
from pqcli.tensors.info import ITEM_BYTES, TensorInfo
from pqcli.tensors.records import Alias, Coded, Coding, Kept, Plain, Record, StoredError

MAX_MANIFEST_BYTES = 1 << 28
QUANTIZED_DTYPES = frozenset({"float64", "float32", "float16", "bfloat16"})


class Container:
    """An open container: its manifest, and one decoded tensor at a time. Use as a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        check_container(path)
        try:
            self._file = safetensors.safe_open(str(path), framework="pt", backend="pread")
        except safetensors.SafetensorError as error:
            raise ContainerError(
                f"{path}: not a {SUFFIX} file, or a damaged one; `pqcli compress` makes one of a checkpoint"
            ) from error
        except OSError as error:
            raise ContainerError(f"{path}: cannot be read: {error.strerror or error}") from error
        self._keys = set(self._file.keys())  # type: ignore[no-untyped-call]
        self.manifest = self._read_manifest()
        self._by_name = {record.name: i for i, record in enumerate(self.records)}
        self._check_records()
        self._check_entries()
        self._decoder: Decoder | None = None
        self._bundle: dict[str, torch.Tensor] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    @property
    def records(self) -> tuple[Record, ...]:
        """One record per tensor, in the checkpoint's order."""
        return self.manifest.tensors

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The tensors as the checkpoint described them."""
        return tuple(record.info for record in self.records)

    @property
    def bundle_bytes(self) -> int:
        """Length of `pqcli.kept`."""
        return self._shape(KEPT)[0]

    def record(self, name: str) -> Record:
        """The record of a tensor. Raises ContainerError for a name that is not there."""
        if name not in self._by_name:
            raise ContainerError(
                f"{self.path}: no tensor {name!r}; `pqcli inspect` lists the {len(self.records)} there are"
            )
        return self.records[self._by_name[name]]

    def error(self, name: str) -> StoredError | None:
        """The error that compression measured; None for a tensor that is not quantized."""
        return self._errors.get(self.record(name).name)

    def pq_tensor(self, name: str) -> pq.PQTensor:
        """Codebook and assignments of a tensor that plain PQ quantized, unpacked."""
        record = self.record(name)
        if not isinstance(record.coding, Plain):
            raise ContainerError(f"{self.path}: tensor {name!r} has no codebook, its action is {record.action!r}")
        codebook = self._get(f"pq/{name}/codebook")
        packed = self._get(f"pq/{name}/assignments").numpy()
        try:
            assignments = packing.unpack(packed, record.n_vectors, packing.n_bits(len(codebook)))
        except ValueError as error:
            raise self._damaged(f"assignments of {name!r}: {error}") from None
        if assignments.size and int(assignments.max()) >= len(codebook):
            raise self._damaged(f"tensor {name!r} refers to centroid {assignments.max()} of {len(codebook)}")
        dtype = getattr(torch, record.info.dtype)
        return pq.PQTensor(record.info.shape, dtype, record.matrix_shape, codebook, torch.from_numpy(assignments))

    def entropy(self, name: str) -> float:
        """Bits that the symbols of a whole-checkpoint codec would take at their order-0 entropy, a table a tensor.

        Small files and those of older writers do not tell; then all tensors are decoded to find out.
        """
        record = self.record(name)
        if name in self._entropies:
            return self._entropies[name] * record.info.numel
        try:
            return self._opened_decoder().entropy(name)
        except (ValueError, OverflowError) as error:
            raise self._damaged(f"tensor {name!r}: {error}") from None

    def decode(self, name: str, *, check: bool = True) -> torch.Tensor:
        """The dense tensor, in its original dtype and in its own memory.

        Raises ContainerError if its bytes are not those that compression saw (`check=False` skips this).
        """
        record = self.record(name)
        if isinstance(record.coding, Alias):
            return self.decode(record.coding.of, check=check)
        tensor = _DECODERS[type(record.coding)](self, record)
        if check and not self.is_intact(name, tensor):
            raise self._damaged(f"tensor {name!r} decodes to other bytes than were compressed")
        return tensor

    def is_intact(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether `tensor` has the bytes that `name` had when it was compressed."""
        return tensor_hash(tensor).startswith(self._hashes[self._by_name[name]])

    # --- tensors ------------------------------------------------------------------------------------------------------

    def _plain(self, record: Record) -> torch.Tensor:
        return pq.decode(self.pq_tensor(record.name))

    def _kept(self, record: Record) -> torch.Tensor:
        if record.is_bundled:
            if self._bundle is None:
                self._bundle = self._unbundled()
            return self._bundle[record.name].clone()
        data = self._get(f"keep/{record.name}")
        if KEPT_CODED in self.manifest.features:
            data = self._inflated(data, [record])[0]
        return data.view(getattr(torch, record.info.dtype)).reshape(record.info.shape)

    def _unbundled(self) -> dict[str, torch.Tensor]:
        """All tensors of `pqcli.kept`; they are small."""
        records = [record for record in self.records if record.is_bundled]
        data = self._get(KEPT)
        if KEPT_CODED in self.manifest.features:
            pieces = self._inflated(data, records)
        else:
            pieces = [piece.clone() for piece in data.split([record.info.n_bytes for record in records])]  # type: ignore[no-untyped-call]
        return {
            record.name: piece.view(getattr(torch, record.info.dtype)).reshape(record.info.shape)
            for record, piece in zip(records, pieces, strict=True)
        }

    def _inflated(self, data: torch.Tensor, records: Sequence[Record]) -> list[torch.Tensor]:
        """The bytes of kept tensors that were coded without loss."""
        specs = [(ITEM_BYTES[record.info.dtype], record.info.numel) for record in records]
        try:
            pieces = lossless.decompress(data.numpy().tobytes(), specs)
            return [torch.from_numpy(p) if p.size else torch.empty(0, dtype=torch.uint8) for p in pieces]
        except ValueError as error:
            raise self._damaged(f"kept tensor {records[0].name!r}: {error}") from None

    def _coded(self, record: Record) -> torch.Tensor:
        try:
            matrix = self._opened_decoder().matrix(record.name)
        except (ValueError, OverflowError) as error:
            raise self._damaged(f"tensor {record.name!r}: {error}") from None
        return dense(matrix, record)

    def _opened_decoder(self) -> Decoder:
        """The decoder of all streams. Raises ValueError where their shared part is damaged."""
        if self._decoder is None:
            codec = load(self.manifest.coded["codec"])
            if not isinstance(codec, StreamCodec):
                raise ValueError(f"streams of {self.manifest.coded['codec']!r}, which has none")
            sources = [source_of(other) for other in self.records if isinstance(other.coding, Coded)]
            self._decoder = codec.decoder(self._streams(), sources)
        return self._decoder

    def _streams(self) -> Streams:
        """What all tensors share now, a stream when it is asked for."""
        lengths = [self.manifest.coded["shared"], *self.manifest.coded["streams"]]
        ends = list(accumulate(lengths, initial=0))
        data = self._file.get_slice(CODED)  # type: ignore[no-untyped-call]

        def fetch(start: int, stop: int) -> bytes:
            found: bytes = data[start:stop].numpy().tobytes()
            return found

        return Streams(fetch(0, ends[1]), _Fetched(ends[1:], fetch))

    # --- structure ----------------------------------------------------------------------------------------------------

    def _damaged(self, what: str) -> ContainerError:
        return ContainerError(f"{self.path}: {what}; the file is damaged")

    def _shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())  # type: ignore[no-untyped-call]

    def _get(self, key: str) -> torch.Tensor:
        if key not in self._keys:
            raise ContainerError(f"{self.path}: has no entry {key!r}; it is damaged or not a pqcli container")
        try:
            tensor: torch.Tensor = self._file.get_tensor(key)  # type: ignore[no-untyped-call]
        except (OSError, safetensors.SafetensorError, RuntimeError, ValueError) as error:
            raise self._damaged(f"entry {key!r} cannot be read ({error})") from error
        return tensor

    def _read_manifest(self) -> Manifest:
        import pydantic

        raw = self._get(MANIFEST)
        try:
            inflate = zlib.decompressobj()
            text = inflate.decompress(raw.numpy().tobytes(), MAX_MANIFEST_BYTES)
            plain = json.loads(text)
            unknown = sorted(set(plain["features"]) - known_features())
            version = plain["version"]
        except (zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(f"the manifest cannot be read ({error})") from error
        if version != VERSION or unknown:
            what = f"features {', '.join(map(str, unknown))}" if unknown else f"format version {version}"
            raise ContainerError(f"{self.path}: needs {what}, which this pqcli does not know; install a newer pqcli")
        try:
            return pydantic.TypeAdapter(StoredManifest).validate_json(text).manifest()
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise self._damaged(f"manifest entry {place}: {first['msg']}") from None
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def _check_records(self) -> None:
        """Check what can be checked without reading payloads, so that decoding meets no surprise."""
        if len(self._by_name) != len(self.records):
            raise self._damaged("the manifest names a tensor twice")
        for record in self.records:
            if not (_makes_sense(record) and self._alias_leads_somewhere(record)):
                raise self._damaged(f"the record of {record.name!r} makes no sense")
        coded = self.manifest.coded
        codecs = {record.action for record in self.records if isinstance(record.coding, Coded)}
        if codecs != ({coded.get("codec")} if coded else set()):
            raise self._damaged("the manifest does not describe its coded tensors")
        if coded and not _are_lengths([coded.get("shared"), *_list(coded.get("streams"))]):
            raise self._damaged("the manifest does not describe its streams")

    def _alias_leads_somewhere(self, record: Record) -> bool:
        if not isinstance(record.coding, Alias):
            return True
        target = self._by_name.get(record.coding.of)
        other = None if target is None else self.records[target]
        if other is None or isinstance(other.coding, Alias):
            return False
        return (other.info.shape, other.info.dtype) == (record.info.shape, record.info.dtype)

    def _check_entries(self) -> None:
        """Check that every entry is there with the shape that the manifest gives it; read hashes and errors."""
        shapes = {key: self._shape(key) for key in (KEPT, HASHES) if key in self._keys}
        kept, hashes = shapes.get(KEPT, ()), shapes.get(HASHES, ())
        if len(kept) != 1 or len(hashes) != 2 or not 1 <= hashes[1] <= HASH_BYTES:
            raise self._damaged("kept tensors or hashes are missing")
        bundle_bytes = kept[0] if KEPT_CODED in self.manifest.features else None
        expected = entries_of(self.manifest, bundle_bytes, hashes[1], has_entropies=ENTROPIES in self._keys)
        for entry in expected:
            if entry.key != MANIFEST and (entry.key not in self._keys or self._shape(entry.key) != entry.shape):
                raise self._damaged(f"entry {entry.key!r} is missing or has the wrong shape")
        self._hashes = [bytes(row) for row in self._get(HASHES).numpy()]
        quantized = [record.name for record in self.records if record.quantized]
        self._errors = {
            name: StoredError(*row) for name, row in zip(quantized, self._get(ERRORS).tolist(), strict=True)
        }
        coded = [record.name for record in self.records if isinstance(record.coding, Coded)]
        bits = self._get(ENTROPIES).tolist() if ENTROPIES in self._keys else []
        if not all(math.isfinite(value) and value >= 0 for value in bits):
            raise self._damaged("an entropy is no number of bits")
        self._entropies: dict[str, float] = dict(zip(coded, bits, strict=True)) if bits else {}


class _Fetched(Sequence[bytes]):
    """The streams of a container, each fetched when it is asked for."""

    def __init__(self, ends: Sequence[int], fetch: Callable[[int, int], bytes]) -> None:
        self._ends, self._fetch = ends, fetch

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._fetch(self._ends[index], self._ends[index + 1])


def _makes_sense(record: Record) -> bool:
    """Whether a record can be true: known codec and dtype, a matrix of the tensor's size, blocks that fit it."""
    info, coding = record.info, record.coding
    if info.dtype not in ITEM_BYTES or min(info.shape, default=0) < 0:
        return False
    if isinstance(coding, Kept | Coded) and coding.n_bytes is not None and coding.n_bytes < 0:
        return False
    if not isinstance(coding, Plain | Coded):
        return True
    if info.dtype not in QUANTIZED_DTYPES or not info.shape or (coding.rows or 0) < 0:
        return False
    rows, columns = record.matrix_shape
    if rows * columns != info.numel:
        return False
    if isinstance(coding, Coded):
        return coding.codec in registry.with_streams() and coding.kernel >= 1 and columns % coding.kernel == 0
    fits = 1 <= coding.block_size <= columns and 1 <= coding.n_centroids <= 1 << packing.MAX_BITS
    return fits and coding.codebook_dtype in {"float16", "float32"}


_DECODERS: dict[type[Coding], Callable[[Container, Record], torch.Tensor]] = {
    Plain: Container._plain,  # noqa: SLF001 - the table of this module
    Kept: Container._kept,  # noqa: SLF001
    Coded: Container._coded,  # noqa: SLF001
}
"""How each kind of tensor is decoded; an alias is decoded as what it is another name of."""


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [None]


def _are_lengths(values: list[Any]) -> bool:
    return all(isinstance(value, int) and value >= 0 for value in values)


def open_container(path: str | Path) -> Container:
    """The container at `path`. Raises ContainerError if it is missing, damaged, or from a newer pqcli."""
    return Container(Path(path))
