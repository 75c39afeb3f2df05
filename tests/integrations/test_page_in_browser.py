"""The HTML report in a real browser: on a desk, on a phone, in the dark, on paper, without scripts."""

import pytest

from pqcli.cli import html
from tests.integrations import browser as browsers
from tests.reports.minilm_report import minilm_report, quantized, report_of

pytestmark = pytest.mark.integrations

EVIL = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>\"'&\u202e\x00"
NAMES = "[...document.querySelectorAll('#table tbody tr')].filter(r => !r.hidden).map(r => r.cells[0].title)"


@pytest.fixture(scope="module")
def browser():
    program = browsers.find()
    if program is None:
        pytest.skip("there is no Chromium on this machine (Debian: apt-get install chromium)")
    with browsers.Browser(program) as found:
        yield found


@pytest.fixture
def opened(browser, tmp_path):
    """Open the page of a report, and see at the end that it had nothing to complain of."""
    pages = []

    def open_page(report, **how):
        path = tmp_path / f"{len(pages)}.html"
        path.write_text(html.render(report), encoding="utf-8")
        pages.append(browser.open(path, **how))
        return pages[-1]

    yield open_page
    assert [complaint for page in pages for complaint in page.complaints()] == []


def outlier():
    tensors = [quantized(f"layer.{i}.weight", relative_mse=0.1 + i / 1000) for i in range(20)]
    evil = quantized(EVIL * 3, relative_mse=5.3, bits_per_weight=31.9, reason=EVIL, dtype=EVIL, scheme=EVIL)
    return report_of(*tensors, evil, output=EVIL, source=EVIL, dropped=(EVIL,))


REPORTS = {"minilm": minilm_report, "tiny": lambda: report_of(quantized()), "outlier": outlier}


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_never_scrolls_sideways_and_every_row_of_cards_is_full(opened, name, width):
    page = opened(REPORTS[name](), width=width, dark=width == 390)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run("window.hacked") is None
    for cards in (".figures div", ".plots .card"):
        boxes = page.run(
            f"[...document.querySelectorAll('{cards}')].map(e => e.getBoundingClientRect())"
            ".map(r => [r.top, r.left, r.right])"
        )
        rows = {}
        for top, left, right in boxes:
            rows.setdefault(round(top), []).append((left, right))
        widths = {len(row) for row in rows.values()}
        assert len(widths) == 1, f"{cards}: rows of {[len(row) for row in rows.values()]}"
        ends = [(min(left for left, _ in row), max(right for _, right in row)) for row in rows.values()]
        assert max(end for _, end in ends) - min(end for _, end in ends) < 1


def test_pictures_and_their_texts_lie_inside_their_cards(opened):
    for width in (390, 1280):
        page = opened(outlier(), width=width)
        outside = page.run(
            "[...document.querySelectorAll('svg text')].filter(t => { const a = t.getBoundingClientRect(), "
            "b = t.closest('.card').getBoundingClientRect(); return a.left < b.left - 1 || a.right > b.right + 1; })"
            ".map(t => t.textContent)"
        )
        assert outside == []


def test_a_click_on_a_title_sorts_and_the_third_gives_the_old_order_back(opened):
    report = minilm_report()
    page = opened(report)
    before = page.run(NAMES)
    assert before == [tensor.name for tensor in report.tensors]
    by_size = sorted(report.tensors, key=lambda tensor: -tensor.bytes)
    page.click("th:last-child button")
    assert page.run(NAMES) == [tensor.name for tensor in by_size]
    assert page.run("document.querySelector('th:last-child').getAttribute('aria-sort')") == "descending"
    page.click("th:last-child button")
    assert page.run(NAMES) == [tensor.name for tensor in sorted(report.tensors, key=lambda tensor: tensor.bytes)]
    page.click("th:last-child button")
    assert page.run(NAMES) == before
    page.click("th:nth-child(5) button")  # what has no error comes last
    n = len(report.quantized)
    worst = sorted(report.quantized, key=lambda tensor: -tensor.relative_mse)
    shown = [f"{tensor.relative_mse:#.3g}" for tensor in worst]
    assert page.run("[...document.querySelectorAll('#table tbody tr')].map(r => r.cells[4].textContent)")[:n] == shown
    assert page.run("document.querySelectorAll('th[aria-sort=descending]').length") == 1


def test_the_keyboard_sorts_too(opened):
    page = opened(minilm_report())
    page.run("document.querySelector('th button').focus()")
    page.press("Enter", 13)
    assert page.run("document.querySelector('th').getAttribute('aria-sort')") == "ascending"
    names = page.run(NAMES)
    assert names[0] == "embeddings.LayerNorm.bias"
    assert names[-1].startswith("pooler.")


def test_what_is_typed_into_the_search_hides_all_other_rows(opened):
    report = minilm_report()
    page = opened(report)
    page.click("#search")
    page.type("Layer.3 query")
    assert page.run(NAMES) == [t.name for t in report.tensors if "layer.3" in t.name and "query" in t.name]
    assert page.run("document.getElementById('found').textContent") == "2 of 104"
    page.run("document.getElementById('search').select()")
    page.type("one-dimensional")  # a reason, which is a tooltip
    assert page.run(NAMES) == [t.name for t in report.tensors if "one-dimensional" in t.reason]


def test_without_scripts_there_is_a_plain_table(opened):
    report = minilm_report()
    page = opened(report, script=False)
    assert page.run(NAMES) == [tensor.name for tensor in report.tensors]
    assert page.run("getComputedStyle(document.querySelector('.search')).display") == "none"
    assert page.run("document.querySelectorAll('th button').length") == 0


def test_hostile_names_run_nothing_and_are_shown_as_they_are(opened):
    page = opened(outlier())
    assert page.run("window.hacked") is None
    assert page.run("document.images.length") == 0
    assert page.run("document.scripts.length") == 1
    assert "<script>window.hacked = 1</script>" in page.run("document.querySelector('h1').textContent")


def test_a_script_that_gets_through_all_the_same_is_not_run(browser, tmp_path):
    """As if a name were not escaped: the page's policy stops it."""
    text = html.render(report_of(quantized("here"))).replace("<body>", "<body><script>window.hacked = 1</script>")
    (tmp_path / "hacked.html").write_text(text, encoding="utf-8")
    page = browser.open(tmp_path / "hacked.html")
    assert page.run("window.hacked") is None
    assert any("Content Security Policy" in complaint for complaint in page.complaints())


def test_the_dark_is_dark(opened):
    def light(page):
        return sum(map(int, page.run("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")))

    assert light(opened(minilm_report(), dark=True)) < 150 < 600 < light(opened(minilm_report()))


def test_it_can_be_printed(opened):
    page = opened(minilm_report())
    assert 3 <= page.printed_pages() <= 8


def test_five_thousand_tensors_stay_quick(opened):
    tensors = [quantized(f"encoder.layer.{i}.weight", relative_mse=(i * 7919 % 5000) / 5000) for i in range(5000)]
    page = opened(report_of(*tensors))
    started = page.busy()
    page.click("th:nth-child(5) button")
    assert page.run(NAMES)[0] == max(tensors, key=lambda tensor: tensor.relative_mse).name
    page.click("#search")
    page.type("layer.4999.")
    assert page.run(NAMES) == ["encoder.layer.4999.weight"]
    assert started < 20
    assert page.busy() - started < 10
