"""What is printed, where, and that no name can do harm to the terminal it is printed on."""

import io
import json
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from pqcli.cli import readable
from pqcli.cli.console import Console, safe
from pqcli.cli.tables import record_table, report_table
from pqcli.errors import UsageError
from pqcli.jobs.events import Event
from tests.reports.minilm_report import minilm_report, preview, quantized, report_of

EVIL = "[red]a\x1b[31m\u202egnp.exe\nerror: \udc80[/red] :warning: \u200b"


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


class Spoken:
    """A console, and what it has said on either stream."""

    def __init__(self, *, terminal=False, **flags):
        self.streams = (Terminal(), Terminal()) if terminal else (io.StringIO(), io.StringIO())
        self.console = Console(stdout=self.streams[0], stderr=self.streams[1], **flags)

    @property
    def out(self):
        return self.streams[0].getvalue()

    @property
    def err(self):
        return self.streams[1].getvalue()


@pytest.fixture(scope="module")
def minilm():
    return minilm_report()


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@given(st.text())
def test_visible_text_is_printable_and_printable_text_is_unchanged(text):
    assert readable.visible(text).isprintable()
    assert readable.visible(readable.visible(text)) == readable.visible(text)


@given(st.text().filter(lambda text: not text.endswith("\\")))
def test_safe_text_passes_through_markup_as_it_is(text):
    assert Text.from_markup(safe(text), emoji=False).plain == readable.visible(text)


@given(st.text(st.characters(exclude_categories=("C", "Z"))), st.integers(0, 40))
def test_an_elided_name_fits_and_keeps_both_ends(text, width):
    short = readable.elide(text, width)
    assert cell_len(short) <= width
    if cell_len(text) <= width:
        assert short == text


def test_elision_keeps_what_tells_layers_apart():
    short = readable.elide("encoder.layer.0.attention.output.dense.weight", 34)
    assert short.startswith("encoder.layer")
    assert short.endswith("output.dense.weight")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"), (90_868_376, "90.9 MB")],
)
def test_sizes_are_decimal_with_three_digits(n_bytes, text):
    assert readable.size(n_bytes) == text


@pytest.mark.parametrize("width", [50, 80, 100, 120, 140, 300, None])
def test_no_row_is_wider_than_the_terminal_and_totals_are_always_there(minilm, width):
    lines = [line for line in report_table(minilm, width) if line.no_wrap]
    assert len(lines) == 1 + 1 + 104 + 1 + 4
    if width is not None:
        assert max(cell_len(line.plain) for line in lines) <= width
    table = "\n".join(line.plain for line in lines)
    assert "39 tensors quantized" in table
    assert readable.size(minilm.compressed_bytes) in table
    assert readable.error(minilm.relative_mse) in table


def test_wider_terminals_show_every_column_a_narrower_one_shows(minilm):
    titles = [set(report_table(minilm, width)[3].plain.split()) for width in (60, 80, 120, 140, None)]
    for narrow, wide in pairwise(titles):
        assert narrow <= wide
    assert {"scheme", "rel.MSE", "bits/w", "size"} <= titles[1]
    assert {"cosine", "used", "entropy", "gap"} <= titles[-1]


def test_names_are_whole_where_stdout_is_not_a_terminal(minilm):
    spoken = Spoken()
    spoken.console.report(minilm)
    assert all(tensor.name in spoken.out for tensor in minilm.tensors)
    assert "\x1b" not in spoken.out
    assert spoken.out == spoken.console.rendered(minilm, "table")


def test_one_monstrous_name_does_not_pad_every_row():
    report = report_of(quantized("x" * 10_000), *(quantized(f"layer.{i}") for i in range(50)))
    spoken = Spoken()
    spoken.console.report(report)
    assert len(spoken.out) < 30_000


def test_kept_tensors_are_grouped_by_reason_and_dropped_ones_named(minilm):
    spoken = Spoken()
    spoken.console.report(replace(minilm, dropped=("optimizer (a set)",)))
    assert "63 tensors, 124 kB: one-dimensional" in spoken.out
    assert "dropped   optimizer (a set)" in spoken.out


def test_a_report_compares_assignments_with_their_entropy_and_the_size_with_int4():
    shown = []
    for taken in (2100, 1900):
        tensor = quantized(assignment_bytes=taken, entropy_bytes=2000, int4_relative_mse=0.0123)
        spoken = Spoken()
        spoken.console.report(report_of(tensor))
        shown.append(spoken.out)
    entropy = "than their order-0 entropy, tensor by tensor (2.00 kB)"
    assert f"entropy   assignments take 2.10 kB: 5.0 % more {entropy}" in shown[0]
    assert f"entropy   assignments take 1.90 kB: 5.0 % less {entropy}" in shown[1]
    assert "int4      2.11 kB for the quantized tensors as int4 in groups of 128 (4.125 bits/weight, rel" in shown[0]
    unknown = Spoken()
    unknown.console.report(report_of(quantized()))
    assert "order-0" not in unknown.out
    assert "int4 in groups of 128 (4.125 bits/weight)" in unknown.out


