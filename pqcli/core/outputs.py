"""How far a network's output is from what it was: two outputs for the same inputs, sample by sample.

Shapes: outputs (n, c), one row a sample (a token, an example); logits (n, classes); vectors (n, c).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_ROWS_AT_ONCE = 256
"""Logits are wide: so many rows are made into probabilities at a time."""


@dataclass
class OutputSums:
    """Sums over samples; the properties are what they come to, NaN of nothing."""

    n: int = 0
    energy: float = 0.0
    error: float = 0.0
    cosines: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add outputs (n, c) before and after."""
        before, after = before.detach().double(), after.detach().double()
        self.n += len(before)
        self.energy += float(before.square().sum())
        self.error += float((before - after).square().sum())
        self.cosines += float(torch.nn.functional.cosine_similarity(before, after, dim=-1).sum())

    @property
    def relative_mse(self) -> float:
        """|y - y'|^2 / |y|^2, all samples together."""
        return self.error / self.energy if self.energy else math.nan

    @property
    def cosine(self) -> float:
        """Mean cosine of the outputs of a sample."""
        return self.cosines / self.n if self.n else math.nan


@dataclass
class PredictionSums:
    """Sums over predictions: how far probabilities are, and how likely the truth is to both."""

    n: int = 0
    divergence: float = 0.0
    n_agreed: int = 0
    n_targets: int = 0
    nll_before: float = 0.0
    nll_after: float = 0.0

    def add(self, before: torch.Tensor, after: torch.Tensor, targets: torch.Tensor | None = None) -> None:
        """Add logits (n, classes) before and after; `targets` (n,) are the true classes, negative where not known."""
        for start in range(0, len(before), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            p, q = (logits[part].detach().float().log_softmax(-1) for logits in (before, after))
            self.n += len(p)
            self.divergence += float((p.exp() * (p - q)).sum(dtype=torch.float64))
            self.n_agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            if targets is not None:
                known = targets[part] >= 0
                wanted = targets[part][known][:, None]
                self.n_targets += len(wanted)
                self.nll_before -= float(p[known].gather(1, wanted).sum(dtype=torch.float64))
                self.nll_after -= float(q[known].gather(1, wanted).sum(dtype=torch.float64))

    @property
    def kl_divergence(self) -> float:
        """Mean of sum p log(p / q), in nats: p before, q after."""
        return self.divergence / self.n if self.n else math.nan

    @property
    def agreement(self) -> float:
        """Share of the samples whose most likely class is the same."""
        return self.n_agreed / self.n if self.n else math.nan

    @property
    def perplexities(self) -> tuple[float, float]:
        """Before and after: the exponential of the mean negative log likelihood of the targets."""
        if not self.n_targets:
            return math.nan, math.nan
        return math.exp(self.nll_before / self.n_targets), math.exp(self.nll_after / self.n_targets)


def neighbours_agree(before: torch.Tensor, after: torch.Tensor) -> float:
    """Share of the vectors (n, c) whose nearest neighbour among the others, by cosine, is the same; NaN of under 3."""
    if len(before) < 3:
        return math.nan
    nearest = [_nearest(vectors) for vectors in (before, after)]
    return float((nearest[0] == nearest[1]).double().mean())


def _nearest(vectors: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(vectors.detach().float(), dim=-1)
    found = []
    for start in range(0, len(unit), _ROWS_AT_ONCE):
        similar = unit[start : start + _ROWS_AT_ONCE] @ unit.T
        rows = torch.arange(len(similar))
        similar[rows, rows + start] = -math.inf
        found.append(similar.argmax(-1))
    return torch.cat(found)
