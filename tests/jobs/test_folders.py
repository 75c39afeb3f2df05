"""Folders in, folders out: what lies beside weights comes along, and weights come back under the names they had."""

import contextlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import pqcli
from pqcli import atomic
from pqcli.atomic import atomic_folder
from pqcli.checkpoint import components, walking
from pqcli.checkpoint.components import components_of
from pqcli.cli import html
from pqcli.cli.commands import app
from pqcli.jobs.folders.compressing import opened_folder, shared_recipes
from pqcli.jobs.report import inspect

RECIPE = pqcli.Recipe(block_size=4, n_centroids=16, n_iter=2)
FOR_TORCH = {"format": "pt"}


def weights(*names, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(64, 32, generator=generator) for name in names} | {"bias": torch.randn(32)}


def made(folder: Path) -> Path:
    """A folder with weights, hidden files, a sub-folder with weights of its own, an empty one, and a link."""
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "2_Dense").mkdir()
    (folder / "empty" / "inner").mkdir(parents=True)
    save_file(weights("a.weight"), folder / "model.safetensors", FOR_TORCH)
    save_file(weights("linear.weight", seed=1), folder / "2_Dense" / "model.safetensors", FOR_TORCH)
    for name in ("config.json", ".gitattributes", "1_Pooling/config.json", "2_Dense/config.json", "größe [x] %.txt"):
        (folder / name).write_text(f"the text of {name}")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "vocab.txt").symlink_to("config.json")
    (folder / "pooling").symlink_to("1_Pooling")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def same_but_weights(one: Path, other: Path) -> None:
    """Both folders have the same files; those that are not weights have the same bytes."""
    a, b = files(one), files(other)
    assert a.keys() == b.keys()
    for name, data in a.items():
        if not name.endswith((".safetensors", ".bin", ".pt")):
            assert data == b[name], name


