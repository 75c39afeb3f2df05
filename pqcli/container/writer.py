"""`Writer`: finished tensors -> file."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from pqcli.atomic import atomic_writer, output_errors
from pqcli.codecs.base import Piece, Streams
from pqcli.codecs.kept import bundle
from pqcli.container.checksum import CHECKSUM, ENTROPIES, ERRORS, HASHES, Checksum
from pqcli.container.header import MANIFEST
from pqcli.container.layout import CODED, KEPT, SHORT_HASH_BYTES, Layout, lay_out
from pqcli.container.manifest import KEPT_CODED, CodedStreams, Manifest, make_manifest, manifest_bytes
from pqcli.container.naming import Naming
from pqcli.core.digests import HASH_BYTES
from pqcli.tensors.records import Coded, Record, StoredError

_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class About:
    """What a file says beside its tensors: their order, the source, the recipe, and what is known of its base."""

    order: tuple[str, ...]
    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    naming: Naming | None = None


@dataclass
class Writer:
    """Takes finished tensors one by one, and makes the file of them at the end. Use as a context manager.

    Payloads are spooled to a nameless temporary file beside the target, because the header, which comes first, is known
    only when all are there. Nothing appears at `target` before `finish`. A `compact` file codes kept tensors without
    loss and has shorter hashes. Raises OutputError where the disk does not take what is written.
    """

    target: Path
    about: About
    force: bool = False
    compact: bool = False
    _pieces: dict[str, Piece] = field(default_factory=dict)
    _spooled: dict[str, tuple[int, int]] = field(default_factory=dict)
    _bundle: tuple[int, bytes] = (-1, b"")

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

    def add(self, piece: Piece) -> None:
        """One finished tensor; its entries leave memory."""
        for key, data in piece.entries:
            self._put(key, [data])
        self._pieces[piece.record.name] = Piece(
            piece.record, piece.digest, bundled=piece.bundled, error=piece.error, use=piece.use
        )

    @property
    def pieces(self) -> list[Piece]:
        """The tensors added so far, in the file's order, without what has left memory."""
        return [self._pieces[name] for name in self.about.order if name in self._pieces]

    @property
    def records(self) -> list[Record]:
        """Their records."""
        return [piece.record for piece in self.pieces]

    @property
    def bundle(self) -> bytes:
        """What `pqcli.kept` holds of the tensors added so far; coded anew only where one has come since."""
        bundled = [piece for piece in self.pieces if piece.bundled is not None]
        if self._bundle[0] != len(bundled):
            self._bundle = len(bundled), bundle(bundled, is_compact=self.compact)
        return self._bundle[1]

    def layout(self, codec: str = "", streams: Streams | None = None, coded: Sequence[Record] = ()) -> Layout:
        """The layout of the file if it were finished with these streams; `coded` are records not added yet."""
        return lay_out(self._manifest(codec, streams, coded), len(self.bundle))

    def finish(
        self, codec: str = "", streams: Streams | None = None, check: Callable[[Path], None] | None = None
    ) -> int:
        """Write the file; returns its size in bytes. `codec` names what made the streams.

        With a `check`, the file is read again, and must pass it, before it is put in place (`pqcli.atomic`). Raises
        OutputError where it cannot be written.
        """
        if streams is not None:
            self._put(CODED, [streams.shared, *streams.streams])
        manifest = self._manifest(codec, streams)
        layout = lay_out(manifest, len(self.bundle))
        pieces = self.pieces
        hash_bytes = SHORT_HASH_BYTES if self.compact else HASH_BYTES
        self._put(KEPT, [self.bundle])
        self._put(HASHES, [self._pieces[piece.record.held_by].digest[:hash_bytes] for piece in pieces])
        self._put(ERRORS, [_error_rows(pieces)])
        self._put(MANIFEST, [manifest_bytes(manifest)])
        if any(entry.key == ENTROPIES for entry in layout.entries):
            self._put(ENTROPIES, [_entropy_densities(pieces)])
        with atomic_writer(self.target, force=self.force, check=check) as out:
            out.write(layout.header)
            checksum = Checksum(layout.header)
            for entry in layout.entries:
                if entry.key == CHECKSUM:  # the last one
                    out.write(checksum.digest())
                    continue
                start, length = self._spooled[entry.key]
                if length != entry.n_bytes:
                    raise ValueError(f"entry {entry.key!r} has {length} bytes where its records say {entry.n_bytes}")
                self._spool.seek(start)
                for piece in _pieces_of(self._spool, length):
                    checksum.add(entry.key, piece)
                    out.write(piece)
        return layout.n_bytes

    def _manifest(self, codec: str, streams: Streams | None, coded: Sequence[Record] = ()) -> Manifest:
        known = {name: piece.record for name, piece in self._pieces.items()} | {record.name: record for record in coded}
        records = [known[name] for name in self.about.order if name in known]
        features = [KEPT_CODED] if self.compact else []
        about = None
        if streams is not None:
            about = CodedStreams(codec, len(streams.shared), tuple(len(data) for data in streams.streams))
            features += streams.features
        return make_manifest(self.about.source, self.about.recipe, records, about, features, self.about.naming)

    def _put(self, key: str, pieces: Iterable[bytes | NDArray[np.uint8]]) -> None:
        with output_errors(self.target):
            start = self._spool.tell()
            for piece in pieces:
                self._spool.write(piece if isinstance(piece, bytes) else piece.data)
            self._spooled[key] = (start, self._spool.tell() - start)


def _error_rows(pieces: Sequence[Piece]) -> bytes:
    errors = [StoredError.of(piece.error) for piece in pieces if piece.error is not None]
    with np.errstate(over="ignore"):
        return np.array([[e.rms, e.relative_mse, e.cosine, e.max_abs_error] for e in errors], "<f4").tobytes()


def _entropy_densities(pieces: Sequence[Piece]) -> bytes:
    """Bits by weight of every coded tensor at its order-0 entropy."""
    coded = [
        (piece.use.entropy_bits, piece.record.info.numel)
        for piece in pieces
        if piece.use and isinstance(piece.record.coding, Coded)
    ]
    return np.array([bits / max(numel, 1) for bits, numel in coded], "<f2").tobytes()


def _pieces_of(file: IO[bytes], n_bytes: int) -> Iterator[bytes]:
    """The next `n_bytes` of a file, a bounded piece at a time."""
    while n_bytes:
        piece = file.read(min(n_bytes, _COPY_BYTES))
        if not piece:
            raise OSError(f"{n_bytes} bytes that were spooled are gone")
        yield piece
        n_bytes -= len(piece)
