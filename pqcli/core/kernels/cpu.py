"""The primitive on a CPU: one pass over the vectors, no score ever in memory.

How a core is kept busy with multiply-adds
- Vectors run along the SIMD lanes. A block of vectors is transposed into a scratch buffer; then 3 registers hold
  coordinate t of 48 vectors (with 16 lanes), and each coordinate of a centroid is broadcast to all lanes. A tile of 4
  centroids x 3 registers makes 12 independent sums, enough to hide the latency of a multiply-add.
- Only the maximum is kept in the inner loop: one `max` for d multiply-adds. Which centroid it was is found later: the
  loop remembers for each vector which *chunk* of 16 centroids (as many as there are lanes) held the best score, a
  compare and two selects per chunk, and at the end that one chunk is scored again, with centroids along the lanes.
  The same multiply-adds in the same order give the same bits, so the first lane that equals the maximum is the answer,
  and ties go to the smallest index.
- The vector is in cache when its winner is known, so that is when it is added to the sums.
- Centroids are visited in parts that fit in the L1 cache, for a block of vectors at a time.

What binds: the d multiply-adds of a score share two ports with 1 max and 3/16 of bookkeeping, so d / (d + 1.2)
of the multiply-add peak is the roof: 87 % at d = 8, 77 % at d = 4.

One answer: the vectors are cut into slabs by n, k and d alone, each slab has its own sums, and these are added in
order: the number of threads does not change a bit
"""

from __future__ import annotations

import _thread
import itertools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from pqcli.core.kernels import Pass
from pqcli.core.native.library import function

_BLOCK_VECTORS = 48  # registers of vectors transposed at a time: 24 KiB at d = 8
_CODEBOOK_TILE_BYTES = 24 << 10  # half of an L1 cache
N_SCORES = 16  # sums of scores
_SLAB_UNIT = 768  # whole blocks, whatever the lanes
_SLAB_UNITS = 6
_MAX_SLABS = 256
_MAX_PARTIAL_BYTES = 64 << 20  # of all slabs' sums together

Array = NDArray[np.float32]
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

lanes: Callable[[], int] = function("lanes", returns=int)
"""How many float32 a vector register holds."""

sweep_slab = function("sweep_slab", *[int] * 19)
"""Sweep one slab; every array is an address, since to look at each slice of one takes longer than a small sweep.

d, dtype           of the vectors, 0: float32, 1: float16, 2: bfloat16
vectors, stride, n of the slab, elements from row to row, at least 1
rows               codebook, padded to whole chunks: (n_chunks * lanes, d)
bias               (n_chunks * lanes,), the padding is -inf
columns            the codebook once more with centroids along the lanes: (n_chunks, d + 1, lanes), bias last
n_chunks, tile, k  tile: chunks visited for a block of vectors at a time
scratch            (scratch_size,) float32
weights, step      N_SCORES of them readable from any vector on; step 0: the first ones are for all
assignments        (n,) int32
accumulate         whether to write sums (k, d) and counts (k,)
sums, counts       float64
score              (N_SCORES,) float64
"""


