"""The bytes of a dense tensor, written to a stream."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, BinaryIO

from pqcli.errors import OutputError

if TYPE_CHECKING:
    import torch

    from pqcli.tensors.info import TensorInfo

_CHUNK = 8 << 20


def write_bytes(file: BinaryIO, tensor: torch.Tensor, info: TensorInfo) -> int:
    """Write the tensor's elements in row-major order, little-endian; returns their CRC-32.

    Raises `OutputError` where the tensor is not what `info` announced: the header is written already.
    """
    import torch

    check_announced(tensor, info)
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    crc = 0
    if dense.numel():
        raw = dense.view(torch.uint8).numpy().data
        for start in range(0, len(raw), _CHUNK):
            part = raw[start : start + _CHUNK]
            file.write(part)
            crc = zlib.crc32(part, crc)
    return crc


def check_announced(tensor: torch.Tensor, info: TensorInfo) -> None:
    """Raise `OutputError` unless the tensor has the shape and the dtype of `info`."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tuple(tensor.shape) != info.shape or dtype != info.dtype:
        raise OutputError(
            f"tensor '{info.name}' was announced as {info.dtype} {list(info.shape)} and came as "
            f"{dtype} {list(tensor.shape)}"
        )
