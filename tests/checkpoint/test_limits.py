"""What a stranger's header may cost: every limit is met soon, told with its number, and can be raised."""

from __future__ import annotations

import base64
import json
import struct
import time
import zipfile
import zlib

import pytest
import torch

from pqcli import checkpoint
from pqcli.checkpoint.limits import Budget
from pqcli.errors import CheckpointError, ContainerError
from pqcli.tensors.info import TensorInfo
from tests.checkpoint.test_hostile import PROTO, pickled, tensor, zip_around

MIB = 1 << 20
TEXT = b"X" + struct.pack("<I", MIB) + b"a" * MIB + b"q\x01"
KEPT = b"}(X\x01\x00\x00\x00w"


@pytest.mark.parametrize(
    ("value", "limits", "message"),
    [
        (b"]q\0" + b"0](h\0h\0eq\0" * 60, {}, r"more than 2\d\d,\d\d\d entries, written out from \d+ operations"),
        (b")q\0" + b"0(h\0h\0tq\0" * 60, {}, r"more than 2\d\d,\d\d\d entries, written out"),
        (b"}q\0" + b"0}(K\x01h\0K\x02h\0uq\0" * 60, {}, r"more than 2\d\d,\d\d\d entries, written out"),
        (b"]q\0" + b"0cx.y\nZ\n)\x81(h\0h\0eq\0" * 60, {}, r"more than 2\d\d,\d\d\d entries, written out"),
        (b"](" + b"K\x01" * 5000 + b"e", {"n_entries": 4000}, "more than 4,000 entries"),
        (b"](" + b"K\x01" * 5000 + b"e", {"n_operations": 4000}, "more than 4,000 operations"),
        (b"](" * 200 + b"e" * 200, {}, "nested more than 100 levels deep"),
        (b"](" * 20 + b"e" * 20, {"depth": 10}, "nested more than 10 levels deep"),
        (TEXT + b"0](" + b"h\x01" * 300 + b"e", {}, "more than 268,435,456 bytes of text and data"),
        (TEXT + b"0](" + b"h\x01" * 3 + b"e", {"n_bytes": 2 * MIB}, "more than 2,097,152 bytes of text and data"),
        (
            TEXT + b"0}(" + b"".join(b"h\x01K%c\x86N" % n for n in range(1, 5)) + b"u",
            {"n_bytes": 2 * MIB},
            "bytes of text",
        ),
        (TEXT + b"0cbuiltins\nset\n](" + b"h\x01" * 3 + b"e\x85R", {"n_bytes": 2 * MIB}, "bytes of text"),
        (b"](" + b"K\x01" * 50_000 + b"e", {"seconds": -1.0}, "more than -1 seconds"),
    ],
)
def test_a_limit_that_is_met_is_told_with_its_number(tmp_path, value, limits, message):
    path = zip_around(tmp_path / "a.pt", PROTO + value + b".")
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.open(path, limits=checkpoint.Limits(**limits))
    assert time.monotonic() - begun < 30
    assert "refused (where you trust the file, raise it: --limit " in str(caught.value) or "damaged" in str(
        caught.value
    )


def test_a_limit_can_be_raised(tmp_path):
    inner = [[0] * 200 for _ in range(60)]
    torch.save({"w": torch.ones(2), "x": inner}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"--limit n_entries=N, in Python Limits\(n_entries=N\)"):
        checkpoint.open(tmp_path / "a.pt", limits=checkpoint.Limits(n_entries=10_000))
    checkpoint.open(tmp_path / "a.pt", limits=checkpoint.Limits(n_entries=13_000)).close()
    checkpoint.open(tmp_path / "a.pt").close()


def test_a_structure_shared_a_thousand_times_is_no_bomb(tmp_path):
    shared = {f"k{n}": n for n in range(100)}
    torch.save({"w": torch.ones(2), "x": [shared] * 1000}, tmp_path / "a.pt")
    checkpoint.open(tmp_path / "a.pt").close()


