"""How a command ends: the one place that turns an exception into a message and an exit code.

0 done, 1 an error of pqcli's own tree, 2 usage, 3 a check failed, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

import typer

from pqcli.errors import OutputError, PQError

if TYPE_CHECKING:
    from pqcli.cli.console import Console

EXIT_INTERRUPTED = 130


def run(work: Callable[[Console], None], *, json: bool = False, quiet: bool = False) -> None:
    """Do the work; end the process with the right exit code and, for a failure, one message and no traceback."""
    from pqcli.cli.console import Console

    console = Console(quiet=quiet, json=json)
    with _terminable():
        try:
            work(console)
        except PQError as error:
            console.error(error)
            _exit(error.exit_code)
        except KeyboardInterrupt:
            console.error(OutputError("interrupted; nothing was written"))
            sys.stdout.flush()
            os._exit(EXIT_INTERRUPTED)  # at once: the interpreter would wait for threads deep inside a kernel
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has left: nothing to tell, and nothing to flush
            _exit(0)
        except MemoryError as error:
            console.error(OutputError(f"out of memory ({error or 'no details'}); nothing was written"))
            _exit(1)
        except OSError as error:
            console.error(
                OutputError(f"{error.filename or 'the system'}: {error.strerror or error}; nothing was written")
            )
            _exit(1)


def _exit(code: int) -> NoReturn:
    raise typer.Exit(code)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that temporary files are removed."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
