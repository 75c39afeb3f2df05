"""Every codec of the table passes the same checks, and a new one needs a folder and a line."""

import pytest
import torch
from typer.testing import CliRunner

import pqcli
from pqcli.cli.commands import app
from pqcli.codecs import registry
from pqcli.container import layout
from pqcli.errors import ContainerError, RecipeError
from tests.codecs.common import check_codec, check_importance, check_jobs_in_another_process, everything

QUICK = {"effort": 4}
CODECS = {
    "pq": {"n_iter": 3},
    "pq with a budget": {"quality": "balanced"},
    "trellis": QUICK,
    "auto": QUICK,
    "onebit": {},
}


@pytest.fixture(autouse=True)
def _third_codec(monkeypatch):
    monkeypatch.setattr(registry, "_ROWS", dict(registry._ROWS))
    registry.register(registry.Row("onebit", "tests.codecs.toy"))


@pytest.mark.parametrize("codec", CODECS)
def test_what_every_codec_promises(codec, tmp_path):
    check_codec(codec.split()[0], tmp_path, **CODECS[codec])


@pytest.mark.parametrize("codec", ["pq", "pq with a budget", "trellis"])
def test_jobs_run_in_another_process_with_the_same_result(codec, tmp_path):
    check_jobs_in_another_process(codec.split()[0], tmp_path, **CODECS[codec])


@pytest.mark.parametrize(("codec", "settings"), [("pq", {"n_iter": 3}), ("trellis", {**QUICK, "target_bits": 3.0})])
def test_importance_reaches_the_encoder(codec, settings, tmp_path):
    check_importance(codec, tmp_path, **settings)


def test_every_row_of_the_table_is_checked_here():
    assert {registry.chosen(name.split()[0], has_budget="budget" in name).name for name in CODECS} == set(
        registry._ROWS
    )


def test_a_third_codec_works_with_every_command(tmp_path):
    """Its folder, and the line that registers it: nothing else names it."""
    source, file = tmp_path / "model.pt", tmp_path / "model.pq.safetensors"
    torch.save(everything(), source)

    def command(*arguments):
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
        return result.output

    assert "onebit" in command("plan", source, "--codec", "onebit")
    command("compress", source, "--codec", "onebit")
    assert "onebit" in command("report", file)
    assert "onebit" in command("inspect", file)
    command("verify", file, "--against", source)
    command("decode", file, "-o", tmp_path / "dense.pt")
    signs = torch.load(tmp_path / "dense.pt", weights_only=True)["fc.weight"]
    assert torch.equal(signs.sign(), everything()["fc.weight"].sign())
    assert "onebit" in layout.known_features()


def test_a_reader_without_the_codec_refuses_its_files(tmp_path, monkeypatch):
    source = tmp_path / "model.pt"
    torch.save(everything(), source)
    file = tmp_path / "model.pq.safetensors"
    pqcli.compress(source, recipe=pqcli.Recipe(codec="onebit"))
    monkeypatch.delitem(registry._ROWS, "onebit")
    with pytest.raises(ContainerError, match="needs features onebit, which this pqcli does not know"):
        pqcli.load(file)
    with pytest.raises(RecipeError, match="must be 'pq', 'trellis' or 'auto'"):
        pqcli.Recipe(codec="onebit")
