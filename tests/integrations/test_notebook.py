"""What a real notebook shows, run by nbclient in a kernel of its own."""

import os
from html.parser import HTMLParser

import pytest
import torch

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

pytestmark = pytest.mark.integrations

EVIL = "<script>document.title = 'hacked'</script>"
CELLS = {
    "report": "import pqcli\nreport = pqcli.compress('model.pt', recipe=pqcli.Recipe(n_iter=1))\nreport",
    "container": "container = pqcli.open('model.pq.safetensors')\ncontainer",
    "preview": "pqcli.preview('model.pt')",
    "recipe": "pqcli.Recipe(block_size=4, exclude=('fc*',))",
    "findings": "pqcli.verify('model.pq.safetensors')",
    "tensors": "report.tensors[0]",
    "printed": "print(report, container)",
    "closed": "container.close()",
    "bar": "_ = pqcli.compress('model.pt', 'bar.pq.safetensors', pqcli.Recipe(codec='trellis'), progress=True)",
}


class Text(HTMLParser):
    """The text of a piece of HTML, and its tags."""

    def __init__(self, source):
        super().__init__()
        self.text, self.tags = "", []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The outputs of each cell, as nbformat has them."""
    folder = tmp_path_factory.mktemp("notebook")
    generator = torch.Generator().manual_seed(0)
    state = {f"layer.{i}.weight": torch.randn(32, 32, generator=generator) for i in range(60)}
    torch.save(state | {f"fc.{EVIL}.weight": torch.randn(64, 32, generator=generator)}, folder / "model.pt")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS.values()])
    environment = {**os.environ, "IPYTHONDIR": str(folder / "ipython"), "JUPYTER_RUNTIME_DIR": str(folder / "runtime")}
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    nbformat.validate(notebook)
    return {name: cell.outputs for name, cell in zip(CELLS, notebook.cells, strict=True)}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("report", "<Report of model.pq.safetensors: 2"),
        ("container", "<Container model.pq.safetensors: "),
        ("preview", "<Preview of model.pq.safetensors: 2"),
        ("recipe", "Recipe(block_size=4, exclude=('fc*',))"),
    ],
)
def test_an_object_is_a_line_and_a_compact_table(shown, name, line):
    (output,) = shown[name]
    data = output["data"]
    assert data["text/plain"].startswith(line)
    assert len(data["text/plain"]) < 300
    page = Text(data["text/html"])
    assert page.tags.count("tr") <= 13
    assert len(data["text/html"]) < 10_000


def test_how_many_more_there_are_stands_below_the_first_rows(shown):
    for name in ("report", "container", "preview"):
        assert "49 more" in Text(shown[name][0]["data"]["text/html"]).text


def test_hostile_names_are_shown_and_not_run(shown):
    for name in ("report", "container", "preview"):
        page = Text(shown[name][0]["data"]["text/html"])
        assert "script" not in page.tags
    assert "49 more" in Text(shown["report"][0]["data"]["text/html"]).text


def test_other_values_are_short_too(shown):
    assert shown["findings"][0]["data"]["text/plain"] == "[]"
    assert len(shown["tensors"][0]["data"]["text/plain"]) < 200
    assert len(shown["printed"][0]["text"]) < 500


def test_a_bar_stays_one_output_and_ends_full(shown):
    (output,) = shown["bar"]
    page = Text(output["data"]["text/html"])
    assert page.tags == ["progress", "span"]
    assert 'value="1.0000"' in output["data"]["text/html"]
    assert "measuring model.pt 100% " in page.text
