"""Zeros stay zeros: which elements of a quantized tensor are exactly zero, held beside it and restored after decoding.

A row of zeros is a padding index or a pruned unit, zeros everywhere are a pruned tensor; no codec gives them back as
zeros by itself. What is held is one bit a row, or one bit an element, packed with the lowest bit first and coded
without loss; a first byte tells which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.core.entropy import lossless

if TYPE_CHECKING:
    from pqcli.tensors.records import Record

FEATURE: Final = "zeros"
LEAST_SHARE: Final = 1 / 32
"""So many of the elements must be zero to be told one by one; what training leaves by chance is far less."""
_ROWS, _ELEMENTS = range(2)


def key(name: str) -> str:
    """The entry of a tensor's zeros in the file."""
    return f"zero/{name}"


def held(record: Record, weight: torch.Tensor) -> bytes | None:
    """What is held of a tensor's zeros; None where it has none, or a few by chance.

    Rows and columns of zeros always are, other zeros where they are a share of `LEAST_SHARE`.
    """
    rows, columns = record.matrix_shape
    matrix = weight.reshape(rows, columns)
    n_zeros = matrix.numel() - int(matrix.count_nonzero())
    if not n_zeros:
        return None
    mask = (matrix == 0).numpy()
    in_rows = np.asarray(mask.all(axis=1))
    if n_zeros >= LEAST_SHARE * mask.size and n_zeros > int(in_rows.sum()) * columns:
        return _coded(_ELEMENTS, mask)
    in_columns = mask[~in_rows].all(axis=0) if not in_rows.all() else np.zeros(columns, bool)
    if in_columns.any():
        return _coded(_ELEMENTS, mask)
    return _coded(_ROWS, in_rows) if in_rows.any() else None


def restored(tensor: torch.Tensor, record: Record, data: bytes) -> torch.Tensor:
    """The tensor with its zeros, in place. Raises ValueError for bytes that `held` did not give."""
    rows, columns = record.matrix_shape
    kind = data[0] if data else -1
    if kind not in (_ROWS, _ELEMENTS):
        raise ValueError(f"zeros of kind {kind}")
    n = rows if kind == _ROWS else rows * columns
    (packed,) = lossless.decompress(data[1:], [(1, -(-n // 8))])
    mask = torch.from_numpy(np.unpackbits(packed, count=n, bitorder="little").view(bool))
    matrix = tensor.view(rows, columns)
    if kind == _ROWS:
        matrix[mask] = 0
    else:
        matrix[mask.view(rows, columns)] = 0
    return tensor


def _coded(kind: int, mask: NDArray[np.bool_]) -> bytes:
    return bytes([kind]) + lossless.compress([np.packbits(mask, bitorder="little")])
