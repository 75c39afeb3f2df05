"""A second reader of the feature `moments`, after FORMAT.md alone, and files that lie about moments."""

import json
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import pqcli
from pqcli.errors import ContainerError, DamagedError
from tests.container.flips import Flips
from tests.container.forging import taken_apart
from tests.container.test_format_coded import read_bundle

GOLDEN = Path(__file__).parents[1] / "golden"
FILE = GOLDEN / "moments-v1.pq.safetensors"


def table(form):
    """What the codes stand for where the scale is 1, as float32."""
    if form == "first":
        return [np.float32(float((c - 128) * abs(c - 128)) / 16129.0) for c in range(256)]
    return [np.float32(float(c**4) / 4228250625.0) for c in range(256)]


def read_moments(entries, record):
    n = math.prod(record["shape"])
    codes, scales = read_bundle(entries[f"moments/{record['name']}"].tobytes(), [(1, n), (2, -(-n // 128))])
    meant, values = table(record["form"]), []
    for i, code in enumerate(codes):
        assert code or record["form"] == "second"
        (scale,) = struct.unpack("<f", b"\0\0" + scales[2 * (i // 128) : 2 * (i // 128) + 2])
        assert 0 <= scale < math.inf
        values.append(np.float32(scale) * meant[code])
    dtype = getattr(torch, record["dtype"])
    limit = torch.finfo(dtype).max
    exact = torch.from_numpy(np.array(values, np.float64))
    return exact.clamp(-limit, limit).to(torch.float32).to(dtype).reshape(record["shape"])


@pytest.mark.parametrize("name", ["moments-v1", "trellis-moments-v1"])
def test_a_reader_written_from_the_specification_gets_the_same_moments(name):
    entries = load_file(GOLDEN / f"{name}.pq.safetensors")
    records = json.loads(zlib.decompress(entries["pqcli.manifest"].tobytes()))["tensors"]
    loaded = pqcli.load(GOLDEN / f"{name}.pq.safetensors")
    held = [record for record in records if record["action"] == "moments"]
    assert len(held) == 8
    for record in held:
        found = read_moments(entries, record)
        assert torch.equal(found.view(torch.uint8), loaded[record["name"]].view(torch.uint8)), record["name"]


# --- hostile files ----------------------------------------------------------------------------------------------------

NAME = "optimizer.state.0.exp_avg"


def of(forgery, name=NAME):
    return next(record for record in forgery.manifest["tensors"] if record["name"] == name)


def refused(forgery, tmp_path, message, verb=pqcli.open):
    file = tmp_path / "hostile.pq.safetensors"
    file.write_bytes(forgery.bytes())
    with pytest.raises(ContainerError, match=message):
        verb(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: of(f).pop("form"), "action 'moments' with moments of the form None"),
        (lambda f: of(f).update(form="third"), "moments of the form 'third'"),
        (lambda f: of(f).update(form=1), "makes no sense"),
        (lambda f: of(f).pop("coded_bytes"), "how many bytes they take"),
        (lambda f: of(f).update(coded_bytes=-1), "a size that no tensor has"),
        (lambda f: of(f).update(coded_bytes=of(f)["coded_bytes"] + 1), "calls for"),
        (lambda f: of(f).update(dtype="int32"), "moments of the dtype int32"),
        (lambda f: of(f).update(zero_bytes=3), "zeros told of what is not quantized"),
        (lambda f: of(f).update(difference=True), "a difference of what is coded as 'moments'"),
        (lambda f: of(f).update(action="keep"), "action 'keep' with moments of the form 'first'"),
        (lambda f: of(f, "fc.weight").update(form="first"), "action 'pq' with moments"),
        (lambda f: of(f, "optimizer.state.1.exp_avg").update(form="first"), "action 'copy' with moments"),
        (lambda f: f.manifest.update(features=["checksum", "copy", "pq"]) or f.metadata.update(
            features="checksum,copy,pq"), "moments in a file without that feature"),
    ],
)  # fmt: skip
def test_a_manifest_that_lies_about_moments_is_refused(tmp_path, change, message):
    forgery = taken_apart(FILE)
    change(forgery)
    refused(forgery, tmp_path, message)


def bundle(codes, scales):
    """A bundle of raw planes: way 0, and every plane by method 0, the most significant first."""
    high, low = bytes(scales[1::2]), bytes(scales[0::2])
    return b"\0\0" + bytes(codes) + (b"\0\0" + high + b"\0" + low if scales else b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "bytes left where"),
        (bundle([128] * 1440, b"\x80\x7f" * 12), "a scale of moments that is negative or not finite"),
        (bundle([128] * 1440, b"\x80\xbf" * 12), "a scale of moments that is negative or not finite"),
        (bundle([128] * 1439 + [0], b"\x80\x3f" * 12), "a first moment with the code 0"),
        (bundle([128] * 1440, b"\x80\x3f" * 12)[:-1], "bytes left where"),
        (bundle([128] * 1440, b"\x80\x3f" * 12) + b"\0", "bytes too many"),
        (bundle([127] * 1440, b"\x80\x3f" * 12), "decodes to other bytes"),
    ],
)
def test_payloads_that_no_writer_makes_end_in_an_error(tmp_path, data, message):
    forgery = taken_apart(FILE)
    forgery.entries[f"moments/{NAME}"] = ["U8", [len(data)], data]
    of(forgery)["coded_bytes"] = len(data)
    refused(forgery, tmp_path, message, pqcli.load)


def test_moments_that_would_fill_memory_are_refused(tmp_path):
    forgery = taken_apart(FILE)
    of(forgery, "optimizer.state.2.momentum_buffer").update(shape=[1 << 20, 1 << 20])
    (tmp_path / "x.pq.safetensors").write_bytes(forgery.bytes())
    with pytest.raises(DamagedError, match="more than the"):
        pqcli.open(tmp_path / "x.pq.safetensors")


def test_a_flipped_bit_is_an_error_or_changes_no_answer(tmp_path):
    flips = Flips(FILE, tmp_path)
    flips.check(range(17, 8 * len(flips.data), 7001))
