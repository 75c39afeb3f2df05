"""The bytes of a dense tensor, written to a stream."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, BinaryIO

from pqcli.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from pqcli.core.dtypes import Array
    from pqcli.tensors.info import TensorInfo

    Read = Callable[[str], Array | torch.Tensor]
    """What gives a tensor by its name, numpy's or torch's."""

_CHUNK = 8 << 20


def write_bytes(file: BinaryIO, tensor: Array | torch.Tensor, info: TensorInfo) -> int:
    """Write the tensor's elements in row-major order, little-endian; returns their CRC-32.

    Raises `OutputError` where the tensor is not what `info` announced: the header is written already.
    """
    raw = as_announced(tensor, info).reshape(-1).view("uint8").data
    crc = 0
    for start in range(0, len(raw), _CHUNK):
        part = raw[start : start + _CHUNK]
        file.write(part)
        crc = zlib.crc32(part, crc)
    return crc


def as_announced(tensor: Array | torch.Tensor, info: TensorInfo) -> Array:
    """The tensor as an array. Raises `OutputError` unless it has the shape and the dtype of `info`."""
    from pqcli.core.arrays import as_array  # with numpy, which headers do without
    from pqcli.core.dtypes import name_of

    array = as_array(tensor)
    if array.shape != info.shape or name_of(array.dtype) != info.dtype:
        raise OutputError(
            f"tensor '{info.name}' was announced as {info.dtype} {list(info.shape)} and came as "
            f"{name_of(array.dtype)} {list(array.shape)}"
        )
    return array
