"""The loops of `pqcli.core.trellis.rotation`, in C (`rotation.c`): a fixed order of operations, none of them fused.

basis (k, size) int32, normals (k, size) float32, coefficients (k,) float32, weights (rows, columns) float32, rest
(k, size) float64
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pqcli.core.native.library import function, reads, writes

Matrix = NDArray[np.float32]

WIDTH = 32
"""Vectors rotated side by side: as many as the first cache holds, where they are not long."""

_ORTHONORMALIZE = function(
    "orthonormalize",
    reads(np.int32), reads(np.int64), int, int, writes(np.float64), writes(np.float32), writes(np.float32),
)  # fmt: skip
_REFLECT = function(
    "reflect",
    writes(np.float32), int, int, reads(np.float32), reads(np.float32), int, int, bool, writes(np.float32),
)  # fmt: skip


def orthonormalize(
    basis: NDArray[np.int32],
    precisions: NDArray[np.int64],
    rest: NDArray[np.float64],
    normals: Matrix,
    coefficients: Matrix,
) -> None:
    """Householder's QR in float64, column by column: fills in zeroed normals and coefficients; scratch is `rest`.

    A basis vector that the earlier ones leave nothing of reflects nothing (its normal is zero).
    """
    _ORTHONORMALIZE(basis, precisions, *basis.shape, rest, normals, coefficients)


def reflect(weights: Matrix, normals: Matrix, coefficients: Matrix, inverse: bool) -> None:
    """Apply the reflections 1 ... k, or k ... 1 (`inverse`), to every consecutive `size` columns of `weights`.

    Columns are a multiple of `size`. Reflection i takes coefficients[i] * (normals[i] . x) * normals[i] off x. Sums run
    over ascending entries, for each vector by itself, so that the result depends neither on the vectors beside it nor
    on the machine.
    """
    block = np.empty((normals.shape[1], WIDTH), np.float32)
    _REFLECT(weights, *weights.shape, normals, coefficients, *normals.shape, inverse, block)
