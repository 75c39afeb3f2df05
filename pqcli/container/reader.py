"""`Container`: file -> records and tensors, one at a time. What a file says of itself was checked at the door."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from pqcli.codecs import moments, registry, zeros
from pqcli.codecs.base import Decoder, StreamCodec, Streams, load, source_of
from pqcli.codecs.difference import as_base, exact_sum, restored
from pqcli.container import checksum, notebook
from pqcli.container.bases import Base, Given, Search, content_hash, find_base, message
from pqcli.container.checksum import CHECKSUM
from pqcli.container.door import admit
from pqcli.container.files import FILES, Packed, unpack
from pqcli.container.layout import CODED, KEPT, own_entries
from pqcli.container.limits import Limits
from pqcli.container.manifest import KEPT_CODED, CodedStreams
from pqcli.container.shards import open_any
from pqcli.core.arrays import as_tensor
from pqcli.core.digests import tensor_bytes, tensor_hash
from pqcli.core.dtypes import Array, dtype_of, saturated
from pqcli.core.entropy import lossless
from pqcli.core.pq import decoding, packing
from pqcli.errors import BaseError, ContainerError
from pqcli.recipe.suggestions import close_names
from pqcli.stats.damage import Damage
from pqcli.tensors.info import ITEM_BYTES, TensorInfo
from pqcli.tensors.records import Alias, Coded, Coding, Copy, Kept, Moments, Plain, Record, Same, StoredError

if TYPE_CHECKING:
    import torch

    from pqcli.core.pq.pq import PQTensor


class Container:
    """An open container: its manifest, and one decoded tensor at a time. Use as a context manager."""

    def __init__(self, path: Path, limits: Limits | None = None, search: Search | None = None) -> None:
        self.path = path
        self._search = search or Search()
        self._base: Base | None = None
        self._entries = open_any(path, limits or Limits())
        try:
            self._said = admit(self._entries, limits or Limits())
        except BaseException:
            self._entries.close()
            raise
        self.manifest = self._said.manifest
        self._decoder: Decoder | None = None
        self._bundle: dict[str, NDArray[np.uint8]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return notebook.container_line(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return notebook.container_page(self)

    def close(self) -> None:
        """Close the file, and its base; may be called twice."""
        self._decoder = None  # what it has begun ahead is not needed any more
        if self._base is not None:
            self._base.close()
        self._entries.close()

    @property
    def records(self) -> tuple[Record, ...]:
        """One record per tensor, in the checkpoint's order."""
        return self.manifest.tensors

    @property
    def infos(self) -> tuple[TensorInfo, ...]:
        """The tensors as the checkpoint described them."""
        return tuple(record.info for record in self.records)

    @property
    def n_weights(self) -> int:
        """Weights that decoding all of it has to rebuild."""
        return sum(record.info.numel for record in self.records if not isinstance(record.coding, Alias))

    @property
    def n_bytes(self) -> int:
        """Size of the container: its file, or its files and their index."""
        return self._entries.n_bytes

    @property
    def identity(self) -> bytes:
        """Eight bytes that differ between files: a hash of the header, the manifest, and every tensor's hash."""
        return self._entries.checksum_of_head()

    @property
    def largest_file_bytes(self) -> int:
        """Size of its file, or of the largest of its files."""
        return self._entries.largest_file_bytes

    def coded(self, start: int, stop: int) -> bytes:
        """Some bytes of `pqcli.coded`."""
        return bytes(self._entries.read(CODED, start, stop))

    @property
    def bundle_bytes(self) -> int:
        """Length of `pqcli.kept`."""
        return self._entries.place(KEPT).n_bytes

    def files(self) -> dict[str, bytes]:
        """The small files that the container holds beside its tensors, by their paths. Raises ContainerError."""
        about = self.manifest.files
        if about is None:
            return {}
        try:
            return unpack(about, self._entries.read(FILES))
        except ValueError as error:
            raise self._entries.damaged(f"entry {FILES!r}: {error}") from None

    def record(self, name: str) -> Record:
        """The record of a tensor. Raises ContainerError for a name that is not there."""
        if name not in self._said.index:
            close = close_names(name, [record.name for record in self.records])
            raise ContainerError(
                f"{self.path}: no tensor {name!r}{close}; `pqcli inspect` lists the {len(self.records)} there are"
            )
        return self.records[self._said.index[name]]

    def error(self, name: str) -> StoredError | None:
        """The error that compression measured; None for a tensor that is not quantized, or was trained since."""
        return self._said.errors.get(self.record(name).held_by)

    def is_trained(self, name: str) -> bool:
        """Whether the tensor, or the one that it is a copy of, was trained after it had been compressed."""
        return self.record(self.record(name).held_by).trained

    def damage(self, name: str) -> Damage | None:
        """What compression predicted of the tensor's error, from statistics; None where it knew nothing."""
        return self._said.damages.get(self.record(name).held_by)

    def pq_tensor(self, name: str) -> PQTensor:
        """Codebook and assignments of a tensor that plain PQ quantized, unpacked."""
        import torch

        from pqcli.core.pq.pq import PQTensor

        record = self.record(name)
        if not isinstance(record.coding, Plain):
            raise ContainerError(f"{self.path}: tensor {name!r} has no codebook, its action is {record.action!r}")
        codebook, assignments = self._plain_parts(record, packing.unpack)
        dtype = getattr(torch, record.info.dtype)
        return PQTensor(record.info.shape, dtype, record.matrix_shape, as_tensor(codebook), as_tensor(assignments))

    def _plain_parts(
        self, record: Record, unpack: Callable[[Any, int, int], NDArray[Any]]
    ) -> tuple[Array, NDArray[np.integer]]:
        name = record.name
        codebook = self._entries.array(f"pq/{name}/codebook")
        packed = self._entries.array(f"pq/{name}/assignments")
        try:
            assignments = unpack(packed, record.n_vectors, packing.n_bits(len(codebook)))
        except ValueError as error:
            raise self._entries.damaged(f"assignments of {name!r}: {error}") from None
        if assignments.size and int(assignments.max()) >= len(codebook):
            raise self._entries.damaged(f"tensor {name!r} refers to centroid {assignments.max()} of {len(codebook)}")
        return codebook, assignments

    def digest(self, name: str) -> bytes:
        """As much of the hash of the decoded tensor as the file has."""
        return self._said.hashes[self._said.index[name]]

    def payloads(self, name: str) -> tuple[tuple[str, bytes], ...]:
        """The entries that a tensor has for itself, as they lie in the file."""
        record = self.record(name)
        keys = [entry.key for entry in own_entries(record, self.manifest.features)]
        keys += [] if record.zero_bytes is None else [zeros.key(name)]
        return tuple((key, bytes(self._entries.read(key))) for key in keys)

    def streams(self) -> Streams | None:
        """What tensors share, as it lies in the file; None where they share nothing."""
        coded = self.manifest.coded
        if coded is None:
            return None
        of_codec = registry.row(coded.codec).features
        return replace(self._streams(coded), features=tuple(f for f in of_codec if f in self.manifest.features))

    def packed_files(self) -> Packed | None:
        """The small files inside, as they lie in the file; None where there are none."""
        about = self.manifest.files
        return None if about is None else Packed(about, bytes(self._entries.read(FILES)))

    def packed_assignments(self, name: str) -> NDArray[np.uint8]:
        """The assignments of a tensor that plain PQ quantized, as they lie in the file: (bytes,) uint8."""
        return self._entries.array(f"pq/{name}/assignments")

    def zeros(self, name: str) -> NDArray[np.bool_] | None:
        """Which elements of a quantized tensor are exactly zero, as `zeros.mask` tells it; None where none are told."""
        record = self.record(name)
        if record.zero_bytes is None:
            return None
        try:
            return zeros.mask(record, bytes(self._entries.read(zeros.key(name))))
        except ValueError as error:
            raise self._entries.damaged(f"zeros of {name!r}: {error}") from None

    def entropy(self, name: str) -> float:
        """Bits that the symbols of a whole-checkpoint codec would take at their order-0 entropy, a table a tensor.

        Small files and those of older writers do not tell; then all tensors are decoded to find out.
        """
        record = self.record(name)
        if name in self._said.entropies:
            return self._said.entropies[name] * record.info.numel
        try:
            return self._opened_decoder().entropy(name)
        except (ValueError, OverflowError) as error:
            raise self._entries.damaged(f"tensor {name!r}: {error}") from None

    def decode(self, name: str, *, check: bool = True) -> torch.Tensor:
        """The dense tensor, in its original dtype and in its own memory; otherwise as `numpy`."""
        return as_tensor(self.numpy(name, check=check))

    def numpy(self, name: str, *, check: bool = True) -> Array:
        """The dense tensor as a numpy array, which takes no torch to decode.

        numpy has no bfloat16 and no float8: these are dtypes of `ml_dtypes`, which computes with them; a complex32 is
        a pair of float16, "real" and "imag". Raises ContainerError if its bytes are not those that compression saw
        (`check=False` skips this), and BaseError if it needs a base that is missing or another one.
        """
        record = self.record(name)
        if isinstance(record.coding, Alias | Copy):
            return self.numpy(record.coding.of, check=check)
        base = self.base() if record.needs_base else None
        array = self.decoded(record, base)
        if check and not self.is_intact(name, array):
            self.check_base(record)
            raise self._entries.damaged(f"tensor {name!r} decodes to other bytes than were compressed")
        return array

    def decoded(self, record: Record, base: Base | None) -> Array:
        """The dense tensor of a record that is no alias, given a base that fits (`bases.misfit`), unchecked."""
        of_base = base.read(record.name) if base is not None and record.needs_base else None
        array = _DECODERS[type(record.coding)](self, record, of_base)
        return array if record.zero_bytes is None else self._with_zeros(array, record)

    def base(self) -> Base:
        """What its differences are to. Raises BaseError where that is missing or another one, or none is needed."""
        if self._base is None:
            self._base = find_base(self, self._search)
        return self._base

    def check_base(self, record: Record) -> None:
        """Raise BaseError if the base is what is wrong with a tensor that needs it."""
        wanted = self.manifest.base
        if wanted is None or not record.needs_base:
            return
        found = content_hash(self.records, self.base())
        if found != wanted.hash:
            raise BaseError(message(self.path, wanted, [f"'{self.base().path}' has the hash {found}"]))

    def bind(self, base: Base) -> None:
        """Take `base` for its base from now on."""
        self._base = base

    @property
    def needs_base(self) -> bool:
        """Whether some tensor cannot be decoded without a base."""
        return self.manifest.base is not None

    def is_intact(self, name: str, tensor: Array | torch.Tensor) -> bool:
        """Whether `tensor` has the bytes that `name` had when it was compressed."""
        return tensor_hash(tensor).startswith(self._said.hashes[self._said.index[name]])

    def is_whole(self) -> bool:
        """Whether all payloads are those that were written, by the file's checksum; reads the whole file.

        True where a file of an older pqcli has no checksum. That of the other bytes was checked on opening.
        """
        if checksum.FEATURE not in self.manifest.features:
            return True
        stored = self._entries.read(CHECKSUM, checksum.PART_BYTES)
        return self._entries.checksum_of_rest(CHECKSUM) == stored

    def check_figures(self) -> None:
        """Raise ContainerError where figures about a tensor would be made of payloads that are not those written.

        Assignments are counted for figures, and streams where the file has no entropies; else nothing is read here.
        """
        are_read = any(
            isinstance(record.coding, Plain | Coded) and record.name not in self._said.entropies
            for record in self.records
        )
        if are_read and not self.is_whole():
            raise self._entries.damaged("its payloads are not those that were written (checksum); see `pqcli verify`")

    # --- tensors ------------------------------------------------------------------------------------------------------

    def _plain(self, record: Record, base: Array | None) -> Array:
        codebook, assignments = self._plain_parts(record, packing.unpack_narrow)
        codebook = saturated(codebook, record.info.dtype if base is None else "float32")
        matrix = decoding.join(codebook, assignments, *record.matrix_shape)
        return matrix.reshape(record.info.shape) if base is None else restored(record, matrix, base)

    def _same(self, record: Record, base: Array | None) -> Array:
        if base is None:
            raise TypeError(f"tensor {record.name!r} without its base")
        return as_base(record.info.dtype, base)

    def _with_zeros(self, array: Array, record: Record) -> Array:
        try:
            return zeros.restored(array, record, bytes(self._entries.read(zeros.key(record.name))))
        except ValueError as error:
            raise self._entries.damaged(f"zeros of {record.name!r}: {error}") from None

    def _kept(self, record: Record, base: Array | None) -> Array:
        stored = self._kept_bytes(record)
        data = stored if base is None else exact_sum(stored, base, record.info.dtype)
        return data.view(dtype_of(record.info.dtype)).reshape(record.info.shape)

    def _moments(self, record: Record, _base: Array | None) -> Array:
        try:
            return moments.restored(record, bytes(self._entries.read(moments.key(record.name))))
        except ValueError as error:
            raise self._entries.damaged(f"moments of {record.name!r}: {error}") from None

    def _kept_bytes(self, record: Record) -> NDArray[np.uint8]:
        """What is kept: the bytes of the tensor itself, or of its difference."""
        if record.is_bundled:
            if self._bundle is None:
                self._bundle = self._unbundled()
            return self._bundle[record.name].copy()
        data = tensor_bytes(self._entries.array(f"keep/{record.name}"))
        return self._inflated(data, [record])[0] if KEPT_CODED in self.manifest.features else data

    def _unbundled(self) -> dict[str, NDArray[np.uint8]]:
        """All tensors of `pqcli.kept`; they are small."""
        records = [record for record in self.records if record.is_bundled]
        data = self._entries.array(KEPT)
        if KEPT_CODED in self.manifest.features:
            pieces = self._inflated(data, records)
        else:
            ends = list(accumulate(record.info.n_bytes for record in records))
            pieces = np.split(data, ends[:-1])
        return {record.name: piece for record, piece in zip(records, pieces, strict=True)}

    def _inflated(self, data: NDArray[np.uint8], records: Sequence[Record]) -> list[NDArray[np.uint8]]:
        """The bytes of kept tensors that were coded without loss."""
        specs = [(ITEM_BYTES[record.info.dtype], record.info.numel) for record in records]
        try:
            return lossless.decompress(data.tobytes(), specs)
        except ValueError as error:
            raise self._entries.damaged(f"kept tensor {records[0].name!r}: {error}") from None

    def _coded(self, record: Record, base: Array | None) -> Array:
        try:
            matrix = self._opened_decoder().matrix(record.name)
        except (ValueError, OverflowError) as error:
            raise self._entries.damaged(f"tensor {record.name!r}: {error}") from None
        return restored(record, matrix, base)

    def _opened_decoder(self) -> Decoder:
        """The decoder of all streams. Raises ValueError where their shared part is damaged."""
        if self._decoder is None:
            coded = self.manifest.coded
            codec = load(coded.codec) if coded else None
            if coded is None or not isinstance(codec, StreamCodec):
                raise ValueError("a tensor of streams, of which there are none")
            sources = [source_of(other) for other in self.records if isinstance(other.coding, Coded)]
            self._decoder = codec.decoder(self._streams(coded), sources)
        return self._decoder

    def _streams(self, coded: CodedStreams) -> Streams:
        """What all tensors share now, a stream when it is asked for."""
        ends = list(accumulate((coded.shared, *coded.streams), initial=0))

        return Streams(self.coded(0, ends[1]), _Fetched(ends[1:], self.coded))


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


_DECODERS: dict[type[Coding], Callable[[Container, Record, Array | None], Array]] = {
    Plain: Container._plain,  # noqa: SLF001 - the table of this module
    Kept: Container._kept,  # noqa: SLF001
    Coded: Container._coded,  # noqa: SLF001
    Moments: Container._moments,  # noqa: SLF001
    Same: Container._same,  # noqa: SLF001
}
"""How each kind of tensor is decoded, given the base's where it needs that; an alias and a copy are decoded as the
tensor that they name."""


def open_container(path: str | Path, *, limits: Limits | None = None, base: str | Path | Given = ()) -> Container:
    """The container at `path`. Raises ContainerError if it is missing, damaged, or from a newer pqcli.

    A file that claims to hold more than `limits` allow is refused. `base` says where the base may be found, and the
    base's own, of a file that holds differences (`pqcli.container.bases`); it is looked for when a tensor needs it.
    """
    return Container(Path(path), limits, Search.among(base, limits))
