"""Differences to a base: what is coded of a fine-tune whose base is at hand, and how the two become the tensor again.

    quantized   W - B in float32 is coded; decoded, the sum with B in float32 becomes the tensor's dtype
    kept        W - B in integers, numbering all floats in order, which lossless coding makes few bytes of: bit for bit
    as the base nothing: B in the tensor's dtype is the tensor, bit for bit

B is what the base has under the same name, in the same shape: a checkpoint's tensor, or what a container decodes to. An
error is one of the sum, so that coding the difference to a base that has lost something corrects the loss as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from pqcli.codecs.base import Readable, Weights, dense
from pqcli.core.arrays import as_array
from pqcli.core.digests import tensor_bytes
from pqcli.core.dtypes import converted, name_of, saturated
from pqcli.tensors.info import ITEM_BYTES

if TYPE_CHECKING:
    import torch

    from pqcli.core.dtypes import Array
    from pqcli.tensors.records import Record

FEATURE: Final = "base"
FLOATING: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
"""Dtypes between which a base's tensor may be converted."""
_LARGEST_ITEM: Final = 16
"""Items of so many bytes, which are no words that numpy can add, are told by what they differ by bit for bit."""


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

    def restored(self, record: Record, decoded: Array) -> Array:
        """The sum, or what was decoded."""
        return restored(record, decoded, as_array(self.of_base.read(record.name)) if record.difference else None)


def subtracted(tensor: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """The difference of two tensors of one shape, float32."""
    return tensor.float() - base.float()


def restored(record: Record, decoded: Array, base: Array | None) -> Array:
    """A quantized tensor of what was decoded (float32), and of the base's if that was the difference to it."""
    if base is None:
        return dense(decoded, record)
    with np.errstate(all="ignore"):
        return dense(decoded.reshape(base.shape) + converted(base, "float32"), record)


def as_base(dtype: str, base: Array) -> Array:
    """The base's tensor in a record's dtype. Raises ValueError for dtypes between which nothing is converted."""
    own = name_of(base.dtype)
    if own == dtype:
        return base
    if not {dtype, own} <= FLOATING:
        raise ValueError(f"{dtype} where the base has {own}")
    return saturated(base, dtype)


def exact_difference(data: NDArray[np.uint8], base: Array | torch.Tensor, dtype: str) -> NDArray[np.uint8]:
    """What the bytes of a kept tensor of that dtype differ by from the base's: small words where the two are near.

    Raises ValueError for another number of bytes.
    """
    words, other = _words(data, dtype), _words(_bytes_like(data, base), dtype)
    if words.itemsize == _LARGEST_ITEM:
        return np.bitwise_xor(data, _bytes_like(data, base))
    difference = _in_order(words, dtype) - _in_order(other, dtype)
    is_negative = difference >> (8 * words.itemsize - 1) != 0
    folded = difference << 1
    found: NDArray[np.uint8] = np.where(is_negative, ~folded, folded).view(np.uint8)
    return found


def exact_sum(difference: NDArray[np.uint8], base: Array | torch.Tensor, dtype: str) -> NDArray[np.uint8]:
    """The bytes of the tensor; the inverse of `exact_difference`."""
    folded, other = _words(difference, dtype), _words(_bytes_like(difference, base), dtype)
    if folded.itemsize == _LARGEST_ITEM:
        return np.bitwise_xor(difference, _bytes_like(difference, base))
    half = folded >> 1
    words = np.where(folded & 1 != 0, ~half, half) + _in_order(other, dtype)
    found: NDArray[np.uint8] = _out_of_order(words, dtype).view(np.uint8)
    return found


def _bytes_like(data: NDArray[np.uint8], base: Array | torch.Tensor) -> NDArray[np.uint8]:
    other = tensor_bytes(base)
    if len(other) != len(data):
        raise ValueError(f"{len(data):,} bytes where the base has {len(other):,}")
    return other


def _words(data: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    size = ITEM_BYTES[dtype]
    return data.view("V16" if size == _LARGEST_ITEM else f"<u{size}")


def _in_order(words: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Words in the order of the numbers that they stand for: floats have a sign and a magnitude."""
    if dtype not in FLOATING:
        return words
    top = words.dtype.type(1 << (8 * words.itemsize - 1))
    return np.where(words & top != 0, ~words, words | top)


def _out_of_order(words: NDArray[Any], dtype: str) -> NDArray[Any]:
    if dtype not in FLOATING:
        return words
    top = words.dtype.type(1 << (8 * words.itemsize - 1))
    return np.where(words & top != 0, words & ~top, ~words)


def may_be_difference(dtype: str, base_dtype: str) -> bool:
    """Whether tensors of this dtype can be quantized as differences to those of the other."""
    return {dtype, base_dtype} <= FLOATING


def may_be_exact(dtype: str, base_dtype: str) -> bool:
    """Whether kept tensors of this dtype can be told from those of the other."""
    return ITEM_BYTES[dtype] == ITEM_BYTES[base_dtype]
