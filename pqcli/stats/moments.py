"""What calibration saw, as the means that an encoder asks for.

    stats = pqcli.stats.open("model.stats.safetensors")
    m = stats.moments("encoder.layer.0.output.dense.weight")     # None where there is none

Sums lie behind (`sums.py`), so that files can be added up; a site's matrix is read when it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from pqcli.readable import plural
from pqcli.stats.sums import Outline, SiteSums, WeightSums, watched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import torch


@dataclass(frozen=True)
class Moments:
    """Means over the samples of one weight. c is the number of columns: the size of the layer's input.

    axis            dimension of the weight that the columns belong to: 1, all dimensions after the first (linear,
                    convolution: the patch (in / groups, *kernel)); 0, the first (transformers' Conv1D, transposed
                    convolutions); -1 or -2, the last or the one before of stacked experts, pooled over the experts
    n_samples       samples (tokens, patches; for a plain embedding lookups) behind the moments
    second          (c, c) float32, E[x x'], symmetric; None where only blocks or a diagonal are kept
    blocks          square blocks along the diagonal of that matrix, the last one may be smaller; else None
    block_width     their width; None without blocks
    diagonal        (c,) float64, E[x^2]; None for a plain embedding
    halves          (2, c) float64, the same of two independent halves of the samples; None where not known
    noise           share of the squared correlations off the diagonal that is sampling error, 0 ... 1, measured between
                    the halves on up to 128 columns: shrink them by about 1 - noise; None where not known
    mean            (c,) float64, E[x]; None where not known
    gradient        mean over samples and outputs of the squared gradient of the network's output (a random projection,
                    or the loss with labels drawn from its prediction) at the layer's output; None if not collected
    row_gradient    (outputs,) float64, the same for each output; None where not known
    row_frequency   (rows,) float64, how often an embedding's rows were looked up, divided by the lookups; else None
    n_lookups       number of lookups
    lookup_gradient mean squared gradient at what the embedding gave (for a plain embedding `gradient` is this too)

    A weight used as embedding and as output layer (tied) has both kinds.
    """

    axis: int
    n_samples: float
    second: np.ndarray | None = None
    blocks: tuple[np.ndarray, ...] | None = None
    block_width: int | None = None
    diagonal: np.ndarray | None = None
    halves: np.ndarray | None = None
    noise: float | None = None
    mean: np.ndarray | None = None
    gradient: float | None = None
    row_gradient: np.ndarray | None = None
    row_frequency: np.ndarray | None = None
    n_lookups: float = 0.0
    lookup_gradient: float | None = None


class Statistics:
    """Statistics of a model's weights, from a file or from a collection; one matrix in memory at a time.

    `weights` are by name, `aliases` their tied names; `site(i)` reads the sums of an input, `outline(i)` what is known
    of it without reading them.
    """

    def __init__(
        self,
        weights: Mapping[str, WeightSums],
        aliases: Mapping[str, str],
        n_sites: int,
        site: Callable[[int], SiteSums],
        outline: Callable[[int], Outline] | None = None,
    ) -> None:
        self.weights, self.aliases, self.n_sites, self.site = weights, aliases, n_sites, site
        self.outline = outline or (lambda index: site(index).outline)

    def __repr__(self) -> str:
        return f"<Statistics of {plural(len(self.weights), 'weight')}, {plural(self.n_sites, 'input')}>"

    def __contains__(self, name: str) -> bool:
        return self.aliases.get(name, name) in self.weights

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Weights that have statistics; tied names of them are known too."""
        return tuple(self.weights)

    def moments(self, name: str) -> Moments | None:
        """What was seen of a weight, by its name in the checkpoint; None where nothing was."""
        weight = self.weights.get(self.aliases.get(name, name))
        if weight is None:
            return None
        seen = {} if weight.site is None else _site_means(self.site(weight.site))
        felt = _outputs(weight)
        n_samples = seen.pop("n_samples", felt["n_lookups"])
        return Moments(axis=weight.axis, n_samples=n_samples, **seen, **felt)  # type: ignore[arg-type]


def gradient_of(weight: WeightSums) -> float | None:
    """The mean squared gradient at the layer's output, or at what an embedding gave; None if not collected."""
    found = _outputs(weight).get("gradient")
    return found if isinstance(found, float) else None


def _site_means(sums: SiteSums) -> dict[str, object]:
    n = max(sum(sums.counts), 1e-300)
    means: dict[str, object] = {
        "n_samples": sum(sums.counts),
        "diagonal": _numpy(sums.diagonal.sum(0)) / n,
        "mean": None if sums.total is None else _numpy(sums.total) / n,
    }
    if min(sums.counts) > 0:
        means["halves"] = _numpy(sums.diagonal) / np.array(sums.counts)[:, None]
        means["noise"] = _noise(sums)
    if sums.second is None:
        return means
    second = sums.second.float().cpu().numpy() / np.float32(n)
    if sums.form == "full":
        return {**means, "second": second}
    ends = [min(sums.width, sums.columns - start) for start in range(0, sums.columns, sums.width)]
    blocks = tuple(block[:end, :end] for block, end in zip(second, ends, strict=True))
    return {**means, "blocks": blocks, "block_width": sums.width}


def _noise(sums: SiteSums) -> float | None:
    """Sampling error's share of the squared correlations off the diagonal.

    For halves A and B with equal expectation E|A - B|^2 = E|S - E S|^2, where S = A + B: the error of the whole.
    """
    if sums.watched is None or sums.columns < 2:
        return None
    halves = _numpy(sums.watched)
    scale = np.sqrt(_numpy(sums.diagonal).sum(0)[watched(sums.columns)])
    scale = np.where(scale > 0, scale, np.inf)
    a, b = halves / (scale[:, None] * scale)
    # halves of unequal size: compare at the size of the smaller, so that the difference has no bias
    share = np.array(sums.counts) / sum(sums.counts)
    difference = (a / share[0] - b / share[1]) * np.sqrt(share[0] * share[1])
    off = ~np.eye(len(a), dtype=bool)
    power = float(np.square(a + b)[off].sum())
    return min(1.0, float(np.square(difference)[off].sum()) / power) if power > 0 else 1.0


def _outputs(weight: WeightSums) -> dict[str, object]:
    felt: dict[str, object] = {"n_lookups": 0.0}
    if weight.gradient is not None and weight.n_gradient > 0:
        rows = _numpy(weight.gradient) / weight.n_gradient
        felt |= {"row_gradient": rows if len(rows) > 1 else None, "gradient": float(rows.mean())}
    if weight.lookups is not None:
        total = float(weight.lookups.sum())
        felt |= {"n_lookups": total, "row_frequency": _numpy(weight.lookups) / max(total, 1e-300)}
        if weight.n_lookup_gradient > 0:
            felt["lookup_gradient"] = weight.lookup_gradient / weight.n_lookup_gradient
            if weight.site is None:
                felt["gradient"] = felt["lookup_gradient"]
    return felt


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()
