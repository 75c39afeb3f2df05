"""A second reader of the feature `base`, after FORMAT.md alone; bases that are no bases, and hints that lead astray."""

import hashlib
import json
import math
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

import pqcli
from pqcli.codecs.difference import exact_difference, exact_sum
from pqcli.container.naming import hint_to, hinted, is_followed
from pqcli.errors import BaseError, ContainerError, DamagedError
from tests.container.forging import taken_apart
from tests.container.test_format_coded import read_bundle, read_trellis
from tests.families.family import bytes_of, gaussian, same, saved

GOLDEN = Path(__file__).parents[1] / "golden"


# --- a second reader --------------------------------------------------------------------------------------------------


def item_bytes(record):
    return getattr(torch, record["dtype"]).itemsize


def as_tensor(data, record):
    dtype = getattr(torch, record["dtype"])
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(record["shape"])


def unfolded(k, b, n, is_float):
    """The tensor's item, of a kept item and the base's."""

    def o(x):
        return x if not is_float else (1 << n) - 1 - x if x >> (n - 1) else x + (1 << (n - 1))

    def o_inverse(y):
        return y if not is_float else y - (1 << (n - 1)) if y >> (n - 1) else (1 << n) - 1 - y

    d = k // 2 if k % 2 == 0 else (1 << n) - (k + 1) // 2
    return o_inverse((o(b) + d) % (1 << n))


def read_kept(entries, records, base):
    kept = [record for record in records if record["action"] == "keep"]
    spec = {r["name"]: (item_bytes(r), math.prod(r["shape"])) for r in kept}
    small = [r["name"] for r in kept if math.prod(spec[r["name"]]) <= 65536]
    data = dict(zip(small, read_bundle(entries["pqcli.kept"].tobytes(), [spec[n] for n in small]), strict=True))
    for record in kept:
        name = record["name"]
        if name not in data:
            data[name] = read_bundle(entries[f"keep/{name}"].tobytes(), [spec[name]])[0]
        if record.get("difference"):
            size = item_bytes(record)
            words = np.frombuffer(data[name], f"<u{size}").tolist()
            others = bytes_of(base[name]).numpy().view(f"<u{size}").tolist()
            is_float = record["dtype"] in {"float64", "float32", "float16", "bfloat16"}
            found = [unfolded(k, b, 8 * size, is_float) for k, b in zip(words, others, strict=True)]
            data[name] = np.array(found, f"<u{size}").tobytes()
        yield name, as_tensor(data[name], record)


