"""The components of a folder: which of its files hold weights, wherever they lie, and what becomes of the others.

A folder of transformers has one component, at its top. One of sentence-transformers may have more (`2_Dense`), one of
diffusers has them in its sub-folders alone (`unet`, `vae`, ...). All else is carried as it is, but for what would come
twice: the same model in another format, which libraries and authors leave beside the weights that pqcli reads.

The rule for those is by name, so that nothing is taken for a copy that may be something else:

- beside the weights, what has a name by which libraries know the same weights in another format, precision or naming:
  `pytorch_model.bin` beside `model.safetensors`, `tf_model.h5`, `flax_model.msgpack`, `model.fp16.safetensors`,
  `consolidated.00.pth`, their shards and indices; and any `.gguf`;
- in a sub-folder called after a format (`onnx`, `openvino`, `coreml`, `original`, ...): what ends like weights.

Of safetensors and torch.save, safetensors are taken.
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pqcli.checkpoint.dcp import is_distributed
from pqcli.checkpoint.folder import (
    INDEX_NAMES,
    find_weights,
    index_name,
    is_checkpoint,
    is_of_optimizer,
    is_of_training,
    is_of_training_framework,
    single_name,
)
from pqcli.checkpoint.walking import walk
from pqcli.errors import CheckpointError
from pqcli.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

COPY = "the same model in another format"
"""Why a file is not carried that holds what another one holds already."""
_OURS = (".pq.safetensors", ".pq.safetensors.index.json")
"""What pqcli itself writes."""

_FAMILY = {
    "model": "model",
    "pytorch_model": "model",
    "tf_model": "model",
    "flax_model": "model",
    "rust_model": "model",
    "openvino_model": "model",
    "consolidated": "model",
    "diffusion_pytorch_model": "diffusion",
    "diffusion_flax_model": "diffusion",
    "adapter_model": "adapter",
}
"""What libraries call weights, and which of the names mean the same weights."""
_VARIANT = r"fp32|fp16|bf16|fp8|int8|uint8|int4|q4|q4f16|bnb4|quantized|O[1-4]|qint8[a-z0-9_]*"
_SHARD = r"-\d+-of-\d+|\.\d+"
_KNOWN_NAME = re.compile(
    rf"(?P<name>{'|'.join(sorted(_FAMILY, key=len, reverse=True))})"
    rf"(?:[._-](?:{_VARIANT}))?(?:{_SHARD})?(?:[._-](?:{_VARIANT}))?"
    r"\.(?:safetensors|bin|pth|pt|ckpt|h5|hdf5|keras|msgpack|ot|onnx|onnx_data|tflite|mlmodel|xml)"
    rf"(?:\.index(?:\.(?:{_VARIANT}))?\.json)?"
)
_QUANTIZED_ELSEWHERE = (".gguf", ".ggml")
_FORMAT_FOLDERS = {"onnx", "openvino", "coreml", "tflite", "tf", "flax", "original"}
_WEIGHT_ENDINGS = (
    ".safetensors", ".bin", ".xml", ".pth", ".pt", ".onnx", ".onnx_data", ".onnx.data", ".tflite", ".mlmodel", ".h5",
    ".msgpack", ".ot", ".pb",
)  # fmt: skip


@dataclass(frozen=True)
class Component:
    """Weights that belong together: the files `weights` (an index first) in the sub-folder `place` ("" for the top).

    `stem` is what the weights are called without endings; `is_main` whether libraries load them from there.
    """

    place: str
    stem: str
    weights: tuple[str, ...]
    is_main: bool


@dataclass(frozen=True)
class Components:
    """A folder, taken apart. Paths are in it, with `/` between.

    `side` are the files that are carried as they are, with their sizes; `folders` and `links` as `walking.Walk` has
    them; `left_out` what is not carried, with the reason.
    """

    components: tuple[Component, ...]
    side: dict[str, int] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    links: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> list[str]:
        """All files that are carried, weights or not."""
        weights = [posixpath.join(one.place, name) for one in self.components for name in one.weights]
        return [*weights, *self.side]

    @property
    def side_bytes(self) -> int:
        """What the files that are carried as they are have together."""
        return sum(self.side.values())


def components_of(folder: Path, *, limits: Limits | None = None, with_copies: bool = False) -> Components:
    """The folder, taken apart. With `with_copies`, the same model in other formats is carried as well.

    Raises `CheckpointError` where there are no weights, or where it is not clear which are meant.
    """
    found = walk(folder)
    places: dict[str, list[str]] = {"": []}
    ours = {path: "compressed by pqcli already" for path in found.files if path.endswith(_OURS)}
    for path in found.files:
        if path in ours:
            continue
        place, name = posixpath.split(path)
        if not name.startswith(".") and not any(part.startswith(".") for part in place.split("/")):
            places.setdefault(place, []).append(name)
    components: list[Component] = []
    copies: set[str] = set()
    for place, names in places.items():
        if not _is_called_after_a_format(place):
            here, copied = _in_place(folder, place, names, limits or Limits())
            components += here
            copies |= {posixpath.join(place, name) for name in copied}
    if not components and ours:
        raise CheckpointError(
            f"'{folder}' is compressed already; `pqcli decode` gives back the folder that it was made from"
        )
    if not components:
        try:
            find_weights(folder, places[""], limits or Limits())
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_told(found.refused)}") from error
        raise CheckpointError(f"'{folder}' is a folder without weights of its own")
    for place, names in places.items():
        if _is_called_after_a_format(place):
            copies |= {posixpath.join(place, name) for name in names if name.endswith(_WEIGHT_ENDINGS)}
    taken = {posixpath.join(one.place, name) for one in components for name in one.weights}
    left_out = {**found.refused, **ours, **({} if with_copies else dict.fromkeys(sorted(copies), COPY))}
    side = {path: n_bytes for path, n_bytes in found.files.items() if path not in taken and path not in left_out}
    return Components(tuple(components), side, found.folders, found.links, left_out)


def with_optimizers(folder: Path, parts: Components, stems: Collection[str] | None = None) -> Components:
    """The folder, whose optimizers, as trainers save them, are components too; with `stems`, those of these paths."""
    found = []
    for path in parts.side:
        place, name = posixpath.split(path)
        is_meant = stems is None or posixpath.join(place, Path(name).stem) in stems
        if is_meant and is_of_optimizer(name) and is_checkpoint(folder / path):
            found.append(Component(place, Path(name).stem, (name,), is_main=False))
    taken = {posixpath.join(one.place, *one.weights) for one in found}
    side = {path: n_bytes for path, n_bytes in parts.side.items() if path not in taken}
    return replace(parts, components=(*parts.components, *found), side=side)


def _in_place(folder: Path, place: str, names: list[str], limits: Limits) -> tuple[list[Component], list[str]]:
    """The components of one sub-folder, the main one first, and the names of what holds the same once more."""
    if place and (is_distributed(names) or is_of_training_framework(names)):
        return [], []  # in parts, which only their own tools put together
    main = _main(folder / place, names, limits)
    others = [name for name in names if name not in main]
    copies = [name for name in others if main and _is_copy(name, main)]
    components = [Component(place, _stem(main[0]), main, is_main=True)] if main else []
    components += [
        Component(place, Path(name).stem, (name,), is_main=False)
        for name in others
        if name not in copies and not is_of_training(name) and is_checkpoint(folder / place / name)
    ]
    often = Counter(one.stem for one in components)
    return [
        replace(one, stem=one.weights[0]) if often[one.stem] > 1 and not one.is_main else one for one in components
    ], copies


def _main(folder: Path, names: list[str], limits: Limits) -> tuple[str, ...]:
    """The weights that libraries load from this folder: an index and its shards, or one file; none where it has none.

    Where several checkpoints lie side by side, none of them is the main one.
    """
    index = index_name(names)
    if index is None and single_name(names) is None:
        candidates = [name for name in names if not is_of_training(name) and is_checkpoint(folder / name)]
        if len(candidates) != 1:
            return ()
    files = find_weights(folder, names, limits)
    return (*([files.index.name] if files.index else []), *files.shards)


def _is_copy(name: str, main: Sequence[str]) -> bool:
    """Whether a file beside the main weights is known to hold the same once more."""
    if name.endswith(_QUANTIZED_ELSEWHERE):
        return True
    known = _KNOWN_NAME.fullmatch(name)
    family = {_FAMILY[found["name"]] for found in map(_KNOWN_NAME.fullmatch, main) if found}
    return known is not None and _FAMILY[known["name"]] in family


def _is_called_after_a_format(place: str) -> bool:
    return place.rpartition("/")[2] in _FORMAT_FOLDERS


def _stem(name: str) -> str:
    """`model` of `model.safetensors.index.json`; torch.save's `pytorch_model` is what safetensors call `model`."""
    stem = name.removesuffix(".index.json") if name in INDEX_NAMES or name.endswith(".index.json") else name
    stem = Path(stem).stem
    return "model" if stem == "pytorch_model" else stem


def _told(refused: dict[str, str]) -> str:
    if not refused:
        return ""
    path, why = next(iter(refused.items()))
    more = f" and {len(refused) - 1} more" if len(refused) > 1 else ""
    return f"; not followed: {path} ({why}){more}; name the file itself, or put a copy into the folder"
