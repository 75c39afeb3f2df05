"""llama.cpp's importance matrices (their GGUF form), read as statistics of which only the diagonal is known.

Such a file holds for each tensor NAME of llama.cpp's `NAME.in_sum2`, sums of squared inputs, and `NAME.counts`, the
tokens behind them (for stacked experts a row and a number each). llama.cpp has one name for what different families of
models call differently; the gguf package knows which. A tensor gets all names that it can have: the first is its name
here, the others are aliases. Experts have their numbers in their names, as checkpoints do.

Left out are the layers that GPT-2 keeps transposed: the matrix in llama.cpp's file is the other way round.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np
import torch

from pqcli.errors import MissingExtraError, StatsError
from pqcli.stats.moments import Statistics
from pqcli.stats.sums import SiteSums, WeightSums

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_MAGIC = b"GGUF"
_LIKED = ("model.layers.", "lm_head")
"""How the names begin that most checkpoints have; they come first."""
_TRANSPOSED = re.compile(r"(^|\.)h\.\d+\.(attn|mlp)\.c_(attn|proj|fc)$")


def is_gguf(path: Path) -> bool:
    """Whether the file begins as a GGUF does."""
    try:
        with path.open("rb") as file:
            return file.read(4) == _MAGIC
    except OSError:
        return False


def open_imatrix(path: Path) -> Statistics:
    """The diagonal statistics of an importance matrix. Raises `StatsError` where the file is none or is damaged."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise MissingExtraError("importance matrices need gguf; pip install 'pqcli[transformers]'") from None
    try:
        reader = GGUFReader(str(path))
        tensors = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors}
    except Exception as error:  # noqa: BLE001 - the reader raises whatever a damaged file makes of it
        raise StatsError(f"{path}: a damaged GGUF file ({error})") from None
    sites: list[SiteSums] = []
    weights: dict[str, WeightSums] = {}
    aliases: dict[str, str] = {}
    known = _names()
    for key in sorted(key for key in tensors if key.endswith(".in_sum2")):
        base = key.removesuffix(".in_sum2")
        for names, squares, counts in _matrices(path, key, tensors[key], tensors.get(f"{base}.counts"), known):
            fresh = [name for name in names if name not in weights and name not in aliases]
            if fresh:
                sites.append(_site(squares, counts))
                weights[fresh[0]] = WeightSums(site=len(sites) - 1)
                aliases |= dict.fromkeys(fresh[1:], fresh[0])
    if not weights:
        raise StatsError(f"{path}: no importance matrix whose names are known (NAME.in_sum2 and NAME.counts)")
    return Statistics(weights, aliases, len(sites), sites.__getitem__)


def _matrices(
    path: Path,
    key: str,
    squares: np.ndarray,
    counts: np.ndarray | None,
    known: Mapping[str, Sequence[str]],
) -> Iterator[tuple[list[str], np.ndarray, np.ndarray]]:
    """Names, sums of squares (c,) and counts of the matrices in a tensor of llama.cpp's: one, or one an expert."""
    if counts is None or not squares.size or not counts.size or squares.ndim > 2:
        raise StatsError(f"{path}: '{key}' has no counts beside it, or is empty; the file is damaged")
    if not (np.isfinite(squares).all() and np.isfinite(counts).all() and squares.min() >= 0 and counts.min() >= 0):
        raise StatsError(f"{path}: '{key}' holds values that are negative or not finite; the file is damaged")
    rows, counts = squares.reshape(-1, squares.shape[-1]), counts.ravel()
    names = _checkpoint_names(key.removesuffix(".in_sum2"), known)
    if len(rows) == 1:
        yield [f"{name}.weight" for name in names], rows[0], counts
        return
    if len(counts) not in (1, len(rows)):
        raise StatsError(f"{path}: '{key}' has {len(rows)} matrices and {len(counts)} counts; the file is damaged")
    for e, row in enumerate(rows):
        numbered = [name.replace(".experts.", f".experts.{e}.") for name in names if ".experts." in name]
        yield [f"{name}.weight" for name in numbered], row, counts if len(counts) == 1 else counts[e : e + 1]


def _site(squares: np.ndarray, counts: np.ndarray) -> SiteSums:
    columns = len(squares)
    nothing = torch.zeros(columns, dtype=torch.float64)
    diagonal = torch.stack([torch.from_numpy(squares.copy()), nothing])
    return SiteSums(columns, "diagonal", columns, None, diagonal, None, None, [float(counts.sum()), 0.0])


def _names() -> dict[str, list[str]]:
    """By llama.cpp's name, with `{bid}` for the number of the layer: what checkpoints call it."""
    from gguf.constants import TENSOR_NAMES
    from gguf.tensor_mapping import TensorNameMap

    found: dict[str, list[str]] = {}
    for mapping in (TensorNameMap.mappings_cfg, TensorNameMap.block_mappings_cfg):
        for tensor, names in mapping.items():
            liked = sorted(dict.fromkeys(names), key=lambda name: not name.startswith(_LIKED))
            found.setdefault(TENSOR_NAMES[tensor], []).extend(liked)
    return found


def _checkpoint_names(name: str, known: Mapping[str, Sequence[str]]) -> list[str]:
    """What checkpoints may call a tensor of llama.cpp's, without `.weight`."""
    base = name.removesuffix(".weight")
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", base)
    layer = "" if match is None else str(int(match[1]))
    pattern = base if match is None else f"blk.{{bid}}.{match[2]}"
    names = [each.replace("{bid}", layer) for each in known.get(pattern, ())]
    return [each for each in names if not _TRANSPOSED.search(each)]
