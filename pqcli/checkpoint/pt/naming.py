"""What the tensors of a nested checkpoint are called, and which of them are the model's.

A tensor's name is its key path joined by dots. The path starts below the *model root*, so that `{"state_dict": {...},
"epoch": 3}` gives the names the model itself uses; tensors outside the root carry their full path.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pqcli.checkpoint.pt.numpy_objects import NumpyArray
from pqcli.checkpoint.pt.objects import Instance
from pqcli.checkpoint.pt.torch_objects import TensorRef
from pqcli.tensors.moments import is_moment_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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
        if isinstance(top.get(key), dict) and any(True for _ in tensors_in(top[key])):
            return (key,)
    return ()


def is_optimizer(top: Any) -> bool:
    """Whether all of a pickle is the state of one optimizer, as torch's `Optimizer.state_dict` gives it."""
    return isinstance(top, dict) and {"state", "param_groups"} <= top.keys() and isinstance(top["state"], dict)


def name_of(path: Path, root: Path) -> str:
    """The tensor's name, before collisions are resolved."""
    return ".".join(_below(path, root)) or "tensor"


def prefix_of(path: Path, root: Path) -> str:
    """What the names of all tensors directly in the dict at `path` begin with."""
    return "".join(f"{part}." for part in _below(path, root))


def role_of(path: Path, root: Path) -> str:
    """The role: "other" for training state (optimizer moments, generator states), else "model".

    At the top level only tensors that are called as an optimizer's moments are training state, by their whole names.
    """
    if root and path[: len(root)] == root:
        return "model"
    if len(path) == 1 and is_moment_name(path[0]):
        return "other"
    nested = len(path) > 1
    return "other" if path and (nested or "rng" in path[0]) and _TRAINING_STATE.fullmatch(path[0]) else "model"


def tensors_in(value: Any, visit: Callable[[], object] = lambda: None) -> Iterator[TensorRef | NumpyArray]:
    """The tensors and arrays anywhere in a pickle's value, each once; `visit` is called for everything looked at."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        item = waiting.pop()
        visit()
        if id(item) in seen:
            continue
        if isinstance(item, (TensorRef, NumpyArray)):
            seen.add(id(item))
            yield item
        elif isinstance(item, (dict, list, tuple)):
            seen.add(id(item))
            waiting.extend(parts_of(item))


def parts_of(container: Any) -> Iterator[Any]:
    """What a dict (but for its keys), list, tuple or object of a pickle holds."""
    if isinstance(container, Instance):
        return container.parts()
    return iter(container.values() if isinstance(container, dict) else container)


def _below(path: Path, root: Path) -> Path:
    return path[len(root) :] if path[: len(root)] == root else path


def _is_weight(tensor: TensorRef) -> bool:
    return bool(tensor.shape) and not tensor.dtype.startswith(_INTEGER)
