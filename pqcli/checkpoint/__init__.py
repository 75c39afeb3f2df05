"""Checkpoints: what is read, from any input, and what is written back.

    with checkpoint.open("model.pt") as source:          # headers only; also .safetensors, legacy .pt, folders
        for info in source.tensors:                      # TensorInfo: name, shape, dtype, alias_of, role
            weight = source.read(info.name)              # one tensor at a time
        checkpoint.write(target, source.tensors, source.read, source.skeleton, format=source.format)

The `skeleton` is all that is not tensor data, as JSON: nesting, epoch counters, metadata, shards. With it and the
tensors, `write` gives the same checkpoint back.

    formats                  the table of formats: a module and a row each
    sniff                    which kind of file is it?
    bytesource, limits       where a tensor's bytes lie, and fetching them with pread; what a header may cost
    pt/pickles, pt/objects   a pickle read as data; the classes that come back as themselves
    pt/tree, pt/rebuilding   the nesting as JSON, and back
    pt/naming, overlaps      what the tensors are called, where the model is; which of them share bytes
    pt/torch_save, safetensors_io                  the formats
    folder, dcp                                    files that belong together; torch's distributed checkpoints
    opened, opening, writing, reopening            the verbs; a checkpoint in another process
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