def test_many_tensors_of_one_name_are_told_apart_in_time(tmp_path):
    """`a.b.c...` cut into keys in every way gives thousands of equal names."""
    value = {}
    tensors = torch.ones(1)
    parts = [str(n) for n in range(13)]
    for cuts in range(1 << 12):
        keys, target = [parts[0]], value
        for number, part in enumerate(parts[1:]):
            if cuts >> number & 1:
                keys.append(part)
            else:
                keys[-1] += f".{part}"
        for key in keys[:-1]:
            target = target.setdefault(key, {})
        target[keys[-1]] = tensors
    torch.save(value, tmp_path / "a.pt")
    with checkpoint.open(tmp_path / "a.pt") as opened:
        names = [info.name for info in opened.tensors]
    assert len(set(names)) == len(names) == 1 << 12
    assert names[-1] == f"{names[0]}~{1 << 12}"


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a":[' + b"[]," * 300 + b"[]]}", "more than 500 entries"),
        (b"[" * 400, "more than|Expecting"),
        (b'{"a":"' + b"," * 600 + b'"}', "more than 500 entries"),
        (b'"' + b"a" * 20_000 + b'"', "more than 10,000 bytes"),
    ],
)
def test_json_is_counted_before_it_is_built(text, message):
    budget = Budget(checkpoint.Limits(n_entries=500, n_bytes=10_000))
    with pytest.raises((CheckpointError, ValueError), match=message):
        budget.json(text)


def header(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"__metadata__":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}", "no JSON|entries"),
        (b'{"__metadata__":' + b"[[],[]]," * 1_000_000 + b"}", "more than 2,000,000 entries"),
        (b'{"a":{"dtype":"F32","shape":[' + b"1," * 3_000_000 + b'1],"data_offsets":[0,4]}}', "more than 2,000,000"),
        (b'{"a":' + b"9" * 10_000 + b"}", "no JSON"),
    ],
)
def test_a_safetensors_header_that_expands_is_refused(tmp_path, text, message):
    (tmp_path / "a").write_bytes(header(text))
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(tmp_path / "a")
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("text", [b'{"weight_map":' + b"[[],[]]," * 1_000_000 + b"}", b'{"weight_map":' + b"[" * 10**6])
def test_an_index_that_expands_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"index\.json'.*(more than 2,000,000 entries|no shard index)"):
        checkpoint.open(tmp_path)


def packed(node):
    text = node if isinstance(node, bytes) else json.dumps(node).encode()
    return {"$": "packed", "v": base64.b64encode(zlib.compress(text, 9)).decode()}


@pytest.mark.parametrize(
    "node",
    [
        packed(b"[" + b"[]," * 20_000_000 + b"[]]"),
        packed(b" " * (65 * MIB) + b"1"),
        {"$": "tuple", "v": [packed(b'"' + b"a" * (30 * MIB) + b'"')] * 1},
        [packed([packed(b'"' + b"a" * (30 * MIB) + b'"')] * 9)],
        packed(b"[" * 5000 + b"]" * 5000),
        packed(packed(packed(packed(b"nonsense")))),
        {"$": "packed", "v": "AAAA"},
        {"$": "packed", "v": 7},
    ],
    ids=lambda node: str(len(json.dumps(node))),
)
def test_what_a_container_packs_is_limited_together(tmp_path, node):
    infos = (TensorInfo("w", (1,), "float32"),)
    tree = {"top": {"$": "dict", "items": [1, ["x", node]]}}
    begun = time.monotonic()
    if "tuple" in json.dumps(node)[:20]:
        checkpoint.write(tmp_path / "x", infos, lambda _: torch.ones(1), {"source": "pt", "tree": tree}, format="pt")
        return  # one of them is small enough
    with pytest.raises(ContainerError, match="does not fit its tensors"):
        checkpoint.write(tmp_path / "x", infos, lambda _: torch.ones(1), {"source": "pt", "tree": tree}, format="pt")
    assert time.monotonic() - begun < 20


