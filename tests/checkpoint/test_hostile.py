"""Whatever a stranger's file says: one `CheckpointError`, soon, without code run or memory taken."""

from __future__ import annotations

import collections
import functools
import importlib
import io
import operator
import os
import pathlib
import pickle
import random
import struct
import subprocess
import webbrowser
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pqcli import checkpoint
from pqcli.errors import CheckpointError, ContainerError
from pqcli.tensors.info import TensorInfo
from tests.checkpoint.checkpoint_cases import nested_checkpoint


def refused(path, message, limits=None):
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.open(path, limits=limits).close()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# -- files that are something else -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"\n  <html>\xe2", "an HTML page"),
        (b"<?xml version='1.0'?>", "an XML or HTML document"),
        (b"GGUF\x03\0\0\0", "a GGUF model"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x93NUMPY\x01\0", "a numpy array"),
        (b"\x08\x07\x12\x07pytorch\x1a", "an ONNX model"),
        (b"\x1f\x8b\x08", "a gzip archive; unpack it first"),
        (b'{"a": 1}', "a JSON text"),
        (b"hello world", "a text file"),
        (b"\0" * 100, "full of zeros"),
        (b"\xde\xad\xbe\xef" * 9, "not a checkpoint that pqcli knows"),
        (pickle.dumps({"a": 1}), "a plain Python pickle"),
        (b"PK\x05\x06" + bytes(18), "a damaged zip archive"),
        (b"PK\x03\x04" + bytes(100), "truncated or damaged"),
    ],
)
def test_a_file_that_is_something_else_is_told_what_it_is(tmp_path, content, message):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    refused(path, message)


def test_a_path_that_cannot_be_read_says_why(tmp_path):
    refused(tmp_path / "missing.pt", "does not exist")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "device, pipe or socket")
    with pytest.raises(CheckpointError, match="null byte"):
        checkpoint.open("a\0b")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_archives_are_told_apart(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    refused(tmp_path / "a.npz", "a numpy .npz archive")
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "a TorchScript archive.*state_dict")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("weights.pt", b"")
    refused(tmp_path / "a.zip", "contains checkpoints; unpack it")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("word/document.xml", b"")
    refused(tmp_path / "b.zip", "not one of torch.save")


# -- pickles with code -------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/pqcli-was-here",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Evil(), "posix.system"),
        (os.getcwd, "posix.getcwd"),
        (eval, "builtin__?s?.eval"),
        (functools.partial(os.system, "true"), "posix.system"),
        ([print], "builtin__?s?.print"),
        ({"x": subprocess.Popen}, "commands.Popen"),
        (importlib.import_module, "importlib.import_module"),
        (pickle.loads, "pickle.loads"),
        (webbrowser.open, "webbrowser.open"),
        (collections.defaultdict(os.getcwd), "posix.getcwd"),
        (operator.attrgetter("a.b"), "operator.attrgetter"),
    ],
)
def test_a_pickle_that_needs_code_is_refused_by_name(tmp_path, value, name, zipped):
    torch.save({"w": torch.ones(2), "x": value}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "a.pt", f"{name}.*may run code.*refuses")
    assert not pathlib.Path("/tmp/pqcli-was-here").exists()


def test_a_whole_pickled_model_is_explained(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "Linear is a whole model, not its state dict: --from-module .*torch.save")


def test_what_torch_refuses_is_what_its_own_list_says(tmp_path):
    torch.save({"w": torch.ones(2), "x": [os.getcwd, pickle.loads]}, tmp_path / "a.pt")
    for name in torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "a.pt"):
        refused(tmp_path / "a.pt", name)


# -- pickles that are bombs --------------------------------------------------------------------------------------------


