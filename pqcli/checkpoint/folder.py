"""Hugging Face folders: one weights file, or shards with an index that says which tensor is in which.

The index is a JSON text, `{"metadata": {...}, "weight_map": {tensor name: shard file}}`. Its shard names come from a
stranger: only bare file names inside the folder are accepted, on reading and on writing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pqcli.checkpoint import formats
from pqcli.checkpoint.bytesource import reading
from pqcli.checkpoint.sniff import HEAD_BYTES
from pqcli.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")
_INDEX_ENDINGS = (".safetensors.index.json", ".bin.index.json")
_MAX_INDEX = 256 << 20
_SHOWN = 5


@dataclass(frozen=True)
class FolderFiles:
    """Which files of a folder hold the weights, in order, and which are something else."""

    shards: tuple[str, ...]
    index: Index | None
    side_files: tuple[str, ...]


@dataclass(frozen=True)
class Index:
    """A shard index: its own file name, its `metadata`, and the shard of every tensor."""

    name: str
    metadata: Any
    weight_map: dict[str, str]


def find_weights(folder: Path) -> FolderFiles:
    """The weight files of a folder: an index, else the usual single names, else the only checkpoint there is."""
    with reading(folder):
        names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_file())
    index_name = _index_name(names)
    if index_name is not None:
        index = _read_index(folder, index_name)
        shards = tuple(sorted(set(index.weight_map.values())))
        missing = [shard for shard in shards if shard not in names]
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
            raise CheckpointError(
                f"'{folder}' lacks {len(missing)} of the {len(shards)} shards that {index_name} lists ({shown}); "
                "the download did not finish"
            )
    else:
        index = None
        shards = (_single(folder, names),)
    side_files = tuple(name for name in names if name not in shards and name != index_name)
    return FolderFiles(shards, index, side_files)


def bare_name(name: object) -> bool:
    """Whether `name` is a plain file name, which cannot lead out of its folder."""
    return (
        isinstance(name, str)
        and 0 < len(name) <= 255
        and name not in {".", ".."}
        and not any(char in "/\\:" or ord(char) < 32 for char in name)
    )


def check_index(folder: Path, index: Index, found: dict[str, tuple[str, ...]]) -> None:
    """Raise `CheckpointError` unless every tensor of the index is in its shard; `found` is names by shard."""
    for shard, names in found.items():
        present = set(names)
        missing = [name for name, place in index.weight_map.items() if place == shard and name not in present]
        if missing:
            shown = ", ".join(ascii(name) for name in missing[:_SHOWN])
            raise CheckpointError(
                f"'{folder / shard}' lacks {len(missing)} tensors that {index.name} places there ({shown}); "
                "index and shards do not belong together"
            )


def _index_name(names: list[str]) -> str | None:
    for name in INDEX_NAMES:
        if name in names:
            return name
    others = [name for name in names if name.endswith(_INDEX_ENDINGS)]
    return others[0] if len(others) == 1 else None


def _single(folder: Path, names: list[str]) -> str:
    for name in SINGLE_NAMES:
        if name in names:
            return name
    found = [name for name in names if _is_checkpoint(folder / name)]
    if len(found) == 1:
        return found[0]
    if found:
        shown = ", ".join(found[:_SHOWN]) + (" ..." if len(found) > _SHOWN else "")
        raise CheckpointError(
            f"'{folder}' holds {len(found)} checkpoints and no index ({shown}); name one of the files"
        )
    raise CheckpointError(
        f"'{folder}' is a folder without weights: no model.safetensors, no pytorch_model.bin, no index, "
        "and no other checkpoint file in it"
    )


def _is_checkpoint(path: Path) -> bool:
    with reading(path), path.open("rb") as file:
        found = formats.recognised(file.read(HEAD_BYTES), path.stat().st_size)
    return found is not None and not path.name.endswith(".json")


def _read_index(folder: Path, name: str) -> Index:
    path = folder / name
    with reading(path):
        if path.stat().st_size > _MAX_INDEX:
            raise CheckpointError(f"'{path}' has {path.stat().st_size:,} bytes; that is no shard index")
        text = path.read_bytes()
    try:
        index = json.loads(text)
        weight_map = index["weight_map"]
        places = list(weight_map.items())
        metadata = index.get("metadata")
        json.dumps(index, ensure_ascii=False).encode("utf-8")  # lone surrogates, which no other file can hold
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' is no shard index ({type(error).__name__}: {str(error)[:100]})") from error
    if not places:
        raise CheckpointError(f"'{path}' lists no tensors; that is no shard index")
    for tensor, shard in places:
        if not bare_name(shard):
            raise CheckpointError(
                f"'{path}' places tensor {ascii(tensor)[:100]} in {ascii(shard)[:100]}, which is not a bare file name; "
                "refused"
            )
    return Index(name, metadata, weight_map)


def is_weights_name(name: str) -> bool:
    """Whether a loader could take a file of this name for (a part of) the model's weights."""
    return name.endswith((*formats.all_suffixes(), *_INDEX_ENDINGS))
