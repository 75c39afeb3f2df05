"""Files of a folder that are not carried are listed with their sizes, and counted against the ratio."""

import json

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import pqcli
from pqcli.cli.commands import app
from pqcli.jobs.report import inspect


def test_files_that_are_not_carried_are_told_by_size(tmp_path):
    folder, file = tmp_path / "m", tmp_path / "out.pq.safetensors"
    folder.mkdir()
    save_file({"w": torch.randn(64, 64)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_bytes(b"x" * 30_000)
    done = CliRunner().invoke(app, ["compress", str(folder), "-o", str(file), "--json"], env={"COLUMNS": "300"})
    report = json.loads(done.stdout)
    assert done.exit_code == 0
    assert report["dropped"] == ["tokenizer.json (a file beside the weights, 30,000 B; copy it yourself)"]
    assert report["side_bytes"] == 30_000
    assert report["ratio_with_side"] == (report["original_bytes"] + 30_000) / (report["compressed_bytes"] + 30_000)
    again = pqcli.report(file)
    assert (again.side_bytes, again.ratio_with_side) == (30_000, report["ratio_with_side"])
    assert inspect(file)["source"]["side_bytes"] == 30_000


def test_a_file_by_itself_has_nothing_beside_it(tmp_path):
    save_file({"w": torch.randn(64, 64)}, tmp_path / "m.safetensors")
    report = pqcli.compress(tmp_path / "m.safetensors")
    assert report.ratio_with_side == report.ratio
    with pqcli.open(tmp_path / "m.pq.safetensors") as container:
        assert container.manifest.source.side_bytes == 0
