"""A bar on a terminal for the events of a long job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.text import Text

from pqcli.cli import readable
from pqcli.cli.readable import elide, visible

if TYPE_CHECKING:
    from rich.console import Console

    from pqcli.jobs.events import Event, Hook

LEAST_NAME = 12
"""Cells below which a bar does not show the tensor's name."""
LONGEST_STAGE = len("calibrating")
_UNITS = {"searching": "", "loading": "", "calibrating": "tokens", "comparing": "batches"}
"""What is counted, where it is not weights."""


@contextmanager
def bar(console: Console, label: str, clock: Callable[[], float]) -> Iterator[Hook]:
    """A hook that draws one line on `console`, which is gone when the body ends: each stage starts at nothing."""
    bar_width = 10 if console.width < 100 else 20
    room = console.width - len(label) - LONGEST_STAGE - bar_width - len("  100%  999 M weights/s, 59:59 left  ")

    class Speed(ProgressColumn):
        """Work by second and the time left."""

        def render(self, task: Any) -> Text:
            started, latest = task.fields["started"], task.fields["latest"]
            resumed = task.fields["resumed"]  # what was done before says nothing of the rate
            text = speed(
                task.completed - resumed, task.total - resumed, latest - started, clock() - started, task.fields["unit"]
            )
            return Text(text, style="cyan", no_wrap=True)

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
    now = clock()
    task = progress.add_task(label, total=1, stage="", unit="", started=now, latest=now, current="", resumed=0)
    stage = ""

    def hook(event: Event) -> None:
        nonlocal stage
        now = clock()
        if event.stage != stage or event.done == event.resumed:
            stage = event.stage
            unit = _UNITS.get(stage, "weights")
            total = max(event.total, 1)
            progress.update(
                task, stage=stage, unit=unit, started=now, total=total, completed=event.done, resumed=event.resumed
            )
        current = elide(visible(event.name), room) if room >= LEAST_NAME else ""
        progress.update(task, completed=event.done, total=max(event.total, 1), latest=now, current=current)

    with progress:
        yield hook


def speed(done: float, total: float, latest: float, now: float, unit: str = "weights") -> str:
    """`5.2 M weights/s, 12 s left`, from the work done until `latest` of the `now` seconds that have passed.

    Empty until something is done, and for work that is not counted in units. Between two reports of progress the time
    left counts down; when the next one is overdue, because one tensor holds a large share of the work, no time is
    promised.
    """
    if not done or latest <= 0 or not unit:
        return ""
    rate = done / latest
    left = (total - done) / rate - (now - latest)
    promise = f"{readable.duration(left)} left" if left > 0 else "finishing" if done >= total else "? left"
    return f"{readable.count(rate)} {unit}/s, {promise}"
