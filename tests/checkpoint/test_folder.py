"""Hugging Face folders: single files, shards with an index, and everything that can be wrong with them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pqcli import checkpoint
from pqcli.errors import CheckpointError, ContainerError, OutputError
from pqcli.tensors.info import TensorInfo
from tests.checkpoint.checkpoint_cases import assert_same, round_trip


def sharded(folder, *, bins=False):
    """Two shards, an index, and the files that lie beside weights."""
    folder.mkdir()
    ending, index_name = (
        ("bin", "pytorch_model.bin.index.json") if bins else ("safetensors", "model.safetensors.index.json")
    )
    shards = [{"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3)}, {"b.weight": torch.randn(2, 3).half()}]
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-00002.{ending}"
        if bins:
            torch.save(shard, folder / name)
        else:
            save_file(shard, folder / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": 72, "total_parameters": 21}, "weight_map": weight_map}
    (folder / index_name).write_text(json.dumps(index))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return {name: tensor for shard in shards for name, tensor in shard.items()}


@pytest.mark.parametrize("bins", [False, True])
def test_a_sharded_folder_comes_back_with_its_shards_and_its_index(tmp_path, bins):
    sharded(tmp_path / "a", bins=bins)
    opened = round_trip(tmp_path / "a", tmp_path / "b")
    assert opened.format == "folder"
    assert opened.side_files == ("config.json", "tokenizer.json")
    weights = sorted(path.name for path in (tmp_path / "a").iterdir() if path.name not in opened.side_files)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == weights
    for name in weights:
        if name.endswith(".json"):
            assert json.loads((tmp_path / "a" / name).read_text()) == json.loads((tmp_path / "b" / name).read_text())
        elif bins:
            assert_same(*(torch.load(tmp_path / side / name, weights_only=True) for side in "ab"))
        else:
            assert_same(*(load_file(tmp_path / side / name) for side in "ab"))


def test_the_size_counts_the_weight_files_only(tmp_path):
    sharded(tmp_path / "a")
    with checkpoint.open(tmp_path / "a") as opened:
        assert opened.n_bytes == sum(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors"))


@pytest.mark.parametrize("format_", ["pt", "safetensors"])
def test_a_folder_becomes_one_file(tmp_path, format_):
    value = sharded(tmp_path / "a")
    round_trip(tmp_path / "a", tmp_path / "b", format_)
    with checkpoint.open(tmp_path / "b") as opened:
        assert opened.format == format_
        assert {info.name for info in opened.tensors} == set(value)
        assert all(torch.equal(opened.read(name), value[name]) for name in value)


def test_a_file_becomes_a_folder(tmp_path):
    torch.save({"model": {"w": torch.ones(2, 2)}, "epoch": 3}, tmp_path / "a.pt")
    round_trip(tmp_path / "a.pt", tmp_path / "b", "folder")
    assert_same(load_file(tmp_path / "b" / "model.safetensors"), {"w": torch.ones(2, 2)})


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_the_only_weights_of_a_folder_are_found(tmp_path, name):
    (tmp_path / "a").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "a" / name)
    (tmp_path / "a" / "README.md").write_text("hello")
    opened = round_trip(tmp_path / "a", tmp_path / "b")
    assert opened.side_files == ("README.md",)
    assert [path.name for path in (tmp_path / "b").iterdir()] == [name]


def test_safetensors_are_preferred_to_the_same_weights_as_bin(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    with checkpoint.open(tmp_path) as opened:
        assert torch.equal(opened.read("w"), torch.ones(2))
        assert opened.side_files == ("pytorch_model.bin",)


def test_another_dtype_changes_the_total_size_of_the_index(tmp_path):
    sharded(tmp_path / "a")
    with checkpoint.open(tmp_path / "a") as opened:
        half = tuple(TensorInfo(info.name, info.shape, "float16") for info in opened.tensors)
        checkpoint.write(tmp_path / "b", half, lambda name: opened.read(name).half(), opened.skeleton, format="folder")
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * 21


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i["weight_map"].update({"b.weight": "../x.safetensors"}), "not a bare file name"),
        (lambda i: i["weight_map"].update({"b.weight": "/etc/passwd"}), "not a bare file name"),
        (lambda i: i["weight_map"].update({"b.weight": 7}), "not a bare file name"),
        (lambda i: i["weight_map"].update({"c": "model-00003-of-00003.safetensors"}), "lacks 1 of the 3 shards"),
        (lambda i: i["weight_map"].update({"c": "model-00001-of-00002.safetensors"}), "lacks 1 tensors"),
        (lambda i: i.update(weight_map={}), "lists no tensors"),
        (lambda i: i.update(weight_map=[1]), "no shard index"),
        (lambda i: i.pop("weight_map"), "no shard index"),
    ],
)
def test_an_index_that_cannot_be_right_is_refused(tmp_path, change, message):
    sharded(tmp_path / "a")
    edit_index(tmp_path / "a", change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(tmp_path / "a")


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    sharded(tmp_path / "a")
    save_file({"a.bias": torch.ones(3), "b.weight": torch.ones(1)}, tmp_path / "a" / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"'a\.bias' is in both"):
        checkpoint.open(tmp_path / "a")


def test_a_folder_without_weights_says_so(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="a folder without weights"):
        checkpoint.open(tmp_path)


def test_a_folder_with_several_checkpoints_asks_which(tmp_path):
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints and no index \(one.safetensors, two.safetensors\)"):
        checkpoint.open(tmp_path)


def test_an_existing_folder_is_written_to_only_by_force_and_never_mixed(tmp_path):
    sharded(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("{}")
    with checkpoint.open(tmp_path / "a") as opened:

        def write(**options):
            return checkpoint.write(
                tmp_path / "b", opened.tensors, opened.read, opened.skeleton, format="folder", **options
            )

        with pytest.raises(OutputError, match="exists already and is not empty"):
            write()
        assert write(force=True) > 0
        assert write(force=True) > 0
        assert (tmp_path / "b" / "config.json").exists()
        (tmp_path / "b" / "model.safetensors").write_bytes(b"old")
        with pytest.raises(OutputError, match=r"holds other weights \(model.safetensors\)"):
            write(force=True)


def test_a_folder_that_fails_half_way_leaves_nothing(tmp_path):
    sharded(tmp_path / "a")

    def read(name):
        if name == "b.weight":
            raise KeyboardInterrupt
        return opened.read(name)

    with checkpoint.open(tmp_path / "a") as opened, pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path / "b", opened.tensors, read, opened.skeleton, format="folder")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["../evil.safetensors", "", ".", "a/b", "/abs", None])
def test_a_skeleton_cannot_lead_out_of_its_folder(tmp_path, name):
    sharded(tmp_path / "a")
    with checkpoint.open(tmp_path / "a") as opened:
        skeleton = json.loads(json.dumps(opened.skeleton))
        skeleton["shards"][0]["file"] = name
        with pytest.raises(ContainerError, match="shard name"):
            checkpoint.write(tmp_path / "b", opened.tensors, opened.read, skeleton, format="folder")
    assert checkpoint.default_suffix("pt", {"source": "pt", "suffix": "/../x"}) == ".pt"