def test_a_folder_comes_back_with_everything_that_lay_beside_its_weights(tmp_path):
    source = made(tmp_path / "m")
    report = pqcli.compress(source, recipe=RECIPE)
    out = tmp_path / "m.pq"
    assert report.output == str(out)
    assert report.compressed_bytes == sum(
        map(len, (data for name, data in files(out).items() if name[:8] != "pooling/"))
    )
    compressed = files(out)
    expected = {name.replace("model.safetensors", "model.pq.safetensors") for name in files(source)}
    assert compressed.keys() == expected
    assert (out / "vocab.txt").read_bytes() == (source / "config.json").read_bytes()
    assert not (out / "vocab.txt").is_symlink()
    assert (out / "pooling").readlink() == Path("1_Pooling")
    assert (out / "empty" / "inner").is_dir()
    assert (out / "run.sh").stat().st_mode & 0o111
    decoded = pqcli.decode(out)
    assert decoded == tmp_path / "m.decoded"
    same_but_weights(source, decoded)
    for path in ("model.safetensors", "2_Dense/model.safetensors"):
        before, after = load_file(source / path), load_file(decoded / path)
        assert list(before) == list(after)
        assert torch.equal(before["bias"], after["bias"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m.decoded", "m.pq"]


def test_reports_of_a_folder_are_the_sum_of_its_containers(tmp_path):
    source = made(tmp_path / "m")
    written = pqcli.compress(source, recipe=RECIPE)
    read, measured = pqcli.report(tmp_path / "m.pq"), pqcli.report(tmp_path / "m.pq", source)
    tensors = ["a.weight", "bias", "2_Dense/bias", "2_Dense/linear.weight"]
    for report in (written, read, measured):
        assert [tensor.name for tensor in report.tensors] == tensors
        assert report.n_carried == 7
        assert report.original_bytes == written.original_bytes
        assert report.compressed_bytes == written.compressed_bytes
        assert report.relative_mse == pytest.approx(written.relative_mse, rel=1e-4)
        assert [Path(part.output).name for part in report.parts] == ["model.pq.safetensors"] * 2
        assert report.original_bytes == report.carried_bytes + sum(part.original_bytes for part in report.parts)
        assert report.compressed_bytes == report.tensor_bytes + report.overhead_bytes + report.carried_bytes
    assert pqcli.verify(tmp_path / "m.pq", source) == []
    assert len(inspect(tmp_path / "m.pq")["containers"]) == 2
    assert "2_Dense/linear.weight" in html.render(written)
    with pytest.raises(pqcli.PQError, match="is compared with the folder that it was made from"):
        pqcli.report(tmp_path / "m.pq", source / "model.safetensors")
    one = inspect(tmp_path / "m.pq", ["2_Dense/linear.weight"])["containers"]
    assert [record["name"] for container in one for record in container["tensors"]] == ["linear.weight"]
    with pytest.raises(pqcli.PQError, match="no tensor 'x'"):
        inspect(tmp_path / "m.pq", ["x"])


def test_a_folder_is_loaded_and_opened_by_full_names(tmp_path):
    pqcli.compress(made(tmp_path / "m"), recipe=RECIPE)
    loaded = pqcli.load(tmp_path / "m.pq")
    assert list(loaded) == ["a.weight", "bias", "2_Dense/bias", "2_Dense/linear.weight"]
    with pqcli.open(tmp_path / "m.pq") as opened:
        assert [info.name for info in opened.infos] == list(loaded)
        assert torch.equal(opened.decode("2_Dense/linear.weight"), loaded["2_Dense/linear.weight"])
        assert opened.record("2_Dense/linear.weight").name == "linear.weight"
        assert opened.error("bias") is None
        with pytest.raises(pqcli.PQError, match="no tensor 'nothing'"):
            opened.decode("nothing")
    with pqcli.open(tmp_path / "m.pq" / "2_Dense") as alone:
        assert torch.equal(alone.decode("linear.weight"), loaded["2_Dense/linear.weight"])


def test_the_plan_of_a_folder_is_what_compressing_it_gives(tmp_path):
    source = made(tmp_path / "m")
    seen = pqcli.preview(source, recipe=RECIPE)
    report = pqcli.compress(source, recipe=RECIPE)
    assert (seen.predicted_bytes, seen.original_bytes) == (report.compressed_bytes, report.original_bytes)
    assert seen.output == tmp_path / "m.pq"
    assert [entry.info.name for entry in seen.plan.entries] == [tensor.name for tensor in report.tensors]


def test_patterns_may_mean_the_tensors_of_one_component_alone(tmp_path):
    source = made(tmp_path / "m")
    report = pqcli.compress(source, recipe=pqcli.Recipe(exclude=("linear*",), n_centroids=16, n_iter=1))
    assert {tensor.name for tensor in report.tensors if tensor.action == "pq"} == {"a.weight"}
    with pytest.raises(pqcli.PQError, match="matches none of the"):
        pqcli.compress(source, recipe=pqcli.Recipe(exclude=("nothing*",)), force=True)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"target_bytes": 9_000}, {"target_ratio": 2.2}])
def test_a_size_is_that_of_the_whole_folder(tmp_path, settings):
    most = settings.get("target_bytes", 0)
    report = pqcli.compress(made(tmp_path / "m"), recipe=pqcli.Recipe(**settings))
    assert report.compressed_bytes <= (most or report.original_bytes / 2.2)
    assert report.compressed_bytes > 0.85 * (most or report.original_bytes / 2.2)


