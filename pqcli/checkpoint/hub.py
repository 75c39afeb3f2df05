"""Names and addresses where a path is expected: models of the Hugging Face Hub, and other addresses.

Nothing that exists here is taken for a name, and neither is what looks like the path of a file. A name is looked up by
`huggingface_hub`, where that is installed: it finds what was downloaded before, or downloads it. Else the message says
how to get it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pqcli.checkpoint import formats
from pqcli.errors import CheckpointError

_PART = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}"
_NAME = re.compile(rf"{_PART}/{_PART}")
_ON_HUB = re.compile(rf"(?:hf://|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)({_PART}/{_PART})(?:/.*)?")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+.*")
_FILE_OF_HUB = re.compile(r"/(?:resolve|blob)/[^/]+/(.+)")


@dataclass(frozen=True)
class Place:
    """Where a source lies; `name` is what the Hub calls it, "" for a path."""

    path: Path
    name: str = ""

    def output(self) -> Path | None:
        """Where what is made of it goes, beside the current folder's other files; None for what has a place already."""
        return Path(self.name.rpartition("/")[2] + ".pq") if self.name else None


def located(source: str | Path) -> Place:
    """The file or folder that is meant; a model of the Hub is downloaded where that can be done.

    Raises `CheckpointError` for an address or a name that cannot be had here, saying what to do.
    """
    path, text = Path(source), as_typed(source)
    if _exists(path):
        return Place(path)
    on_hub = _ON_HUB.fullmatch(text)
    if on_hub:
        file = _FILE_OF_HUB.search(text)
        if file:
            name = on_hub[1]
            folder = name.rpartition("/")[2]
            raise CheckpointError(
                f"'{text}' is the address of one file of {name}; download it first, and name it here: "
                f"hf download {name} {file[1].partition('?')[0]} --local-dir {folder}"
            )
        return _of_hub(on_hub[1], text)
    if _ADDRESS.fullmatch(text):
        raise CheckpointError(
            f"'{text}' is an address, and pqcli reads files; download it first, and name the file here: "
            f"curl -L -O '{text}'"
        )
    if _looks_like_a_name(path, text):
        return _of_hub(text, text)
    return Place(path)  # opening it says that it is not there


def as_typed(source: str | Path) -> str:
    """The text that a path was made of: of an address, `Path` leaves one slash out."""
    return re.sub(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)", r"\1://", str(source))


def _looks_like_a_name(path: Path, text: str) -> bool:
    """Whether it is `org/name`, and not a file in a folder that is there, or is not there yet."""
    if not _NAME.fullmatch(text) or path.parent.is_dir():
        return False
    return path.suffix.lower() not in (*formats.all_suffixes(), ".json", ".gguf", ".h5", ".zip")


def _of_hub(name: str, text: str) -> Place:
    folder = name.rpartition("/")[2]
    what_to_do = f"hf download {name} --local-dir {folder}, then pqcli compress {folder}"
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"'{text}' is no file and no folder here. If the model of this name on the Hugging Face Hub is meant, "
            f"download it first: {what_to_do} (pip install huggingface_hub brings the command hf)"
        ) from None
    try:
        return Place(Path(huggingface_hub.snapshot_download(name)), name)
    except Exception as error:  # whatever it is: of the network, of the Hub, of the disk
        why = str(error).strip().partition("\n")[0][:200] or "no details"
        raise CheckpointError(
            f"'{text}' is no file and no folder here, and the Hugging Face Hub did not give a model of this name "
            f"({type(error).__name__}: {why}). Where the Hub can be reached: {what_to_do}"
        ) from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return True  # there is something wrong with it, which opening it says
