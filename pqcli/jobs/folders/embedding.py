"""Small files of a folder that go into a lone container, and come out of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pqcli.atomic import atomic_writer
from pqcli.checkpoint.bytesource import reading
from pqcli.checkpoint.components import components_of
from pqcli.errors import OutputError, UsageError
from pqcli.jobs.folders.outputs import goes_to_folder
from pqcli.limits import Limits

LARGEST_BYTES = 16 << 20
"""A larger file is none that is meant to lie inside another one."""
MOST_BYTES = 64 << 20
"""All of them together are read into memory."""


def check_embedding(source: Path, output: str | Path | None) -> None:
    """Raise UsageError unless a folder becomes a lone file."""
    if not source.is_dir() or goes_to_folder(source, output):
        raise UsageError(
            "--embed-files puts the small files of a folder into one container: name a folder, and add "
            "-o x.pq.safetensors"
        )


def small_files(source: Path, limits: Limits | None = None) -> dict[str, bytes]:
    """The files beside the weights at the top of a folder, by their paths; larger ones stay where they are.

    Weights in its sub-folders are such files too.
    """
    found = components_of(source, limits=limits)
    top = {name for one in found.components if one.is_main and not one.place for name in one.weights}
    paths = [path for path in found.files if path not in top and path not in found.left_out]
    sizes = {path: (source / path).stat().st_size for path in paths}
    files: dict[str, bytes] = {}
    left = MOST_BYTES
    for path, n_bytes in sizes.items():
        if n_bytes <= min(LARGEST_BYTES, left):
            with reading(source / path):
                files[path] = (source / path).read_bytes()
            left -= n_bytes
    return files


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files into a folder that becomes whole elsewhere. Raises OutputError where there is one of that name."""
    for path, data in files.items():
        target = folder / path
        if target.exists():
            raise OutputError(f"the container holds a file {path}, and weights that decode to a file of this name")
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_writer(target) as file:
            file.write(data)
