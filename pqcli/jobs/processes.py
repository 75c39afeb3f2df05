"""Workers that are processes of this machine: one for each GPU, or as many as were asked for.

Threads serve as long as their kernels release the interpreter lock. With several GPUs it is what they do between
kernels that counts, and each card wants a process of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

import torch

from pqcli.codecs.base import Found, Task
from pqcli.core.threads import n_threads
from pqcli.jobs import remote
from pqcli.jobs.executors import Hear, unheard
from pqcli.jobs.remote import Answer, LostWorkerError

_LOOKS: Final = 1.0
"""Seconds between two looks of a worker at whether its parent is still there."""
_device = "cpu"
"""Of this process, where it is a worker."""


@dataclass
class Processes:
    """An executor of processes, one for each of `devices`. Use as a context manager."""

    devices: tuple[torch.device, ...]
    in_flight_bytes: int
    _pool: ProcessPoolExecutor | None = field(default=None, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            for worker in list((pool._processes or {}).values()):  # noqa: SLF001 - there is no public way to end them
                worker.terminate()
            pool.shutdown(cancel_futures=True)
            del pool
            gc.collect()  # its locks: a process that ends in a hurry would leave them behind, and say so

    def results(self, tasks: Sequence[Task[Found]], hear: Hear = unheard) -> Iterator[tuple[int, Found]]:  # noqa: ARG002
        """The largest are sent first; results as they come. Nothing is told of tasks before they are done."""
        return remote.results(self, tasks, self.in_flight_bytes)

    @property
    def n_workers(self) -> int:
        """One a device."""
        return len(self.devices)

    def send(self, task: bytes, n_bytes: int) -> Future[Answer]:  # noqa: ARG002 - all share one memory
        """To whichever process is free."""
        try:
            return self._started().submit(_work, task)
        except BrokenProcessPool:  # a worker died since
            self._pool = None
            return self._started().submit(_work, task)

    def first(self, handles: Sequence[Future[Answer]]) -> Future[Answer]:
        """Done or broken."""
        done, _ = wait(handles, return_when=FIRST_COMPLETED)
        return next(handle for handle in handles if handle in done)

    def take(self, handle: Future[Answer]) -> Answer:
        """A process that dies takes the pool with it, and all tasks that others were at."""
        try:
            return handle.result()
        except BrokenProcessPool as error:
            raise LostWorkerError("a worker process died") from error

    def cancel(self, handles: Sequence[Future[Answer]]) -> None:
        """What has begun is not waited for."""
        for handle in handles:
            handle.cancel()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            devices = context.SimpleQueue()
            for device in self.devices:
                devices.put(str(device))
            share = max(1, n_threads() // len(self.devices))
            self._pool = ProcessPoolExecutor(
                len(self.devices), context, initializer=_begin, initargs=(devices, share, os.getpid())
            )
        return self._pool


def _begin(devices: Any, share: int, parent: int) -> None:
    """A worker takes a device, leaves Ctrl-C to its parent, and ends when that does."""
    global _device
    _device = devices.get()
    remote.take_share(share)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOKS)
        os._exit(1)

    threading.Thread(target=look, daemon=True).start()


def _work(task: bytes) -> Answer:
    return remote.run_pickled(task, _device)
