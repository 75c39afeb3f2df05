"""Product quantization of one tensor: `encode` gives a `PQTensor`, `decode` gives the tensor back.

`PQ` is the same thing behind the interface of fairseq's class of that name (Stock et al., "And the Bit Goes Down",
ICLR 2020), with assignments in fairseq's block-major order, so that its `PQLinear`, `PQConv2d` and `PQEmbedding` take
them unchanged.

Shapes: weight any (out, ...), matrix (rows, columns), codebook (k, block_size), assignments (rows * blocks_per_row,).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from pqcli.core import metrics, progress
from pqcli.core.arrays import as_array, as_tensor
from pqcli.core.pq import blocks as block_layout
from pqcli.core.pq import em
from pqcli.core.pq.decoding import join
from pqcli.core.pq.feedback import Layer, suits
from pqcli.core.threads import lone_blas

if TYPE_CHECKING:
    from torch import Tensor

    from pqcli.core.feeding import Inputs
    from pqcli.core.importance import Importance

LOG = logging.getLogger("pqcli")
FP16_LOSS = 1e-6
"""Largest share of the codebook's energy that rounding to float16 may cost; beyond it the codebook stays float32."""
FLOAT32 = torch.finfo(torch.float32)
FED_SHARE = 3
"""Where feedback goes on with EM's codebook, EM has one in so many of its iterations: all gain 0.03 dB in the end."""
FITTED, FED_FITTED = 0.6, 0.2
"""The share of the time of encoding a tensor that EM takes, without and with feedback; for progress alone."""
SAFE_EXPONENT = 30
"""Weights beyond 2^-30 .. 2^30 are scaled by a power of two first, so that their squares stay finite."""


@dataclass(frozen=True)
class PQTensor:
    """One encoded tensor. `shape` and `dtype` are the original's; all tensors are on the CPU.

    `matrix_shape` is (rows, columns); assignments are int32, row by row.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    matrix_shape: tuple[int, int]
    codebook: Tensor
    assignments: Tensor

    @property
    def block_size(self) -> int:
        """Length of a block."""
        return self.codebook.shape[1]

    @property
    def n_centroids(self) -> int:
        """Rows of the codebook."""
        return self.codebook.shape[0]


@dataclass(frozen=True)
class Encoded:
    """A `PQTensor` with what it cost: the error, measured after every rounding, and EM's objective by iteration.

    `decoded` is what `decode(tensor)` gives.
    """

    tensor: PQTensor
    decoded: Tensor
    error: metrics.Error
    objective: tuple[float, ...]


def encode(
    weight: Tensor,
    matrix_shape: tuple[int, int],
    block_size: int,
    options: em.Options,
    codebook_dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    importance: Importance | None = None,
    inputs: Inputs | None = None,
) -> Encoded:
    """`weight` (any shape and floating dtype) as a codebook and assignments; EM runs on `device` in float32.

    A float16 codebook that would overflow, or lose small weights, is kept in float32 instead.
    With `importance`, of the matrix, EM minimises the squared errors that it weighs; the objective counts them relative
    to its geometric mean, `error` counts all alike. With `inputs`, the moments of the inputs of this weight's layer, it
    is the error of the layer's outputs that is made small (`pqcli.core.pq.feedback`), on the CPU once EM is done.
    Raises ValueError if `weight` holds NaN or infinity, and EmptyClusterResolveError as `em.fit` does.
    """
    matrix = weight.detach().reshape(matrix_shape).to(device)
    exponent = _exponent(matrix)
    scaled = torch.ldexp(matrix.float(), torch.tensor(-exponent)) if exponent else matrix
    is_felt = inputs is not None and suits(inputs, matrix_shape, block_size)
    cut = block_layout.cut(scaled, block_size, inputs.importance(matrix_shape) if inputs else importance)
    with progress.within(0.0, FED_FITTED if is_felt else FITTED):
        fitted = em.fit(cut, _begun(options) if is_felt else options)
    if inputs is not None and is_felt and fitted.objective != (0.0,):
        with lone_blas():
            layer = Layer.of(scaled.float().cpu().numpy(), block_size, inputs)
            with progress.within(FED_FITTED, FITTED):
                found = layer.refined(fitted.codebook.cpu().numpy())
            codebook, dtype = rounded(torch.from_numpy(found.codebook), exponent, codebook_dtype)
            found = layer.descended(replace(found, codebook=codebook.numpy()))
        assignments = torch.from_numpy(layer.in_order(found))
    else:
        codebook, dtype = rounded(fitted.codebook, exponent, codebook_dtype)
        assignments = em.assign(cut, codebook)
    stored = torch.ldexp(codebook, torch.tensor(exponent)) if exponent else codebook
    tensor = PQTensor(tuple(weight.shape), weight.dtype, matrix_shape, stored.to(dtype).cpu(), assignments.cpu())
    scale = 4.0**exponent
    del cut, scaled, matrix  # the decoded tensor takes their place in memory
    decoded = decode(tensor)
    objective = tuple(scale * value for value in fitted.objective)
    return Encoded(tensor, decoded, metrics.compare(weight, decoded), objective)


def _begun(options: em.Options) -> em.Options:
    """What is asked of EM where feedback goes on with its codebook."""
    stages = tuple((n, -(-n_iter // FED_SHARE)) for n, n_iter in options.stages)
    return replace(options, n_iter=-(-options.n_iter // FED_SHARE), stages=stages)


def decode(tensor: PQTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The dense tensor, in its original dtype or in `dtype`. Bitwise the same on every machine: it only looks up."""
    codebook = as_array(saturated(tensor.codebook, dtype or tensor.dtype))
    return as_tensor(join(codebook, as_array(tensor.assignments), *tensor.matrix_shape)).view(tensor.shape)


