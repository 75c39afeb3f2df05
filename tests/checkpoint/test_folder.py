"""Hugging Face folders: single files, shards with an index, and everything that can be wrong with them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pqcli import checkpoint
from pqcli.checkpoint import folder
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


# -- folders of trainers and libraries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_an_adapter_is_what_is_meant_beside_a_trainers_files(tmp_path, ending):
    weights = {"base_model.model.q_proj.lora_A.weight": torch.randn(4, 8)}
    path = tmp_path / f"adapter_model.{ending}"
    if ending == "bin":
        torch.save(weights, path)
    else:
        save_file(weights, path)
    (tmp_path / "adapter_config.json").write_text("{}")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state.pth"):
        torch.save({"state": torch.ones(3)}, tmp_path / name)
    with checkpoint.open(tmp_path) as opened:
        assert [info.name for info in opened.tensors] == list(weights)
        assert "optimizer.pt" in opened.side_files
        assert opened.side_bytes == sum(p.stat().st_size for p in tmp_path.iterdir() if p != path)


def test_a_trainers_files_alone_are_no_weights(tmp_path):
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.ones(3)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="a folder without weights"):
        checkpoint.open(tmp_path)


def test_files_in_folders_of_the_folder_are_listed_with_their_size(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(2)}, tmp_path / "2_Dense" / "model.safetensors")
    (tmp_path / "2_Dense" / "config.json").write_text("{}")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("x")
    (tmp_path / "README.md").write_text("hello")
    with checkpoint.open(tmp_path) as opened:
        assert opened.side_files == ("README.md", "2_Dense/config.json", "2_Dense/model.safetensors")
        assert opened.side_sizes["2_Dense/config.json"] == 2


@pytest.mark.parametrize("index", ["model_index.json", None])
def test_weights_in_folders_of_the_folder_are_pointed_to(tmp_path, index):
    for part in ("unet", "vae", "scheduler"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text("{}")
    save_file({"w": torch.ones(2)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save({"w": torch.ones(2)}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    if index:
        (tmp_path / index).write_text("{}")
    with pytest.raises(CheckpointError, match="its weights lie in unet/, vae/: name one") as caught:
        checkpoint.open(tmp_path)
    assert ("diffusers pipeline" in str(caught.value)) == bool(index)
    checkpoint.open(tmp_path / "unet").close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero_to_fp32.py", "a DeepSpeed checkpoint.*zero_to_fp32.py"),
        ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "a DeepSpeed checkpoint"),
        ("bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt", "a DeepSpeed checkpoint"),
        ("mp_rank_00_model_states.pt", "a DeepSpeed or Megatron checkpoint"),
        ("layer_02-model_00-model_states.pt", "a DeepSpeed or Megatron checkpoint"),
        ("model_world_size_8_rank_0.pt", "an FSDP checkpoint.*FULL_STATE_DICT"),
        ("__0_0.distcp", "distributed checkpoint.*dcp_to_torch"),
    ],
)
def test_a_training_frameworks_folder_is_told_and_never_read_in_part(tmp_path, name, message):
    torch.save({"module": {"w": torch.ones(2)}}, tmp_path / "lonely.pt")
    torch.save({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(tmp_path)


@pytest.mark.parametrize("name", ["x.gguf", "tf_model.h5", "flax_model.msgpack", "model.onnx", "w.NPZ"])
def test_a_lone_checkpoint_beside_weights_of_another_kind_must_be_named(tmp_path, name):
    torch.save({"w": torch.ones(2)}, tmp_path / "lonely.pt")
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"does not read; name lonely\.pt itself"):
        checkpoint.open(tmp_path)
    checkpoint.open(tmp_path / "lonely.pt").close()


def test_a_loop_of_links_between_folders_ends(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "self").symlink_to(tmp_path)
    with checkpoint.open(tmp_path) as opened:
        assert opened.side_files == ()


def test_a_folder_of_everything_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_MAX_FILES", 5)
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "sub").mkdir()
    for number in range(5):
        (tmp_path / "sub" / f"{number}.txt").write_text("")
    with pytest.raises(CheckpointError, match="more than 5 files, too many to be a checkpoint; name the weights"):
        checkpoint.open(tmp_path)
    checkpoint.open(tmp_path / "model.safetensors").close()