# -- the structure of the zip ------------------------------------------------------------------------------------------


def archive_of(path, records, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in records:
            archive.writestr(name, content)
    return path


DATA = pickled({"w": tensor()})


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "damaged zip|empty zip"),
        ([("archive/data.pkl", DATA)], "record data/0 is missing"),
        ([("archive/data.pkl", DATA), ("archive/data/0", b"")], "has 0 bytes where the pickle promises 16"),
        ([("archive/data.pkl", DATA), ("archive/data/0", bytes(15))], "has 15 bytes where"),
        ([("archive/data.pkl", DATA), ("archive/data.pkl", DATA)], "occurs twice"),
        ([("a/data.pkl", DATA), ("b/data.pkl", DATA)], "2 records named data.pkl"),
        ([("data.pkl", DATA)], "not one of torch.save"),
        ([("a/b/data.pkl", DATA)], "0 records named data.pkl"),
        ([("archive/data.pkl", DATA), ("archive/constants.pkl", b"")], "TorchScript"),
        ([("archive/data.pkl", DATA), ("archive/code/x.py", b"")], "TorchScript"),
        ([("archive/data.pkl", DATA), ("archive/byteorder", b"big"), ("archive/data/0", bytes(16))], "big-endian"),
        ([("archive/data.pkl", b""), ("archive/data/0", bytes(16))], "pickle is damaged"),
        ([("x.npy", b"")], "numpy .npz"),
        ([("model.weights.h5", b"")], "Keras"),
        ([("inner.safetensors", b"")], "contains checkpoints"),
        ([("\x1b[31m\n", b"")], "not one of torch.save"),
        ([("../../etc/data.pkl", DATA)], "0 records named data.pkl"),
    ],
)
def test_a_zip_that_torch_would_not_write_is_refused(tmp_path, records, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.open(archive_of(tmp_path / "a.pt", records))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_bomb_is_refused_unopened(tmp_path, method):
    records = [("archive/data.pkl", DATA), ("archive/data/0", bytes(60 * MIB))]
    with pytest.raises(CheckpointError, match=r"is compressed, which torch\.save never does"):
        checkpoint.open(archive_of(tmp_path / "a.pt", records, compression=method))


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        (42, struct.pack("<I", 2**31), "points outside|no record begins|several archives"),
        (42, struct.pack("<I", 5), "several archives|no record begins"),
        (24, struct.pack("<I", 2**31 - 1), "compressed"),
        (8, struct.pack("<H", 1), "encrypted"),
        (10, struct.pack("<H", 99), "compressed"),
        (28, struct.pack("<H", 60_000), "directory"),
    ],
)
def test_a_zip_directory_that_lies_is_refused(tmp_path, place, content, message):
    path = archive_of(tmp_path / "a.pt", [("archive/data.pkl", DATA), ("archive/data/0", bytes(16))])
    data = bytearray(path.read_bytes())
    at = data.index(b"PK\x01\x02") + place
    data[at : at + len(content)] = content
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.open(path)


@pytest.mark.parametrize("before", [b"#!/bin/sh\n", b"MZ" + bytes(500), b"PK\x03\x04" + bytes(26)])
def test_something_before_the_archive_is_refused(tmp_path, before):
    path = archive_of(tmp_path / "a.pt", [("archive/data.pkl", DATA), ("archive/data/0", bytes(16))])
    path.write_bytes(before + path.read_bytes())
    with pytest.raises(CheckpointError):
        checkpoint.open(path)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_protocol_of_pickles_is_read(tmp_path, protocol):
    value = {"w": torch.arange(3.0), "x": [1, "text", (None, True), {"k": 2.5}]}
    torch.save(value, tmp_path / "a.pt", pickle_protocol=max(2, protocol))
    with checkpoint.open(tmp_path / "a.pt") as opened:
        assert torch.equal(opened.read("w"), value["w"])
