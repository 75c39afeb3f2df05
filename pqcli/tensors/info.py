"""`TensorInfo`: what a header tells about one tensor, before a single weight is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint64": 8, "uint32": 4, "uint16": 2, "uint8": 1, "bool": 1,
    "complex64": 8, "complex128": 16, "complex32": 4,
}  # fmt: skip
"""Bytes per element by torch dtype name (without the `torch.` prefix)."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, known from headers alone.

    `name` is unique in the checkpoint. `dtype` is torch's name without the prefix ("float32"). `alias_of` names the
    earlier tensor that this one shares its memory with (same storage, offset, shape and strides), or is None.
    `role` is "model" for a model's parameters and buffers, "other" for what belongs to the training run (optimizer
    moments and the like) and is therefore never quantized unless a rule asks for it by name. `overlaps` names a group
    of tensors (by its first) that are views of one storage and share some of their bytes with one another without
    being the same: coded apart they would come back disagreeing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    alias_of: str | None = None
    role: str = "model"
    overlaps: str | None = field(default=None, compare=False)

    @property
    def numel(self) -> int:
        """Number of elements; 1 for a scalar."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Size of the dense data in bytes."""
        return self.numel * ITEM_BYTES[self.dtype]