def zip_around(path, pickled, records=None):
    """A `.pt` with a pickle of our own."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        for key, content in (records or {}).items():
            archive.writestr(f"archive/data/{key}", content)
    return path


PROTO = b"\x80\x02"


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (PROTO, "damaged|no end"),
        (PROTO + b"}.garbage", "holds no tensors"),
        (PROTO + b"cbuiltins\nbytearray\nq\x00\x8a\x06\x00\x00\x10\xa5\xd4\xe8\x85R.", "damaged"),
        (b"\x80\x05\x96\x00\x00\x00\x00\x00\x01\x00\x00.", "damaged|BYTEARRAY8"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "damaged"),
        (PROTO + b"Nr\xff\xff\xff\xff.", "holds no tensors"),
        (PROTO + b"]q\x00h\x00a.", "contains itself"),
        (PROTO + b"}q\x00K\x01h\x00s.", "contains itself"),
        (PROTO + b"](" + b"](" * 5000 + b"e" * 5001 + b".", "nested more than 100 levels"),
        (PROTO + b"}" + b")" + b"\x85" * 100_000 + b"K\x01s.", "dict key that is a nested tuple"),
        (PROTO + b"}]K\x01s.", "dict key of type list"),
        (PROTO + b"]q\x00" + b"0](h\x00h\x00eq\x00" * 60 + b".", "more than 20,000 entries"),
        (PROTO + b"K\x01K\x02R.", "damaged"),
        (PROTO + b"h\x05.", "damaged"),
        (PROTO + b"0.", "damaged"),
        (PROTO + b"(.", "damaged"),
        (PROTO + b"\x82\x01.", "operation EXT1"),
        (PROTO + b"Pabc\n.", "operation PERSID"),
        (PROTO + b"(ios\nsystem\n.", "operation INST"),
        (PROTO + b"X\x01\x00\x00\x00aQ.", "damaged"),
        (PROTO + b"I" + b"9" * 5000 + b"\n.", "damaged"),
        (PROTO + b"c" + b"a" * 100_000 + b".", "damaged"),
    ],
)
def test_a_hostile_pickle_is_refused_at_once(tmp_path, pickled, message):
    refused(zip_around(tmp_path / "a.pt", pickled), message, limits=checkpoint.Limits(n_entries=20_000))


class Storage:
    """Pickles as a storage of the record `key`."""

    def __init__(self, key="0", size=4, storage_class=torch.FloatStorage, device="cpu"):
        self.id = ("storage", storage_class, key, device, size)


class Rebuild:
    """Pickles as a call of a rebuild function."""

    def __init__(self, function, *arguments):
        self.call = (getattr(torch._utils, function), arguments)

    def __reduce__(self):
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.id if isinstance(obj, Storage) else None


def pickled(value):
    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(value)
    return buffer.getvalue()


def tensor(shape=(4,), strides=(1,), offset=0, **storage):
    return Rebuild("_rebuild_tensor_v2", Storage(**storage), offset, shape, strides, False, {})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (tensor(shape=(5,)), "tensor 'w'.*needs 20 bytes, its storage has 16"),
        (tensor(offset=1), "needs 20 bytes"),
        (tensor(offset=-1), "impossible shape"),
        (tensor(strides=(-1,)), "impossible shape"),
        (tensor(shape=(-4,)), "impossible shape"),
        (tensor(shape=(2**40,), strides=(0,)), "decompression bomb"),
        (tensor(shape=(2**62, 2**62), strides=(0, 0)), "decompression bomb"),
        (tensor(shape=(1,) * 65, strides=(1,) * 65), "impossible shape"),
        (tensor(shape=(4, 1)), "damaged"),
        (tensor(shape=(4.0,)), "damaged"),
        (tensor(size=5), "record data/0 has 16 bytes where the pickle promises 20"),
        (tensor(size=-5), "damaged"),
        (tensor(key="1"), "record data/1 is missing"),
        (tensor(key="../data.pkl"), "is missing"),
        (tensor(device="meta"), "without data"),
        (Rebuild("_rebuild_tensor_v2", None, 0, (1,), (1,), False, {}), "damaged"),
        (Rebuild("_rebuild_tensor_v2"), "damaged"),
        (Rebuild("_rebuild_parameter", Rebuild("_rebuild_parameter", 1, True, {}), True, {}), "holds no tensors"),
    ],
)
def test_a_tensor_that_is_not_in_the_file_is_refused(tmp_path, value, message):
    refused(zip_around(tmp_path / "a.pt", pickled({"w": value}), {"0": bytes(16)}), message)


def test_the_hand_made_file_is_fine_where_nothing_is_wrong(tmp_path):
    content = struct.pack("<4f", 1, 2, 3, 4)
    path = zip_around(tmp_path / "a.pt", pickled({"w": tensor((2, 2), (1, 2))}), {"0": content})
    with checkpoint.open(path) as opened:
        assert opened.read("w").tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.eye(3).to_sparse(), "tensor 'x.1' is a sparse tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "a sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantized tensor"),
        (lambda: torch.ones(3, device="meta"), "without data"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_cannot_be_kept_are_named(tmp_path, make, message):
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": [0, make()]}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", message)


# -- damaged archives --------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_where_torch_does_not_look(tmp_path):
    torch.save({"a": torch.ones(1000), "b": torch.zeros(1000), "v": torch.zeros(10, 10)[2:4]}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        name = archive.infolist()[0].filename.split("/")[0]
        for key, byte in (("1", 77), ("2", 390)):
            entry = archive.getinfo(f"{name}/data/{key}")
            start = entry.header_offset + 30 + sum(struct.unpack_from("<2H", data, entry.header_offset + 26))
            data[start + byte] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with checkpoint.open(tmp_path / "a.pt") as opened:
        opened.read("a")
        for tensor_name in ("b", "v"):
            with pytest.raises(CheckpointError, match=f"tensor '{tensor_name}'.*checksum.*does not match"):
                opened.read(tensor_name)


def test_an_archive_without_checksums_is_accepted(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(1000)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    with checkpoint.open(tmp_path / "a.pt") as opened:
        assert torch.equal(opened.read("a"), torch.ones(1000))


def test_compressed_records_are_refused(tmp_path):
    torch.save({"a": torch.ones(1000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as source, zipfile.ZipFile(tmp_path / "b.pt", "w") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    refused(tmp_path / "b.pt", "is compressed")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_double_records_are_refused(tmp_path):
    path = zip_around(tmp_path / "a.pt", pickled({"w": tensor()}), {"0": bytes(16)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data/0", bytes(16))
    refused(path, "occurs twice")


def test_a_big_endian_file_is_refused(tmp_path):
    path = zip_around(tmp_path / "a.pt", pickled({"w": tensor()}), {"0": bytes(16)})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/byteorder", b"big")
    refused(path, "big-endian")


def save_kind(kind, path):
    value = nested_checkpoint()
    if kind == "safetensors":
        save_file({name: tensor.clone() for name, tensor in value["state_dict"].items()}, path)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=kind == "zip")
    return path


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_every_truncated_file_is_refused(tmp_path, kind):
    data = save_kind(kind, tmp_path / "whole").read_bytes()
    path = tmp_path / "part"
    for length in {*range(0, 200, 3), *range(200, len(data), 251), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            checkpoint.open(path).close()


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return {kind: save_kind(kind, folder / kind).read_bytes() for kind in ("zip", "legacy", "safetensors")}


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32), n_changes=st.integers(1, 8))
def test_a_garbled_file_is_read_or_refused_but_never_crashes(tmp_path_factory, whole_files, kind, seed, n_changes):
    generator = random.Random(seed)
    data = bytearray(whole_files[kind])
    for _ in range(n_changes):
        data[generator.randrange(min(len(data), 4000) if generator.random() < 0.8 else len(data))] = (
            generator.randrange(256)
        )
    path = tmp_path_factory.mktemp("garbled") / "x"
    path.write_bytes(data)
    try:
        with checkpoint.open(path) as opened:
            for info in opened.tensors:
                opened.read(info.name)
            checkpoint.write(path.with_name("y"), opened.tensors, opened.read, opened.skeleton, format=opened.format)
    except CheckpointError:
        pass  # the only exception that may come out


_json = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-3, 2**70), st.text(max_size=3), st.sampled_from(["dict", "odict"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["$", "v", "items", "n", "metadata", "name", "a"]), inner, max_size=4),
        st.builds(
            lambda kind, v: {"$": kind, "v": v},
            st.sampled_from(["tuple", "size", "complex", "bytes", "float", "int", "dtype", "device", "packed", "os"]),
            inner,
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(top=_json, root=_json, source=st.sampled_from(["pt", "folder"]))
def test_a_hostile_skeleton_ends_in_one_error_and_no_file(tmp_path_factory, top, root, source):
    folder = tmp_path_factory.mktemp("skeleton")
    infos = (TensorInfo("a", (2,), "float32"), TensorInfo("b", (2,), "float32"))
    skeleton = {"source": source, "tree": {"root": root, "top": top}, "shards": top, "index": root}
    try:
        checkpoint.write(folder / "x", infos, lambda _: torch.ones(2), skeleton, format=source)
    except ContainerError:
        assert not list(folder.iterdir())


def test_an_alias_of_nothing_is_refused(tmp_path):
    infos = (TensorInfo("a", (2,), "float32"), TensorInfo("b", (3,), "float32", alias_of="a"))
    for format_ in ("pt", "safetensors", "folder"):
        with pytest.raises(ContainerError, match="'b' is tied to 'a', which is no tensor of the same shape"):
            checkpoint.write(tmp_path / "x", infos, lambda _: torch.ones(2), None, format=format_)
