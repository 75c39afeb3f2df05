"""The one hot primitive: for each vector `x_i`, the `j` that maximises `x_i . c_j + b_j`.

Shapes: vectors (n, d), codebook (k, d), bias (k,), weights (n,), assignments (n,), sums (k, d), counts (k,).

With `b_j = -|c_j|^2 / 2` the winner is the nearest centroid; with `b_j = -|c_j|^2 / 2 + (lambda / 2) log2 p_j` it is
the entropy-constrained choice (Chou, Lookabaugh, Gray 1989). So one primitive per kind of hardware serves every kind of
EM. One `sweep` is the E-step over all vectors and, because each vector is in cache just then, the sums of the M-step.

    reference    plain torch, on any device
    cpu          loops in C, for registers of every width
    cuda         Triton, for NVIDIA GPUs
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from pqcli.errors import UsageError

Backend = Literal["auto", "reference", "cpu", "cuda"]

DEFAULT_BUDGET_BYTES = 256 << 20

_COMPILED_FROM = 1 << 17  # multiply-adds; the reference has other last bits, so files hang on this number
_COMPILED_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_COMPILED_BLOCK_SIZE = 64  # beyond, a matrix product is as fast


@dataclass(frozen=True)
class Pass:
    """What one sweep over the vectors found.

    assignments: (n,) int32, ties go to the smallest j.
    sums: (k, d) float64, the sum of `w_i x_i` per centroid; None unless asked for.
    counts: (k,) float64, the sum of `w_i` per centroid (plain counts without weights); None unless asked for.
    score: the sum over i of `w_i max_j (x_i . c_j + b_j)`, added up in float64.
    """

    assignments: torch.Tensor
    sums: torch.Tensor | None
    counts: torch.Tensor | None
    score: float


def sweep(
    vectors: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor,
    *,
    weights: torch.Tensor | None = None,
    accumulate: bool = True,
    budget_bytes: int = DEFAULT_BUDGET_BYTES,
    backend: Backend = "auto",
) -> Pass:
    """Assign every vector to its best centroid, and (if `accumulate`) add up the vectors of each centroid.

    vectors: (n, d) float32, float16 or bfloat16, each row contiguous (`stride(1) == 1`), rows possibly apart;
        scores are computed in float32.
    codebook, bias, weights: float32, on the device of vectors; weights None means all ones.
    budget_bytes: the most memory for scores; only the reference holds any.
    backend: "auto" goes by the device and the size of the job, never by its values or by the number of threads.
    """
    if backend not in ("auto", "reference", "cpu", "cuda"):
        raise UsageError(f"unknown kernel backend {backend!r}; use auto, reference, cpu or cuda")
    shapes = [tuple(tensor.shape) for tensor in (vectors, codebook, bias, *([] if weights is None else [weights]))]
    (n, d), k = vectors.shape, len(codebook)
    if shapes[1:] != [(k, d), (k,), (n,)][: len(shapes) - 1]:
        raise UsageError(f"vectors (n, d), codebook (k, d), bias (k,), weights (n,) do not fit together: {shapes}")
    if backend == "auto":
        backend = _choose(vectors, codebook)
    # The kernels are given addresses: what they would misread is converted here (a no-op in the usual case).
    vectors = vectors if vectors.stride(1) == 1 else vectors.contiguous()
    vectors = vectors if vectors.dtype in _COMPILED_TYPES else vectors.float()
    codebook, bias, weights = codebook.float(), bias.float(), None if weights is None else weights.float()
    if backend == "cpu":
        from pqcli.core.kernels import cpu

        return cpu.sweep(vectors, codebook, bias, weights, accumulate)
    if backend == "cuda":
        from pqcli.core.kernels import cuda

        return cuda.sweep(vectors, codebook, bias, weights, accumulate)
    from pqcli.core.kernels import reference

    return reference.sweep(vectors, codebook, bias, weights, accumulate, budget_bytes)


def _choose(vectors: torch.Tensor, codebook: torch.Tensor) -> Backend:
    """The backend for a job, by its shape and device alone."""
    n, (k, d) = len(vectors), codebook.shape
    if d > _MAX_COMPILED_BLOCK_SIZE:
        return "reference"
    if vectors.device.type == "cpu" and is_compiled_for(n, k, d):
        return "cpu"
    if vectors.device.type == "cuda" and find_spec("triton"):
        return "cuda"
    return "reference"


def is_compiled_for(n: int, k: int, d: int) -> bool:
    """Whether the kernel of the CPU takes n vectors in main memory."""
    return d <= _MAX_COMPILED_BLOCK_SIZE and n * k * d >= _COMPILED_FROM
