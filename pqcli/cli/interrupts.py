"""Ctrl-C, SIGTERM and SIGHUP: the process ends within a second, and leaves nothing half-written.

The first signal unwinds the main thread by an exception, as Ctrl-C does in any Python program. But the main thread may
be deep inside a kernel, or waiting for threads that are, and hears of nothing until they return. So a second thread
hears of every signal too; when the first has not ended the process after `GRACE`, or another one comes, it removes the
temporary files itself and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn

from pqcli.atomic import abandon, placed
from pqcli.jobs.journal.live import what_is_left

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE = 0.5
"""Seconds that the main thread gets to unwind."""


class Interrupted(KeyboardInterrupt):
    """A signal that asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within the block the signals raise `Interrupted`, once, and end the process soon whatever becomes of it.

    A signal that was ignored before (nohup, a job in the background) still is. In a thread other than the main one,
    which no signal reaches, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard, told = os.pipe()
    os.set_blocking(told, False)
    numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handle = _Once()
    watcher = threading.Thread(target=_watch, args=(heard,), daemon=True)
    watcher.start()
    previous_fd = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous_fd)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(told)  # the watcher reads the end, and leaves
        watcher.join()
        os.close(heard)


def leave(number: int) -> NoReturn:
    """End the process by the exit code of a signal, at once: the interpreter would wait for threads inside kernels."""
    abandon()
    os._exit(exit_code(number))


def exit_code(number: int) -> int:
    """What shells report of a process that a signal ended: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + number


def message() -> str:
    """What is true of the output when the work is interrupted."""
    n_files, left = placed(), what_is_left()
    written = f"{n_files} {'file was' if n_files == 1 else 'files were'} already written whole"
    if not left:
        return f"interrupted; {written if n_files else 'nothing was written'}"
    return f"interrupted; {written if n_files else 'no output was written'}; the same command goes on from here: {left}"


class _Once:
    """The handler: of several signals only the first is raised, so that nothing disturbs the unwinding."""

    def __init__(self) -> None:
        self._raised = False

    def __call__(self, number: int, _frame: object) -> None:
        if not self._raised:
            self._raised = True
            raise Interrupted(number)


def _watch(heard: int) -> None:
    first = _next(heard)
    if first is None:
        return
    ready, _, _ = select.select([heard], [], [], GRACE)
    if ready and _next(heard) is None:
        return  # the work has ended after all
    with contextlib.suppress(OSError):
        is_terminal = sys.__stderr__ is not None and sys.__stderr__.isatty()
        start = "\r\033[K\033[?25h" if is_terminal else ""  # a progress bar hides the cursor
        os.write(2, f"{start}error: {message()}\n".encode())
    leave(first)


def _next(heard: int) -> int | None:
    """The next of our signals; None at the end of the block. Others, which wake the pipe too, are passed over."""
    while byte := os.read(heard, 1):
        if byte[0] in SIGNALS:
            return byte[0]
    return None
