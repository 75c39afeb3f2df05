"""The page stands alone, draws what the report says, and trusts no name."""

import base64
import hashlib
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqcli.cli import html
from tests.reports.minilm_report import minilm_report, quantized, report_of

VOID = {"meta", "wbr", "input"}
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


def test_the_page_asks_nobody_for_anything_and_runs_nothing_but_its_own_script(page, minilm):
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    assert page.tags.count("script") == 1
    assert not [name for name, _ in page.attributes if name in {"src", "href", "action"} or name.startswith("on")]
    assert "http" not in html.render(minilm).replace("http-equiv", "")
    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in value)
    script = re.search(r"<script>(.*?)</script>", html.render(minilm), re.DOTALL)[1]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"


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
    assert page.tags.count("script") == 1
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


def test_one_far_value_does_not_crush_the_bars_of_the_others():
    tensors = [quantized(f"a{i}", relative_mse=0.1 + i / 1000) for i in range(20)]
    plot = html.error_plot(report_of(*tensors, quantized("far", relative_mse=5.3)))
    assert [one.label for one in plot.outliers] == ["5.30"]
    assert min(bar.height for bar in plot.bars[:-1]) > 0.5 * (html.BOTTOM - html.TOP)
    assert plot.bars[-1].height == html.BOTTOM - html.TOP
    assert plot.bars[-1].is_clipped
    assert "far 5.30" in plot.worst


def test_errors_over_powers_of_ten_have_a_logarithmic_scale():
    plot = html.error_plot(report_of(*(quantized(f"a{i}", relative_mse=10.0**-i) for i in range(8))))
    assert plot.is_log
    heights = [bar.height for bar in plot.bars]
    steps = [before - after for before, after in pairwise(heights)]
    assert max(steps) == pytest.approx(min(steps))
    assert plot.ticks[0].label == "1"


def test_a_point_far_from_all_others_is_marked_at_the_edge_with_its_figures():
    tensors = [quantized(f"a{i}", relative_mse=0.1 + i / 1000, bits_per_weight=2 + i / 100) for i in range(20)]
    plot = html.rate_plot(report_of(*tensors, quantized("far", relative_mse=1e-9, bits_per_weight=32.0)))
    assert len(plot.points) == 20
    assert [mark.text for mark in plot.outside] == ["32 bits, 90 dB"]
    assert html.LEFT <= plot.outside[0].x <= html.RIGHT
    assert html.TOP <= plot.outside[0].y <= html.BOTTOM
    xs = [point.x for point in plot.points]
    assert max(xs) - min(xs) > 0.5 * (html.RIGHT - html.LEFT)


def test_a_size_far_above_all_others_is_drawn_with_a_gap():
    plot = html.size_plot(report_of(quantized("a"), quantized("b", bytes=10_000_000)))
    assert plot.is_clipped
    assert [bar.is_clipped for bar in plot.bars] == [True, False, False]
    assert plot.bars[1].width > 0.5 * html.WIDTH


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=60))
def test_every_bar_and_point_lies_inside_the_picture(values):
    report = report_of(*(quantized(f"a{i}", relative_mse=value) for i, value in enumerate(values)))
    for bar in html.error_plot(report).bars:
        assert 0 <= bar.height <= html.BOTTOM - html.TOP + 1e-6
    plot = html.rate_plot(report)
    assert len(plot.points) + len(plot.outside) == len(values)
