"""Is this one of pqcli's own files? Told from its header, before torch is imported."""

from __future__ import annotations

from pathlib import Path

from pqcli.container.header import MANIFEST, SUFFIX, open_file, recognised
from pqcli.container.limits import Limits
from pqcli.errors import ContainerError

__all__ = ["MANIFEST", "SUFFIX", "check_container", "is_container"]


def check_container(path: Path, limits: Limits | None = None) -> None:
    """Raise ContainerError where there is no file, or not one that pqcli wrote."""
    with open_file(path) as file:
        recognised(path, file, limits or Limits())


def is_container(path: Path, limits: Limits | None = None) -> bool:
    """Whether the file at `path` is one that pqcli wrote."""
    try:
        check_container(path, limits)
    except ContainerError:
        return False
    return True
