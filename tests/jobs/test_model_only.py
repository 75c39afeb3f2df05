"""`--model-only`: a training checkpoint without its training state, and never a silent loss."""

import json
from collections import OrderedDict

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import pqcli
from pqcli import checkpoint
from pqcli.cli.commands import app
from pqcli.errors import CheckpointError, RecipeError
from pqcli.recipe.recipe import Recipe

ASKED = Recipe(model_only=True, block_size=4, n_centroids=16)


def trained(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(OrderedDict(up=nn.Linear(64, 128), norm=nn.LayerNorm(128), down=nn.Linear(128, 64)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    return {
        "epoch": 7,
        "rng_state": torch.get_rng_state(),
        "optimizer": optimizer.state_dict(),
        "model": model.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "args": {"lr": 1e-3, "betas": (0.9, 0.999)},
    }


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run.pt"
    torch.save(trained(), path)
    return path


def loaded(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("settings", [{}, {"codec": "trellis", "effort": 4, "target_bits": 4.0}])
def test_what_decodes_is_the_checkpoint_without_its_training_state(run, settings):
    report = pqcli.compress(run, recipe=Recipe(model_only=True, **settings))
    back, value = loaded(pqcli.decode(report.output)), trained()
    assert list(back) == ["epoch", "optimizer", "model", "lr_scheduler", "args"]
    assert back["optimizer"] == {"param_groups": value["optimizer"]["param_groups"]}
    assert back["lr_scheduler"] == value["lr_scheduler"]
    assert (back["epoch"], back["args"]) == (7, value["args"])
    assert torch.equal(back["model"]["norm.weight"], value["model"]["norm.weight"])
    assert list(back["model"]) == list(value["model"])
    assert pqcli.verify(report.output, run) == []
    assert pqcli.verify(report.output) == []


def test_what_is_left_out_is_listed_and_not_counted_in_the_original(run):
    whole, model = pqcli.compress(run, recipe=Recipe(), force=True), pqcli.compress(run, recipe=ASKED, force=True)
    value = trained()
    moments = [tensor for state in value["optimizer"]["state"].values() for tensor in state.values()]
    n_bytes = sum(tensor.nbytes for tensor in moments)
    size = value["rng_state"].nbytes
    told = "training state, left out as asked"
    assert model.dropped == (
        f"rng_state ({told}: 1 tensor, {size:,} B)",
        f"optimizer ({told}: {len(moments)} tensors, {n_bytes:,} B)",
    )
    assert whole.dropped == ()
    assert model.original_bytes == whole.original_bytes - n_bytes - size
    assert pqcli.report(model.output).dropped == model.dropped
    assert pqcli.report(model.output, run).original_bytes == model.original_bytes
    assert model.compressed_bytes < whole.compressed_bytes - n_bytes // 2


def test_the_command_line_says_what_it_leaves_out_and_what_it_does_not_compare(run, tmp_path):
    def said(*arguments):
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, done.output
        return done.stdout, done.stderr.replace("\n", " ")

    file = str(tmp_path / "m.pq.safetensors")
    _, noted = said("compress", str(run), "-o", file, "--model-only", "--block-size", "4")
    assert "not in the compressed file" in noted
    assert "optimizer (training state, left out as asked" in noted
    planned, _ = said("plan", str(run), "--model-only", "--json")
    assert {entry["name"].partition(".")[0] for entry in json.loads(planned)["tensors"]} == {"up", "norm", "down"}
    _, noted = said("verify", file, "--against", str(run))
    assert "not compared, because --model-only left it out: rng_state" in noted
    assert "every tensor decodes" in noted
    _, noted = said("verify", file)
    assert "not compared" not in noted


def test_a_file_that_lacks_state_it_was_not_asked_to_leave_out_is_still_found_out(run, tmp_path):
    torch.save({"model": trained()["model"]}, tmp_path / "bare.pt")
    report = pqcli.compress(tmp_path / "bare.pt", recipe=Recipe())
    assert any("optimizer" in finding.name for finding in pqcli.verify(report.output, run))


def test_weights_of_the_model_that_are_missing_are_found_out_all_the_same(run, tmp_path):
    value = trained()
    del value["model"]["norm.bias"]
    torch.save(value, tmp_path / "less.pt")
    report = pqcli.compress(tmp_path / "less.pt", recipe=ASKED)
    assert [finding.name for finding in pqcli.verify(report.output, run)] == ["norm.bias"]


def test_a_pattern_for_what_is_left_out_matches_nothing(run):
    with pytest.raises(RecipeError, match=r"include 'optimizer\.\*'"):
        pqcli.compress(run, recipe=Recipe(model_only=True, include=("optimizer.*",)))


def test_a_checkpoint_of_training_state_alone_is_refused(tmp_path):
    path = tmp_path / "state.pt"
    torch.save({"optimizer": trained()["optimizer"]}, path)
    with pytest.raises(CheckpointError, match="holds training state only, no tensor of a model"):
        pqcli.compress(path, recipe=ASKED)


def test_a_weight_tied_to_training_state_stays_whole_and_tied(tmp_path):
    value = trained()
    weight = value["model"]["up.weight"]
    value["optimizer"]["master"] = {"a": weight}  # comes before the model: the reader names it as the owner
    value["model"]["tied.weight"] = weight
    path = tmp_path / "tied.pt"
    torch.save(value, path)
    report = pqcli.compress(path, recipe=ASKED)
    assert pqcli.verify(report.output, path) == []
    model = loaded(pqcli.decode(report.output))["model"]
    assert model["up.weight"].data_ptr() == model["tied.weight"].data_ptr()


def test_lists_keep_the_places_of_what_stays_and_empty_containers_stay():
    mixed = {
        "model": nn.Linear(8, 8).state_dict(),
        "optim": [torch.ones(2), 5, (torch.ones(3), {}), [torch.ones(1)], []],
    }
    left = {"model": ..., "optim": [None, 5, (None, {}), None, []]}
    assert {**pruned(mixed), "model": ...} == left


def pruned(value):
    """The nesting of a value without the training state, as it is written again."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        torch.save(value, path)
        with checkpoint.open(path) as opened:
            model = opened.model_only()
            checkpoint.write(Path(folder) / "b.pt", model.tensors, model.read, model.skeleton, format="pt")
        return loaded(Path(folder) / "b.pt")


def test_the_shards_of_a_folder_lose_their_training_state(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    value = trained()
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    first = {"up.weight": value["model"]["up.weight"], "optimizer": value["optimizer"]}
    torch.save(first, folder / names[0])
    torch.save({"down.weight": value["model"]["down.weight"]}, folder / names[1])
    with checkpoint.open(folder / names[0]) as shard:
        where = {info.name: names[0] for info in shard.tensors} | {"down.weight": names[1]}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where, "metadata": {}}))
    report = pqcli.compress(folder, tmp_path / "f.pq.safetensors", ASKED)
    assert pqcli.verify(report.output, folder) == []
    decoded = pqcli.decode(report.output, tmp_path / "decoded")
    assert set(loaded(decoded / names[0])) == {"up.weight", "optimizer"}
    index = json.loads((decoded / "pytorch_model.bin.index.json").read_text())
    assert set(index["weight_map"]) == {"up.weight", "down.weight"}


def test_a_checkpoint_without_training_state_is_as_without_the_flag(tmp_path):
    state = trained()["model"]
    torch.save(state, tmp_path / "a.pt")
    with checkpoint.open(tmp_path / "a.pt") as opened:
        model = opened.model_only()
        assert (model.tensors, model.skeleton, model.dropped, model.n_bytes) == (
            opened.tensors, opened.skeleton, opened.dropped, opened.n_bytes,
        )  # fmt: skip
