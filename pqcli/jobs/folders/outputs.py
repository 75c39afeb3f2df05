"""Whether compressing gives a folder, and where it goes: settled before any work, and before torch is imported."""

from __future__ import annotations

import os
from pathlib import Path

from pqcli.atomic import check_folder_target
from pqcli.errors import OutputError

ENDING = ".pq"
"""What a folder's name gets when it is compressed."""


def goes_to_folder(source: str | Path, output: str | Path | None) -> bool:
    """Whether compressing `source` gives a folder: it is one, and no lone file is asked for.

    A folder of torch's distributed checkpoints is one checkpoint in many files, which comes back as one file.
    """
    source = Path(source)
    if not source.is_dir() or (output is not None and Path(output).suffix == ".safetensors"):
        return False
    from pqcli.checkpoint.dcp import is_distributed  # only of a folder must so much be known
    from pqcli.checkpoint.folder import names_in

    return not is_distributed(names_in(source))


def default_folder(source: Path) -> Path:
    """`FOLDER.pq` beside a folder."""
    source = source.resolve() if source.name in {"", ".", ".."} else source
    return source.with_name(source.name + ENDING)


def check_folder_output(output: Path, source: Path, *, force: bool) -> None:
    """Raise OutputError where a folder cannot be written, or would lose or swallow the one that it is made of."""
    real, own = Path(os.path.realpath(output)), Path(os.path.realpath(source))
    if real == own:
        raise OutputError(f"'{output}' is the input itself; use -o to write elsewhere")
    if own in real.parents:
        raise OutputError(f"'{output}' lies in the folder that is read; use -o to write elsewhere")
    if real in own.parents:
        raise OutputError(f"'{output}' is a folder that holds the input; use -o to write elsewhere")
    check_folder_target(output, force=force)
