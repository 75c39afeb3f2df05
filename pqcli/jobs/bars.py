"""Bars for the events of a long job: one line on a terminal, one in a notebook.

The verbs show one with `progress=True` (`showing`); the command line shows one on a terminal. The bar and its
percentage are of the whole job, the rate is of the stage it is in, and the time left is until the whole job is done
(`pqcli.jobs.pace`).
"""

from __future__ import annotations

import contextvars
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from pqcli import readable
from pqcli.jobs.events import Event, Hook, ignore
from pqcli.jobs.pace import Pace
from pqcli.readable import elide, visible

if TYPE_CHECKING:
    from rich.console import Console

Progress = Hook | bool | None
"""What the verbs take as `progress`: a hook for events, True for a bar, or nothing."""
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

LEAST_NAME = 12
"""Cells below which a bar does not show the tensor's name."""
LONGEST_STAGE = len("calibrating")
REDRAWN_AFTER = 0.2
"""Seconds between two pictures of a bar in a notebook."""
_UNITS = {"searching": "", "loading": "", "calibrating": "tokens", "comparing": "batches", "copying": "B"}
"""What is counted, where it is not weights."""


def showing(verb: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """The verb, which shows a bar where it is called with `progress=True`; its label is the first path."""

    @wraps(verb)
    def called(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if kwargs.get("progress") is not True:
            return verb(*args, **kwargs)
        first = next((given for given in (*args, *kwargs.values()) if isinstance(given, str | Path)), "")
        with _shown(str(first)) as hook:
            kwargs["progress"] = hook
            return verb(*args, **kwargs)

    return called


def hook_of(progress: Progress) -> Hook:
    """The hook that a verb was given; True has become one in `showing`."""
    return progress if callable(progress) else ignore


@contextmanager
def _shown(label: str) -> Iterator[Hook]:
    """A bar where there is somewhere to draw one: in a notebook, or on a terminal."""
    label = label.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if hasattr(shell, "kernel"):
        yield _Notebook(label, time.monotonic)
    elif sys.stderr is not None and sys.stderr.isatty():
        from rich.console import Console

        with on_terminal(Console(stderr=True), label, time.monotonic) as hook:
            yield hook
    else:
        yield ignore


@contextmanager
def on_terminal(console: Console, label: str, clock: Callable[[], float]) -> Iterator[Hook]:
    """A hook that draws one line on `console`, which is gone when the body ends."""
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
    from rich.text import Text

    label = elide(visible(label), console.width // 3)
    bar_width = 10 if console.width < 100 else 20
    room = console.width - len(label) - LONGEST_STAGE - bar_width - len("  100%  999 M weights/s, 59:59 left  ")
    pace = Pace()

    class Speed(ProgressColumn):
        """Work by second and the time left."""

        def render(self, task: Any) -> Text:  # noqa: ARG002 - `pace` knows more
            return Text(speed(pace, clock()), style="cyan", no_wrap=True)

    progress = Progress(
        TextColumn("{task.fields[stage]}", style="bold", markup=False),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=bar_width),
        TextColumn("{task.percentage:>3.0f}%", markup=False),
        Speed(),
        TextColumn("{task.fields[current]}", style="dim", markup=False),
        console=console,
        transient=True,
        redirect_stdout=False,  # results are printed after the bar has gone
    )
    task = progress.add_task(label, total=1, stage="", current="")

    def hook(event: Event) -> None:
        pace.see(event, clock())
        current = elide(visible(event.name), room) if room >= LEAST_NAME else ""
        progress.update(task, completed=pace.fraction, stage=event.stage, current=current)

    with progress:
        yield hook


def speed(pace: Pace, now: float) -> str:
    """`5.2 M weights/s, 12 s left`: the rate of this stage, and the time until all is done.

    Empty until enough is done to tell. No time is promised when the next report of progress is overdue, because one
    tensor holds a large share of the work.
    """
    unit = _UNITS.get(pace.event.stage, "weights")
    rate = pace.rate()
    left = pace.left(now)
    parts = [f"{readable.count(rate)} {unit}/s"] if rate and unit else []
    if left is not None:
        parts.append(f"{readable.duration(left)} left" if left else "finishing")
    elif pace.event.fraction - pace.given >= pace.FIRST_FRACTION:
        parts.append("? left")
    return ", ".join(parts)


class _Notebook:
    """A hook that draws a bar in the cell that started the work, some times a second.

    Plain HTML, since widgets need more than every notebook has. Events come from any thread: each picture is drawn in
    the context of the cell, by which the kernel knows where it belongs.
    """

    def __init__(self, label: str, clock: Callable[[], float]) -> None:
        from IPython.display import HTML, display

        self._html, self._label, self._clock = HTML, label, clock
        self._pace = Pace()
        self._context = contextvars.copy_context()
        self._drawing = threading.Lock()
        self._drawn = clock()
        self._handle: Any = display(self._picture(), display_id=True)  # type: ignore[no-untyped-call]

    def __call__(self, event: Event) -> None:
        """Draw, unless it was drawn just now."""
        with self._drawing:
            now = self._clock()
            self._pace.see(event, now)
            if now - self._drawn >= REDRAWN_AFTER or event.fraction >= 1:
                self._drawn = now
                self._context.copy().run(self._handle.update, self._picture())

    def _picture(self) -> Any:
        words = [self._pace.event.stage, visible(self._label), f"{self._pace.fraction:.0%}"]
        said = " ".join(filter(None, [*words, speed(self._pace, self._clock())]))
        return self._html(  # type: ignore[no-untyped-call]
            f'<progress value="{self._pace.fraction:.4f}" max="1" style="vertical-align:middle"></progress> '
            f"<span>{escape(said)}</span>"
        )
