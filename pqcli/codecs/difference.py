"""Differences to a base: what is coded of a fine-tune whose base is at hand, and how the two become the tensor again.

    quantized   W - B in float32 is coded; decoded, the sum with B in float32 becomes the tensor's dtype
    kept        the bytes of W xor those of B, which lossless coding makes few of; xor B again, bit for bit
    as the base nothing: B in the tensor's dtype is the tensor, bit for bit

B is what the base has under the same name, in the same shape: a checkpoint's tensor, or what a container decodes to. An
error is one of the sum, so that coding the difference to a base that has lost something corrects the loss as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.codecs.base import Readable, Weights, dense
from pqcli.core.digests import tensor_bytes
from pqcli.core.pq import pq
from pqcli.tensors.info import ITEM_BYTES

if TYPE_CHECKING:
    from pqcli.tensors.records import Record

FEATURE: Final = "base"
FLOATING: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
"""Dtypes between which a base's tensor may be converted."""


@dataclass(frozen=True)
class Differences(Weights):
    """Weights of which some, `names`, are coded as differences to the `of_base` of the same name.

    `shared` are the names of all tensors that the base has too, in the same shape.
    """

    of_base: Readable
    names: frozenset[str]
    shared: frozenset[str]

    def coded(self, name: str) -> torch.Tensor:
        """The difference, float32, or the tensor."""
        tensor = self.checkpoint.read(name)
        return subtracted(tensor, self.of_base.read(name)) if name in self.names else tensor

    def coded_rows(self, name: str, start: int, stop: int, columns: int) -> torch.Tensor:
        """Rows of it."""
        rows = self.checkpoint.read_flat(name, start * columns, stop * columns)
        if name in self.names:
            rows = subtracted(rows, self.of_base.read_flat(name, start * columns, stop * columns))
        return rows.view(-1, columns)

    def base(self, name: str) -> torch.Tensor | None:
        """The base's tensor, where it has it in this shape."""
        return self.of_base.read(name) if name in self.shared else None

    def restored(self, record: Record, decoded: torch.Tensor) -> torch.Tensor:
        """The sum, or what was decoded."""
        return restored(record, decoded, self.of_base.read(record.name) if record.difference else None)


def subtracted(tensor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The difference of two tensors of one shape, float32."""
    return tensor.float() - base.float()


def restored(record: Record, decoded: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """A quantized tensor of what was decoded (float32), and of the base's if that was the difference to it."""
    return dense(decoded if base is None else decoded.reshape(base.shape).float() + base.float(), record)


def as_base(record: Record, base: torch.Tensor) -> torch.Tensor:
    """The base's tensor in the record's dtype. Raises ValueError for dtypes between which nothing is converted."""
    dtype = getattr(torch, record.info.dtype)
    if base.dtype == dtype:
        return base
    if not {record.info.dtype, str(base.dtype).removeprefix("torch.")} <= FLOATING:
        raise ValueError(f"{record.info.dtype} where the base has {str(base.dtype).removeprefix('torch.')}")
    return pq.saturated(base, dtype)


def xor(data: NDArray[np.uint8], base: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a kept tensor xor those of the base's: both ways. Raises ValueError for another number of bytes."""
    other = tensor_bytes(base)
    if len(other) != len(data):
        raise ValueError(f"{len(data):,} bytes where the base has {len(other):,}")
    return np.bitwise_xor(data, other)


def may_be_difference(dtype: str, base_dtype: str) -> bool:
    """Whether tensors of this dtype can be quantized as differences to those of the other."""
    return {dtype, base_dtype} <= FLOATING


def may_be_xor(dtype: str, base_dtype: str) -> bool:
    """Whether kept tensors of this dtype can be told from those of the other."""
    return ITEM_BYTES[dtype] == ITEM_BYTES[base_dtype]
