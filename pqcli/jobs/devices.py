"""Which devices there are to work on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pqcli.core.threads import n_threads
from pqcli.errors import UsageError

WORKERS_PER_GPU = 2
"""One reads, measures and hashes on the CPU while the card learns the other's codebook."""


def resolve_device(device: str) -> torch.device:
    """The device that "auto", "cpu", "cuda", "cuda:1" or "mps" means here. Raises UsageError where there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device!r}: use auto, cpu, cuda, cuda:0 or mps") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: {torch.cuda.device_count()} CUDA devices are visible; use --device cpu")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this machine has no Metal device; use --device cpu")
    if found.type not in {"cpu", "cuda", "mps"}:
        raise UsageError(f"--device {device!r}: use auto, cpu, cuda, cuda:0 or mps")
    return found


def workers(device: torch.device) -> list[torch.device]:
    """A device per worker: the cores of the CPU; all CUDA cards where none was named, or the one that was, twice."""
    if device.type == "cpu":
        return [device] * n_threads()
    if device.type != "cuda":
        return [device]
    cards = (
        [device] if device.index is not None else [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    )
    return WORKERS_PER_GPU * cards


@contextmanager
def at_work(device: torch.device) -> Iterator[None]:
    """On a GPU, this thread works there, in a stream of its own: copies and EM of two workers overlap."""
    if device.type != "cuda":
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.device(device), torch.cuda.stream(stream):
        yield
