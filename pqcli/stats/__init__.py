"""What calibration saw: second moments of each layer's input, and how much the network's output feels each layer.

with pqcli.collect(model) as stats:
    for batch in loader:
        model(**batch)
stats.save("model.stats.safetensors")

pqcli.stats.open("model.stats.safetensors").moments("encoder.layer.0.output.dense.weight")

Names are loaded when first used: files that tell of predicted damage are read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqcli.stats.collecting import Collector, collect
    from pqcli.stats.files import open_stats as open  # noqa: A004 - `pqcli.stats.open(file)` reads best
    from pqcli.stats.files import save
    from pqcli.stats.merging import merge
    from pqcli.stats.moments import Moments, Statistics

_LAZY = {
    "Collector": ("pqcli.stats.collecting", "Collector"),
    "Moments": ("pqcli.stats.moments", "Moments"),
    "Statistics": ("pqcli.stats.moments", "Statistics"),
    "collect": ("pqcli.stats.collecting", "collect"),
    "merge": ("pqcli.stats.merging", "merge"),
    "open": ("pqcli.stats.files", "open_stats"),
    "save": ("pqcli.stats.files", "save"),
}

__all__ = ["Collector", "Moments", "Statistics", "collect", "merge", "open", "save"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'pqcli.stats' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)