def test_a_size_is_shared_among_the_components_after_what_lies_beside_them(tmp_path):
    source = made(tmp_path / "m")
    save_file({"linear.weight": torch.randn(640, 32)}, source / "2_Dense" / "model.safetensors")
    with opened_folder(source, RECIPE) as folder:
        shared = shared_recipes(folder, pqcli.Recipe(target_bytes=50_000))
        sizes = [recipe.target_bytes for recipe in shared.values()]
        assert 50_000 - len(sizes) <= sum(sizes) + folder.parts.side_bytes <= 50_000
        assert 8 < sizes[1] / sizes[0] < 10
        half = shared_recipes(folder, pqcli.Recipe(target_ratio=2))
        assert sum(recipe.target_bytes for recipe in half.values()) < folder.original_bytes / 2
        assert set(shared_recipes(folder, RECIPE).values()) == {RECIPE}
        with pytest.raises(pqcli.PQError, match="7 files beside its weights are copied and take"):
            shared_recipes(folder, pqcli.Recipe(target_bytes=100))


def test_shards_come_back_under_their_names_with_their_index(tmp_path):
    source = tmp_path / "m"
    (source / "text_encoder").mkdir(parents=True)
    first, second = weights("a.weight"), {"b.weight": torch.randn(64, 32)}
    for folder, ending in ((source, "safetensors"), (source / "text_encoder", "bin")):
        shards = [f"model-0000{i}-of-00002.{ending}" for i in (1, 2)]
        for name, shard in zip(shards, (first, second), strict=True):
            if ending == "bin":
                torch.save(shard, folder / name)
            else:
                save_file(shard, folder / name, FOR_TORCH)
        where = dict.fromkeys(first, shards[0]) | dict.fromkeys(second, shards[1])
        index = {"metadata": {"total_size": 16512}, "weight_map": where}
        name = "pytorch_model.bin.index.json" if ending == "bin" else "model.safetensors.index.json"
        (folder / name).write_text(json.dumps(index, indent=2) + "\n")
    pqcli.compress(source, recipe=RECIPE)
    assert sorted(files(tmp_path / "m.pq")) == ["model.pq.safetensors", "text_encoder/model.pq.safetensors"]
    decoded = pqcli.decode(tmp_path / "m.pq", tmp_path / "back")
    same_but_weights(source, decoded)
    assert torch.load(decoded / "text_encoder" / "model-00002-of-00002.bin").keys() == second.keys()
    assert pqcli.verify(tmp_path / "m.pq", source) == []


# -- what is left out --------------------------------------------------------------------------------------------------

COPIES = [
    "pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5",
    "flax_model.msgpack", "rust_model.ot", "model.fp16.safetensors", "model-q4.gguf", "model.onnx",
    "consolidated.00.pth", "onnx/model_quantized.onnx", "onnx/model.onnx_data", "openvino/openvino_model.bin",
    "openvino/openvino_model.xml", "original/consolidated.00.pth",
]  # fmt: skip
NO_COPIES = [
    "vad.onnx", "embeddings.npz", "onnx/config.json", "original/params.json", "original/tokenizer.model",
    "sub/model.onnx", "model.py", "training_args.bin", "optimizer.pt", "model_index.json",
]  # fmt: skip


def test_the_same_model_in_other_formats_is_told_and_left_out(tmp_path):
    source = tmp_path / "m"
    source.mkdir()
    save_file(weights("a.weight"), source / "model.safetensors", FOR_TORCH)
    for name in (*COPIES, *NO_COPIES):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"some bytes")
    found = components_of(source)
    assert {path for path, why in found.left_out.items() if why == components.COPY} == set(COPIES)
    assert set(found.side) == set(NO_COPIES)
    report = pqcli.compress(source, recipe=RECIPE)
    assert len([what for what in report.dropped if components.COPY in what]) == len(COPIES)
    assert report.original_bytes == (source / "model.safetensors").stat().st_size + 10 * len(NO_COPIES)
    assert files(tmp_path / "m.pq").keys() == {*NO_COPIES, "model.pq.safetensors"}
    assert pqcli.verify(tmp_path / "m.pq", source) == []
    pqcli.compress(source, tmp_path / "all", RECIPE, with_copies=True)
    assert files(tmp_path / "all").keys() == {*COPIES, *NO_COPIES, "model.pq.safetensors"}


