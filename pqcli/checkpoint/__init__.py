"""Checkpoints: what is read, from any input, and what is written back.

    with checkpoint.open("model.pt") as source:          # headers only; also .safetensors, legacy .pt, folders
        for info in source.tensors:                      # TensorInfo: name, shape, dtype, alias_of, role
            weight = source.read(info.name)              # one tensor at a time
        checkpoint.write(target, source.tensors, source.read, source.skeleton, format=source.format)

The `skeleton` is all that is not tensor data, as JSON: nesting, epoch counters, metadata, shards. With it and the
tensors, `write` gives the same checkpoint back.

    formats                  the table of formats: a module and a row each
    sniff                    which kind of file is it? (`sniff.sniff`)
    bytesource, limits       where a tensor's bytes lie, and fetching them with pread; what a header may cost
    pt/pickles, pt/objects   a pickle read as data; the classes that come back as themselves
    pt/tree, pt/rebuilding   the nesting as JSON, and back
    pt/naming, overlaps      what the tensors are called, where the model is; which of them share bytes
    pt/torch_save, safetensors_io                  the formats
    folder, dcp                                    files that belong together; torch's distributed checkpoints
    opened, opening, writing, reopening            the verbs; a checkpoint in another process

Names are loaded when first used: what only looks at names and headers of files does without numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pqcli.atomic import atomic_writer
    from pqcli.checkpoint.formats import by_suffix, default_suffix
    from pqcli.checkpoint.limits import Limits
    from pqcli.checkpoint.opened import LEFT_OUT, Checkpoint
    from pqcli.checkpoint.opening import open_checkpoint as open  # noqa: A004 - read as checkpoint.open
    from pqcli.checkpoint.pt.tree import Dropped, Json
    from pqcli.checkpoint.writing import write

_LAZY = {
    "LEFT_OUT": ("pqcli.checkpoint.opened", "LEFT_OUT"),
    "Checkpoint": ("pqcli.checkpoint.opened", "Checkpoint"),
    "Dropped": ("pqcli.checkpoint.pt.tree", "Dropped"),
    "Json": ("pqcli.checkpoint.pt.tree", "Json"),
    "Limits": ("pqcli.checkpoint.limits", "Limits"),
    "atomic_writer": ("pqcli.atomic", "atomic_writer"),
    "by_suffix": ("pqcli.checkpoint.formats", "by_suffix"),
    "default_suffix": ("pqcli.checkpoint.formats", "default_suffix"),
    "open": ("pqcli.checkpoint.opening", "open_checkpoint"),
    "write": ("pqcli.checkpoint.writing", "write"),
}

__all__ = [
    "LEFT_OUT",
    "Checkpoint",
    "Dropped",
    "Json",
    "Limits",
    "atomic_writer",
    "by_suffix",
    "default_suffix",
    "open",
    "write",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name not in _LAZY:
        raise AttributeError(f"module 'pqcli.checkpoint' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)
