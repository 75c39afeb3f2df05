"""What is added up while a model runs: sums over samples, so that runs and machines can be added together.

Shapes: inputs (n, c), one row a sample (a token, a patch); `second` (c, c) is the sum of x x'. A *site* is one input
that may feed several layers (query, key, value); a *weight* points to its site. Above `full_width` columns a site keeps
square blocks along the diagonal instead of the whole matrix.

Memory of a site: 4 c^2 bytes, or 4 c w with blocks of width w, plus some 130 kB.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

N_WATCHED = 128
"""Columns of which both halves of the samples keep their own matrix, to measure the sampling error."""


def watched(columns: int) -> np.ndarray:
    """The columns (ascending) whose moments are kept for both halves; the same for every run."""
    chosen = np.random.default_rng(columns).permutation(columns)[:N_WATCHED]
    return np.asarray(np.sort(chosen))


@dataclass(frozen=True)
class Outline:
    """What is known of a site without its numbers: columns, form, width of blocks, samples in each half."""

    columns: int
    form: str
    width: int
    counts: tuple[float, float]


@dataclass
class SiteSums:
    """Sums over the samples of one input.

    `form` is "full" (`second` (c, c)), "blocks" (`second` (ceil(c / w), w, w), padded with zeros) or "diagonal"
    (`second` None). `diagonal` (2, c), `watched` (2, s, s) and `counts` hold two independent halves of the samples:
    every other example. `total` (c,) is the sum of x, or None where it is not known.
    """

    columns: int
    form: str
    width: int
    second: torch.Tensor | None
    diagonal: torch.Tensor
    total: torch.Tensor | None
    watched: torch.Tensor | None
    counts: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @classmethod
    def empty(cls, columns: int, device: torch.device, full_width: int, block_width: int) -> SiteSums:
        """Sums of nothing yet, on the device of the layer's input."""
        size = min(columns, N_WATCHED)
        full = columns <= full_width
        shape = (columns, columns) if full else (-(-columns // block_width), block_width, block_width)
        return cls(
            columns,
            "full" if full else "blocks",
            columns if full else block_width,
            torch.zeros(shape, device=device),
            torch.zeros(2, columns, dtype=torch.float64, device=device),
            torch.zeros(columns, dtype=torch.float64, device=device),
            torch.zeros(2, size, size, device=device),
        )

    def add(self, x: torch.Tensor, half: int) -> None:
        """Add samples `x` (n, c) float32 that belong to one half."""
        if self.second is not None:
            if self.form == "full":
                self.second.addmm_(x.T, x)
            else:
                padded = torch.nn.functional.pad(x, (0, self.second.shape[0] * self.width - self.columns))
                blocks = padded.view(len(x), -1, self.width).transpose(0, 1)
                self.second.baddbmm_(blocks.mT, blocks)
        self.diagonal[half] += x.square().sum(0, dtype=torch.float64)
        if self.total is not None:
            self.total += x.sum(0, dtype=torch.float64)
        if self.watched is not None:
            some = x[:, torch.from_numpy(watched(self.columns)).to(x.device)]
            self.watched[half].addmm_(some.T, some)
        self.counts[half] += len(x)

    @property
    def outline(self) -> Outline:
        """Its columns, form, width and counts."""
        return Outline(self.columns, self.form, self.width, (self.counts[0], self.counts[1]))

    def copy(self) -> SiteSums:
        """Sums of their own that start at the same values."""
        kept = [None if t is None else t.clone() for t in (self.second, self.diagonal, self.total, self.watched)]
        second, diagonal, total, seen = kept
        assert diagonal is not None  # noqa: S101 - for the type checker: never None above
        return SiteSums(self.columns, self.form, self.width, second, diagonal, total, seen, list(self.counts))


@dataclass
class WeightSums:
    """What one weight felt, beside its input.

    `site` is the input's index, or None for a plain embedding. `axis` is the dimension of the weight that the input's
    columns belong to (see `Moments.axis`). `gradient` (outputs,) sums the squared gradient at the layer's output over
    `n_gradient` samples; `lookups` (rows,) counts how often each row was looked up, and `lookup_gradient` sums the
    squared gradient at what was looked up, averaged over the row's columns, over `n_lookup_gradient` lookups.
    """

    site: int | None = None
    axis: int = 1
    gradient: torch.Tensor | None = None
    n_gradient: float = 0.0
    lookups: torch.Tensor | None = None
    lookup_gradient: float = 0.0
    n_lookup_gradient: float = 0.0
