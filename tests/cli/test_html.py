"""The page stands alone, draws what the report says, and trusts no name."""

import math
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqcli.cli import html
from tests.reports.minilm_report import minilm_report, quantized, report_of

VOID = {"meta", "wbr"}
EVIL = "<script>alert(1)</script>\"'&\u202e\x00\udc80 {{ 7 * 6 }}"


class Page(HTMLParser):
    """Tags, attributes and text of a page; raises where a tag is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def minilm():
    return minilm_report()


@pytest.fixture(scope="module")
def page(minilm):
    return Page(html.render(minilm))


def test_the_page_has_every_tensor_and_the_totals(page, minilm):
    text = "".join(page.text)
    assert all(tensor.name in text for tensor in minilm.tensors)
    for figure in ("90.9 MB", "28.9x", "0.301", "39 of them quantized", "one-dimensional: norms and biases stay exact"):
        assert figure in text


def test_the_page_compares_with_entropy_and_int4():
    tensor = quantized(assignment_bytes=2100, entropy_bytes=2000, int4_relative_mse=0.0123)
    text = "".join(Page(html.render(report_of(tensor))).text)
    assert "assignments take 2.10 kB: 5.0 % more than their order-0 entropy" in text
    assert "2.11 kB for the quantized tensors as int4 in groups of 128 (4.125 bits/weight, relative MSE 0.0123)" in text


def test_the_page_asks_nobody_for_anything_and_runs_nothing(page, minilm):
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in {"src", "href", "action"} or name.startswith("on")]
    assert "http" not in html.render(minilm).replace("http-equiv", "")
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_the_page_fits_a_phone_and_the_dark(page):
    assert ("name", "viewport") in page.attributes
    assert any("prefers-color-scheme: dark" in text for text in page.text)


def test_every_quantized_tensor_is_in_both_plots(page):
    assert page.tags.count("circle") == 39
    assert page.tags.count("svg") == 3


def test_hostile_texts_stay_texts(minilm):
    evil = replace(quantized(EVIL), reason=EVIL, scheme=EVIL, dtype=EVIL)
    kept = replace(evil, action="keep")
    text = html.render(report_of(evil, kept, output=EVIL, source=EVIL, dropped=(EVIL,), recipe={EVIL: [EVIL]}))
    page = Page(text)
    assert "script" not in page.tags
    assert "\u202e" not in text
    assert "\x00" not in text
    assert "{{ 7 * 6 }}" in text
    text.encode()


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (replace(quantized(), action="keep"),),
        (quantized(relative_mse=0.0),),
        (quantized(relative_mse=math.nan, bits_per_weight=math.inf, cosine=None, max_abs_error=math.nan),),
        (
            quantized(
                relative_mse=None, energy=None, bits_per_weight=None, centroids_used=None, assignment_entropy=None
            ),
        ),
        (quantized(relative_mse=1e-30), quantized(relative_mse=1e30)),
        (quantized(n_weights=0, bytes=0),),
    ],
)
def test_odd_reports_make_a_page_too(tensors):
    page = Page(html.render(report_of(*tensors)))
    assert "nan" not in "".join(
        str(value) for name, value in page.attributes if name in {"x", "y", "width", "height", "cx", "cy"}
    )


def test_bars_of_the_error_plot_are_as_high_as_the_errors(minilm):
    plot = html.error_plot(minilm)
    for bar, tensor in zip(plot.bars, minilm.quantized, strict=True):
        assert bar.height / plot.bars[0].height == pytest.approx(tensor.relative_mse / minilm.quantized[0].relative_mse)
        assert bar.y >= html.TOP - 1e-9
        assert bar.y + bar.height == pytest.approx(html.BOTTOM)


def test_bars_of_the_size_plot_show_the_whole_file(minilm):
    plot = html.size_plot(minilm)
    shares = [float(bar.text.split("·")[1].removesuffix("%")) for bar in plot.bars]
    assert sum(shares) == pytest.approx(100, abs=0.5)


def test_points_below_the_bound_are_drawn_below_its_line(minilm):
    plot = html.rate_plot(minilm)
    x1, y1, x2, y2 = plot.bound
    for point in plot.points:
        line = y1 + (y2 - y1) * (point.x - x1) / (x2 - x1)
        assert point.y > line
        assert html.LEFT <= point.x <= html.RIGHT
        assert html.TOP <= point.y <= html.BOTTOM


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_axis_marks_are_few_even_and_inside(low, length):
    high = low + length
    marks = html.round_numbers(low, high)
    assert 1 <= len(marks) <= 7
    slack = 1e-6 * max(abs(low), abs(high), length)
    assert all(low - slack <= mark <= high + slack for mark in marks)