def sweep(
    vectors: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor,
    weights: torch.Tensor | None,
    accumulate: bool,
    *,
    is_slab: bool = False,
) -> Pass:
    """`kernels.sweep` in main memory, on `torch.get_num_threads()` threads, for d small enough to unroll.

    With `is_slab` the vectors are one slab of some larger whole, and are not cut again.
    """
    n, (k, d) = len(vectors), codebook.shape
    n_lanes = lanes()
    rows, padded_bias, columns = layouts(codebook, bias, n_lanes)
    dtype = _DTYPES[vectors.dtype]
    weight_step = 0 if weights is None else 1
    padded_weights = torch.ones(N_SCORES) if weights is None else torch.cat([weights, torch.ones(N_SCORES)])

    bounds = [0, n] if is_slab else slabs(n, k, d)
    n_slabs = len(bounds) - 1
    n_threads = max(1, min(torch.get_num_threads(), n_slabs))
    assignments = torch.empty(n, dtype=torch.int32)
    scratch = torch.empty(n_threads, scratch_size(d, n_lanes))
    partial = np.zeros((n_slabs, k * (d + 1) if accumulate else 0))
    scores = np.zeros((n_slabs, N_SCORES))

    # Plain integers: a tensor's slice and its address cost a microsecond each, which a small sweep would feel.
    at_vectors, row_bytes = vectors.data_ptr(), vectors.stride(0) * vectors.itemsize
    at_weights, at_assignments = padded_weights.data_ptr(), assignments.data_ptr()
    at_partial, at_scores = partial.ctypes.data, scores.ctypes.data
    codebook_arguments = (
        rows.ctypes.data,
        padded_bias.ctypes.data,
        columns.ctypes.data,
        len(columns),
        chunks_in_cache(d, n_lanes),
        k,
    )
    queue = itertools.count()
    done: list[int] = []

    def work(thread: int) -> None:
        at_scratch = scratch[thread].data_ptr()
        while (slab := next(queue)) < n_slabs:
            start, stop = bounds[slab], bounds[slab + 1]
            at_sums = at_partial + 8 * slab * k * (d + 1)
            sweep_slab(
                d, dtype, at_vectors + start * row_bytes, vectors.stride(0), stop - start, *codebook_arguments,
                at_scratch, at_weights + 4 * start * weight_step, weight_step, at_assignments + 4 * start,
                int(accumulate), at_sums, at_sums + 8 * k * d, at_scores + 8 * slab * N_SCORES,
            )  # fmt: skip
            done.append(slab)

    def help_out(thread: int, finished: _thread.LockType) -> None:
        try:
            work(thread)
        finally:
            finished.release()

    # Threads live for one sweep: 30 microseconds each, and no pool to share, to fork or to shut down. Not threading's:
    # its start() waits for the new thread to run, which just then begins to work: a millisecond when cores are busy.
    locks = [_thread.allocate_lock() for _ in range(1, n_threads)]
    for thread, finished in enumerate(locks, start=1):
        finished.acquire()
        _thread.start_new_thread(help_out, (thread, finished))
    work(0)
    for finished in locks:
        finished.acquire()
    if len(done) != n_slabs:
        raise RuntimeError(f"{n_slabs - len(done)} of {n_slabs} slabs were lost by a failing thread")

    score = float(scores.sum())
    if not accumulate:
        return Pass(assignments, None, None, score)
    total = torch.from_numpy(
        np.add.reduce(partial, axis=0)
    )  # one slab after the other; torch may split it over threads
    return Pass(assignments, total[: k * d].view(k, d), total[k * d :], score)


def chunks_in_cache(d: int, lanes: int) -> int:
    """Chunks of centroids that are visited for a block of vectors at a time."""
    return max(1, _CODEBOOK_TILE_BYTES // (4 * lanes * (d + 1)))


def scratch_size(d: int, lanes: int) -> int:
    """Numbers that a thread needs room for: a block of vectors, as rows and as columns, and what is known of each."""
    return _BLOCK_VECTORS * lanes * (2 * d + 2)


def slabs(n: int, k: int, d: int) -> list[int]:
    """Where slabs begin and end; a slab is one thread's turn, and owns k * (d + 1) sums."""
    most = min(_MAX_SLABS, max(8, _MAX_PARTIAL_BYTES // (8 * k * (d + 1))))
    n_units = -(-n // _SLAB_UNIT)
    n_slabs = min(most, -(-n_units // _SLAB_UNITS))
    return [min(n, n_units * slab // n_slabs * _SLAB_UNIT) for slab in range(n_slabs + 1)] if n_slabs else [0]


def layouts(codebook: torch.Tensor, bias: torch.Tensor, lanes: int) -> tuple[Array, Array, Array]:
    """rows, bias and columns, as `sweep_slab` takes them; in numpy, whose small operations take a third of the time."""
    k, d = codebook.shape
    n_chunks = -(-k // lanes)
    rows, padded_bias = codebook.contiguous().numpy(), bias.contiguous().numpy()
    if padding := n_chunks * lanes - k:
        rows = np.concatenate([rows, np.zeros((padding, d), np.float32)])
        padded_bias = np.concatenate([padded_bias, np.full(padding, -np.inf, np.float32)])
    columns = torch.empty(n_chunks, d + 1, lanes).numpy()  # torch's memory begins at a multiple of 64 bytes
    columns[:, :d] = rows.reshape(n_chunks, lanes, d).transpose(0, 2, 1)
    columns[:, d] = padded_bias.reshape(n_chunks, lanes)
    return rows, padded_bias, columns
