"""Zeros stay zeros: which elements of a quantized tensor are exactly zero, held beside it and restored after decoding.

A row of zeros is a padding index or a pruned unit, zeros everywhere are a pruned tensor; no codec gives them back as
zeros by itself. What is held is one bit a row where all zeros are in rows of zeros, else one bit an element, packed
with the lowest bit first and coded without loss; a first byte tells which. Coded, a few zeros by chance take a few
bytes each, and one in thirty-two, the most that is not obviously pruning, takes 0.2 bit a weight: little enough that
there is no threshold below which a zero would become a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from pqcli.core.entropy import lossless

if TYPE_CHECKING:
    import torch

    from pqcli.core.dtypes import Array
    from pqcli.tensors.records import Record

FEATURE: Final = "zeros"
_ROWS, _ELEMENTS = range(2)


def key(name: str) -> str:
    """The entry of a tensor's zeros in the file."""
    return f"zero/{name}"


def held(record: Record, weight: torch.Tensor) -> bytes | None:
    """What is held of a tensor's zeros; None where it has none."""
    rows, columns = record.matrix_shape
    matrix = weight.reshape(rows, columns)
    n_zeros = matrix.numel() - int(matrix.count_nonzero())
    if not n_zeros:
        return None
    mask = (matrix == 0).numpy()
    in_rows = np.asarray(mask.all(axis=1))
    return _coded(_ROWS, in_rows) if n_zeros == int(in_rows.sum()) * columns else _coded(_ELEMENTS, mask)


def held_by_bits(packed: NDArray[np.uint8], n_zeros: int, record: Record) -> bytes:
    """The same of a tensor of which `packed` has a bit an element, set for each of its `n_zeros` zeros."""
    rows, columns = record.matrix_shape
    n_rows = np.fromiter((_is_set(packed, row * columns, (row + 1) * columns) for row in range(rows)), bool, rows)
    if n_zeros == int(n_rows.sum()) * columns:
        return _coded(_ROWS, n_rows)
    return bytes([_ELEMENTS]) + lossless.compress([packed])


def restored(tensor: Array, record: Record, data: bytes) -> Array:
    """The tensor with its zeros, in place. Raises ValueError for bytes that `held` did not give."""
    tensor.reshape(record.matrix_shape)[mask(record, data)] = 0
    return tensor


def mask(record: Record, data: bytes) -> NDArray[np.bool_]:
    """What is set to zero: (rows,) where that is whole rows, else (rows, columns).

    Raises ValueError for bytes that `held` did not give.
    """
    rows, columns = record.matrix_shape
    kind = data[0] if data else -1
    if kind not in (_ROWS, _ELEMENTS):
        raise ValueError(f"zeros of kind {kind}")
    n = rows if kind == _ROWS else rows * columns
    (packed,) = lossless.decompress(data[1:], [(1, -(-n // 8))])
    found = np.unpackbits(packed, count=n, bitorder="little").view(bool)
    return found if kind == _ROWS else found.reshape(rows, columns)


def _is_set(packed: NDArray[np.uint8], start: int, stop: int) -> bool:
    """Whether all bits [start, stop) are set."""
    first = start // 8
    bits = np.unpackbits(packed[first : -(-stop // 8)], bitorder="little")
    return bool(bits[start - 8 * first : stop - 8 * first].all())


def _coded(kind: int, mask: NDArray[np.bool_]) -> bytes:
    return bytes([kind]) + lossless.compress([np.packbits(mask, bitorder="little")])
