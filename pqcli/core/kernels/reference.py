"""The primitive in plain torch: obvious, on any device, and what every other kernel is tested against.

Scores are computed for a tile of vectors times a tile of centroids at a time, so that they stay in the cache of a CPU
and within the caller's budget anywhere. Shapes as in the package docstring.
"""

from __future__ import annotations

import torch

from pqcli.core.kernels import Pass

_CPU_TILE_BYTES = 1 << 20  # of scores: half of a typical L2 cache
_BYTES_PER_SCORE = 4


def sweep(
    vectors: torch.Tensor,
    codebook: torch.Tensor,
    bias: torch.Tensor,
    weights: torch.Tensor | None,
    accumulate: bool,
    budget_bytes: int,
) -> Pass:
    """`kernels.sweep`, in torch; holds at most `budget_bytes` of scores."""
    n, (k, d) = len(vectors), codebook.shape
    tile_bytes = min(budget_bytes, _CPU_TILE_BYTES) if vectors.device.type == "cpu" else budget_bytes
    n_scores = max(1, tile_bytes // _BYTES_PER_SCORE)
    columns = min(k, n_scores)
    rows = max(1, n_scores // columns)

    assignments = torch.empty(n, dtype=torch.int32, device=vectors.device)
    sums = torch.zeros(k, d, dtype=torch.float64, device=vectors.device)
    counts = torch.zeros(k, dtype=torch.float64, device=vectors.device)
    score = torch.zeros((), dtype=torch.float64, device=vectors.device)
    for start in range(0, n, rows):
        x = vectors[start : start + rows].float()
        w = torch.ones(len(x), device=x.device) if weights is None else weights[start : start + rows]
        best, winner = _best(x, codebook, bias, columns)
        assignments[start : start + rows] = winner
        score += best.double() @ w.double()
        if accumulate:
            sums.index_add_(0, winner, x.double() * w.double()[:, None])
            counts.index_add_(0, winner, w.double())
    return Pass(assignments, sums if accumulate else None, counts if accumulate else None, float(score))


def _best(
    x: torch.Tensor, codebook: torch.Tensor, bias: torch.Tensor, columns: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest score of each row of x and its index, the smallest among equals."""
    best, winner = torch.addmm(bias[:columns], x, codebook[:columns].T).max(dim=1)
    for start in range(columns, len(codebook), columns):
        stop = start + columns
        other, index = torch.addmm(bias[start:stop], x, codebook[start:stop].T).max(dim=1)
        winner = torch.where(other > best, index + start, winner)
        best = torch.maximum(other, best)
    return best, winner
