"""What the shell is offered for Tab, asked as a shell asks: by click's protocol."""

import os
import resource
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import pqcli
from pqcli.cli.commands import app
from pqcli.recipe import loading
from pqcli.recipe.recipe import QUALITIES, codec_names
from tests.conftest import REPOSITORY


def offered(*words):
    """The words that Tab offers for the last of these, which may be empty."""
    line = shlex.join(["pqcli", *words[:-1]]) + " " + words[-1]
    environment = {"_PQCLI_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
    done = CliRunner().invoke(app, [], env=environment, prog_name="pqcli")
    assert done.exit_code == 0
    return done.stdout.split()


@pytest.fixture
def file(model, tmp_path):
    pqcli.compress(model, tmp_path / "model.pq.safetensors")
    return tmp_path / "model.pq.safetensors"


@pytest.mark.parametrize("command", ["compress", "plan"])
def test_words_of_settings_are_offered(command):
    assert offered(command, "model.pt", "--codec", "") == list(codec_names())
    assert offered(command, "model.pt", "--quality", "s") == [name for name in QUALITIES if name.startswith("s")]
    assert offered(command, "model.pt", "--quality", "") == list(QUALITIES)


def test_presets_and_yaml_files_are_offered_as_recipes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "model.pt").touch()
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "small.yml").touch()
    assert offered("compress", "model.pt", "--config", "") == [*loading.preset_names(), "mine.yaml"]
    assert offered("compress", "model.pt", "--config", "kill") == [n for n in loading.preset_names() if n[:4] == "kill"]
    assert offered("compress", "model.pt", "--config", "rec") == ["recipes/"]
    assert offered("compress", "model.pt", "--config", "recipes/") == ["recipes/small.yml"]
    assert offered("compress", "model.pt", "--config", "nowhere/x") == []


def test_devices_addresses_and_columns_are_offered():
    assert offered("compress", "m.pt", "--device", "cu") == ["cuda", "cuda:0"]
    assert offered("calibrate", "folder", "--device", "m") == ["mps"]
    assert offered("compress", "m.pt", "--ray", "") == ["auto", "local"]
    assert offered("report", "m.pq.safetensors", "--sort", "rel") == ["relative_mse"]
    assert offered("report", "m.pq.safetensors", "--fail-above", "max") == ["max_abs_error="]
    assert offered("inspect", "m.pq.safetensors", "--limit", "dep") == ["depth="]


def test_the_tensors_of_the_file_on_the_line_are_offered(file):
    with pqcli.open(file) as container:
        names = [record.name for record in container.records]
    assert offered("inspect", str(file), "--tensor", "") == names
    assert offered("inspect", str(file), "--tensor", "embed") == [name for name in names if name.startswith("embed")]
    assert offered("inspect", "--tensor", "") == []


def test_tensors_of_folders_have_their_labels(model, tmp_path):
    for label in ("unet", "vae"):
        (tmp_path / "both" / label).mkdir(parents=True)
        pqcli.compress(model, tmp_path / "both" / label / "a.pq.safetensors")
    assert "unet/conv.weight" in offered("inspect", str(tmp_path / "both"), "--tensor", "unet/")


@pytest.mark.parametrize("data", [b"", b"\x00" * 100, b"\xff" * 8, b"\x10" + b"\x00" * 7 + b'{"a": 1}        '])
def test_a_file_that_is_none_of_pqclis_offers_nothing(tmp_path, data):
    (tmp_path / "a").write_bytes(data)
    assert offered("inspect", str(tmp_path / "a"), "--tensor", "") == []
    assert offered("inspect", str(tmp_path / "b"), "--tensor", "") == []


def test_a_shell_is_answered_by_the_program_itself_and_at_once(file):
    """In a process, in the way of bash, and without torch, which alone takes longer than Tab may."""
    program = "import sys; sys.argv = ['pqcli']; from pqcli.__main__ import main; main()"
    words = f"pqcli inspect {file.name} --tensor conv"
    environment = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "_PQCLI_COMPLETE": "complete_bash", "COMP_WORDS": words,
        "COMP_CWORD": "4",
    }  # fmt: skip
    started = children_seconds()
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=file.parent, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["conv.weight", "conv.bias"]
    assert children_seconds() - started < 1.0  # of a processor's time; 0.4 s where nobody else is at work


def children_seconds():
    """Processor time of the processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
