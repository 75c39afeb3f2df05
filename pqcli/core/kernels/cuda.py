"""The primitive on a GPU, in Triton: scores live in registers, one read of the vectors per sweep.

A program takes 256 vectors, two to a thread, and walks over the codebook 16 centroids at a time. Vectors run along the
lanes and a thread scores all 16 centroids itself, so the argmax of a tile needs no exchange between threads, and every
centroid is loaded once for the whole warp. Then the program adds its vectors to the sums with atomics.

Arithmetic is IEEE float32 with explicit fused multiply-adds in the order of the CPU kernel. The tensor cores would take
TF32 inputs, 10 bits of mantissa, and change answers; `tl.dot` would moreover pad d to 16.

What binds, for k = 256 and d = 8 (counted in the machine code for compute capability 9.0, not measured):
- Issue. The inner loop has 397 instructions for 32 scores per thread: 256 multiply-adds, 84 of the argmax, 36 loads of
  16 bytes, the rest addresses. An SM issues 128 lanes per cycle whatever the instruction: the roof is 64 % of the
  multiply-add peak. 83 registers per thread leave room for 20 warps per SM to hide latency.
- Memory. 32 bytes of a vector are read and 4 written for 2048 multiply-adds: 8 ps per vector at 4.3 TB/s, where the
  multiply-adds take 61 ps at 33.5 T/s.
- Atomics. d + 1 per vector against k d multiply-adds, spread over up to 64 copies of the sums.

The answer is the same at every run: sums are integers (fixed point, scaled so that n of the largest cannot overflow),
and integers add up to the same total in any order. A sum is exact to n 2^-(62 - log2 n) of the largest |w x|.
Assignments agree with the CPU kernel's bit for bit in exact arithmetic and in fused multiply-adds alike.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pqcli.core.kernels import Pass

_BLOCK_K = 16
_COPIES = 64  # of the sums, so that atomics rarely meet
_COPIES_BYTES = 64 << 20
_FIXED_POINT_BITS = 62


def sweep(
    vectors: torch.Tensor, codebook: torch.Tensor, bias: torch.Tensor, weights: torch.Tensor | None, accumulate: bool
) -> Pass:
    """`kernels.sweep` on the device of vectors."""
    n, (k, d) = len(vectors), codebook.shape
    device = vectors.device
    block_n = 256 if d <= 16 else 128  # two vectors to a thread while their coordinates fit in its registers
    n_programs = triton.cdiv(n, block_n)
    n_copies = max(1, min(_COPIES, n_programs, _COPIES_BYTES // (8 * k * (d + 1))))

    assignments = torch.empty(n, dtype=torch.int32, device=device)
    totals = torch.zeros(n_copies, k, d + 1, dtype=torch.int64, device=device)
    scores = torch.zeros(n_programs, dtype=torch.float64, device=device)
    scales = torch.ones(2, dtype=torch.float64, device=device)
    if n:
        if accumulate:
            scales = _scales(vectors, weights)
        columns = _columns(codebook, bias)
        _sweep_kernel[(n_programs,)](
            vectors, vectors.stride(0), n, columns, len(columns), k,
            vectors if weights is None else weights.contiguous(), assignments, scores, totals, scales, n_copies,
            D=d, WEIGHTED=weights is not None, ACCUMULATE=accumulate, BLOCK_N=block_n, BLOCK_K=_BLOCK_K, num_warps=4,
        )  # fmt: skip
    score = float(scores.sum())
    if not accumulate:
        return Pass(assignments, None, None, score)
    total = totals.sum(0).double()
    return Pass(assignments, total[:, :d] / scales[0], total[:, d] / scales[1], score)


def _columns(codebook: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The codebook in tiles (tiles, d + 1, _BLOCK_K), bias last; centroids that are never chosen fill the last tile."""
    padding = -len(codebook) % _BLOCK_K
    coordinates = torch.nn.functional.pad(codebook, (0, 0, 0, padding))
    padded_bias = torch.nn.functional.pad(bias, (0, padding), value=-torch.inf)
    tiles = torch.cat([coordinates, padded_bias[:, None]], dim=1).view(-1, _BLOCK_K, codebook.shape[1] + 1)
    return tiles.transpose(1, 2).contiguous()


def _scales(vectors: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The powers of two that turn `w x`, and `w`, into integers of which n add up to at most 2^62.

    They stay on the device, so that nobody waits for them.
    """
    n = len(vectors)
    heaviest = torch.ones((), device=vectors.device) if weights is None else weights.abs().amax()
    heaviest = heaviest.double()
    largest = torch.stack([vectors.abs().amax().double() * heaviest, heaviest])
    exponent = torch.frexp(largest).exponent + (n - 1).bit_length()
    return torch.ldexp(torch.ones_like(largest), _FIXED_POINT_BITS - exponent)


@triton.jit
def _sweep_kernel(
    vectors: tl.tensor,  # (n, d), rows `stride` apart
    stride: tl.tensor,
    n: tl.tensor,
    columns: tl.tensor,  # (tiles, d + 1, BLOCK_K)
    n_tiles: tl.tensor,
    k: tl.tensor,
    weights: tl.tensor,
    assignments: tl.tensor,
    scores: tl.tensor,  # (programs,) float64
    totals: tl.tensor,  # (copies, k, d + 1) int64, counts last
    scales: tl.tensor,  # (2,) float64, of sums and of counts
    n_copies: tl.tensor,
    D: tl.constexpr,
    WEIGHTED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One program: BLOCK_N vectors against the whole codebook."""
    program = tl.program_id(0)
    member = program.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    present = member < n
    rows = vectors + member * stride

    x = ()
    for t in tl.static_range(D):
        x += (tl.load(rows + t, mask=present, other=0.0).to(tl.float32),)  # type: ignore[assignment] # it is unrolled
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK_N,), tl.int32)
    for tile in range(n_tiles):
        column = columns + tile * ((D + 1) * BLOCK_K) + tl.arange(0, BLOCK_K)
        b = tl.load(column + D * BLOCK_K)
        score = tl.broadcast_to(b[:, None], (BLOCK_K, BLOCK_N))
        for t in tl.static_range(D):
            c = tl.load(column + t * BLOCK_K)
            score = tl.fma(c[:, None], x[t][None, :], score)
        tile_best, tile_winner = tl.max(score, axis=0, return_indices=True)  # the first among equals
        better = tile_best > best
        best = tl.where(better, tile_best, best)
        winner = tl.where(better, tile * BLOCK_K + tile_winner, winner)
    winner = tl.minimum(winner, k - 1)  # not even a NaN may point outside
    tl.store(assignments + member, winner, mask=present)

    if WEIGHTED:
        weight = tl.load(weights + member, mask=present, other=0.0).to(tl.float64)
    else:
        weight = tl.where(present, 1.0, 0.0).to(tl.float64)
    tl.store(scores + program, tl.sum(tl.where(present, best, 0.0).to(tl.float64) * weight, axis=0))

    if ACCUMULATE:
        copy = (program % n_copies).to(tl.int64)
        target = totals + (copy * k + winner) * (D + 1)
        scale = tl.load(scales)
        for t in tl.static_range(D):
            value = x[t].to(tl.float64) * weight
            tl.atomic_add(target + t, tl.floor(value * scale + 0.5).to(tl.int64), mask=present, sem="relaxed")
        count = tl.floor(weight * tl.load(scales + 1) + 0.5).to(tl.int64)
        tl.atomic_add(target + D, count, mask=present, sem="relaxed")
