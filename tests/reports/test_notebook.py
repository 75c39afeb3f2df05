"""What a Python session shows of pqcli's objects: a line where Python prints one, a small table in a notebook."""

from dataclasses import replace
from html.parser import HTMLParser

import pytest

import pqcli
from pqcli.jobs.compare import Comparison, LayerComparison
from pqcli.notebook import MOST_ROWS, page
from pqcli.recipe import loading
from tests.reports.minilm_report import minilm_report, quantized, report_of

EVIL = "<script>alert(1)</script>\"'&\u202e\x00\udc80 {{ 7 * 6 }}"


class Shown(HTMLParser):
    """The tags and the text of what a notebook shows; raises where a tag is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.attributes, self.open = [], "", [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def objects(model, tmp_path):
    """One of everything that a session may show, made of a small checkpoint."""
    report = pqcli.compress(model, tmp_path / "a.pq.safetensors")
    with pqcli.open(report.output) as container:
        yield {
            "Report": report,
            "Container": container,
            "Preview": pqcli.preview(model),
            "Recipe": pqcli.Recipe(block_size=4, rules=(pqcli.Rule(match="*", n_centroids=16),)),
            "Comparison": Comparison(3, 0.1, 0.9, layers=tuple(LayerComparison(f"l{i}", i, 1.0) for i in range(99))),
        }


def test_every_object_has_a_short_line_and_a_compact_table(objects):
    for name, thing in objects.items():
        assert name in repr(thing)
        assert len(repr(thing)) < 400
        shown = Shown(thing._repr_html_())
        assert shown.tags.count("tr") <= MOST_ROWS + 1
        assert len(thing._repr_html_()) < 10_000


def test_a_report_of_many_tensors_says_how_many_more_there_are():
    report = minilm_report()
    assert len(repr(report)) < 200
    assert repr(report).startswith("<Report of model.pq.safetensors: 90.9 MB -> 3.1")
    assert f"{104 - MOST_ROWS} more" in Shown(report._repr_html_()).text
    assert len(repr(report.tensors[0])) < 120


def test_quantized_tensors_are_shown_first():
    report = report_of(*(replace(quantized(f"kept{i}"), action="keep") for i in range(50)), quantized("coded"))
    assert "coded" in Shown(report._repr_html_()).text


def test_hostile_names_stay_names_and_add_no_line():
    report = report_of(quantized(EVIL, scheme=EVIL), output=EVIL, warnings=(EVIL,))
    shown = Shown(report._repr_html_())
    assert "script" not in shown.tags
    assert not [name for name, _ in shown.attributes if name.startswith("on")]
    for text in (report._repr_html_(), repr(report), repr(report.tensors[0])):
        assert "\u202e" not in text
        assert "\n" not in text
        text.encode()


def test_a_table_takes_the_colours_of_the_notebook():
    styles = [value for name, value in Shown(minilm_report()._repr_html_()).attributes if name == "style"]
    assert not [style for style in styles if "color:" in style or "#" in style]


def test_a_long_name_is_shortened_and_whole_in_its_tooltip():
    name = "a" * 100 + "<z>"
    shown = Shown(page("title", [], ["name"], [[name]], 1))
    assert name not in shown.text
    assert ("title", name) in shown.attributes


def test_the_line_of_a_recipe_is_the_call_that_makes_it():
    for name in loading.preset_names():
        recipe = loading.load(name)
        made = eval(repr(recipe), {"Recipe": pqcli.Recipe, "Rule": pqcli.Rule})
        assert made == recipe
    assert repr(pqcli.Recipe()) == "Recipe()"
    assert repr(pqcli.Recipe(block_size=4)) == "Recipe(block_size=4)"


def test_a_container_of_a_folder_shows_its_labels(model, tmp_path):
    folder = tmp_path / "both"
    for label in ("unet", "vae"):
        (folder / label).mkdir(parents=True)
        pqcli.compress(model, folder / label / "a.pq.safetensors")
    with pqcli.open(folder) as containers:
        assert "2 containers" in repr(containers)
        assert "unet/" in Shown(containers._repr_html_()).text
