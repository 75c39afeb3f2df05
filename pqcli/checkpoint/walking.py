"""What lies in a folder and in the folders of it: ordinary files, and links that stay inside.

A link that leads out of the folder is told and not followed: a folder from a stranger must not carry a file of ours
along. In the cache of the Hugging Face Hub a snapshot is a folder of links into the `blobs` beside it; there "inside"
is the folder of the whole model.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pqcli.checkpoint.bytesource import reading
from pqcli.errors import CheckpointError

Value = TypeVar("Value")

MOST_FILES = 20_000

_OWN_ENDINGS = (".pqcli", ".pqcli-lock", ".pqcli-journal")
"""What pqcli itself may have lying about while it works, or when it was killed (`pqcli.atomic`, `pqcli.claim`)."""
_BOOKKEEPING = {".git": "what git keeps for itself", ".cache/huggingface": "what the download keeps for itself"}


@dataclass(frozen=True)
class Walk:
    """What lies in a folder, all by their paths in it, with `/` between, in order.

    `files` are ordinary files with their sizes, links to such files among them; `folders` the folders; `links` are
    links to folders inside, with the place that they lead to as seen from the link; `refused` is what is not carried,
    with the reason.
    """

    files: dict[str, int] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    links: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def walk(folder: Path) -> Walk:
    """What lies in `folder`, hidden files included. Raises `CheckpointError` where it cannot be read or never ends."""
    found = Walk()
    folders: list[str] = []
    with reading(folder):
        root = folder.resolve()
        home = _home(root)
        for place, below, names in os.walk(root, onerror=_raise):
            here = Path(place)
            for name in list(below):
                path = here / name
                relative = path.relative_to(root).as_posix()
                if path.is_symlink():
                    below.remove(name)
                    _take_link(path, relative, root, found)
                elif relative in _BOOKKEEPING or name == ".git":
                    below.remove(name)
                    found.refused[relative] = _BOOKKEEPING.get(relative, _BOOKKEEPING[".git"])
                else:
                    folders.append(relative)
            for name in names:
                if not name.endswith(_OWN_ENDINGS):
                    _take_file(here / name, (here / name).relative_to(root).as_posix(), home, found)
            if len(found.files) + len(folders) > MOST_FILES:
                raise CheckpointError(
                    f"'{folder}' and its folders hold more than {MOST_FILES:,} files, too many to be a checkpoint; "
                    "name the weights themselves"
                )
    return Walk(_sorted(found.files), tuple(sorted(folders)), _sorted(found.links), _sorted(found.refused))


def _home(root: Path) -> Path:
    """Within what links may lead: the folder, or the Hub's cache of the model of which it is a snapshot."""
    model = root.parent.parent
    return model if root.parent.name == "snapshots" and model.name.startswith("models--") else root


def _take_link(path: Path, relative: str, root: Path, found: Walk) -> None:
    """A link to a folder: followed by nobody, but made again where it stays inside."""
    target = path.resolve()
    if target.is_relative_to(root):
        found.links[relative] = os.path.relpath(target, path.parent)
    else:
        found.refused[relative] = f"a link out of the folder, to {target}"


def _take_file(path: Path, relative: str, home: Path, found: Walk) -> None:
    if path.is_symlink():
        try:
            target = path.resolve()
        except RuntimeError:  # how Python 3.11 reports links in a circle
            target = path
        if not target.is_relative_to(home):
            found.refused[relative] = f"a link out of the folder, to {target}"
            return
        if not target.exists() or target.is_symlink():
            found.refused[relative] = "a link to something that is not there"
            return
    if path.is_file():
        found.files[relative] = path.stat().st_size
    else:
        found.refused[relative] = "a pipe, a socket or a device"


def _sorted(table: dict[str, Value]) -> dict[str, Value]:
    """By path, what lies in the folder itself first."""
    return dict(sorted(table.items(), key=lambda item: ("/" in item[0], item[0])))


def _raise(error: OSError) -> None:
    raise error
