"""What calibration saw: second moments of each layer's input, and how much the network's output feels each layer.

with pqcli.collect(model) as stats:
    for batch in loader:
        model(**batch)
stats.save("model.stats.safetensors")

pqcli.stats.open("model.stats.safetensors").moments("encoder.layer.0.output.dense.weight")
"""

from __future__ import annotations

from pqcli.stats.collecting import Collector, collect
from pqcli.stats.files import open_stats as open  # noqa: A004 - `pqcli.stats.open(file)` reads best
from pqcli.stats.files import save
from pqcli.stats.merging import merge
from pqcli.stats.moments import Moments, Statistics

__all__ = ["Collector", "Moments", "Statistics", "collect", "merge", "open", "save"]
