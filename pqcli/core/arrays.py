"""The edge between numpy and torch: one tensor in one memory, seen from either side.

What is read and decoded are numpy arrays (`pqcli.core.dtypes` says of which dtype), so that nobody needs torch for it;
torch is imported when a tensor is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from pqcli.core.dtypes import Array, dtype_of, name_of

if TYPE_CHECKING:
    import torch

_WORDS: Final = {1: "uint8", 2: "int16", 4: "int32"}
"""By their item size, the integers through which dtypes pass that only one of the two has."""


def as_tensor(array: Array) -> torch.Tensor:
    """The array as a tensor on the CPU, of the same memory; one that must not be written to is copied."""
    import torch

    if not array.flags.writeable:
        array = array.copy()
    if array.dtype.isbuiltin == 1:  # numpy's own, which torch knows
        return torch.from_numpy(array)
    words = torch.from_numpy(array.view(_WORDS[array.itemsize]))
    return words.view(getattr(torch, name_of(array.dtype)))


def as_array(tensor: torch.Tensor | Array) -> Array:
    """The elements of a dense tensor, row by row; of the same memory where they lie so on the CPU."""
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(tensor.shape)  # the former makes a scalar a row
    import torch

    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    dtype = dtype_of(str(dense.dtype).removeprefix("torch."))
    if dtype.isbuiltin != 1:
        found: Array = dense.view(getattr(torch, _WORDS[dtype.itemsize])).numpy().view(dtype)
        return found
    return dense.numpy()
