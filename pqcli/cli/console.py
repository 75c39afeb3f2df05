"""The only module that prints: tables, progress, JSON and messages.

What the user asked for (a table, a document, the one-line result of `compress`) goes to stdout; everything that is said
about it (progress, notes, warnings, errors) goes to stderr, so that a pipe carries the result alone. No text passes
through rich's markup, and every text is made visible first (`readable.visible`): names come from strangers. Where
stdout is not a terminal, tables are shown in full.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from rich.console import Console as RichConsole
from rich.markup import escape
from rich.text import Text

from pqcli.cli import readable
from pqcli.cli.readable import visible
from pqcli.cli.tables import (
    N_NAMED,
    comparison_lines,
    field_lines,
    plan_document,
    plan_table,
    record_table,
    report_table,
    statistics_table,
)
from pqcli.jobs.events import Event, Hook, ignore
from pqcli.reports.figures import Report

if TYPE_CHECKING:
    from pqcli.codecs.auto.choosing import Choice
    from pqcli.jobs.calibrate import Calibrated
    from pqcli.jobs.compare import Comparison
    from pqcli.jobs.prediction import Prediction
    from pqcli.jobs.preview import Preview
    from pqcli.jobs.statistics import Seen

Format = Literal["table", "json", "csv", "html"]


def safe(text: str) -> str:
    """`text` as it may stand in rich markup: tags shown as they are, control and bidirectional characters escaped."""
    return escape(visible(text))


N_REASONS = 4
"""Reasons for keeping tensors that a summary names."""


class Console:
    """Everything a command says. One is made per command.

    `json`: results are JSON documents, and there is no progress. `quiet`: no progress, notes or summaries; warnings and
    errors are still said. `width` overrides the terminal's width, and `stdout` and `stderr` the streams.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        json: bool = False,
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quiet, self._json, self._clock = quiet, json, clock
        self._stdout, self._stderr = _tolerant(stdout or sys.stdout), _tolerant(stderr or sys.stderr)
        self._out = _Terminal(file=self._stdout, width=width, highlight=False, emoji=False, markup=False)
        self._err = _Terminal(file=self._stderr, width=width, highlight=False, emoji=False, markup=False)
        self._width = width or (self._out.width if self._stdout.isatty() else None)

    # --- results, on stdout ---------------------------------------------------------------------------------------

    def report(self, report: Report, format: Format = "table", network: Comparison | None = None) -> None:  # noqa: A002 - named like the flag
        """Print a report: a line a tensor, then the totals; and how far the network is, where that was found out."""
        if format == "table" and not self._json:
            ascii_only = self._out.options.ascii_only
            self._lines(report_table(report, self._width, ascii_only=ascii_only))
            if network is not None:
                self._lines(comparison_lines(network, self._width, ascii_only=ascii_only))
        else:
            self._raw(self.rendered(report, "json" if self._json else format, network))

    def rendered(self, report: Report, format: Format, network: Comparison | None = None) -> str:  # noqa: A002 - named like the flag
        """A report as the text of a file: any format, all columns, no colour."""
        if format == "json":
            return _document(report.to_json() | ({} if network is None else {"network": asdict(network)}))
        if format == "csv":
            return report.to_csv()
        if format == "html":
            from pqcli.cli import html

            return html.render(report)
        lines = report_table(report, None) + ([] if network is None else comparison_lines(network, None))
        return "".join(line.plain + "\n" for line in lines)

    def plan(self, preview: Preview) -> None:
        """Print what would be done to each tensor, why, and the size that gives."""
        if self._json:
            self.json(plan_document(preview))
            return
        self._lines(plan_table(preview, self._width, ascii_only=self._out.options.ascii_only))
        self._dropped(preview.dropped, "folder" if preview.n_carried else "file")

    def foretold(self, found: Prediction, *, is_long: bool) -> None:
        """Say how long a plan will take that takes as long as the work; other plans show it themselves."""
        if is_long:
            self.note(
                f"compressing takes about {readable.about(found.seconds)}, and so does its plan, because the size "
                "depends on the weights"
            )

    def summary(self, report: Report) -> None:
        """Print what `compress` did: the result in one line on stdout, what to know about it on stderr."""
        if self._json:
            self.json(report.to_json())
        elif not self._quiet:
            took = f"  in {readable.duration(report.seconds)}" if report.seconds is not None else ""
            took += " (resumed)" if report.resumed else ""
            before, after = readable.headline(report).split(" -> ", 1)
            source = f"{visible(Path(report.source).name)} " if report.source else ""
            self._lines([Text(f"{source}{before} -> {visible(report.output)} {after}{took}", style="bold")])
        kept = [tensor for tensor in report.tensors if tensor.action == "keep"]
        if kept:
            self.note(f"kept bit-exact: {len(kept)} of {readable.plural(len(report.tensors), 'tensor')}")
            for line in readable.kept_reasons(report, N_REASONS):
                self.note(f"  {line}")
        if report.parts:
            for line in readable.part_lines(report):
                self.note(line)
        for word, said in (
            ("training state: ", readable.state_line(report)),
            ("base ", readable.base_line(report)),
            ("", readable.felt_line(report)),
        ):
            if said is not None:
                self.note(word + said)
        self._dropped(report.dropped, "folder" if report.parts else "file")
        if report.side_bytes:
            self.note(readable.side_line(report))
        for warning in report.warnings:
            self.warn(warning)
        has_moments = report.state is not None and report.state.n_moments > 0
        if not report.quantized and report.base is None and not has_moments:
            self.warn("nothing was quantized; `pqcli plan` tells why for each tensor")
        else:
            file = shlex.quote(visible(report.output))
            self.note(f"layer by layer: pqcli report {file}    back to dense: pqcli decode {file}")

    def calibrated(self, done: Calibrated) -> None:
        """Print what `calibrate` wrote, and say of which weights it knows nothing."""
        if self._json:
            self.json(asdict(done))
        elif not self._quiet:
            self._lines([
                Text(
                    f"{visible(done.output)} {readable.size(done.output_bytes)}: {done.n_weights} weights of "
                    f"{done.model}, {done.n_examples:,} {done.split}, {done.n_tokens:,} tokens  in "
                    f"{readable.duration(done.seconds)}",
                    style="bold",
                )
            ])  # fmt: skip
        if done.unseen:
            self.warn(
                f"nothing is known of {readable.plural(len(done.unseen), 'weight')} of the checkpoint (not in the "
                f"model, used by no layer that can be watched, or without effect on its output): "
                f"{readable.joined(done.unseen, N_NAMED)}"
            )
        if done.random:
            self.warn(
                f"{readable.plural(len(done.random), 'parameter')} of {done.model} not in the checkpoint, and random: "
                f"{readable.joined(done.random, N_NAMED)}"
            )
        self.note(f"use it: pqcli compress FOLDER --codec trellis --stats {shlex.quote(visible(done.output))}")

    def statistics(self, rows: Sequence[Seen]) -> None:
        """Print what a file of statistics knows, a line a weight."""
        if self._json:
            self.json([asdict(row) for row in rows])
        else:
            self._lines(statistics_table(rows, self._width, ascii_only=self._out.options.ascii_only))

    def json(self, document: object) -> None:
        """Print one JSON document on stdout, in ASCII whatever the names are."""
        self._raw(_document(document))

    def inspection(self, document: Mapping[str, Any]) -> None:
        """Print a container's own description: its fields, then a table of its tensors."""
        tensors = document.get("tensors")
        self._lines(field_lines({key: value for key, value in document.items() if value is not tensors}))
        if isinstance(tensors, Sequence) and all(isinstance(tensor, Mapping) for tensor in tensors):
            self._lines([Text(), *record_table(tensors, self._width, ascii_only=self._out.options.ascii_only)])

    def choices(self, choices: Sequence[Choice]) -> None:
        """Print, for every tensor, the ways to code it with what they cost, the one taken first."""
        if self._json:
            self.json([asdict(choice) | {"winner": choice.winner.way} for choice in choices])
            return
        for choice in choices:
            winner = choice.winner
            losers = sorted((c for c in choice.candidates if c is not winner), key=lambda c: c.cost)
            self._lines([Text(visible(choice.name), style="bold")])
            for mark, way in [("->", winner), *(("  ", loser) for loser in losers)]:
                figures = f"{way.bits_per_weight:6.2f} bits  relative MSE {readable.error(way.relative_mse):>8}"
                scheme = f" {way.block_size}x{way.n_centroids}" if way.block_size else ""
                self._lines([Text(f"  {mark} {way.way + scheme:<16} {figures}  cost {way.cost:8.4f}")])

    def presets(self, presets: Mapping[str, str]) -> None:
        """Print the names that `--config` takes, with what they are for."""
        width = max(map(len, presets), default=0)
        self._lines(
            Text.assemble((f"{visible(name):{width}}", "bold"), f"  {visible(description)}")
            for name, description in presets.items()
        )

    # --- messages and progress, on stderr -------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Say something worth knowing; silent when quiet or when a JSON document is asked for."""
        if not self._quiet and not self._json:
            self._say("", text, "dim")

    def warn(self, text: str) -> None:
        """Say something that must not be overlooked."""
        self._say("warning: ", text, "yellow")

    def error(self, error: BaseException) -> None:
        """Say why the command failed."""
        self._say("error: ", str(error) or type(error).__name__, "bold red")

    @contextmanager
    def progress(self, label: str) -> Iterator[Hook]:
        """A hook that shows, while the body runs, the stage, how much of it is done, the rate and the time left.

        Shows no progress without a terminal, when quiet, or when JSON is asked for; the hook may be called all the
        same. That a killed run is gone on with is noted in any case.
        """
        if self._quiet or self._json or not (self._stderr.isatty() and self._err.is_interactive):
            yield self._noting(ignore)
            return
        from pqcli.jobs.bars import on_terminal

        with on_terminal(self._err, label, self._clock) as hook:
            yield self._noting(hook)

    # --- how ------------------------------------------------------------------------------------------------------

    def _noting(self, hook: Hook) -> Hook:
        def noting(event: Event) -> None:
            if event.stage == "resuming":
                self.note(f"resumed: {event.name}")
            else:
                hook(event)

        return noting

    def _dropped(self, dropped: Sequence[str], kind: str) -> None:
        plainer = [item for item in dropped if readable.COMES_BACK in item]
        lost = [item for item in dropped if readable.COMES_BACK not in item]
        if lost:
            what = ", ".join(readable.grouped(lost, N_NAMED))
            self.warn(f"not in the compressed {kind}, and lost when you delete the original: {what}")
        if plainer:
            what = ", ".join(readable.grouped(plainer, N_NAMED))
            self.note(f"in the compressed {kind}, but as something plainer: {what}")

    def _say(self, prefix: str, text: str, style: str) -> None:
        """Print on stderr; a line break in a name cannot forge a line."""
        first, *others = text.split("\n")
        _print(self._err, Text.assemble((prefix, style), visible(first), style="" if prefix else style))
        for line in others:
            _print(self._err, Text(f"  {visible(line)}", style="" if prefix else style))

    def _lines(self, lines: Iterator[Text] | Sequence[Text]) -> None:
        for line in lines:
            _print(self._out, line)

    def _raw(self, text: str) -> None:
        self._stdout.write(text if text.endswith("\n") else text + "\n")
        self._stdout.flush()


class _Terminal(RichConsole):
    """A console that leaves it to the command what a reader who has left means; rich itself would exit with 1."""

    def on_broken_pipe(self) -> None:
        """Called by rich while a BrokenPipeError is handled."""
        raise


def _print(console: RichConsole, text: Text) -> None:
    """Print a line; on a terminal in lines of whole words, so that a path can still be copied. Rows stay one line."""
    if console.is_terminal and not text.no_wrap:
        lines = textwrap.wrap(
            text.plain, console.width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        text = Text("\n".join(lines), style=text.style, spans=text.spans)
    console.print(text, soft_wrap=True)


def _tolerant(stream: IO[str] | None) -> IO[str]:
    """The stream, writing an escape for what its encoding does not have instead of failing.

    A stream that the caller has closed (`>&-`) is None, and swallows what is printed.
    """
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return stream


def _document(document: object) -> str:
    return json.dumps(document, indent=2, allow_nan=False) + "\n"