def test_another_checkpoint_beside_the_weights_is_compressed_by_itself(tmp_path):
    source = tmp_path / "m"
    source.mkdir()
    save_file(weights("a.weight"), source / "model.safetensors", FOR_TORCH)
    save_file(weights("lora.weight"), source / "adapter_model.safetensors", FOR_TORCH)
    torch.save({"state_dict": weights("e.weight"), "step": 7}, source / "ema.pt")
    torch.save({"x": object}, source / "unreadable.pt")
    pqcli.compress(source, recipe=RECIPE)
    containers = [f"{name}.pq.safetensors" for name in ("adapter_model", "ema", "model")]
    assert names(tmp_path / "m.pq") == [*containers, "unreadable.pt"]
    decoded = pqcli.decode(tmp_path / "m.pq")
    assert files(decoded).keys() == files(source).keys()
    assert torch.load(decoded / "ema.pt")["step"] == 7
    assert "ema/e.weight" in pqcli.load(tmp_path / "m.pq")


def test_checkpoints_side_by_side_are_all_compressed(tmp_path):
    source = tmp_path / "m"
    source.mkdir()
    for name in ("x.pt", "y.pt"):
        torch.save(weights(name), source / name)
    save_file(weights("x"), source / "x.safetensors")
    pqcli.compress(source, recipe=RECIPE)
    assert len(files(tmp_path / "m.pq")) == 3
    assert files(pqcli.decode(tmp_path / "m.pq")).keys() == files(source).keys()


def test_training_state_of_a_trainer_is_left_out_when_only_the_model_is_wanted(tmp_path):
    source = tmp_path / "m"
    source.mkdir()
    save_file(weights("a.weight"), source / "model.safetensors", FOR_TORCH)
    for name in ("optimizer.pt", "rng_state_0.pth", "config.json"):
        (source / name).write_bytes(b"some bytes")
    report = pqcli.compress(source, recipe=pqcli.Recipe(model_only=True, n_centroids=16))
    assert files(tmp_path / "m.pq").keys() == {"model.pq.safetensors", "config.json"}
    assert len(report.dropped) == 2
    assert pqcli.verify(tmp_path / "m.pq", source) == []


def test_links_out_of_the_folder_are_told_and_not_followed(tmp_path):
    source = made(tmp_path / "m")
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "secrets").mkdir()
    (source / "a.txt").symlink_to("../secret")
    (source / "b").symlink_to(tmp_path / "secrets")
    (source / "c").symlink_to("nowhere")
    (source / "d").symlink_to("d")
    os.mkfifo(source / "pipe")
    report = pqcli.compress(source, recipe=RECIPE)
    told = " ".join(report.dropped)
    for name in (
        "a.txt (a link out of the folder",
        "b (a link out of",
        "c (a link to something",
        "d (",
        "pipe (a pipe",
    ):
        assert name in told
    assert not {"a.txt", "b", "c", "d", "pipe"} & set(names(tmp_path / "m.pq"))


def test_weights_that_are_a_link_out_of_the_folder_are_an_error_that_says_so(tmp_path):
    source = tmp_path / "m"
    source.mkdir()
    save_file(weights("a.weight"), tmp_path / "elsewhere.safetensors")
    (source / "model.safetensors").symlink_to("../elsewhere.safetensors")
    with pytest.raises(pqcli.PQError, match=r"not followed: model\.safetensors \(a link out of the folder"):
        pqcli.compress(source)


def test_what_git_and_pqcli_keep_in_a_folder_is_left_out(tmp_path):
    source = made(tmp_path / "m")
    (source / ".git" / "lfs").mkdir(parents=True)
    (source / ".git" / "lfs" / "blob").write_bytes(b"x" * 1000)
    (source / ".cache" / "huggingface").mkdir(parents=True)
    (source / ".cache" / "huggingface" / "x").write_text("x")
    (source / "model.pq.safetensors").write_bytes(b"of an earlier run")
    pqcli.compress(source, recipe=RECIPE)
    assert not [name for name in files(tmp_path / "m.pq") if ".git/" in name or "huggingface" in name]
    with pytest.raises(pqcli.PQError, match="is compressed already"):
        pqcli.compress(tmp_path / "m.pq")


