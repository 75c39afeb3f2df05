"""`Writer`: encoded tensors -> file."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.atomic import atomic_writer, output_errors
from pqcli.codecs.coders import Coded
from pqcli.container.layout import (
    CODED,
    ENTROPIES,
    ERRORS,
    HASHES,
    KEPT,
    KEPT_CODED,
    entropies_entry,
    header,
    make_manifest,
    manifest_bytes,
    shared_entries,
    tensor_entries,
    worth_entropies,
)
from pqcli.container.peek import MANIFEST
from pqcli.container.records import (
    HASH_BYTES,
    SHORT_HASH_BYTES,
    Record,
    StoredError,
    is_bundled,
    tensor_bytes,
    tensor_hash,
)
from pqcli.core import metrics
from pqcli.core.entropy import lossless
from pqcli.core.pq import packing, pq
from pqcli.tensors.info import ITEM_BYTES

_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class _Item:
    """A tensor that was added; `entropy_bits` where it is coded; `bundled`: its bytes if they go to `pqcli.kept`."""

    record: Record
    digest: bytes
    error: StoredError | None = None
    entropy_bits: float | None = None
    bundled: NDArray[np.uint8] | None = None


@dataclass
class Writer:
    """Takes encoded tensors one by one, and makes the file of them at the end. Use as a context manager.

    Payloads are spooled to a nameless temporary file beside the target, because the header, which comes first, is known
    only when all are there. Nothing appears at `target` before `finish`. A `compact` file codes kept tensors without
    loss and has shorter hashes. Raises OutputError where the disk does not take what is written.
    """

    target: Path
    force: bool = False
    compact: bool = False
    _items: dict[str, _Item] = field(default_factory=dict)
    _spooled: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with output_errors(self.target):
            self._spool = tempfile.TemporaryFile(dir=self.target.parent)  # noqa: SIM115 - closed by __exit__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):  # a full disk fails once more, on what is still buffered
            self._spool.close()

    def add_pq(self, record: Record, tensor: pq.PQTensor, decoded_hash: bytes, error: metrics.Error) -> None:
        """A tensor as codebook and assignments."""
        packed = packing.pack(tensor.assignments.numpy(), packing.n_bits(tensor.n_centroids))
        self._put(f"pq/{record.name}/codebook", tensor_bytes(tensor.codebook))
        self._put(f"pq/{record.name}/assignments", packed)
        self._note(record, decoded_hash, error)

    def add_coded(self, record: Record, decoded_hash: bytes, error: metrics.Error, entropy_bits: float) -> None:
        """A tensor whose bytes are among those that `finish` is given."""
        self._note(record, decoded_hash, error, entropy_bits)

    def add_kept(self, record: Record, tensor: torch.Tensor) -> None:
        """A tensor bit for bit."""
        data, digest = tensor_bytes(tensor), tensor_hash(tensor)
        if is_bundled(record):
            self._items[record.name] = _Item(record, digest, bundled=data.copy())
            return
        if self.compact:
            coded = lossless.compress([as_words(data, record.dtype)])
            record = replace(record, coded_bytes=len(coded))
            self._put(f"keep/{record.name}", coded)
        else:
            self._put(f"keep/{record.name}", data)
        self._note(record, digest)

    def add_alias(self, record: Record) -> None:
        """Another name of a tensor that is there already."""
        self._note(record, bytes(HASH_BYTES))

    def records(self, order: Sequence[str]) -> list[Record]:
        """The records of the tensors added so far, in this order of names."""
        return [self._items[name].record for name in order if name in self._items]

    @property
    def kept_bytes(self) -> int:
        """Length of `pqcli.kept` in the finished file."""
        return self._spooled[KEPT][1]

    def bundle(self, order: Sequence[str]) -> bytes:
        """What `pqcli.kept` will hold, with the tensors in this order."""
        bundled = [item for name in order if (item := self._items.get(name)) and item.bundled is not None]
        if not self.compact:
            return b"".join(item.bundled.tobytes() for item in bundled if item.bundled is not None)
        return lossless.compress(
            [as_words(item.bundled, item.record.dtype) for item in bundled if item.bundled is not None]
        )

    def finish(
        self,
        order: Sequence[str],
        source: dict[str, Any],
        recipe: dict[str, Any],
        codec: str | None = None,
        coded: Coded | None = None,
    ) -> int:
        """Write the file with its tensors in this order; returns its size in bytes.

        Raises OutputError where it cannot be written.
        """
        items = [self._items[name] for name in order]
        about: dict[str, Any] = {}
        if coded is not None:
            about = {"codec": codec, "shared": len(coded.shared), "streams": [len(stream) for stream in coded.streams]}
            self._put_all(CODED, [coded.shared, *coded.streams])
        features = [*([KEPT_CODED] if self.compact else []), *(coded.features if coded is not None else ())]
        manifest = make_manifest(source, recipe, [item.record for item in items], about, features)
        hash_bytes = SHORT_HASH_BYTES if self.compact else HASH_BYTES
        self._put(KEPT, self.bundle(order))
        self._put_all(HASHES, [item.digest[:hash_bytes] for item in items])
        errors = [item.error for item in items if item.error is not None]
        with np.errstate(over="ignore"):
            rows = np.array([[e.rms, e.relative_mse, e.cosine, e.max_abs_error] for e in errors], "<f4")
        self._put(ERRORS, rows.tobytes())
        self._put(MANIFEST, manifest_bytes(manifest))
        shared = shared_entries(manifest, self._spooled[KEPT][1], hash_bytes)
        if worth_entropies(manifest):
            shared.append(entropies_entry(manifest))
            coded_items = [item for item in items if item.entropy_bits is not None]
            densities = [(item.entropy_bits or 0.0) / max(item.record.info.numel, 1) for item in coded_items]
            self._put(ENTROPIES, np.array(densities, "<f2").tobytes())
        head, ordered = header(tensor_entries(manifest) + shared, manifest.features)
        with atomic_writer(self.target, force=self.force) as out:
            out.write(head)
            for entry in ordered:
                start, length = self._spooled[entry.key]
                if length != entry.n_bytes:
                    raise ValueError(f"entry {entry.key!r} has {length} bytes where its records say {entry.n_bytes}")
                self._spool.seek(start)
                _copy(self._spool, out, length)
        return len(head) + sum(entry.n_bytes for entry in ordered)

    def _note(
        self, record: Record, digest: bytes, error: metrics.Error | None = None, entropy_bits: float | None = None
    ) -> None:
        self._items[record.name] = _Item(record, digest, StoredError.of(error) if error else None, entropy_bits)

    def _put(self, key: str, data: bytes | NDArray[np.uint8]) -> None:
        self._put_all(key, [data])

    def _put_all(self, key: str, pieces: Iterable[bytes | NDArray[np.uint8]]) -> None:
        with output_errors(self.target):
            start = self._spool.tell()
            for piece in pieces:
                self._spool.write(piece if isinstance(piece, bytes) else piece.data)
            self._spooled[key] = (start, self._spool.tell() - start)


def as_words(data: NDArray[np.uint8], dtype: str) -> NDArray[np.generic]:
    """The bytes of a tensor as unsigned words of its item size, which is all that the lossless coder looks at."""
    size = ITEM_BYTES[dtype]
    return data.view("V16" if size == 16 else f"<u{size}")


def _copy(source: IO[bytes], target: IO[bytes], n_bytes: int) -> None:
    while n_bytes:
        piece = source.read(min(n_bytes, _COPY_BYTES))
        target.write(piece)
        n_bytes -= len(piece)
