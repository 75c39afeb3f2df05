"""`Writer`: finished tensors -> file."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from pqcli.atomic import atomic_writer, output_errors, run_check
from pqcli.codecs.base import Piece, Streams
from pqcli.codecs.kept import bundle
from pqcli.container.checksum import CHECKSUM, DAMAGE, ENTROPIES, ERRORS, HASHES, PART_BYTES, SHARDS, Checksum
from pqcli.container.files import FILES, Packed
from pqcli.container.header import MANIFEST, SUFFIX
from pqcli.container.layout import CODED, DAMAGE_FEATURE, KEPT, SHORT_HASH_BYTES, Layout
from pqcli.container.manifest import KEPT_CODED, CodedStreams, Manifest, make_manifest, manifest_bytes
from pqcli.container.naming import Naming
from pqcli.container.shards import Cut, cut, digest, is_piece
from pqcli.core.digests import HASH_BYTES
from pqcli.errors import OutputError
from pqcli.tensors.records import Coded, Record, StoredError

_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class About:
    """What a file says, and holds, beside its tensors: their order, the source, the recipe, its base, small files.

    With `predicts` it tells what each tensor's error does, as statistics predict it.
    """

    order: tuple[str, ...]
    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    naming: Naming | None = None
    files: Packed | None = None
    predicts: bool = False

    def manifest(
        self, records: Sequence[Record], coded: CodedStreams | None = None, features: Iterable[str] = ()
    ) -> Manifest:
        """The manifest of a file with these records; see `make_manifest`."""
        files = self.files.about if self.files else None
        named = [*features, *([DAMAGE_FEATURE] if self.predicts else [])]
        return make_manifest(self.source, self.recipe, records, coded, named, self.naming, files)


@dataclass
class Writer:
    """Takes finished tensors one by one, and makes the file of them at the end. Use as a context manager.

    Payloads are spooled to a nameless temporary file beside the target, because the header, which comes first, is known
    only when all are there. Nothing appears at `target` before `finish`. A `compact` file codes kept tensors without
    loss and has shorter hashes. One of more than `shard_bytes` is cut into several (`pqcli.container.shards`), which
    do not appear together: write them where it does not matter, as into a folder that is put in its place as a whole.
    Where the disk is full, `make_room` is asked for some, and what was to be written is written again if it gave any.
    Raises OutputError where the disk does not take what is written.
    """

    target: Path
    about: About
    force: bool = False
    compact: bool = False
    shard_bytes: int | None = None
    make_room: Callable[[], bool] = lambda: False
    _pieces: dict[str, Piece] = field(default_factory=dict)
    _spooled: dict[str, tuple[int, int]] = field(default_factory=dict)
    _bundle: tuple[int, bytes] = (-1, b"")

    def __post_init__(self) -> None:
        with output_errors(self.target):
            # without a buffer, which would hold on to what a full disk has refused
            self._spool = tempfile.TemporaryFile(dir=self.target.parent, buffering=0)  # noqa: SIM115 - closed by __exit__

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
            piece.record,
            piece.digest,
            bundled=piece.bundled,
            error=piece.error,
            use=piece.use,
            damage=piece.damage,
            stored=piece.stored,
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

    def layout(self, codec: str = "", streams: Streams | None = None, coded: Sequence[Record] = ()) -> Cut:
        """The layout of the file if it were finished with these streams; `coded` are records not added yet."""
        stem = self.target.name.removesuffix(SUFFIX)
        return cut(self._manifest(codec, streams, coded), len(self.bundle), self.shard_bytes, stem)

    def finish(
        self, codec: str = "", streams: Streams | None = None, check: Callable[[Path], None] | None = None
    ) -> tuple[Path, int]:
        """Write the file; returns what to open (it, or the index of several) and its size in bytes.

        `codec` names what made the streams. With a `check`, the file is read again, and must pass it, before it is put
        in place (`pqcli.atomic`). Raises OutputError where it cannot be written.
        """
        if streams is not None:
            self._put(CODED, [streams.shared, *streams.streams])
        found = self.layout(codec, streams)
        pieces = self.pieces
        hash_bytes = SHORT_HASH_BYTES if self.compact else HASH_BYTES
        self._put(KEPT, [self.bundle])
        self._put(HASHES, [self._pieces[piece.record.held_by].digest[:hash_bytes] for piece in pieces])
        self._put(ERRORS, [_error_rows(pieces)])
        self._put(MANIFEST, [manifest_bytes(found.manifest)])
        if self.about.files is not None:
            self._put(FILES, [self.about.files.data])
        if self.about.predicts:
            self._put(DAMAGE, [_damage_rows(pieces)])
        if any(entry.key == ENTROPIES for entry in found.layouts[0].entries):
            self._put(ENTROPIES, [_entropy_densities(pieces)])
        if len(found.layouts) > 1:
            return self._write_shards(found, check), found.n_bytes
        self._write_file(self.target, found.layouts[0], check)
        return self.target, found.n_bytes

    def _write_file(self, path: Path, layout: Layout, check: Callable[[Path], None] | None) -> bytes:
        """Write a file to its place; the hash of its data."""
        try:
            with atomic_writer(path, force=self.force, check=check) as out:
                return self._write(out, layout)
        except OutputError as error:
            if not (_is_full(error.__cause__) and self.make_room()):
                raise
        return self._write_file(path, layout, check)

    def _write_shards(self, found: Cut, check: Callable[[Path], None] | None) -> Path:
        """Write all files and their index: the first one last but for the index, as it tells of the others."""
        self._cut_coded(found)
        paths = [self.target.with_name(name) for name in found.names]
        read_again = None if check is None else _nothing
        told = []
        for path, layout in zip(paths[1:], found.layouts[1:], strict=True):
            told.append(digest([layout.header]) + self._write_file(path, layout, read_again))
        self._put(SHARDS, told)
        self._write_file(paths[0], found.layouts[0], read_again)
        index = self.target.with_name(self.target.name + ".index.json")
        with atomic_writer(index, force=self.force) as out:
            out.write(found.index_text())
        if check is not None:
            run_check(check, index, index)
        return index

    def _cut_coded(self, found: Cut) -> None:
        """Let the parts of `pqcli.coded` begin where they lie in what was spooled."""
        if CODED not in self._spooled:
            return
        start, _ = self._spooled[CODED]
        for entry in (entry for layout in found.layouts for entry in layout.entries if is_piece(entry.key)):
            self._spooled[entry.key] = (start, entry.n_bytes)
            start += entry.n_bytes

    def _write(self, out: BinaryIO, layout: Layout) -> bytes:
        """Write a file; the hash of its data."""
        out.write(layout.header)
        checksum, rest = Checksum(layout.header), hashlib.blake2b(digest_size=PART_BYTES)
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
                rest.update(piece)
                out.write(piece)
        return rest.digest()

    def _manifest(self, codec: str, streams: Streams | None, coded: Sequence[Record] = ()) -> Manifest:
        known = {name: piece.record for name, piece in self._pieces.items()} | {record.name: record for record in coded}
        records = [known[name] for name in self.about.order if name in known]
        features = [KEPT_CODED] if self.compact else []
        about = None
        if streams is not None:
            about = CodedStreams(codec, len(streams.shared), tuple(len(data) for data in streams.streams))
            features += streams.features
        return self.about.manifest(records, about, features)

    def _put(self, key: str, pieces: Iterable[bytes | NDArray[np.uint8]]) -> None:
        with output_errors(self.target):
            start = end = self._spool.seek(0, os.SEEK_END)
            for piece in pieces:
                left = memoryview(piece if isinstance(piece, bytes) else piece.data).cast("B")
                while left:
                    try:
                        written = self._spool.write(left)
                    except OSError as error:
                        if not (_is_full(error) and self.make_room()):
                            raise
                        continue
                    end, left = end + written, left[written:]
            self._spooled[key] = (start, end - start)


def _error_rows(pieces: Sequence[Piece]) -> bytes:
    rows = [_error_row(piece) for piece in pieces if piece.record.quantized]
    with np.errstate(over="ignore"):
        return np.array(rows, "<f4").tobytes()


def _error_row(piece: Piece) -> tuple[float, float, float, float]:
    """The error of a quantized tensor; no number where it was trained since."""
    error = piece.stored if piece.error is None else StoredError.of(piece.error)
    if error is None:
        return (math.nan,) * 4
    return error.rms, error.relative_mse, error.cosine, error.max_abs_error


def _damage_rows(pieces: Sequence[Piece]) -> bytes:
    """What is predicted of every quantized tensor; no number for what is not."""
    told = [piece.damage for piece in pieces if piece.record.quantized]
    rows = [
        (math.nan if d is None else d.output_mse, math.nan if d is None or d.damage is None else d.damage) for d in told
    ]
    import torch  # whose NaN files have held so far

    largest = torch.finfo(torch.bfloat16).max
    numbers = torch.tensor(rows, dtype=torch.float64).clamp(max=largest).to(torch.bfloat16)
    return numbers.view(torch.int16).numpy().astype("<i2").tobytes()


def _entropy_densities(pieces: Sequence[Piece]) -> bytes:
    """Bits by weight of every coded tensor at its order-0 entropy."""
    coded = [
        (piece.use.entropy_bits, piece.record.info.numel)
        for piece in pieces
        if piece.use and isinstance(piece.record.coding, Coded)
    ]
    return np.array([bits / max(numel, 1) for bits, numel in coded], "<f2").tobytes()


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}


def _nothing(_path: Path) -> None:
    """There is nothing to check of one of several files but its bytes."""


def _pieces_of(file: IO[bytes], n_bytes: int) -> Iterator[bytes]:
    """The next `n_bytes` of a file, a bounded piece at a time."""
    while n_bytes:
        piece = file.read(min(n_bytes, _COPY_BYTES))
        if not piece:
            raise OSError(f"{n_bytes} bytes that were spooled are gone")
        yield piece
        n_bytes -= len(piece)
