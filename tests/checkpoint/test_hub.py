"""Names of the Hugging Face Hub and addresses, where a path is expected. Nothing here reaches any network."""

import sys

import pytest
import torch
from safetensors.torch import save_file

import pqcli
from pqcli.checkpoint.hub import located

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A snapshot as the Hub's cache has it, its files links into `blobs`; `snapshot_download` gives it."""
    model = tmp_path / "cache" / "models--org--name"
    folder = model / "snapshots" / "0123abcd"
    (folder / "1_Pooling").mkdir(parents=True)
    (model / "blobs").mkdir()
    save_file({"w": torch.randn(64, 32)}, model / "blobs" / "aa")
    (model / "blobs" / "bb").write_text("{}")
    (folder / "model.safetensors").symlink_to("../../blobs/aa")
    (folder / "config.json").symlink_to("../../blobs/bb")
    (folder / "1_Pooling" / "config.json").symlink_to("../../../blobs/bb")
    (tmp_path / "secret").write_text("mine")
    (folder / "secret").symlink_to(tmp_path / "secret")
    asked = []

    def download(name):
        asked.append(name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize(
    "source", ["org/name", "https://huggingface.co/org/name", "https://hf.co/org/name/tree/main", "hf://org/name"]
)
def test_a_model_of_the_hub_is_fetched_and_compressed_beside_nothing_of_the_cache(here, snapshot, source):
    report = pqcli.compress(source, recipe=pqcli.Recipe(n_centroids=16, n_iter=1))
    assert snapshot == ["org/name"]
    assert report.output == "name.pq"
    found = {path.relative_to(here / "name.pq").as_posix() for path in (here / "name.pq").rglob("*") if path.is_file()}
    assert found == {"model.pq.safetensors", "config.json", "1_Pooling/config.json"}
    assert "secret" in " ".join(report.dropped)
    assert pqcli.preview(source).output.name == "name.pq"


def test_a_model_that_cannot_be_fetched_says_what_to_do(monkeypatch):
    def fail(name):
        raise OSError(f"no route to {name}\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = r"(?s)'org/name' is no file and no folder here.*\(OSError: no route to org/name\).*hf download org/name "
    with pytest.raises(pqcli.PQError, match=message + r"--local-dir name, then pqcli compress name$"):
        pqcli.compress("org/name")


def test_without_huggingface_hub_the_message_says_how_to_download(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(pqcli.PQError, match=r"hf download org/name --local-dir name.*pip install huggingface_hub"):
        located("org/name")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("https://example.com/a/model.pt?x=1", r"'https://example\.com/a/model\.pt\?x=1' is an address.*curl -L -O"),
        ("s3://bucket/model.pt", r"'s3://bucket/model\.pt' is an address"),
        (
            "https://huggingface.co/org/name/resolve/main/sub/model.safetensors?download=true",
            r"hf download org/name sub/model\.safetensors --local-dir name$",
        ),
    ],
)
def test_an_address_is_shown_as_it_was_typed(text, message):
    for source in (text, located(".").path.__class__(text)):  # as a path it has lost a slash
        with pytest.raises(pqcli.PQError, match=message):
            pqcli.compress(source)


@pytest.mark.parametrize("name", ["models/x.pt", "sub/x", "a/b/c", "./org", "x", "/org/name", "org/name.safetensors"])
def test_the_path_of_a_file_that_is_not_there_is_no_name(here, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (here / "sub").mkdir()
    with pytest.raises(pqcli.PQError, match="does not exist"):
        pqcli.compress(name)
