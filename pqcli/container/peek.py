"""Is this one of pqcli's own files? Told from its header, before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from pqcli.errors import ContainerError

SUFFIX: Final = ".pq.safetensors"
MANIFEST: Final = "pqcli.manifest"
_LARGEST_HEADER: Final = 100_000_000
"""What the safetensors library allows."""


def check_container(path: Path) -> None:
    """Raise ContainerError where there is no file, or not one that pqcli wrote."""
    if path.is_dir():
        raise ContainerError(f"{path}: a folder, not a {SUFFIX} file; `pqcli compress` makes one of it")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            keys = json.loads(file.read(length)) if length <= _LARGEST_HEADER else None
    except FileNotFoundError:
        raise ContainerError(f"{path}: no such file") from None
    except (ValueError, RecursionError):
        keys = None
    except OSError as error:
        raise ContainerError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not isinstance(keys, dict):
        raise ContainerError(
            f"{path}: not a {SUFFIX} file, or a damaged one; `pqcli compress` makes one of a checkpoint"
        )
    if MANIFEST not in keys:
        raise ContainerError(f"{path}: a safetensors file, but not compressed by pqcli; `pqcli compress` does that")
