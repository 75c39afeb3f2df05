"""Four-bit integers in groups that share a scale: the common form that a compressed size is compared with.

Round to nearest, nothing learned: every `group` weights that lie side by side in memory have a float16 scale, their
largest magnitude / 7, and integers from -8 to 7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import pad

from pqcli.core import metrics

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 7
SMALLEST_SCALE = 1e-12
"""A group of zeros has a scale of zero; its weights are divided by this."""
CHUNK_GROUPS = 1 << 11
"""Groups measured at a time."""


def rounded(weights: Tensor, group: int) -> Tensor:
    """What `weights` (n,) float32 come back as, (n,) float32."""
    n_groups = -(-weights.numel() // group)
    groups = pad(weights, (0, n_groups * group - weights.numel())).reshape(n_groups, group)
    scales = (groups.abs().amax(1, keepdim=True) / LARGEST).half().float()
    integers = (groups / scales.clamp(min=SMALLEST_SCALE)).round().clamp(-LARGEST - 1, LARGEST)
    return (integers * scales).flatten()[: weights.numel()]


def error(weight: Tensor, group: int) -> metrics.Error:
    """The error of this form, for a tensor of any shape and floating dtype."""
    chunks = weight.reshape(-1).split(CHUNK_GROUPS * group)  # type: ignore[no-untyped-call]
    return metrics.total(metrics.compare(chunk, rounded(chunk.float(), group)) for chunk in chunks if chunk.numel())