def is_finite(weight: Tensor) -> bool:
    """Whether `weight` can be quantized: no NaN, no infinity, and nothing that float32 cannot hold.

    Nor are weights quantized that are all so small that float32 holds them with few digits or as zero (a float64
    tensor of 1e-200 would come back as nothing); a single small value among larger ones does no harm.
    """
    peak = largest(weight)
    return peak <= FLOAT32.max and (peak == 0 or peak >= FLOAT32.tiny / FLOAT32.eps)


def largest(weight: Tensor) -> float:
    """The largest magnitude in `weight`, 0 where it is empty, NaN where it holds one."""
    if not weight.numel():
        return 0.0
    low, high = weight.aminmax()
    return max(-float(low), float(high))


def _exponent(matrix: Tensor) -> int:
    """The power of two to divide by before squaring; 0 for ordinary weights. Raises ValueError for NaN and infinity."""
    peak = largest(matrix)
    if not math.isfinite(peak):
        raise ValueError("NaN or infinite values cannot be quantized")
    exponent = math.frexp(peak)[1]
    return exponent if peak and abs(exponent) > SAFE_EXPONENT else 0


def rounded(codebook: Tensor, exponent: int, dtype: torch.dtype) -> tuple[Tensor, torch.dtype]:
    """The codebook as it will be stored (still in float32, still scaled), and the dtype that holds it."""
    if dtype == torch.float16:
        scale = torch.tensor(exponent)
        rounded = torch.ldexp(torch.ldexp(codebook, scale).half().float(), -scale)
        lost = (rounded - codebook).double().square().sum()
        if bool(torch.isfinite(rounded).all()) and bool(lost <= FP16_LOSS * codebook.double().square().sum()):
            return rounded, dtype
    return codebook, torch.float32


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`; rounding must not turn a large finite value into infinity.

    On any device; `dtypes.saturated` does the same to arrays.
    """
    if torch.finfo(dtype).max >= torch.finfo(values.dtype).max:
        return values.to(dtype)
    limit = torch.finfo(dtype).max
    return values.clamp(-limit, limit).to(dtype)


class PQ:
    """fairseq's `PQ` on this project's core: quantize one weight, look at codebook and assignments, decode it.

    `W` is a Linear or Embedding weight (out, in) or a convolution's (out, in / groups, *kernel), any floating dtype, on
    any device. `n_centroids` shrinks where there are not that many distinct blocks (the result is then exact). Unlike
    the ancestor, `in` need not divide by `block_size`: the last block of a row is then padded in `decode` only.

        pq = PQ(W, block_size=8).encode()
        pq.centroids      # (n_centroids, block_size), W's dtype
        pq.assignments    # (blocks_per_row * out,) int64, entry `block * out + row`
        pq.decode()       # like W
        pq.objective      # mean squared distance of a block to its centroid, after each iteration

    Raises ValueError for a weight with NaN or infinity or with fewer than two dimensions, EmptyClusterResolveError if
    `max_tentatives` passes of splitting do not fill every empty cluster. `verbose` logs iterations (logger "pqcli").
    """

    def __init__(
        self,
        W: Tensor,
        block_size: int,
        n_centroids: int = 256,
        n_iter: int = 20,
        eps: float = 1e-6,
        max_tentatives: int = 30,
        verbose: bool = False,
        seed: int = 0,
    ) -> None:
        if W.dim() < 2:
            raise ValueError(f"a weight has at least 2 dimensions, this one has shape {tuple(W.shape)}")
        if block_size < 1 or n_centroids < 1 or n_iter < 0:
            raise ValueError(
                f"block_size {block_size} and n_centroids {n_centroids} must be positive, n_iter {n_iter} not negative"
            )
        self.W = W
        self.block_size = min(block_size, max(math.prod(W.shape[1:]), 1))
        self.verbose = verbose
        self.options = em.Options(
            n_centroids=n_centroids, n_iter=n_iter, eps=eps, max_tentatives=max_tentatives, seed=seed
        )
        self.objective: list[float] = []
        self._tensor: PQTensor | None = None

    def encode(self) -> PQ:
        """Learn the codebook and the assignments; returns self."""
        matrix_shape = (self.W.shape[0], math.prod(self.W.shape[1:]))
        encoded = encode(self.W, matrix_shape, self.block_size, self.options, torch.float32, self.W.device)
        n_vectors = max(len(encoded.tensor.assignments), 1)
        self._tensor = encoded.tensor
        self.objective = [value / n_vectors for value in encoded.objective]
        if self.verbose:
            for i, value in enumerate(self.objective, start=1):
                LOG.info("iteration %d: mean squared distance %.6g", i, value)
        return self

    @property
    def n_centroids(self) -> int:
        """Centroids asked for, or, once encoded, centroids there are."""
        return self._tensor.n_centroids if self._tensor else self.options.n_centroids

    @property
    def centroids(self) -> Tensor:
        """(n_centroids, block_size) in W's dtype, on W's device."""
        return self._encoded.codebook.to(self.W)

    @property
    def assignments(self) -> Tensor:
        """(blocks_per_row * out,) int64, block-major as fairseq has it, on W's device."""
        return block_layout.to_block_major(self._encoded.assignments, self.W.shape[0]).long().to(self.W.device)

    def decode(self) -> Tensor:
        """The reconstructed weight, like W."""
        return decode(self._encoded).to(self.W.device)

    @property
    def _encoded(self) -> PQTensor:
        if self._tensor is None:
            raise ValueError("nothing is encoded yet: call encode() first")
        return self._tensor
