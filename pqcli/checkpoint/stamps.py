"""What a file was when it was opened, so that it can be told later whether it still is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stamp:
    """A file as it was when it was opened; `path` is absolute."""

    path: str
    n_bytes: int
    modified_ns: int
