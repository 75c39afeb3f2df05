"""Where each tensor of a checkpoint lies in the model that was loaded from it: told by the values, not by rules.

Libraries rename, stack and merge weights when they load them, each version in its own way. So a name is believed only
where the values agree, and where no name fits the values themselves are looked for: some rows of a parameter, or of
one matrix in a stack, as they are or transposed.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pqcli.stats.renaming import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pqcli.checkpoint import Checkpoint
    from pqcli.tensors.info import TensorInfo

_KEY = 8
"""Values at the beginning of a row that tell where it may lie."""
_MOST_TRIED = 64
"""Places of equal beginning that are looked at: rows of zeros are everywhere."""


def places(
    checkpoint: Checkpoint, model: Any, tell: Callable[[int, str], None] = lambda _n, _name: None
) -> dict[str, Place]:
    """The places of all weights of the checkpoint that the model holds; weights have two dimensions or more.

    `model` is a transformers model on the CPU. Each weight is read once; `tell` hears of its size and its name.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    rows = _Rows(parameters)
    found: dict[str, Place] = {}
    for info in checkpoint.tensors:
        if not is_weight(info):
            continue
        tensor = checkpoint.read(info.name)
        names = (info.name, info.name.removeprefix(prefix), prefix + info.name)
        same = next((name for name in names if name in parameters and _is(parameters[name], tensor)), None)
        place = Place(same) if same is not None else rows.find(tensor)
        if place is not None:
            found[info.name] = place
        tell(info.numel, info.name)
    return found


def is_weight(info: TensorInfo) -> bool:
    """Whether a tensor is one that a layer may multiply with: a floating matrix, a kernel, a stack."""
    return (
        len(info.shape) > 1 and info.numel > 0 and info.dtype.startswith(("float", "bfloat")) and info.role == "model"
    )


def _is(parameter: torch.Tensor, tensor: torch.Tensor) -> bool:
    return parameter.shape == tensor.shape and torch.equal(parameter.detach(), tensor.to(parameter.dtype))


class _Rows:
    """The rows of all parameters by their first values, made when they are first asked for."""

    def __init__(self, parameters: dict[str, torch.Tensor]) -> None:
        self._parameters = parameters
        self._sorted: dict[int, tuple[np.ndarray, np.ndarray]] | None = None
        self._owners: dict[int, list[tuple[int, str, int | None]]] = defaultdict(list)

    def find(self, tensor: torch.Tensor) -> Place | None:
        """Where the tensor lies as rows of a matrix that follow each other."""
        flat = tensor.flatten(1)
        for turned in (False, True):
            place = self._lies(flat.T if turned else flat, turned)
            if place is not None:
                return place
        return None

    def _lies(self, tensor: torch.Tensor, turned: bool) -> Place | None:
        known = self._index().get(tensor.shape[1])
        if known is None:
            return None
        keys, order = known
        for dtype in {parameter.dtype for parameter in self._parameters.values()}:
            matrix = tensor.to(dtype)
            own = _keys(matrix)
            at = int(np.argmax(np.abs(matrix[:, :_KEY].float().numpy()).sum(1)))
            start = int(np.searchsorted(keys, own[at]))
            for row in order[start : start + _MOST_TRIED][keys[start : start + _MOST_TRIED] == own[at]]:
                first, name, index = self._owner(tensor.shape[1], int(row))
                held = _matrix(self._parameters[name], index)
                begin = int(row) - first - at
                if 0 <= begin <= len(held) - len(matrix) and torch.equal(held[begin : begin + len(matrix)], matrix):
                    whole = len(held) == len(matrix)
                    return Place(name, index, None if whole else (begin, begin + len(matrix)), turned)
        return None

    def _owner(self, width: int, row: int) -> tuple[int, str, int | None]:
        owners = self._owners[width]
        return owners[bisect.bisect_right(owners, row, key=lambda owner: owner[0]) - 1]

    def _index(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By width: the keys of all rows in order, and where each row stands among them."""
        if self._sorted is not None:
            return self._sorted
        parts: dict[int, list[np.ndarray]] = defaultdict(list)
        counts: dict[int, int] = defaultdict(int)
        for name, parameter in self._parameters.items():
            for index in _indices(parameter):
                matrix = _matrix(parameter, index)
                width = matrix.shape[1]
                parts[width].append(_keys(matrix))
                self._owners[width].append((counts[width], name, index))
                counts[width] += len(matrix)
        self._sorted = {}
        for width, keys in parts.items():
            together = np.concatenate(keys)
            order = np.argsort(together, kind="stable")
            self._sorted[width] = together[order], order
        return self._sorted


def _indices(parameter: torch.Tensor) -> Iterator[int | None]:
    if parameter.dim() == 3:
        yield from range(len(parameter))
    if parameter.dim() == 2:
        yield None


def _matrix(parameter: torch.Tensor, index: int | None) -> torch.Tensor:
    return parameter.detach() if index is None else parameter.detach()[index]


def _keys(matrix: torch.Tensor) -> np.ndarray:
    """The first values of each row as bytes that can be compared and sorted."""
    head = np.ascontiguousarray(matrix[:, :_KEY].float().numpy() + np.float32(0))  # one zero for both signs
    return head.view(f"S{head.itemsize * head.shape[1]}").ravel()
