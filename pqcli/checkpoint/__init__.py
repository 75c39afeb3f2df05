"""Checkpoints: what is read, from any input, and what is written back.

    with checkpoint.open("model.pt") as source:          # headers only; also .safetensors, legacy .pt, folders
        for info in source.tensors:                      # TensorInfo: name, shape, dtype, alias_of, role
            weight = source.read(info.name)              # one tensor at a time
        checkpoint.write(target, source.tensors, source.read, source.skeleton, format=source.format)

The `skeleton` is all that is not tensor data, as JSON: nesting, epoch counters, metadata, shards. With it and the
tensors, `write` gives the same checkpoint back.

    formats          the table of formats: a module and a row each
    sniff            which kind of file is it?
    bytesource       where a tensor's bytes lie, and fetching them with pread
    pickles, tree    a pickle read as data; its nesting as JSON and back
    naming           what the tensors are called, where the model is
    pt/torch_save, safetensors_io                    the formats
    folder                                           files that belong together
    opened, opening, writing, reopening              the verbs; a checkpoint in another process
"""

from pqcli.atomic import atomic_writer
from pqcli.checkpoint.formats import by_suffix, default_suffix
from pqcli.checkpoint.limits import Limits
from pqcli.checkpoint.opened import LEFT_OUT, Checkpoint
from pqcli.checkpoint.opening import open_checkpoint as open  # noqa: A004 - read as checkpoint.open
from pqcli.checkpoint.pt.tree import Dropped, Json
from pqcli.checkpoint.sniff import sniff
from pqcli.checkpoint.writing import write

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
    "sniff",
    "write",
]
