"""Opening a checkpoint of any kind, from its headers alone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pqcli.checkpoint import formats
from pqcli.checkpoint.asked import Asked
from pqcli.checkpoint.bytesource import ByteSource
from pqcli.checkpoint.dcp import ENDING, is_distributed, open_distributed
from pqcli.checkpoint.folder import FolderFiles, check_index, find_weights, names_in, sizes_in
from pqcli.checkpoint.opened import Checkpoint, Layout, check_layout
from pqcli.checkpoint.reopening import stamp_of
from pqcli.checkpoint.sniff import sniff
from pqcli.errors import CheckpointError
from pqcli.limits import Limits

if TYPE_CHECKING:
    from pqcli.checkpoint.pt.tree import Json
    from pqcli.checkpoint.stamps import Stamp


def open_checkpoint(
    path: str | Path,
    *,
    limits: Limits | None = None,
    from_module: bool = False,
    weights: tuple[str, ...] | None = None,
) -> Checkpoint:
    """A `Checkpoint` over a `.pt` (zip or legacy), a `.safetensors` or a folder; only headers are read.

    What the file is, its first bytes tell, not its name. Raises `CheckpointError`, with one message that says what is
    wrong, where, and what to do. Nothing in a pickle is imported or run (see `pickles`), and what understanding the
    headers may cost is limited. With `from_module`, a whole pickled model is read as its state dict (see `modules`). Of
    a folder, `weights` names the files to take (one, or an index and its shards); without it they are found.
    """
    path, asked = Path(path), Asked(limits or Limits(), from_module, weights=weights)
    if sniff(path) == formats.FOLDER:
        return _open_folder(path, asked)
    with ExitStack() as stack:
        format_, source, layout = _open_file(path, stack, asked)
        skeleton = {"source": format_, **layout.skeleton}
        suffix = formats.unusual_suffix(path, format_)
        if suffix is not None:
            skeleton["suffix"] = suffix
        stack.pop_all()
    return Checkpoint(path, format_, ((source, layout),), skeleton, asked=asked)


def _open_file(path: Path, stack: ExitStack, asked: Asked) -> tuple[str, ByteSource, Layout]:
    kind = sniff(path)
    if kind == formats.FOLDER:
        raise CheckpointError(f"'{path}' is a folder where a file is expected")
    source = ByteSource(path, asked)
    stack.callback(source.close)
    try:
        layout = formats.FORMATS[kind].read(source)
    except CheckpointError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error}") from error
    check_layout(layout, source)
    layout = layout.with_overlaps()
    if not layout.tensors:
        raise CheckpointError(f"'{path}' holds no tensors")
    return kind, source, layout


def _open_folder(folder: Path, asked: Asked) -> Checkpoint:
    names = names_in(folder) if asked.weights is None else list(asked.weights)
    if is_distributed(names):
        own = {name for name in names if name.endswith(ENDING)}
        sizes = {name: n_bytes for name, n_bytes in sizes_in(folder).items() if name not in own}
        return open_distributed(folder, names, sizes, asked)
    if asked.weights is not None and len(names) == 1:  # one that is named may also be called like a trainer's
        files = FolderFiles(tuple(names), None, {})
    else:
        files = find_weights(folder, names, asked.limits)
    parts: list[tuple[ByteSource, Layout]] = []
    shards: list[Json] = []
    owner: dict[str, str] = {}
    with ExitStack() as stack:
        for shard in files.shards:
            format_, source, layout = _open_file(folder / shard, stack, asked)
            for info in layout.tensors:
                if owner.setdefault(info.name, shard) != shard:
                    raise CheckpointError(f"'{folder}': tensor '{info.name}' is in both {owner[info.name]} and {shard}")
            parts.append((source, layout))
            shards.append({"file": shard, "format": format_, "n": len(layout.tensors), **layout.skeleton})
        if files.index:
            found = {shard: tuple(layout.views) for shard, (_, layout) in zip(files.shards, parts, strict=True)}
            check_index(folder, files.index, found)
        stack.pop_all()
    skeleton: dict[str, Json] = {"source": formats.FOLDER, "shards": shards}
    stamps: tuple[Stamp, ...] = ()
    if files.index:
        n_bytes = sum(info.n_bytes for _, layout in parts for info in layout.tensors if info.alias_of is None)
        stamps = (stamp_of(folder / files.index.name),)
        skeleton["index"] = {"file": files.index.name, "metadata": files.index.metadata, "n_bytes": n_bytes}
    side_sizes = files.side_sizes if asked.weights is None else {}
    return Checkpoint(folder, formats.FOLDER, tuple(parts), skeleton, side_sizes, stamps, asked)
