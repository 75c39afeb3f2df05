"""What the tensors of a nested checkpoint are called, and which of them are the model's.

A tensor's name is its key path joined by dots. The path starts below the *model root*, so that `{"state_dict": {...},
"epoch": 3}` gives the names the model itself uses; tensors outside the root carry their full path.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pqcli.checkpoint.pt.torch_objects import TensorRef

if TYPE_CHECKING:
    from collections.abc import Iterable

Path = tuple[str, ...]

ROOT_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "params", "weights")
"""Where training scripts keep the model's state dict, in the order in which they are tried."""

_TRAINING_STATE = re.compile(
    r".*optim.*|(lr_?)?sched(uler)?.*|lr_scheduler.*|(grad_)?scaler.*|amp(_.*)?|loops|callbacks|.*rng.*", re.IGNORECASE
)
_INTEGER = ("uint", "int", "bool")


def find_root(top: Any) -> Path:
    """The path of the model's state dict: `()` for the top level, or one of `ROOT_KEYS`.

    The top level is the root when it holds weights itself: a tensor of at least one dimension that is not integer.
    (The `best_acc1` scalar and the `rng_state` bytes beside a `state_dict` do not make it one.)
    """
    if not isinstance(top, dict):
        return ()
    if any(isinstance(value, TensorRef) and _is_weight(value) for value in top.values()):
        return ()
    for key in ROOT_KEYS:
        if isinstance(top.get(key), dict) and _holds_tensors(top[key]):
            return (key,)
    return ()


def name_of(path: Path, root: Path) -> str:
    """The tensor's name, before collisions are resolved."""
    return ".".join(_below(path, root)) or "tensor"


def prefix_of(path: Path, root: Path) -> str:
    """What the names of all tensors directly in the dict at `path` begin with."""
    return "".join(f"{part}." for part in _below(path, root))


def role_of(path: Path, root: Path) -> str:
    """The role: "other" for training state (optimizer moments, generator states), else "model"."""
    if root and path[: len(root)] == root:
        return "model"
    nested = len(path) > 1
    return "other" if path and (nested or "rng" in path[0]) and _TRAINING_STATE.fullmatch(path[0]) else "model"


def unique_name(name: str, taken: Iterable[str]) -> str:
    """`name`, or `name~2`, `name~3` ... where it is taken; the same in every run."""
    number, candidate = 2, name
    while candidate in taken:
        candidate, number = f"{name}~{number}", number + 1
    return candidate


def _below(path: Path, root: Path) -> Path:
    return path[len(root) :] if path[: len(root)] == root else path


def _is_weight(tensor: TensorRef) -> bool:
    return bool(tensor.shape) and not tensor.dtype.startswith(_INTEGER)


def _holds_tensors(value: Any) -> bool:
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, TensorRef):
            return True
        if isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return False