def test_a_plan_shows_action_and_reason_of_every_tensor_and_the_total(minilm):
    spoken = Spoken()
    spoken.console.plan(preview(replace(minilm, dropped=("optimizer (a set)",))))
    for tensor in minilm.tensors:
        (row,) = [line for line in spoken.out.splitlines() if line.startswith(f"{tensor.name} ")]
        assert tensor.reason in row
        assert ("pq 8x256" if tensor.quantized else "keep") in row
    assert readable.size(minilm.compressed_bytes) in spoken.out
    assert "optimizer (a set)" in spoken.err
    narrow = Spoken(terminal=True, width=80)
    narrow.console.plan(preview(minilm))
    assert "reason" in narrow.out


def test_with_json_stdout_is_one_document_whatever_is_shown(minilm):
    report = replace(minilm, tensors=(quantized(EVIL),))
    for show, field in [("report", "compressed_bytes"), ("summary", "ratio")]:
        spoken = Spoken(json=True)
        getattr(spoken.console, show)(report)
        document = json.loads(spoken.out)
        assert field in document
        assert document["tensors"][0]["name"] == EVIL
        assert spoken.out.isascii()
    spoken = Spoken(json=True)
    spoken.console.plan(preview(minilm))
    document = json.loads(spoken.out)
    assert document["predicted_bytes"] == minilm.compressed_bytes
    assert [tensor["predicted_bytes"] for tensor in document["tensors"]] == [tensor.bytes for tensor in minilm.tensors]


def test_the_summary_is_one_line_on_stdout_and_the_rest_on_stderr(minilm):
    spoken = Spoken()
    spoken.console.summary(replace(minilm, dropped=("optimizer (a set)",)))
    assert spoken.out == (
        "model.safetensors 90.9 MB -> model.pq.safetensors 3.14 MB  28.9x  1.06 bits/weight  "
        "relative MSE 0.301  in 4.2 s\n"
    )
    assert "kept bit-exact: 65 of 104 tensors" in spoken.err
    assert "warning: not in the compressed file" in spoken.err
    assert "optimizer (a set)" in spoken.err
    assert "pqcli report model.pq.safetensors" in spoken.err


def test_quiet_silences_all_but_warnings_errors_and_the_asked_for_result(minilm):
    spoken = Spoken(quiet=True)
    spoken.console.summary(minilm)
    spoken.console.note("by the way")
    with spoken.console.progress("model.pt") as hook:
        hook(Event("encoding", 10, 10, "a"))
    assert (spoken.out, spoken.err) == ("", "")
    spoken.console.summary(replace(minilm, dropped=("optimizer",)))
    assert "optimizer" in spoken.err
    spoken.console.report(minilm)
    assert "pooler.dense.weight" in spoken.out


def test_compressing_nothing_is_said_aloud():
    spoken = Spoken(quiet=True)
    spoken.console.summary(report_of())
    assert "nothing was quantized" in spoken.err


def test_hostile_names_are_shown_harmlessly_everywhere():
    report = report_of(
        quantized(EVIL, reason=EVIL, scheme=EVIL, dtype=EVIL), replace(quantized(EVIL), action="keep", reason=EVIL),
        dropped=(EVIL,), output=EVIL, source=EVIL,
    )  # fmt: skip
    spoken = Spoken()
    console = spoken.console
    console.report(report)
    console.summary(report)
    console.plan(preview(report_of(quantized("a", reason=EVIL, kind=EVIL), dropped=(EVIL,))))
    console.note(EVIL)
    console.warn(EVIL)
    console.error(UsageError(EVIL))
    console.inspection({EVIL: EVIL, "tensors": [{"name": EVIL, "shape": [1, 2], "x": None}]})
    console.presets({"good": EVIL})
    for text in (spoken.out, spoken.err):
        assert all(char == "\n" or char.isprintable() for char in text)
        assert not any(line.startswith("error: \\udc80") for line in text.splitlines())
        assert "[red]a\\x1b[31m\\u202egnp.exe" in text
        assert ":warning:" in text


def test_an_error_is_one_unwrapped_message_with_further_lines_indented():
    spoken = Spoken(width=40)
    spoken.console.error(UsageError("/a/very/long/path/that/is/longer/than/the/terminal.pt: no\nsecond"))
    assert spoken.err == "error: /a/very/long/path/that/is/longer/than/the/terminal.pt: no\n  second\n"


