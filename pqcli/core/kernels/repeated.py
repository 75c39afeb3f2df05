"""The primitive for a codebook that is asked again and again, by few vectors at a time, each time with other biases.

`kernels.sweep` lays out its codebook anew in every call, which takes longer than to search it for a few hundred
vectors. Here that is done once. There are no threads: whoever feeds errors forward has few vectors at a time, and other
tensors at hand.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.core import kernels

Matrix = NDArray[np.float32]


class Repeated:
    """A codebook (k, d), for searches that come to `n_vectors` vectors in all: by that number it is laid out or not.

    `sums` (k, d) are those of all vectors that were counted, by the centroid that they were assigned to.
    """

    def __init__(self, codebook: Matrix, n_vectors: int) -> None:
        self.codebook = np.ascontiguousarray(codebook, np.float32)
        self.sums = np.zeros(self.codebook.shape)
        self._is_compiled = kernels.is_compiled_for(n_vectors, *self.codebook.shape)

    def assigned(self, vectors: Matrix, bias: Matrix, counts: NDArray[np.float64] | None = None) -> NDArray[np.int32]:
        """For each of the vectors (n, d) the j that maximises `x . c_j + b_j`; ties go to the smallest j.

        With `counts` (k,) it is counted there, and the vector added to the sums.
        """
        vectors = np.ascontiguousarray(vectors, np.float32)
        if self._is_compiled:
            return self._laid_out(vectors, bias, counts, self.sums)
        found: NDArray[np.int32] = np.argmax(vectors @ self.codebook.T + bias, axis=1).astype(np.int32)
        if counts is not None:
            counts += np.bincount(found, minlength=len(counts))
            np.add.at(self.sums, found, vectors)
        return found

    @cached_property
    def _laid_out(self) -> _LaidOut:
        return _LaidOut(self.codebook)


class _LaidOut:
    """A codebook as the processor's own kernel reads it, with the kernel's scratch memory."""

    def __init__(self, codebook: Matrix) -> None:
        from pqcli.core.kernels import cpu

        self.k, self.d = codebook.shape
        self.lanes = cpu.lanes()
        self.sweep_slab = cpu.sweep_slab
        nothing = torch.zeros(self.k)
        self.rows, bias, self.columns = cpu.layouts(torch.from_numpy(codebook), nothing, self.lanes)
        self.bias = bias.copy()
        self.scratch = torch.empty(cpu.scratch_size(self.d, self.lanes))
        self.ones, self.score = torch.ones(cpu.N_SCORES), np.zeros(cpu.N_SCORES)
        self.codebook_arguments = (
            self.rows.ctypes.data,
            self.bias.ctypes.data,
            self.columns.ctypes.data,
            len(self.columns),
            cpu.chunks_in_cache(self.d, self.lanes),
            self.k,
        )
        self.scratch_arguments = self.scratch.data_ptr(), self.ones.data_ptr(), 0
        self.at_score = self.score.ctypes.data

    def __call__(
        self, vectors: Matrix, bias: Matrix, counts: NDArray[np.float64] | None, sums: NDArray[np.float64]
    ) -> NDArray[np.int32]:
        self.bias[: self.k] = bias
        self.columns[:, self.d] = self.bias.reshape(-1, self.lanes)
        found = np.empty(len(vectors), np.int32)
        if len(vectors):
            self.sweep_slab(
                self.d,
                0,
                vectors.ctypes.data,
                self.d,
                len(vectors),
                *self.codebook_arguments,
                *self.scratch_arguments,
                found.ctypes.data,
                int(counts is not None),
                sums.ctypes.data,
                0 if counts is None else counts.ctypes.data,
                self.at_score,
            )
        return found