def test_a_folder_of_a_training_framework_inside_is_carried_as_it_is(tmp_path):
    source = made(tmp_path / "m")
    (source / "global_step5").mkdir()
    torch.save({"module": weights("a")}, source / "global_step5" / "mp_rank_00_model_states.pt")
    pqcli.compress(source, recipe=RECIPE)
    name = "global_step5/mp_rank_00_model_states.pt"
    assert files(tmp_path / "m.pq")[name] == files(source)[name]


def test_a_folder_of_everything_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(walking, "MOST_FILES", 3)
    with pytest.raises(pqcli.PQError, match="more than 3 files"):
        pqcli.compress(made(tmp_path / "m"))


# -- where it goes -----------------------------------------------------------------------------------------------------


def test_a_lone_file_can_still_be_had(tmp_path):
    source = made(tmp_path / "m")
    report = pqcli.compress(source, tmp_path / "x.pq.safetensors", RECIPE)
    assert (tmp_path / "x.pq.safetensors").is_file()
    assert "2_Dense/model.safetensors (a file beside the weights" in " ".join(report.dropped)
    pqcli.compress(source, tmp_path / "out", RECIPE)
    assert (tmp_path / "out" / "model.pq.safetensors").is_file()


def test_a_compressed_folder_with_one_container_decodes_to_a_file_as_well(tmp_path):
    source = tmp_path / "m"
    source.mkdir()
    save_file(weights("a.weight"), source / "model.safetensors", FOR_TORCH)
    pqcli.compress(source, recipe=RECIPE)
    assert load_file(pqcli.decode(tmp_path / "m.pq", tmp_path / "x.safetensors")).keys() == {"a.weight", "bias"}
    made(tmp_path / "n")
    pqcli.compress(tmp_path / "n", recipe=RECIPE)
    with pytest.raises(pqcli.PQError, match="holds 2 containers, which no single file can hold"):
        pqcli.decode(tmp_path / "n.pq", tmp_path / "y.safetensors")


