"""Compress trained checkpoints by product quantization, and get the same checkpoint back.

    import pqcli

    report = pqcli.compress("model.pt")                 # -> model.pq.safetensors
    pqcli.decode("model.pq.safetensors")                # -> model.decoded.pt
    state_dict = pqcli.load("model.pq.safetensors")     # dense tensors, nothing written
    pqcli.load_into(model, "model.pq.safetensors")      # the same, one by one into a model
    pqcli.attach(model, "model.pq.safetensors")         # or compressed in it, to train the codebooks
    pqcli.save(model.state_dict(), "model.pq.safetensors")

Names are loaded when first used: `import pqcli` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pqcli.errors import PQError
from pqcli.version import __version__

if TYPE_CHECKING:
    from pqcli.container.folder import Containers
    from pqcli.container.folder import open_compressed as open  # noqa: A004 - `pqcli.open(file)` reads best
    from pqcli.container.reader import Container
    from pqcli.core.pq.pq import PQ
    from pqcli.jobs.attach import attach
    from pqcli.jobs.calibrate import calibrate
    from pqcli.jobs.compare import compare
    from pqcli.jobs.compress import compress, save
    from pqcli.jobs.decode import decode, load
    from pqcli.jobs.export import export
    from pqcli.jobs.loading import load_into
    from pqcli.jobs.preview import preview
    from pqcli.jobs.report import report
    from pqcli.jobs.verify import verify
    from pqcli.limits import Limits
    from pqcli.recipe.recipe import Recipe, Rule
    from pqcli.reports.figures import Report
    from pqcli.stats.collecting import collect
    from pqcli.stats.moments import Statistics

_LAZY = {
    "PQ": ("pqcli.core.pq.pq", "PQ"),
    "Container": ("pqcli.container.reader", "Container"),
    "Containers": ("pqcli.container.folder", "Containers"),
    "Limits": ("pqcli.limits", "Limits"),
    "Recipe": ("pqcli.recipe.recipe", "Recipe"),
    "Report": ("pqcli.reports.figures", "Report"),
    "Rule": ("pqcli.recipe.recipe", "Rule"),
    "Statistics": ("pqcli.stats.moments", "Statistics"),
    "attach": ("pqcli.jobs.attach", "attach"),
    "calibrate": ("pqcli.jobs.calibrate", "calibrate"),
    "collect": ("pqcli.stats.collecting", "collect"),
    "compare": ("pqcli.jobs.compare", "compare"),
    "compress": ("pqcli.jobs.compress", "compress"),
    "decode": ("pqcli.jobs.decode", "decode"),
    "export": ("pqcli.jobs.export", "export"),
    "load": ("pqcli.jobs.decode", "load"),
    "load_into": ("pqcli.jobs.loading", "load_into"),
    "open": ("pqcli.container.folder", "open_compressed"),
    "preview": ("pqcli.jobs.preview", "preview"),
    "report": ("pqcli.jobs.report", "report"),
    "save": ("pqcli.jobs.compress", "save"),
    "verify": ("pqcli.jobs.verify", "verify"),
}

__all__ = [
    "PQ", "Container", "Containers", "Limits", "PQError", "Recipe", "Report", "Rule", "Statistics", "__version__",
    "attach", "calibrate", "collect", "compare", "compress", "decode", "export", "load", "load_into", "open", "preview",
    "report", "save", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "stats":
        return importlib.import_module("pqcli.stats")
    if name not in _LAZY:
        raise AttributeError(f"module 'pqcli' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)
