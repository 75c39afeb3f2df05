"""The loops of `pqcli.core.trellis.rotation`, compiled: fixed order of operations, no fused or reordered arithmetic.

basis (k, size) int32, normals (k, size) float32, coefficients (k,) float32, weights (rows, columns) float32, rest
(k, size) float64
"""

# mypy: disallow-untyped-decorators=False, disallow-untyped-defs=False, check-untyped-defs=False
# ruff: noqa: C901 - a fused loop is one function on purpose
from __future__ import annotations

import numpy as np

from pqcli.core.compiled.jit import kernel

WIDTH = 64
"""Vectors rotated side by side."""


@kernel
def orthonormalize(basis, precisions, rest, normals, coefficients):
    """Householder's QR in float64, column by column: fills in zeroed normals and coefficients; scratch is `rest`.

    A basis vector that the earlier ones leave nothing of reflects nothing (its normal is zero).
    """
    k, size = basis.shape
    for i in range(k):
        scale = 1.0
        for _ in range(precisions[i]):
            scale *= 0.5
        for j in range(size):
            rest[i, j] = basis[i, j] * scale
    for i in range(k):
        norm2 = 0.0
        for j in range(i, size):
            norm2 += rest[i, j] * rest[i, j]
        if norm2 == 0.0:
            continue
        norm = np.sqrt(norm2)
        sign = -1.0 if rest[i, i] < 0.0 else 1.0
        rest[i, i] += sign * norm
        largest = abs(rest[i, i])
        for j in range(i, size):
            rest[i, j] /= largest
            normals[i, j] = rest[i, j]
        length2 = 0.0
        for j in range(i, size):
            length2 += np.float64(normals[i, j]) * np.float64(normals[i, j])
        coefficient = 2.0 / length2
        coefficients[i] = coefficient
        for later in range(i + 1, k):
            dot = 0.0
            for j in range(i, size):
                dot += normals[i, j] * rest[later, j]
            dot *= coefficient
            for j in range(i, size):
                rest[later, j] -= dot * normals[i, j]


@kernel
def reflect(weights, normals, coefficients, inverse):
    """Apply the reflections 1 ... k, or k ... 1 (`inverse`), to every consecutive `size` columns of `weights`.

    Reflection i takes coefficients[i] * (normals[i] . x) * normals[i] off x. Sums run over ascending entries, for
    each vector by itself, so that the result depends neither on the vectors beside it nor on the machine.
    """
    n_rows, n_columns = weights.shape
    k, size = normals.shape
    n_groups = n_columns // size
    n_vectors = n_rows * n_groups
    block = np.empty((size, WIDTH), np.float32)
    dot = np.empty(WIDTH, np.float32)
    for start in range(0, n_vectors, WIDTH):
        n = min(WIDTH, n_vectors - start)
        for v in range(WIDTH):
            row = (start + min(v, n - 1)) // n_groups
            column = ((start + min(v, n - 1)) % n_groups) * size
            for i in range(size):
                block[i, v] = weights[row, column + i]
        for t in range(k):
            which = k - 1 - t if inverse else t
            for v in range(WIDTH):
                dot[v] = 0
            for i in range(which, size):
                factor = normals[which, i]
                for v in range(WIDTH):
                    dot[v] += factor * block[i, v]
            factor = coefficients[which]
            for v in range(WIDTH):
                dot[v] *= factor
            for i in range(which, size):
                factor = normals[which, i]
                for v in range(WIDTH):
                    block[i, v] -= factor * dot[v]
        for v in range(n):
            row = (start + v) // n_groups
            column = ((start + v) % n_groups) * size
            for i in range(size):
                weights[row, column + i] = block[i, v]
