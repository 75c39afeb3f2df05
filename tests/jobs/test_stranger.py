"""Things that strangers do: pipes that close, streams that are not there, odd places, odd names, wrong files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pqcli
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder with a checkpoint and its container, w.pq.safetensors, whose report is longer than a pipe's buffer."""
    folder = tmp_path_factory.mktemp("wide")
    state = {f"layer.{i}.with.a.long.name.that.fills.a.pipe.{i:040}": torch.randn(4) for i in range(1500)}
    torch.save({**state, "w": torch.randn(64, 64)}, folder / "wide.pt")
    pqcli.compress(folder / "wide.pt", folder / "w.pq.safetensors")
    return folder


def shell(script: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", script.replace("pqcli", f"{sys.executable} -m pqcli")],
        cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("format_", ["table", "json", "csv", "html"])
def test_a_reader_that_leaves_early_is_no_failure(wide, format_):
    done = shell(f"pqcli report w.pq.safetensors --format {format_} | head -c 20; exit ${{PIPESTATUS[0]}}", wide)
    assert (done.returncode, done.stderr) == (0, "")


def test_closed_streams_are_no_failure(wide):
    assert shell("pqcli compress wide.pt -o closed.pq.safetensors >&- 2>&-", wide).returncode == 0
    done = shell("pqcli report w.pq.safetensors >&-", wide)
    assert (done.returncode, done.stderr) == (0, "")
    assert shell("pqcli verify w.pq.safetensors </dev/null 2>&-", wide).returncode == 0


def test_a_full_device_as_stdout_is_one_message(wide):
    for command in ("pqcli report w.pq.safetensors", "pqcli inspect w.pq.safetensors --json", "pqcli --help"):
        done = shell(f"{command} >/dev/full", wide)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr, command
        assert "No space left" in done.stderr or "disk is full" in done.stderr


def test_a_hugging_face_folder_comes_back_and_what_is_not_weights_is_named(tmp_path, pqcli_command):
    folder = tmp_path / "hf"
    folder.mkdir()
    first, second = {"a.weight": torch.randn(128, 64)}, {"b.weight": torch.randn(128, 64), "c": torch.randn(4)}
    save_file(first, folder / "model-1.safetensors", {"format": "pt"})
    save_file(second, folder / "model-2.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(first, "model-1.safetensors") | dict.fromkeys(second, "model-2.safetensors")
    index = {"metadata": {"total_size": 65552}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    done = pqcli_command("compress", "hf/")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf.pq" / "config.json").read_text() == "{}"
    done = pqcli_command("compress", "hf/", "-o", "hf.pq.safetensors")
    assert done.returncode == 0, done.stderr
    assert "config.json" in done.stderr
    assert "tokenizer.json" in done.stderr
    assert pqcli_command("decode", "hf.pq.safetensors").returncode == 0
    out = tmp_path / "hf.decoded"
    assert json.loads((out / "model.safetensors.index.json").read_text()) == index
    assert list(load_file(out / "model-2.safetensors")) == ["b.weight", "c"]
    assert torch.equal(load_file(out / "model-2.safetensors")["c"], second["c"])


def test_a_file_of_the_wrong_kind_is_told_what_it_is_and_what_to_do(tmp_path, pqcli_command):
    torch.save({"w": torch.randn(64, 64)}, tmp_path / "m.pt")
    save_file({"w": torch.randn(64, 64)}, tmp_path / "m.safetensors")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("m.pt", "m.safetensors", "empty", "folder"):
        for command in ("decode", "report", "verify", "inspect"):
            done = pqcli_command(command, name)
            assert (done.returncode, done.stdout) == (1, "")
            assert name in done.stderr
            assert "pqcli compress" in done.stderr, done.stderr
            assert "os error" not in done.stderr
            assert "deserializ" not in done.stderr
    assert pqcli_command("compress", "m.pt", "-q").returncode == 0
    done = pqcli_command("compress", "m.pq.safetensors", "-o", "again.pq.safetensors")
    assert done.returncode == 1
    assert "compressed already" in done.stderr


def test_findings_come_in_the_same_order_every_time(tmp_path, pqcli_process):
    torch.save({"w": torch.randn(64, 64)}, tmp_path / "m.pt")
    torch.save({f"other{i}": torch.randn(4) for i in range(8)}, tmp_path / "other.pt")
    pqcli_process("compress", "m.pt", "-q")
    runs = {
        pqcli_process("verify", "m.pq.safetensors", "--against", "other.pt", PYTHONHASHSEED=str(i)).stderr
        for i in range(3)
    }
    assert len(runs) == 1


def test_a_dry_run_refuses_what_the_real_run_would_refuse(tmp_path, pqcli_command):
    torch.save({"w": torch.randn(64, 64)}, tmp_path / "m.pt")
    (tmp_path / "old.pq.safetensors").write_bytes(b"old")
    for flags in (["--device", "toaster"], ["-o", "old.pq.safetensors"], ["-o", "nowhere/x.pq.safetensors"]):
        dry, real = (pqcli_command("compress", "m.pt", *flags, *more) for more in (["--dry-run"], []))
        assert (dry.returncode, dry.stderr) == (real.returncode, real.stderr), flags


def test_unicode_names_relative_paths_and_a_narrow_terminal(tmp_path, pqcli_process):
    folder = tmp_path / "größe 日本"
    folder.mkdir()
    torch.save({"w": torch.randn(64, 64)}, folder / "mödel [red].pt")
    done = pqcli_process("compress", "größe 日本/../größe 日本/mödel [red].pt", COLUMNS="40", NO_COLOR="1", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    assert pqcli_process("decode", "größe 日本/mödel [red].pq.safetensors", PYTHONIOENCODING="ascii").returncode == 0
    assert (folder / "mödel [red].decoded.pt").is_file()


def test_names_that_no_file_can_hold_are_refused_and_not_dropped(tmp_path, pqcli_command):
    torch.save({"a\ud800": torch.randn(64, 64), "b": torch.randn(64, 64)}, tmp_path / "m.pt")
    done = pqcli_command("compress", "m.pt")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no valid text" in done.stderr
    torch.save({"x": torch.randn(64, 64), "note": {"a\ud800": 3}}, tmp_path / "n.pt")
    done = pqcli_command("compress", "n.pt")
    assert done.returncode == 0, done.stderr
    assert "warning" in done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_s_completion_is_printed(shell, tmp_path):
    """Asked for by name: `--show-completion` prints that of the shell from which it is run."""
    done = subprocess.run(
        [Path(sys.executable).with_name("pqcli")],
        cwd=tmp_path, env={**ENVIRONMENT, "_PQCLI_COMPLETE": f"source_{shell}"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"_PQCLI_COMPLETE=complete_{shell}" in done.stdout
