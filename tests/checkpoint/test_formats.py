"""The table of formats: what every row must do, and that a new format is one module and one row."""

from __future__ import annotations

import json
import struct
import types

import pytest
import torch

from pqcli import checkpoint
from pqcli.checkpoint import formats
from pqcli.checkpoint.bytesource import Region, Strided
from pqcli.checkpoint.opened import Layout
from pqcli.checkpoint.rawbytes import write_bytes
from pqcli.checkpoint.sniff import sniff
from pqcli.errors import CheckpointError, OutputError, UsageError
from pqcli.tensors.info import TensorInfo
from tests.checkpoint.common import check_format, infos_of


def toy_module():
    """A format as a contributor would write it: the magic, a length, a JSON list of [name, dtype, shape], the data."""

    def begins(head, _):
        return head.startswith(b"TOY1")

    def read(source):
        try:
            _, header_bytes = struct.unpack("<4sI", source.bytes_at(0, 8))
            records = json.loads(source.bytes_at(8, header_bytes))
            infos = tuple(TensorInfo(str(name), tuple(shape), dtype) for name, dtype, shape in records)
            position, views = 8 + header_bytes, {}
            for info in infos:
                views[info.name] = Strided(Region(position, info.n_bytes), info.dtype, info.shape)
                position += info.n_bytes
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError("its header is damaged") from error
        if position != source.n_bytes or len(views) != len(infos):
            raise CheckpointError(f"its header describes {position} bytes")
        return Layout(infos, views, {})

    def prepare(tensors, read, _):
        for info in tensors:
            if "float" not in info.dtype:
                raise OutputError(f"tensor '{info.name}' is {info.dtype}; toys are floats")
        header = json.dumps([[info.name, info.dtype, info.shape] for info in tensors]).encode()

        def write(file):
            file.write(struct.pack("<4sI", b"TOY1", len(header)) + header)
            for info in tensors:
                write_bytes(file, read(info.alias_of or info.name), info)
            return file.tell()

        return write

    return types.SimpleNamespace(begins=begins, read=read, prepare=prepare)


pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")


@pytest.fixture
def toy(monkeypatch):
    module = toy_module()
    row = formats.Format("toy", ".toy of the tests", (".toy", ".ty"), module.begins, module.read, module.prepare)
    monkeypatch.setitem(formats.FORMATS, "toy", row)
    return row


@pytest.mark.parametrize("name", sorted(formats.FORMATS))
def test_a_format_does_what_every_format_does(tmp_path, name):
    check_format(name, tmp_path)


@pytest.mark.usefixtures("toy")
def test_a_new_format_is_one_module_and_one_row(tmp_path):
    values = {"a": torch.randn(3, 5), "b": torch.randn(7).half()}
    checkpoint.write(tmp_path / "x.toy", infos_of(values), values.__getitem__, None, format="toy")
    assert sniff(tmp_path / "x.toy") == "toy"
    assert checkpoint.by_suffix(tmp_path / "x.TY") == "toy"
    with checkpoint.open(tmp_path / "x.toy") as opened:
        assert opened.format == "toy"
        assert all(torch.equal(opened.read(name), value) for name, value in values.items())
        checkpoint.write(tmp_path / "y.toy", opened.tensors, opened.read, opened.skeleton, format="toy")
        checkpoint.write(tmp_path / "z.pt", opened.tensors, opened.read, opened.skeleton, format="pt")
    assert (tmp_path / "x.toy").read_bytes() == (tmp_path / "y.toy").read_bytes()
    assert all(torch.equal(torch.load(tmp_path / "z.pt")[name], value) for name, value in values.items())


@pytest.mark.usefixtures("toy")
def test_a_new_format_is_found_in_a_folder_and_named_in_messages(tmp_path):
    values = {"a": torch.randn(3, 5)}
    (tmp_path / "model").mkdir()
    checkpoint.write(tmp_path / "model" / "only.toy", infos_of(values), values.__getitem__, None, format="toy")
    with checkpoint.open(tmp_path / "model") as opened:
        assert torch.equal(opened.read("a"), values["a"])
        checkpoint.write(tmp_path / "copy", opened.tensors, opened.read, opened.skeleton, format="folder")
    assert (tmp_path / "copy" / "only.toy").read_bytes() == (tmp_path / "model" / "only.toy").read_bytes()
    (tmp_path / "x").write_bytes(b"\xde\xad\xbe\xef" * 9)
    with pytest.raises(CheckpointError, match=r"\.toy of the tests"):
        checkpoint.open(tmp_path / "x")
    with pytest.raises(UsageError, match=r"\.toy"):
        checkpoint.by_suffix(tmp_path / "x.zip")


@pytest.mark.usefixtures("toy")
def test_a_new_format_does_what_every_format_does(tmp_path):
    check_format("toy", tmp_path)


def test_a_suffix_says_the_format(tmp_path):
    assert [checkpoint.by_suffix(tmp_path / name) for name in ("a.pt", "a.PTH", "a.safetensors", "a", "a.ckpt")] == [
        "pt", "pt", "safetensors", "folder", "pt",
    ]  # fmt: skip
    (tmp_path / "dir.v2").mkdir()
    assert checkpoint.by_suffix(tmp_path / "dir.v2") == "folder"
    with pytest.raises(UsageError) as caught:
        checkpoint.by_suffix(tmp_path / "a.onnx")
    assert str(caught.value) == (
        f"{tmp_path / 'a.onnx'}: unknown suffix '.onnx'; use .safetensors, .pt, .pth, .th, .bin, .ckpt, "
        "or none for a folder"
    )


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(OutputError, match="unknown output format 'npz'; use safetensors, pt or folder"):
        checkpoint.write(tmp_path / "x", (), lambda _: torch.ones(1), None, format="npz")
