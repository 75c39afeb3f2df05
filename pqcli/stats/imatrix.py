"""llama.cpp's importance matrices (their GGUF form), read as statistics of which only the diagonal is known.

Such a file holds for each tensor NAME of llama.cpp's `NAME.in_sum2`, sums of squared inputs, and `NAME.counts`, the
tokens behind them (one pair for each expert where there are several; experts are pooled). Names are mapped to those of
Hugging Face's Llama and its kin; tensors that have no counterpart there are left out.
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
    from pathlib import Path

_MAGIC = b"GGUF"
_BLOCK = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_qkv": "self_attn.qkv_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_OUTSIDE = {"output.weight": "lm_head.weight"}


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
        raise MissingExtraError('importance matrices need gguf; pip install "pqcli[transformers]"') from None
    try:
        reader = GGUFReader(str(path))
        tensors = {tensor.name: np.array(tensor.data, dtype=np.float64) for tensor in reader.tensors}
    except Exception as error:  # noqa: BLE001 - the reader raises whatever a damaged file makes of it
        raise StatsError(f"{path}: a damaged GGUF file ({error})") from None
    sites: list[SiteSums] = []
    weights: dict[str, WeightSums] = {}
    for key in sorted(tensors):
        name = _mapped(key.removesuffix(".in_sum2")) if key.endswith(".in_sum2") else None
        if name is not None:
            sites.append(_site(path, key, tensors[key], tensors.get(key.removesuffix(".in_sum2") + ".counts")))
            weights[name] = WeightSums(site=len(sites) - 1)
    if not weights:
        raise StatsError(f"{path}: no importance matrix whose names are known (NAME.in_sum2 and NAME.counts)")
    return Statistics(weights, {}, len(sites), sites.__getitem__)


def _site(path: Path, key: str, squares: np.ndarray, counts: np.ndarray | None) -> SiteSums:
    if counts is None or not squares.size or not counts.size or squares.ndim > 2:
        raise StatsError(f"{path}: '{key}' has no counts beside it, or is empty; the file is damaged")
    if not (np.isfinite(squares).all() and np.isfinite(counts).all() and squares.min() >= 0 and counts.min() >= 0):
        raise StatsError(f"{path}: '{key}' holds values that are negative or not finite; the file is damaged")
    columns = squares.shape[-1]
    pooled = torch.from_numpy(squares.reshape(-1, columns).sum(0))
    nothing = torch.zeros(columns, dtype=torch.float64)
    n = float(counts.sum())
    return SiteSums(columns, "diagonal", columns, None, torch.stack([pooled, nothing]), None, None, [n, 0.0])


def _mapped(name: str) -> str | None:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in _BLOCK:
        return None
    return f"model.layers.{int(match[1])}.{_BLOCK[match[2]]}.weight"