def test_a_folder_is_replaced_only_by_force_and_only_where_nothing_is_lost(tmp_path):
    source = made(tmp_path / "m")
    pqcli.compress(source, recipe=RECIPE)
    with pytest.raises(pqcli.PQError, match="exists already and is not empty; use --force"):
        pqcli.compress(source, recipe=RECIPE)
    (tmp_path / "m.pq" / "old.pq.safetensors").write_bytes(b"of an earlier run")
    (source / "config.json").write_text("new")
    pqcli.compress(source, recipe=RECIPE, force=True)
    assert (tmp_path / "m.pq" / "config.json").read_text() == "new"
    assert not (tmp_path / "m.pq" / "old.pq.safetensors").exists()
    (tmp_path / "m.pq" / "notes.txt").write_text("mine")
    with pytest.raises(pqcli.PQError, match=r"--force would lose \(1 files: notes\.txt\)"):
        pqcli.compress(source, recipe=RECIPE, force=True)
    assert names(tmp_path) == ["m", "m.pq"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("m", "is the input itself"),
        ("m/inside", "lies in the folder"),
        (".", "holds the input"),
        ("no/where", "create"),
    ],
)
def test_a_folder_never_goes_where_it_would_swallow_its_input(tmp_path, monkeypatch, output, message):
    made(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pqcli.PQError, match=message):
        pqcli.compress("m", output, RECIPE, force=True)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_what_fails_half_way_leaves_what_was_there(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(atomic, "exchanged", lambda one, other: False)
    target = tmp_path / "t"
    with atomic_folder(target, may_go=lambda _: False) as new:
        (new / "a").write_text("1")
    with contextlib.suppress(KeyboardInterrupt), atomic_folder(target, force=True, may_go=lambda _: False) as new:
        (new / "a").write_text("2")
        raise KeyboardInterrupt
    assert files(target) == {"a": b"1"}
    with atomic_folder(target, force=True, may_go=lambda _: False) as new:
        (new / "a").write_text("3")
    assert files(target) == {"a": b"3"}
    assert names(tmp_path) == ["t"]


def test_a_fallback_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "exchanged", lambda one, other: False)
    target = tmp_path / "t"
    target.mkdir()
    (target / "a").write_text("1")
    rename = Path.rename

    def failing(self, to):
        if self.name.endswith(".pqcli"):
            raise OSError(5, "no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(pqcli.PQError), atomic_folder(target, force=True, may_go=lambda _: False) as new:
        (new / "a").write_text("2")
    assert files(target) == {"a": b"1"}
    assert names(tmp_path) == ["t"]


def test_a_file_that_changes_while_it_is_copied_is_an_error_and_nothing_appears(tmp_path, monkeypatch):
    source = made(tmp_path / "m")
    taken = walking.walk(source)

    def later(folder):
        if folder == source:
            (source / "config.json").write_text("another text")
        return taken

    monkeypatch.setattr(components, "walk", later)
    with pytest.raises(pqcli.PQError, match=r"config\.json' has changed meanwhile"):
        pqcli.compress(source, recipe=RECIPE)
    assert names(tmp_path) == ["m"]


def test_a_container_and_a_file_of_the_same_name_are_never_mixed(tmp_path):
    source = made(tmp_path / "m")
    pqcli.compress(source, recipe=RECIPE)
    (tmp_path / "m.pq" / "model.safetensors").write_bytes(b"of somebody else")
    with pytest.raises(pqcli.PQError, match=r"model\.safetensors beside a container that decodes to"):
        pqcli.decode(tmp_path / "m.pq")
    assert names(tmp_path) == ["m", "m.pq"]


def test_a_file_that_was_lost_or_changed_is_found_by_verify(tmp_path):
    source = made(tmp_path / "m")
    pqcli.compress(source, recipe=RECIPE)
    (tmp_path / "m.pq" / "config.json").write_text("another text")
    (tmp_path / "m.pq" / "1_Pooling" / "config.json").unlink()
    data = bytearray((tmp_path / "m.pq" / "2_Dense" / "model.pq.safetensors").read_bytes())
    data[-20] ^= 1
    (tmp_path / "m.pq" / "2_Dense" / "model.pq.safetensors").write_bytes(data)
    found = "\n".join(map(str, pqcli.verify(tmp_path / "m.pq", source)))
    assert "config.json is not as in" in found
    assert "1_Pooling/config.json is in" in found
    assert "2_Dense/model.pq.safetensors" in found


def test_the_command_line_takes_folders_everywhere(tmp_path, monkeypatch):
    source = made(tmp_path / "m")
    (source / "tf_model.h5").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    compressed = said("compress", "m/", "--n-iter", "1")
    assert "m.pq" in compressed
    assert "beside the weights: 7 files" in compressed
    assert "2_Dense/model.pq.safetensors: " in compressed
    assert "tf_model.h5 (the same model in another format)" in compressed
    assert "the files beside the weights are the same" in said("verify", "m.pq", "--against", "m")
    assert "7 files beside the weights" in said("report", "m.pq")
    assert "2_Dense/model.pq.safetensors" in said("inspect", "m.pq")
    assert "7 files beside the weights" in said("plan", "m")
    said("decode", "m.pq")
    same = {name for name in files(source) if name != "tf_model.h5"}
    assert files(tmp_path / "m.decoded").keys() == same
    assert "use --force" in said("compress", "m", code=1)
    assert "use --force" in said("decode", "m.pq", code=1)
    said("compress", "m", "--n-iter", "1", "--force")
    said("decode", "m.pq", "--force")
