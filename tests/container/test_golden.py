"""Golden files decode for ever: what an earlier pqcli wrote, every later one reads, to the bit."""

import json
from pathlib import Path

import pytest
import torch

import pqcli
from tests.golden.make_plain_v1 import checkpoint, digests

GOLDEN = Path(__file__).parents[1] / "golden"
CONTAINERS = sorted(GOLDEN.glob("*.pq.safetensors"))


@pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.name.removesuffix(".pq.safetensors"))
def test_a_golden_file_decodes_to_the_tensors_it_always_decoded_to(path):
    expected = json.loads(path.with_name(path.name.replace(".pq.safetensors", ".json")).read_text(encoding="utf-8"))
    decoded = digests(pqcli.load(path))
    assert list(decoded) == list(expected)
    assert decoded == expected
    assert pqcli.verify(path) == []


def test_there_is_a_golden_file_for_plain_pq_in_format_version_1():
    with pqcli.open(GOLDEN / "plain-v1.pq.safetensors") as container:
        assert (container.manifest.version, container.manifest.features) == (1, ("pq",))
        records = {record.name: record for record in container.records}
    assert {record.action for record in records.values()} == {"pq", "keep", "alias"}
    assert {record.coding.codebook_dtype for record in records.values() if record.action == "pq"} == {
        "float16",
        "float32",
    }
    assert records["constant.weight"].coding.n_centroids == 1
    assert records["odd.weight"].coding.n_centroids == 13
    assert records["wide.weight"].coding.n_centroids == 300
    assert records["padded.weight"].info.shape[1] % records["padded.weight"].coding.block_size
    assert records["large.int"].info.n_bytes > 1 << 16


def test_there_are_golden_files_for_every_feature_of_the_trellis_codec():
    features = {}
    for name in ("trellis-v1", "trellis-mixing-v1", "trellis-rows-v1", "trellis-columns-v1"):
        with pqcli.open(GOLDEN / f"{name}.pq.safetensors") as container:
            features[name] = container.manifest.features
    assert features["trellis-v1"] == ("kept-coded", "trellis")
    assert "trellis-rows" in features["trellis-rows-v1"]
    assert {"trellis-rows", "trellis-columns"} <= {*features["trellis-columns-v1"]}
    assert features["trellis-mixing-v1"] == ("kept-coded", "trellis", "trellis-mixing")


@pytest.mark.parametrize("codec", ["plain", "ecpq", "trellis", "trellis-mixing"])
def test_there_is_a_golden_file_of_every_codec_with_a_checksum_and_one_without(codec):
    features = []
    for name in (f"{codec}-v1", f"{codec}-checksum-v1"):
        with pqcli.open(GOLDEN / f"{name}.pq.safetensors") as container:
            features.append(container.manifest.features)
    assert "checksum" not in features[0]
    assert {*features[0], "checksum"} <= {*features[1]}


def test_a_golden_file_gives_its_nested_checkpoint_back(tmp_path):
    decoded = torch.load(pqcli.decode(GOLDEN / "plain-v1.pq.safetensors", tmp_path / "model.pt"), weights_only=True)
    original = checkpoint()
    assert decoded["epoch"] == 3
    assert decoded["args"] == {"lr": [0.1, 1e-3]}
    state, dense = decoded["state_dict"], original["state_dict"]
    assert list(state) == list(dense)
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()
    for name, tensor in dense.items():
        assert (state[name].shape, state[name].dtype) == (tensor.shape, tensor.dtype)
    for name in ("bias", "half.bias", "mask", "steps", "empty", "large.int"):
        assert torch.equal(state[name], dense[name])
