"""Is this one of pqcli's own files? Told from its header, before torch is imported."""

from __future__ import annotations

from pathlib import Path

from pqcli.container.folder import compressed_folder
from pqcli.container.header import INDEX_SUFFIX, MANIFEST, SUFFIX, open_file, recognised
from pqcli.container.limits import Limits
from pqcli.errors import ContainerError

__all__ = ["MANIFEST", "SUFFIX", "check_container", "is_container"]


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
