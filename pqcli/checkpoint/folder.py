"""Hugging Face folders: one weights file, or shards with an index that says which tensor is in which.

The index is a JSON text, `{"metadata": {...}, "weight_map": {tensor name: shard file}}`. Its shard names come from a
stranger: only bare file names inside the folder are accepted, on reading and on writing.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pqcli.checkpoint import formats
from pqcli.checkpoint.bytesource import reading
from pqcli.checkpoint.limits import Budget, Limits
from pqcli.checkpoint.sniff import HEAD_BYTES, sniff
from pqcli.errors import CheckpointError

INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_NAMES = (
    "model.safetensors",
    "pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
)
"""What weights in one file are called: by transformers, PEFT, diffusers."""

_TRAINING_FILE = re.compile(
    r"training_args\.bin|(optimizer|scheduler|scaler|rng_state|random_states|trainer_state)(_\d+)*\.(pt|pth|bin|pkl|json)"
)
"""What a trainer leaves beside the weights in the format of weights."""
_OPTIMIZER_FILE = re.compile(r"optimizer(_\d+)*\.(pt|pth|bin)")

_EXPORT = "export the weights with its own library first (for instance with transformers' save_pretrained)"
_OTHER_WEIGHTS = {
    ".gguf": f"a GGUF model; {_EXPORT}",
    ".ggml": f"a GGML model; {_EXPORT}",
    ".h5": "Keras weights; load them with from_tf=True in transformers and save them as .safetensors",
    ".hdf5": "Keras weights; load them with Keras and save them as .safetensors",
    ".keras": "a Keras model; load it with Keras and save its weights as .safetensors",
    ".msgpack": "Flax weights; load them with from_flax=True in transformers and save them as .safetensors",
    ".onnx": f"an ONNX model; {_EXPORT}",
    ".npz": "a numpy archive; save its arrays as a dict of tensors with torch.save or safetensors first",
    ".nemo": "a NeMo archive, which is a tar; unpack it first",
    ".tflite": f"a TensorFlow Lite model; {_EXPORT}",
    ".distcp": "a part of a torch distributed checkpoint",
    "saved_model.pb": "a TensorFlow SavedModel; load it with TensorFlow and save its weights as .safetensors",
}
"""Endings of weights that pqcli does not read, and what to do. Where one is, a lone other file may not be meant."""

_KNOWN_FOLDERS = (
    (
        re.compile(r"zero_to_fp32\.py|(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_(optim|model)_states\.pt"),
        "a DeepSpeed checkpoint, whose weights are in parts; {script} out joins them",
    ),
    (
        re.compile(r"mp_rank_\d+_model_states\.pt|layer_\d+-model_\d+-model_states\.pt"),
        "a DeepSpeed or Megatron checkpoint; name one of its files, or convert it to a Hugging Face folder first",
    ),
    (
        re.compile(r"(model|optim|optimizer)_world_size_\d+_rank_\d+\.pt"),
        "an FSDP checkpoint, one file per process; load it with FSDP and save a StateDictType.FULL_STATE_DICT",
    ),
)
"""Folders of training frameworks, told by a file in them."""

_INDEX_ENDINGS = (".safetensors.index.json", ".bin.index.json")
_SHOWN = 5
_MAX_SUBFOLDERS = 200
_MAX_FILES = 20_000


@dataclass(frozen=True)
class FolderFiles:
    """Which files of a folder hold the weights, in order, and which are something else, with their sizes."""

    shards: tuple[str, ...]
    index: Index | None
    side_sizes: dict[str, int]


@dataclass(frozen=True)
class Index:
    """A shard index: its own file name, its `metadata`, and the shard of every tensor."""

    name: str
    metadata: Any
    weight_map: dict[str, str]


def names_in(folder: Path) -> list[str]:
    """The files of a folder, hidden ones left out, in order."""
    with reading(folder):
        return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_file())


def find_weights(folder: Path, names: list[str], limits: Limits) -> FolderFiles:
    """The weight files of a folder: an index, else the usual single names, else the only checkpoint there is.

    `names` are those of `names_in`. Raises `CheckpointError` where it is not clear which files are meant.
    """
    found = index_name(names)
    if found is not None:
        index = _read_index(folder, found, limits)
        shards = tuple(sorted(set(index.weight_map.values())))
        missing = [shard for shard in shards if shard not in names]
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + (" ..." if len(missing) > _SHOWN else "")
            raise CheckpointError(
                f"'{folder}' lacks {len(missing)} of the {len(shards)} shards that {found} lists ({shown}); "
                "the download did not finish"
            )
    else:
        index = None
        shards = (_single(folder, names),)
    carried = {*shards, found}
    sizes = {name: n_bytes for name, n_bytes in sizes_in(folder).items() if name not in carried}
    return FolderFiles(shards, index, sizes)


def sizes_in(folder: Path) -> dict[str, int]:
    """The sizes of the files of a folder and of its folders, by their paths in it.

    Hidden ones are left out, and folders are not followed through links.
    """
    sizes: dict[str, int] = {}
    with reading(folder):
        for place, folders, files in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                path = Path(place, name)
                if not name.startswith(".") and path.is_file():
                    sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
            if len(sizes) > _MAX_FILES:
                raise CheckpointError(
                    f"'{folder}' and its folders hold more than {_MAX_FILES:,} files, too many to be a checkpoint; "
                    "name the weights themselves"
                )
    return dict(sorted(sizes.items(), key=lambda item: ("/" in item[0], item[0])))


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


def single_name(names: list[str]) -> str | None:
    """The name of weights in one file that libraries know, among the names of files."""
    return next((name for name in SINGLE_NAMES if name in names), None)


def is_of_training(name: str) -> bool:
    """Whether a trainer calls what it leaves beside the weights so."""
    return _TRAINING_FILE.fullmatch(name) is not None


def is_of_training_framework(names: list[str]) -> bool:
    """Whether files of these names are a checkpoint in parts, which only the tools of its framework join."""
    return any(pattern.fullmatch(name) for pattern, _ in _KNOWN_FOLDERS for name in names)


def index_name(names: list[str]) -> str | None:
    """The name of the index among the names of files; None where there is none, or one of several unknown ones.

    Safetensors come before torch.save, even where they are a single file.
    """
    safetensors, bins = ([name for name in names if name.endswith(ending)] for ending in _INDEX_ENDINGS)
    found = safetensors
    if not safetensors and not (single_name(names) or "").endswith(".safetensors"):
        found = bins
    known = next((name for name in INDEX_NAMES if name in found), None)
    return known or (found[0] if len(found) == 1 else None)


def _single(folder: Path, names: list[str]) -> str:
    known = single_name(names)
    if known is not None:
        return known
    explain_folder(folder, names)
    others = [name for name in names if name.lower().endswith(tuple(_OTHER_WEIGHTS))]
    found = [name for name in names if name not in others and not is_of_training(name) and is_checkpoint(folder / name)]
    if len(found) > 1:
        shown = ", ".join(found[:_SHOWN]) + (" ..." if len(found) > _SHOWN else "")
        raise CheckpointError(
            f"'{folder}' holds {len(found)} checkpoints and no index ({shown}); name one of the files"
        )
    if found and others:
        raise CheckpointError(
            f"'{folder}' holds {found[0]} and {others[0]}, which pqcli does not read; name {found[0]} itself if that "
            "is what you mean"
        )
    if found:
        return found[0]
    _explain_subfolders(folder)
    if others:
        what = next(what for ending, what in _OTHER_WEIGHTS.items() if others[0].lower().endswith(ending))
        raise CheckpointError(f"'{folder}' holds no weights that pqcli reads; its {others[0]} is {what}")
    for name in names:
        if name.endswith(formats.all_suffixes()):
            sniff(folder / name)  # which says what it is instead: a pointer to the weights, a web page
    raise CheckpointError(
        f"'{folder}' is a folder without weights: no model.safetensors, no pytorch_model.bin, no index, "
        "and no other checkpoint file in it"
    )


def explain_folder(folder: Path, names: list[str]) -> None:
    """Raise, saying what the folder is and how its weights are made one file, where a known tool wrote it."""
    for pattern, message in _KNOWN_FOLDERS:
        found = next((name for name in names if pattern.fullmatch(name)), None)
        if found is not None:
            raise CheckpointError(f"'{folder}' is {message.format(script=_joining(folder))} (it holds {found})")


def _joining(folder: Path) -> str:
    """How the parts of a DeepSpeed checkpoint are joined: by the script that it left, there or in the folder above."""
    for place in (folder, folder.absolute().parent):
        if (place / "zero_to_fp32.py").is_file():
            return f"python {place}/zero_to_fp32.py {place}"
    return f"python -m deepspeed.utils.zero_to_fp32 {folder.absolute().parent}"


def _explain_subfolders(folder: Path) -> None:
    """Raise, naming them, where the weights lie in folders of the folder."""
    with reading(folder):
        below = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        holding = [name for name in below[:_MAX_SUBFOLDERS] if _holds_weights(folder / name)]
    if not holding:
        return
    what = "a diffusers pipeline" if (folder / "model_index.json").is_file() else "a folder without weights of its own"
    shown = ", ".join(f"{name}/" for name in holding[:_SHOWN]) + (" ..." if len(holding) > _SHOWN else "")
    raise CheckpointError(
        f"'{folder}' is {what}; its weights lie in {shown}: name one of these folders, such as '{folder / holding[0]}'"
    )


def _holds_weights(folder: Path) -> bool:
    names = names_in(folder)
    if index_name(names) is not None or any(name.endswith(".distcp") for name in names):
        return True
    return any(not is_of_training(name) and is_checkpoint(folder / name) for name in names)


def is_of_optimizer(name: str) -> bool:
    """Whether a file is called as trainers call the state of an optimizer."""
    return _OPTIMIZER_FILE.fullmatch(name) is not None


def is_checkpoint(path: Path) -> bool:
    """Whether a file begins as one of the formats of weights."""
    with reading(path), path.open("rb") as file:
        found = formats.recognised(file.read(HEAD_BYTES), path.stat().st_size)
    return found is not None and not path.name.endswith(".json")


def _read_index(folder: Path, name: str, limits: Limits) -> Index:
    path = folder / name
    with reading(path):
        n_bytes = path.stat().st_size
    budget = Budget(limits)
    try:
        budget.length(n_bytes, "it")
        with reading(path):
            text = path.read_bytes()
        index = budget.json(text)
        weight_map = index["weight_map"]
        places = list(weight_map.items())
        metadata = index.get("metadata")
        json.dumps(index, ensure_ascii=False).encode("utf-8")  # lone surrogates, which no other file can hold
    except CheckpointError as error:
        raise CheckpointError(f"'{path}': {error}") from error
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
