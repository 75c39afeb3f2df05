"""Bytes of a dense tensor, their hash, and seeds that follow from names."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from pqcli.core.arrays import as_array

if TYPE_CHECKING:
    from torch import Tensor

    from pqcli.core.dtypes import Array

HASH_BYTES: Final = 8


def tensor_bytes(tensor: Array | Tensor) -> NDArray[np.uint8]:
    """The little-endian bytes of a dense tensor, numpy's or torch's, row by row."""
    return as_array(tensor).reshape(-1).view(np.uint8)


def tensor_hash(tensor: Array | Tensor) -> bytes:
    """BLAKE2b-64 of the tensor's bytes; shorter hashes are its beginning."""
    return hashlib.blake2b(tensor_bytes(tensor).data, digest_size=HASH_BYTES).digest()


def seed_of(seed: int, name: str, *, n_bytes: int = 8) -> int:
    """The seed of one tensor, at most 63 bits: by the run's seed and the tensor's name, whatever else there is.

    It is made of the first `n_bytes` that BLAKE2b gives when asked for so many.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "surrogatepass"), digest_size=n_bytes).digest()
    return int.from_bytes(digest, "little") >> max(8 * n_bytes - 63, 0)