def test_terminals_get_colour_unless_no_color_is_set(monkeypatch):
    def spoken():
        spoken = Spoken(terminal=True, width=80)
        spoken.console.warn("careful")
        return spoken.err

    assert "\x1b[33m" in spoken()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[33m" not in spoken()


def test_long_messages_break_between_words_on_a_terminal():
    spoken = Spoken(terminal=True, width=40)
    spoken.console.note(" ".join(["word"] * 30 + ["/a/path/that/is/longer/than/the/whole/terminal.pt"]))
    lines = Text.from_ansi(spoken.err).plain.splitlines()
    assert all(cell_len(line) <= 40 for line in lines[:-1])
    assert lines[-1].strip() == "/a/path/that/is/longer/than/the/whole/terminal.pt"


def test_an_ascii_stdout_gets_ascii_rules_and_escapes_instead_of_a_crash():
    raw = io.BytesIO()
    console = Console(stdout=io.TextIOWrapper(raw, "ascii"), stderr=io.StringIO())
    console.report(report_of(quantized("größe")))
    assert b"gr\\xf6\\xdfe" in raw.getvalue()
    assert b"-----" in raw.getvalue()


def test_progress_shows_name_and_rate_on_a_terminal_and_nothing_elsewhere(monkeypatch):
    for flags, shown in [({"terminal": True}, True), ({"terminal": True, "json": True}, False), ({}, False)]:
        spoken = Spoken(width=120, **flags)
        monkeypatch.setenv("FORCE_COLOR", "1")  # colour without a terminal is no reason for a bar
        with spoken.console.progress("model[b].pt") as hook:
            hook(Event("encoding", 0, 1000))
            hook(Event("encoding", 600, 1000, "layer.\x1bweight"))
        assert spoken.out == ""
        assert ("encoding" in spoken.err and "model[b].pt" in spoken.err and "layer.\\x1bweight" in spoken.err) is shown
        assert bool(spoken.err) is shown


def test_that_a_killed_run_is_gone_on_with_is_noted_with_a_terminal_or_without_and_its_work_is_no_rate(monkeypatch):
    clock = iter(range(1000))
    for flags, is_said in [({"terminal": True}, True), ({}, True), ({"quiet": True}, False), ({"json": True}, False)]:
        spoken = Spoken(width=120, clock=lambda: float(next(clock)), **flags)
        with spoken.console.progress("model.pt") as hook:
            hook(Event("resuming", 37, 120, "encoding, 37 of 120 tensors were done"))
            hook(Event("encoding", 900_000, 1_000_000, resumed=900_000))
            hook(Event("encoding", 900_010, 1_000_000, "layer", 900_000))
        assert ("resumed: encoding, 37 of 120 tensors were done" in spoken.err) is is_said
        assert "k weights/s" not in spoken.err
        assert "M weights/s" not in spoken.err


def test_an_inspection_shows_fields_nested_ones_indented_and_a_table_of_tensors():
    spoken = Spoken()
    spoken.console.inspection({
        "format_version": 1, "source": {"format": "pt", "n_bytes": 12}, "features": ["pq", "keep"],
        "tensors": [{"name": "a.weight", "shape": [4, 8], "action": "pq"}, {"name": "b", "shape": [], "extra": 0.25}],
    })  # fmt: skip
    lines = spoken.out.splitlines()
    assert "  format   pt" in lines
    assert any(line.split() == ["features", "pq,", "keep"] for line in lines)
    assert any(line.split() == ["a.weight", "4x8", "pq", "-"] for line in lines)
    assert any(line.split() == ["b", "scalar", "-", "0.25"] for line in lines)


def test_records_without_rows_or_fields_make_an_empty_table():
    assert record_table([], 80) == []


def test_a_thousand_tensors_are_all_shown():
    spoken = Spoken()
    spoken.console.report(report_of(*(quantized(f"layer.{i}.weight") for i in range(1000))))
    assert sum("layer." in line for line in spoken.out.splitlines()) == 1000


def test_what_comes_back_as_something_plainer_is_not_called_lost(minilm):
    spoken = Spoken()
    spoken.console.summary(
        replace(minilm, dropped=("optimizer (a set)", "args (its class X: comes back as a plain dict)"))
    )
    lost, plainer = spoken.err.split("in the compressed file, but as something plainer: ")
    assert "lost when you delete the original: optimizer (a set)" in lost
    assert "args" not in lost
    assert plainer.startswith("args (its class X: comes back as a plain dict)")


def test_files_beside_the_weights_count_against_the_ratio(minilm):
    beside = replace(minilm, side_bytes=minilm.original_bytes)
    assert beside.ratio == minilm.ratio
    assert 1 < beside.ratio_with_side < 2
    spoken = Spoken()
    spoken.console.summary(beside)
    assert "in neither size; with them the ratio is 1." in spoken.err
    assert beside.to_json()["side_bytes"] == minilm.original_bytes
