"""Which executor does the work of a run, by what the user asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pqcli.defaults import IN_FLIGHT_BYTES
from pqcli.errors import UsageError
from pqcli.jobs.devices import resolve_device
from pqcli.jobs.executors import Executor, Threads

MOST_WORKERS = 1024


@dataclass(frozen=True)
class Place:
    """An executor, and the kind of device that its tasks run on."""

    executor: Executor
    device: torch.device


@contextmanager
def place_of_work(
    device: str, max_memory: int | None, *, ray: str | None = None, workers: int | None = None
) -> Iterator[Place]:
    """Threads of this process; with `workers` so many processes, in turn on the GPUs there are; with `ray` a cluster.

    Raises UsageError for what cannot be meant, MissingExtraError without Ray.
    """
    if ray is not None and workers is not None:
        raise UsageError("--ray and --workers: Ray knows how many workers it has; give one of them")
    if ray is not None:
        from pqcli.jobs.cluster import Cluster

        kind = "auto" if device == "auto" else torch.device(device).type
        with Cluster(ray, kind, IN_FLIGHT_BYTES) as cluster:
            yield Place(cluster, torch.device(cluster.device))
    elif workers is not None:
        from pqcli.jobs.processes import Processes

        if not 1 <= workers <= MOST_WORKERS:
            raise UsageError(f"--workers {workers}: from 1 to {MOST_WORKERS}")
        on = resolve_device(device)
        n_cards = torch.cuda.device_count() if on.type == "cuda" and on.index is None else 0
        devices = tuple(torch.device("cuda", i % n_cards) if n_cards else on for i in range(workers))
        in_flight = Threads.within(on, max_memory).in_flight_bytes // workers if max_memory else IN_FLIGHT_BYTES
        with Processes(devices, in_flight) as processes:
            yield Place(processes, on)
    else:
        on = resolve_device(device)
        yield Place(Threads.within(on, max_memory), on)
