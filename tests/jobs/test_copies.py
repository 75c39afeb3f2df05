"""Tensors with the same bytes are stored once, and come back as tensors of their own."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import pqcli
from pqcli.checkpoint import Checkpoint
from pqcli.errors import DamagedError
from pqcli.jobs.report import inspect
from pqcli.recipe.recipe import Recipe, Rule
from tests.container.forging import taken_apart
from tests.container.test_format import decode_as_printed

CODECS = {
    "plain": {"n_centroids": 16, "n_iter": 2},
    "ecpq": {"rate_weight": 0.2},
    "trellis": {"codec": "trellis", "effort": 4},
    "auto": {"codec": "auto", "effort": 4},
    "budget": {"codec": "trellis", "effort": 4, "target_bits": 3.0},
}
G = torch.Generator().manual_seed(5)


def weights():
    return torch.randn(64, 48, generator=G)


def state():
    """Equal pairs of every kind that do not share memory, and what looks equal and is not."""
    weight, norm, codes = weights(), torch.randn(300, generator=G), torch.randint(9, (40, 40), generator=G)
    nearly, copy = weight.clone(), weight.clone()
    nearly[-1, -1] += 1e-6
    return {
        "a.weight": weight, "b.weight": copy, "nearly.weight": nearly, "b.tied": copy, "half.weight": weight.half(),
        "turned.weight": weight.reshape(48, 64), "a.norm": norm, "b.norm": norm.clone(), "a.codes": codes,
        "b.codes": codes.clone(), "a.bias": torch.zeros(9), "b.bias": torch.zeros(9), "c.weight": weight.clone(),
        "other.weight": weights(),
    }  # fmt: skip


def compressed(tmp_path, value, **settings):
    torch.save(value, tmp_path / "m.pt")
    report = pqcli.compress(tmp_path / "m.pt", tmp_path / "m.pq.safetensors", Recipe(**settings), force=True)
    return tmp_path / "m.pq.safetensors", report


@pytest.mark.parametrize("codec", CODECS)
def test_equal_tensors_are_stored_once_and_come_back_apart(tmp_path, codec):
    value = state()
    file, report = compressed(tmp_path, value, **CODECS[codec])
    found = {tensor.name: tensor for tensor in report.tensors}
    copies = {name: tensor.copy_of for name, tensor in found.items() if tensor.action == "copy"}
    assert copies == {"b.weight": "a.weight", "c.weight": "a.weight", "b.norm": "a.norm", "b.codes": "a.codes"}
    assert all(found[name].bytes == 0 for name in copies)
    assert pqcli.verify(file, tmp_path / "m.pt") == []
    stored, measured = pqcli.report(file), pqcli.report(file, tmp_path / "m.pt")
    for name, of in copies.items():
        for seen in (report, stored, measured):
            tensors = {tensor.name: tensor for tensor in seen.tensors}
            assert (tensors[name].relative_mse is None) is (tensors[of].action == "keep")
            assert tensors[of].action == "keep" or math.isclose(
                tensors[name].relative_mse, tensors[of].relative_mse, rel_tol=1e-5
            )
    for loaded in (pqcli.load(file), torch.load(pqcli.decode(file, force=True), weights_only=True)):
        assert list(loaded) == list(value)
        for name, of in copies.items():
            assert torch.equal(loaded[name], loaded[of])
            assert loaded[name].data_ptr() != loaded[of].data_ptr()
        assert loaded["b.tied"].data_ptr() == loaded["b.weight"].data_ptr()
        assert torch.equal(loaded["b.norm"], value["b.norm"])
        assert torch.equal(loaded["b.codes"], value["b.codes"])
    with pqcli.open(file) as container:
        first = container.decode("b.weight")
        first.zero_()
        assert container.decode("c.weight").any()


def test_a_file_of_safetensors_comes_back_with_both(tmp_path):
    weight = weights()
    save_file({"a": weight, "b": weight.clone()}, tmp_path / "m.safetensors")
    pqcli.compress(tmp_path / "m.safetensors")
    file = tmp_path / "m.pq.safetensors"
    back = load_file(pqcli.decode(file))
    assert torch.equal(back["a"], back["b"])
    tied = torch.load(pqcli.decode(file, tmp_path / "out.pt"), weights_only=True)
    assert tied["a"].data_ptr() != tied["b"].data_ptr()


def test_a_copy_costs_less_than_a_hundred_bytes(tmp_path):
    weight = weights()
    one = compressed(tmp_path, {"a.weight": weight})[1].compressed_bytes
    two = compressed(tmp_path, {"a.weight": weight, "b.weight": weight.clone()})[1].compressed_bytes
    assert two - one < 100


def test_a_kept_one_is_held_for_all_that_are_equal_to_it(tmp_path):
    weight = weights()
    value = {"a.weight": weight, "b.weight": weight.clone(), "c.weight": weight.clone()}
    file, report = compressed(tmp_path, value, exclude=("b.*",))
    assert [tensor.action for tensor in report.tensors] == ["copy", "keep", "copy"]
    assert all(torch.equal(tensor, weight) for tensor in pqcli.load(file).values())
    assert pqcli.verify(file, tmp_path / "m.pt") == []


def test_equal_tensors_that_are_to_be_coded_differently_are(tmp_path):
    weight = weights()
    rules = (Rule(match="b.*", block_size=2, n_centroids=8),)
    _, report = compressed(tmp_path, {"a.weight": weight, "b.weight": weight.clone()}, rules=rules)
    assert [tensor.action for tensor in report.tensors] == ["pq", "pq"]
    assert [tensor.block_size for tensor in report.tensors][1] == 2


@pytest.mark.parametrize(("a", "b"), [(0.0, -0.0), (float("nan"), float("inf"))])
def test_equal_means_every_bit(tmp_path, a, b):
    first, second, third = (torch.full((300,), x) for x in (a, b, a))
    file, report = compressed(tmp_path, {"a": first, "b": second, "c": third})
    assert [tensor.action for tensor in report.tensors] == ["keep", "keep", "copy"]
    loaded = pqcli.load(file)
    assert torch.equal(loaded["b"].view(torch.int32), second.view(torch.int32))


def test_tensors_that_begin_alike_and_end_otherwise_are_no_copies(tmp_path):
    value = {name: torch.zeros(5000) for name in "abc"}
    value["b"][-1] = 1
    _, report = compressed(tmp_path, value)
    assert [tensor.action for tensor in report.tensors] == ["keep", "keep", "copy"]


def test_a_checkpoint_without_equal_tensors_needs_no_feature_and_is_not_read_twice(tmp_path, monkeypatch):
    torch.save({f"{i}.weight": weights() for i in range(4)}, tmp_path / "m.pt")
    read, real = [], Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: read.append(name) or real(self, name))
    pqcli.compress(tmp_path / "m.pt")
    assert sorted(read) == [f"{i}.weight" for i in range(4)]
    assert inspect(tmp_path / "m.pq.safetensors")["features"] == ["checksum", "pq"]


def test_the_decoder_of_the_specification_reads_the_tensor_that_a_copy_names(tmp_path):
    file, _ = compressed(tmp_path, state())
    printed, loaded = decode_as_printed(file), pqcli.load(file)
    records = {record["name"]: record for record in inspect(file)["tensors"]}
    for name, record in records.items():
        if record["action"] == "copy" and record["copy_of"] in printed:
            assert torch.equal(printed[record["copy_of"]], loaded[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"copy_of": "nobody"}, "a copy of 'nobody', which is no tensor of its own"),
        ({"copy_of": "b.weight"}, "a copy of 'b.weight', which is no tensor of its own"),
        ({"copy_of": "b.tied"}, "a copy of 'b.tied', which is no tensor of its own"),
        ({"copy_of": "c.weight"}, "a copy of 'c.weight', which is no tensor of its own"),
        ({"copy_of": "a.norm"}, "a copy of 'a.norm', of another shape or dtype"),
        ({"copy_of": "half.weight"}, "a copy of 'half.weight', of another shape or dtype"),
        ({"copy_of": None}, "action 'copy' of a copy of None"),
        ({"copy_of": 3}, "copy_of: Input should be a valid string"),
        ({"action": "keep"}, "action 'keep' of a copy of 'a.weight'"),
        ({"zero_bytes": 3}, "zeros told of what is not quantized"),
        ({"alias_of": "a.weight"}, "action 'copy' of an alias of 'a.weight'"),
    ],
)
def test_hostile_copies_are_refused(tmp_path, change, message):
    forgery = taken_apart(compressed(tmp_path, state())[0])
    record = next(record for record in forgery.manifest["tensors"] if record["name"] == "b.weight")
    record.update(change)
    (tmp_path / "h.pq.safetensors").write_bytes(forgery.bytes())
    with pytest.raises(DamagedError, match=message):
        pqcli.open(tmp_path / "h.pq.safetensors")


def test_copies_in_a_file_without_the_feature_are_refused(tmp_path):
    forgery = taken_apart(compressed(tmp_path, state())[0])
    forgery.manifest["features"].remove("copy")
    forgery.metadata["features"] = ",".join(forgery.manifest["features"])
    (tmp_path / "h.pq.safetensors").write_bytes(forgery.bytes())
    with pytest.raises(DamagedError, match="a copy in a file without that feature"):
        pqcli.open(tmp_path / "h.pq.safetensors")


def test_a_million_copies_of_one_tensor_are_more_than_a_file_may_hold(tmp_path):
    value = {"a": torch.zeros(1 << 20), "b": torch.zeros(1 << 20)}
    forgery = taken_apart(compressed(tmp_path, value, codec="trellis")[0])
    copy = forgery.manifest["tensors"][1]
    forgery.manifest["tensors"] += [{**copy, "name": f"c{i}"} for i in range(3000)]
    forgery.entries["pqcli.hashes"][1:] = [[3002, 4], bytes(4 * 3002)]
    (tmp_path / "h.pq.safetensors").write_bytes(forgery.bytes())
    with pytest.raises(DamagedError, match="--limit decoded_bytes=N"):
        pqcli.open(tmp_path / "h.pq.safetensors")
