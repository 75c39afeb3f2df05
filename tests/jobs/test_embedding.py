"""A lone file that carries the small files of a folder, and becomes the folder again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pqcli
from pqcli.jobs.folders import embedding
from pqcli.jobs.report import inspect

RECIPE = pqcli.Recipe(block_size=4, n_centroids=16, n_iter=2)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "m"
    (folder / "1_Pooling").mkdir(parents=True)
    (folder / "2_Dense").mkdir()
    save_file({"a.weight": torch.randn(64, 32)}, folder / "model.safetensors", {"format": "pt"})
    save_file({"d.weight": torch.randn(8, 4)}, folder / "2_Dense" / "model.safetensors", {"format": "pt"})
    for name in ("config.json", ".gitattributes", "1_Pooling/config.json", "2_Dense/config.json"):
        (folder / name).write_text(f"the text of {name} " * 20)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "tf_model.h5").write_bytes(b"the same model")
    return folder


def test_a_lone_file_carries_small_files_and_becomes_the_folder_again(tmp_path, source):
    target = tmp_path / "x.pq.safetensors"
    predicted = pqcli.preview(source, target, RECIPE, embed_files=True).predicted_bytes
    report = pqcli.compress(source, target, RECIPE, embed_files=True)
    assert report.compressed_bytes == target.stat().st_size == predicted
    assert report.dropped == ("tf_model.h5 (a file beside the weights, 14 B; copy it yourself)",)
    carried = {name: data for name, data in files(source).items() if name not in ("model.safetensors", "tf_model.h5")}
    with pqcli.open(target) as container:
        assert "files" in container.manifest.features
        assert container.files() == carried
    assert inspect(target)["files"] == {name: len(data) for name, data in carried.items()}
    assert pqcli.verify(target) == []
    decoded = pqcli.decode(target)
    assert decoded == tmp_path / "x.decoded"
    found = files(decoded)
    assert found.pop("model.safetensors")
    assert found == carried
    assert load_file(pqcli.decode(target, tmp_path / "y.safetensors")).keys() == {"a.weight"}
    with pytest.raises(pqcli.PQError, match="use --force"):
        pqcli.decode(target)
    pqcli.decode(target, force=True)


def test_without_the_option_a_lone_file_is_what_it_always_was(tmp_path, source):
    pqcli.compress(source, tmp_path / "x.pq.safetensors", RECIPE)
    with pqcli.open(tmp_path / "x.pq.safetensors") as container:
        assert container.manifest.features == ("checksum", "pq")
        assert container.files() == {}


def test_large_files_are_not_carried_and_told(tmp_path, source, monkeypatch):
    monkeypatch.setattr(embedding, "LARGEST_BYTES", 100)
    report = pqcli.compress(source, tmp_path / "x.pq.safetensors", RECIPE, embed_files=True)
    told = " ".join(report.dropped)
    assert "config.json" in told
    assert "empty.txt" not in told


@pytest.mark.parametrize(("name", "output"), [("m", None), ("m", "out"), ("m/model.safetensors", "x.pq.safetensors")])
def test_files_are_put_into_a_lone_file_of_a_folder_alone(tmp_path, source, name, output):
    with pytest.raises(pqcli.PQError, match=r"name a folder, and add -o x\.pq\.safetensors"):
        pqcli.compress(tmp_path / name, output and tmp_path / output, embed_files=True)
