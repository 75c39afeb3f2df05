"""How a command ends: the one place that turns an exception into a message and an exit code.

0 done, 1 an error of pqcli's own tree, 2 usage, 3 a check failed; interrupted: 130 (Ctrl-C), 143 (SIGTERM), 129
(SIGHUP).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import typer

from pqcli.cli import interrupts
from pqcli.errors import MissingExtraError, OutputError, PQError

if TYPE_CHECKING:
    from pqcli.cli.console import Console


def run(work: Callable[[Console], None], *, json: bool = False, quiet: bool = False) -> None:
    """Do the work; end the process with the right exit code and, for a failure, one message and no traceback."""
    from pqcli.cli.console import Console

    console = Console(quiet=quiet, json=json)
    with interrupts.interruptible():
        try:
            work(console)
        except PQError as error:
            console.error(error)
            _exit(error.exit_code)
        except ModuleNotFoundError as error:  # decoding alone was installed
            console.error(
                MissingExtraError(
                    f"this needs {error.name}, which pqcli-decoder does without; install pqcli in its place"
                )
            )
            _exit(MissingExtraError.exit_code)
        except KeyboardInterrupt as interrupt:
            console.error(OutputError(interrupts.message()))
            sys.stdout.flush()
            interrupts.leave(getattr(interrupt, "number", signal.SIGINT))
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
