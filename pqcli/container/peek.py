"""Is this one of pqcli's own files, and of which tensors? Told from its header and manifest, without torch."""

from __future__ import annotations

from pathlib import Path

from pqcli.container.folder import compressed_folder, full_name
from pqcli.container.header import INDEX_SUFFIX, MANIFEST, SHARD_NAME, SUFFIX, open_file, read_header, recognised
from pqcli.container.limits import TEXT_SHARE, Limits, inflate, parse_json
from pqcli.errors import ContainerError

__all__ = ["MANIFEST", "SUFFIX", "check_container", "is_container", "tensor_names"]


def check_container(path: Path, limits: Limits | None = None) -> None:
    """Raise ContainerError where there is no file, or not one that pqcli wrote; of a folder, where it holds none."""
    if path.is_dir():
        folder = compressed_folder(path)
        for name in folder.containers.values():
            check_container(path / name, limits)
        return
    if path.name.endswith(INDEX_SUFFIX):
        return  # opening it reads little more
    with open_file(path) as file:
        recognised(path, file, limits or Limits())


def is_container(path: Path, limits: Limits | None = None) -> bool:
    """Whether the file at `path` is one that pqcli wrote."""
    try:
        check_container(path, limits)
    except ContainerError:
        return False
    return True


def tensor_names(path: Path) -> list[str]:
    """What the tensors of a container, or of a compressed folder, are called, for completion: nothing of it is checked.

    Raises ContainerError or ValueError where that cannot be told.
    """
    if path.is_dir():
        found = compressed_folder(path).containers
        return [full_name(label, name) for label, place in found.items() for name in tensor_names(path / place)]
    if path.name.endswith(INDEX_SUFFIX):  # the manifest lies in the first of its files
        stem = path.name.removesuffix(INDEX_SUFFIX)
        shards = sorted(one for one in path.parent.glob(f"*{SUFFIX}") if _is_of(one.name, stem))
        return tensor_names(shards[0]) if shards else []
    limits = Limits()
    with open_file(path) as file:
        place = read_header(path, file, limits).entries[MANIFEST]
        file.seek(place.start)
        manifest = parse_json(inflate(file.read(place.n_bytes), limits.json_bytes // TEXT_SHARE), limits.json_bytes)
    return [str(record["name"]) for record in manifest["tensors"]]


def _is_of(name: str, stem: str) -> bool:
    shard = SHARD_NAME.fullmatch(name)
    return shard is not None and shard[1] == stem