def read_pq(entries, record):
    codebook = entries[f"pq/{record['name']}/codebook"]
    k, d = codebook.shape
    rows = record.get("rows") or record["shape"][0]
    n, bits = rows * -(-math.prod(record["shape"]) // rows // d), (k - 1).bit_length()
    stream = np.unpackbits(entries[f"pq/{record['name']}/assignments"], bitorder="little")[: n * bits]
    assignments = stream.reshape(n, bits) @ (1 << np.arange(bits))
    return codebook[assignments].reshape(rows, -1)[:, : math.prod(record["shape"]) // rows].reshape(record["shape"])


def read_file(path, base):
    """All tensors of a file, given those of its base."""
    entries = load_file(path)
    manifest = json.loads(zlib.decompress(entries["pqcli.manifest"].tobytes()))
    records = manifest["tensors"]
    found = dict(read_kept(entries, records, base))
    coded = [record for record in records if record["action"] == "trellis"]
    values = {}
    if coded:
        rows = [r.get("rows") or r["shape"][0] for r in coded]
        sources = [(n, math.prod(r["shape"]) // n, r.get("kernel", 1)) for r, n in zip(coded, rows, strict=True)]
        matrices = read_trellis(entries["pqcli.coded"].tobytes(), manifest["coded"], sources)
        values = {r["name"]: matrix.reshape(r["shape"]) for r, matrix in zip(coded, matrices, strict=True)}
    for record in records:
        name, dtype = record["name"], getattr(torch, record["dtype"])
        if record["action"] == "base":
            found[name] = base[name].to(dtype)
        if record["action"] == "pq":
            values[name] = read_pq(entries, record)
        if name not in values:
            continue
        value = torch.from_numpy(values[name].astype(np.float32))
        if record.get("difference"):
            value = value + base[name].float()
        value = value.to(dtype)
        if "zero_bytes" in record:
            held = entries[f"zero/{name}"].tobytes()
            n = value.shape[0] if held[0] == 0 else value.numel()
            bits = np.unpackbits(
                np.frombuffer(read_bundle(held[1:], [(1, -(-n // 8))])[0], np.uint8), bitorder="little"
            )
            mask = torch.from_numpy(bits[:n].astype(bool))
            value.view(value.shape[0], -1)[mask if held[0] == 0 else mask.view(value.shape[0], -1)] = 0
        found[name] = value
    named = hashlib.blake2b(digest_size=16)
    for record in records:
        if record.get("difference") or record["action"] == "base":
            tensor = base[record["name"]]
            head = [record["name"], str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            named.update(json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode())
            named.update(hashlib.blake2b(bytes_of(tensor).numpy().tobytes(), digest_size=8).digest())
    assert manifest["base"]["hash"] == named.hexdigest()
    return found


@pytest.mark.slow
def test_a_reader_written_from_the_specification_gets_the_same_tensors():
    base = load_torch(GOLDEN / "base-v1.base.safetensors")
    first = read_file(GOLDEN / "base-v1.pq.safetensors", base)
    for path, found in (
        (GOLDEN / "base-v1.pq.safetensors", first),
        (GOLDEN / "base-chain-v1.pq.safetensors", read_file(GOLDEN / "base-chain-v1.pq.safetensors", first)),
    ):
        expected = pqcli.load(path)
        assert expected.keys() == found.keys()
        assert all(same(tensor, found[name]) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int16", "uint8", "bool", "complex64", "complex128"]
)
def test_kept_differences_are_exact_for_any_bytes(dtype):
    rng = np.random.default_rng(0)
    data, other = (rng.integers(0, 2 if dtype == "bool" else 256, 480, np.uint8) for _ in range(2))
    base = torch.from_numpy(other).view(getattr(torch, dtype))
    assert np.array_equal(exact_sum(exact_difference(data, base, dtype), base, dtype), data)
    assert not exact_difference(other.copy(), base, dtype).any()


# --- hints ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hint",
    [
        "../base.pt", "a/../../base.pt", "/etc/passwd", "//host/share", "https://x.org/base.pt", "file:base.pt", "",
        "C:base.pt", "a\\..\\base.pt", "~/base.pt", "a\0b", "a\nb", "x" * 5000, "\u202ebase.pt",
    ],
)  # fmt: skip
def test_a_hint_that_leads_elsewhere_is_not_followed(tmp_path, hint):
    (tmp_path / "below").mkdir()
    (tmp_path / "base.pt").write_bytes(b"x")
    assert not is_followed(hint)
    assert hinted(tmp_path / "below" / "file.pq.safetensors", hint) is None


def test_a_hint_is_followed_below_the_folder_of_its_file_and_not_through_links_that_lead_out(tmp_path):
    below = tmp_path / "below"
    (below / "more").mkdir(parents=True)
    for path in (tmp_path / "base.pt", below / "more" / "base.pt"):
        path.write_bytes(b"x")
    (below / "out.pt").symlink_to(tmp_path / "base.pt")
    (below / "in.pt").symlink_to(below / "more" / "base.pt")
    (below / "loop.pt").symlink_to(below / "loop.pt")
    file = below / "file.pq.safetensors"
    assert hinted(file, "more/base.pt") == hinted(file, "in.pt") == (below / "more" / "base.pt").resolve()
    assert [hinted(file, name) for name in ("out.pt", "loop.pt", "none.pt", "/dev/zero")] == [None] * 4
    assert hint_to(below / "more" / "base.pt", file) == "more/base.pt"
    assert hint_to(tmp_path / "base.pt", file) == "base.pt"


# --- hostile files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tmp_path):
    base = {"w": gaussian(48, 40), "same": gaussian(40, 40, seed=1), "b": gaussian(64, seed=2)}
    saved(tmp_path, "base.pt", base)
    tuned = {
        name: tensor + (name != "same") * gaussian(*tensor.shape, seed=5, rms=1e-3) for name, tensor in base.items()
    }
    saved(tmp_path, "tuned.pt", tuned | {"new": gaussian(40, 40, seed=3)})
    file = tmp_path / "tuned.pq.safetensors"
    pqcli.compress(tmp_path / "tuned.pt", file, pqcli.Recipe(codec="trellis", effort=4), base=tmp_path / "base.pt")
    return file


def record(forgery, name):
    return next(record for record in forgery.manifest["tensors"] if record["name"] == name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.manifest.pop("base"), "does not describe the base"),
        (lambda f: [r.pop("difference", 0) for r in f.manifest["tensors"]] and record(f, "same").update(action="keep"),
         "does not describe the base"),
        (lambda f: f.manifest["base"].update(hash="12"), "a base with the hash '12'"),
        (lambda f: f.manifest["base"].update(hash="G" * 32), "a base with the hash"),
        (lambda f: f.manifest["base"].update(hash=7), "makes no sense"),
        (lambda f: f.manifest["base"].update(path="x" * 5000), "5,000 characters"),
        (lambda f: f.manifest["base"].update(more=1), "makes no sense"),
        (lambda f: record(f, "same").update(difference=True), "a difference of what is coded as 'base'"),
        (lambda f: record(f, "w").update(difference=1), "makes no sense"),
        (lambda f: record(f, "same").update(zero_bytes=3), "zeros told of what is not quantized"),
    ],
)  # fmt: skip
def test_a_manifest_that_lies_about_its_base_is_refused(made, tmp_path, change, message):
    forgery = taken_apart(made)
    change(forgery)
    made.write_bytes(forgery.bytes())
    with pytest.raises(DamagedError, match=message):
        pqcli.open(made)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: record(f, "same").update(shape=[1 << 40, 1 << 18]),
        lambda f: record(f, "same").update(name="other"),
        lambda f: record(f, "same").update(dtype="int64"),
        lambda f: record(f, "same").update(dtype="float16"),
        lambda f: record(f, "b").pop("difference"),
        lambda f: record(f, "w").pop("difference"),
        lambda f: record(f, "new").update(difference=True),
        lambda f: f.manifest["base"].update(hash="0" * 32),
        lambda f: f.manifest["base"].update(path="../base.pt"),
    ],
)
def test_records_that_do_not_fit_the_base_end_in_an_error_or_in_sound_tensors(made, tmp_path, change):
    expected = pqcli.load(made)
    forgery = taken_apart(made)
    change(forgery)
    made.write_bytes(forgery.bytes())
    try:
        found = pqcli.load(made, base=tmp_path / "base.pt")
    except ContainerError as error:
        assert str(made) in str(error)  # noqa: PT017 - either will do
    else:
        assert all(same(found[name], tensor) for name, tensor in expected.items())


def test_files_that_would_be_their_own_bases_are_refused(made, tmp_path):
    other = tmp_path / "other.pq.safetensors"
    shutil.copy(made, other)
    (tmp_path / "base.pt").unlink()
    for file, hint in ((made, "other.pq.safetensors"), (other, made.name)):
        forgery = taken_apart(file)
        forgery.manifest["base"]["path"] = hint
        file.write_bytes(forgery.bytes())
    with pytest.raises(BaseError, match="own base"):
        pqcli.load(made)
    forgery = taken_apart(made)
    forgery.manifest["base"]["path"] = made.name
    made.write_bytes(forgery.bytes())
    with pytest.raises(BaseError, match=r"does not lie beside it|own base"):
        pqcli.load(made)
    with pytest.raises(BaseError):
        pqcli.load(made, base=[made, other])


def test_a_damaged_file_is_told_from_a_wrong_base(made, tmp_path):
    forgery = taken_apart(made)
    data = bytearray(forgery.entries["pqcli.hashes"][2])
    data[4 * [r["name"] for r in forgery.manifest["tensors"]].index("new")] ^= 1
    forgery.entries["pqcli.hashes"][2] = bytes(data)
    made.write_bytes(forgery.bytes())
    with pytest.raises(DamagedError, match="tensor 'new' decodes to other bytes"):
        pqcli.load(made)
    assert [finding.name for finding in pqcli.verify(made)] == ["new"]


def test_a_base_that_differs_late_is_found_out_when_that_tensor_is_decoded(tmp_path):
    base = {f"{i}.weight": gaussian(40, 40 + i, seed=i) for i in range(3)}
    tuned = {name: tensor + gaussian(*tensor.shape, seed=9, rms=1e-3) for name, tensor in base.items()}
    file = tmp_path / "far" / "tuned.pq.safetensors"
    file.parent.mkdir()
    report = pqcli.compress(
        saved(tmp_path, "tuned.pt", tuned), file, pqcli.Recipe(codec="trellis", effort=4),
        base=saved(tmp_path, "base.pt", base),
    )  # fmt: skip
    late = saved(tmp_path, "late.pt", base | {"2.weight": base["2.weight"] + 1e-3})
    for verb in (pqcli.load, pqcli.verify):
        with pytest.raises(BaseError, match=rf"{report.base.hash}.*late.pt' has the hash (?!{report.base.hash})"):
            verb(file, base=late)
    assert pqcli.load(file, base=[late, tmp_path / "base.pt"]).keys() == base.keys()
