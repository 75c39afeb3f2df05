"""Shards: one container in several files, where one would be too large for what has to carry it.

The entries are spread over files, and all that belongs to a tensor lies in one of them. The first holds the manifest
and all else that says what the container is, with the checksums of the others; an index, as Hugging Face folders have
it, says which entry lies in which file. Streams that tensors share are cut between streams.

    cut            manifest -> layouts, one a file
    open_any       a file, or an index -> entries
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from pqcli.checkpoint.folder import bare_name
from pqcli.codecs import zeros
from pqcli.container.checksum import CHECKSUM, HEAD, PART_BYTES, SHARDS
from pqcli.container.entries import Entries, open_entries
from pqcli.container.files import FILES
from pqcli.container.header import INDEX_SUFFIX, MANIFEST, OTHER_SHARD, SUFFIX, Header, Place, open_file
from pqcli.container.layout import CODED, KEPT, Entry, Layout, entries_to_write, laid_out, lay_out, own_entries
from pqcli.container.layout import SHARDS_FEATURE as FEATURE
from pqcli.container.limits import parse_json
from pqcli.container.manifest import MOST_SHARDS, Manifest
from pqcli.errors import ContainerError, DamagedError
from pqcli.limits import Limits

IN_FIRST: Final = HEAD | {CHECKSUM, KEPT, FILES}
"""The entries that lie in the first file."""
_ENTRY_BYTES: Final = 120
"""What one entry takes in a header, beside its name, at most."""


@dataclass(frozen=True)
class Cut:
    """The files of a container: their layouts, and the manifest that tells of them. `stem` is the name before all."""

    manifest: Manifest
    layouts: tuple[Layout, ...]
    stem: str = ""

    @property
    def n_bytes(self) -> int:
        """Size of all files, the index among them."""
        return sum(layout.n_bytes for layout in self.layouts) + len(self.index_text())

    @property
    def names(self) -> list[str]:
        """The names of the files."""
        n = len(self.layouts)
        return [f"{self.stem}-{i:05}-of-{n:05}{SUFFIX}" for i in range(1, n + 1)]

    def index_text(self) -> bytes:
        """The index; nothing where there is one file."""
        if len(self.layouts) == 1:
            return b""
        places = {
            entry.key: name for name, layout in zip(self.names, self.layouts, strict=True) for entry in layout.entries
        }
        total = sum(layout.n_bytes for layout in self.layouts)
        return (json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=1) + "\n").encode()


def cut(manifest: Manifest, bundle_bytes: int | None, most: int | None, stem: str) -> Cut:
    """The files of a container, none larger than `most` bytes where that can be; one, where it is None."""
    whole = lay_out(manifest, bundle_bytes)
    if most is None or whole.n_bytes <= most:
        return Cut(manifest, (whole,), stem)
    n = 2
    while True:  # the first file holds a checksum for each of the others, and so their number counts
        numbered = replace(manifest, features=tuple(sorted({*manifest.features, FEATURE})), shards=n)
        files = _spread(numbered, bundle_bytes, most)
        if len(files) <= n:
            break
        n = len(files)
    if n > MOST_SHARDS or len(files) == 1:
        return Cut(manifest, (whole,), stem)
    while len(files) < n:
        files.append([])
    first, *others = files
    layouts = [laid_out(first, numbered.features), *(laid_out(entries, [OTHER_SHARD]) for entries in others)]
    return Cut(numbered, tuple(layouts), stem)


def _spread(manifest: Manifest, bundle_bytes: int | None, most: int) -> list[list[Entry]]:
    """The entries of every file: what says what the container is in the first one, then unit after unit."""
    every = entries_to_write(manifest, bundle_bytes)
    files = [[entry for entry in every if entry.key in IN_FIRST]]
    left = most - sum(_cost(entry) for entry in files[0])
    n_pieces = 0
    for unit in _units(manifest):
        cost = sum(map(_cost, unit))
        if cost > left and files[-1]:
            files.append([])
            left = most - _ENTRY_BYTES
        left -= cost
        for entry in unit:
            if entry.key != CODED:
                files[-1].append(entry)
                continue
            last = files[-1][-1] if files[-1] else None
            if last is not None and is_piece(last.key):
                files[-1][-1] = Entry(last.key, "uint8", (last.n_bytes + entry.n_bytes,))
            else:
                n_pieces += 1
                files[-1].append(Entry(piece_key(n_pieces), "uint8", entry.shape))
    return files


def _units(manifest: Manifest) -> Iterator[list[Entry]]:
    """What lies in one file: the entries of one tensor, or one stream (the first with what all of them share)."""
    for record in manifest.tensors:
        unit = own_entries(record, manifest.features)
        if record.zero_bytes is not None:
            unit.append(Entry(zeros.key(record.name), "uint8", (record.zero_bytes,)))
        if unit:
            yield unit
    if manifest.coded is not None:
        shared = manifest.coded.shared
        for n_bytes in manifest.coded.streams or (0,):
            yield [Entry(CODED, "uint8", (shared + n_bytes,))]
            shared = 0


def _cost(entry: Entry) -> int:
    return entry.n_bytes + len(json.dumps(entry.key, ensure_ascii=False).encode()) + _ENTRY_BYTES


def piece_key(number: int) -> str:
    """The entry of a part of `pqcli.coded`; the first one has its name."""
    return CODED if number == 1 else f"{CODED}/{number}"


def is_piece(key: str) -> bool:
    """Whether an entry is (a part of) `pqcli.coded`."""
    return key == CODED or key.startswith(f"{CODED}/")


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Shards(Entries):
    """The entries of several files as those of one; `header` has them all, and is else that of the first."""

    first: Entries
    others: Sequence[Entries]
    where: dict[str, Entries]
    index_bytes: int

    @property
    def n_bytes(self) -> int:
        """Size of all files, the index among them."""
        return sum(one.n_bytes for one in (self.first, *self.others)) + self.index_bytes

    @property
    def largest_file_bytes(self) -> int:
        """Size of the largest of the files."""
        return max(one.n_bytes for one in (self.first, *self.others))

    @property
    def n_files(self) -> int:
        """How many files these are entries of."""
        return 1 + len(self.others)

    def read(self, key: str, start: int = 0, stop: int | None = None) -> bytearray:
        """The bytes of an entry, from `start` to `stop`, wherever they lie."""
        place = self.place(key)
        if key != CODED:
            return self.where[key].read(key, start, stop)
        stop = place.n_bytes if stop is None else stop
        data, begin, number = bytearray(), 0, 1
        while piece_key(number) in self.where:
            piece = piece_key(number)
            end = begin + self.where[piece].place(piece).n_bytes
            if start < end and stop > begin:
                data += self.where[piece].read(piece, max(start - begin, 0), min(stop, end) - begin)
            begin, number = end, number + 1
        if len(data) != stop - start:
            raise self.damaged(f"bytes {start:,} to {stop:,} of entry {key!r} are wanted, and it has {begin:,}")
        return data

    def check_others(self) -> None:
        """Raise ValueError unless the headers of the other files are those that the first one tells of."""
        for other, row in zip(self.others, self._told(), strict=True):
            if digest([other.header.raw]) != row[:PART_BYTES]:
                raise ValueError(f"{other.path.name} is a file of another container, or damaged (checksum)")

    def checksum_of_head(self) -> bytes:
        """That of the first file, which tells of the others."""
        return self.first.checksum_of_head()

    def checksum_of_rest(self, but: str) -> bytes:
        """That of the first file, where all others have theirs; else one that no file has."""
        for other, row in zip(self.others, self._told(), strict=True):
            if digest(piece for key in other.header.entries for piece in other.pieces(key)) != row[PART_BYTES:]:
                return b""
        return self.first.checksum_of_rest(but)

    def close(self) -> None:
        """Close all files."""
        for one in (self.first, *self.others):
            one.close()

    def _told(self) -> list[bytes]:
        rows = bytes(self.first.read(SHARDS))
        size = 2 * PART_BYTES
        if len(rows) != size * len(self.others):
            raise ValueError(f"{self.n_files} files, where it tells of {len(rows) // size + 1}")
        return [rows[i : i + size] for i in range(0, len(rows), size)]


def joined(first: Entries, others: Sequence[Entries], index_bytes: int) -> Shards:
    """The entries of all files. Raises DamagedError where an entry is in two, or one of the first is in another."""
    where: dict[str, Entries] = {}
    places: dict[str, Place] = {}
    for one in (first, *others):
        for key, place in one.header.entries.items():
            if key in where or (one is not first and key in IN_FIRST):
                raise one.damaged(f"entry {key!r} is in a file where it cannot be, or in two")
            where[key] = one
            if not is_piece(key):
                places[key] = place
    pieces = [key for key in where if is_piece(key)]
    if {*pieces} != {piece_key(number) for number in range(1, len(pieces) + 1)}:
        raise first.damaged(f"the parts of {CODED!r} are {', '.join(sorted(pieces))[:100]}")
    if pieces:
        total = sum(where[key].place(key).n_bytes for key in pieces)
        places[CODED] = Place("uint8", (total,), 0, total)
    header = Header(first.header.raw, first.header.metadata, places)
    return Shards(first.path, header, first.file, first=first, others=others, where=where, index_bytes=index_bytes)


def open_any(path: Path, limits: Limits) -> Entries:
    """The entries of the file at `path`, or of the files of the index at `path`. Raises ContainerError."""
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path, limits)
    found = open_entries(path, limits)
    if FEATURE in found.header.metadata.get("features", "").split(","):
        found.close()
        raise ContainerError(
            f"{path}: the first of several files of one container; name its index, which ends in {INDEX_SUFFIX}, or "
            "the folder"
        )
    return found


def _open_shards(path: Path, limits: Limits) -> Shards:
    places, index_bytes = read_index(path, limits)
    with ExitStack() as stack:
        opened: list[Entries] = []
        for name in sorted(set(places.values())):
            opened.append(open_entries(path.with_name(name), limits, is_shard=True))
            stack.callback(opened[-1].close)
        firsts = [one for one in opened if MANIFEST in one]
        if len(firsts) != 1:
            raise DamagedError(f"{path}: {len(firsts)} of its files have a manifest; the files are damaged")
        _check_index(path, places, opened)
        found = joined(firsts[0], [one for one in opened if one is not firsts[0]], index_bytes)
        stack.pop_all()
    return found


def read_index(path: Path, limits: Limits) -> tuple[dict[str, str], int]:
    """Which entry lies in which file, and the size of the index. Raises ContainerError where it cannot be one."""
    with open_file(path) as file:
        text = file.read(limits.json_bytes + 1)
    try:
        places = _places(parse_json(text, limits.json_bytes))
    except ValueError as error:
        raise DamagedError(f"{path}: no index of a container: {error}; refused") from None
    names = sorted(set(places.values()))
    missing = [name for name in names if not path.with_name(name).is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise ContainerError(
            f"{path}: {len(missing)} of the {len(names)} files of this container are not there ({shown}); the download "
            "did not finish"
        )
    return places, len(text)


def _places(found: object) -> dict[str, str]:
    places = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(places, dict) or not places:
        raise ValueError("it has no weight_map")
    for key, name in places.items():
        if not isinstance(name, str) or not bare_name(name) or not name.endswith(SUFFIX):
            raise ValueError(f"it places {key!r:.100} in {name!r:.100}, which is no {SUFFIX} file beside it")
    return places


def _check_index(path: Path, places: dict[str, str], files: Sequence[Entries]) -> None:
    found = {key: one.path.name for one in files for key in one.header.entries}
    if found != places or sum(len(one.header.entries) for one in files) != len(found):
        wrong = next((key for key in {*found, *places} if found.get(key) != places.get(key)), "an entry twice")
        raise DamagedError(f"{path}: index and files do not belong together ({wrong!r:.100}); the files are damaged")


def digest(pieces: Iterable[bytes | bytearray]) -> bytes:
    """A part of the checksum that the first file has of another one."""
    found = hashlib.blake2b(digest_size=PART_BYTES)
    for piece in pieces:
        found.update(piece)
    return found.digest()
