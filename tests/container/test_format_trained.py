"""The feature `trained`: read by a second reader after FORMAT.md alone, kept by a golden file, and forged."""

import json
import math
import struct
import zlib

import pytest
from safetensors.numpy import load

import pqcli
from tests.conftest import REPOSITORY
from tests.container.forging import taken_apart
from tests.container.test_hostile import refused

FILE = REPOSITORY / "tests" / "golden" / "trained-v1.pq.safetensors"
TRAINED = {"embedding.weight", "conv.weight", "layer.weight"}


def of(forgery, name="conv.weight"):
    return next(record for record in forgery.manifest["tensors"] if record["name"] == name)


def test_a_second_reader_finds_no_error_told_exactly_of_what_was_trained():
    entries = entries_of(FILE)
    records = json.loads(zlib.decompress(entries["pqcli.manifest"].tobytes()))["tensors"]
    quantized = [r for r in records if r["action"] not in ("keep", "alias", "copy", "base")]
    assert {r["name"] for r in quantized if r.get("trained")} == TRAINED
    with pqcli.open(FILE) as container:
        for record, row in zip(quantized, entries["pqcli.errors"].tolist(), strict=True):
            is_trained = record.get("trained", False)
            assert all(math.isnan(value) == is_trained for value in row)
            assert (container.error(record["name"]) is None) == is_trained
            assert (container.damage(record["name"]) is None) == is_trained
            assert container.is_trained(record["name"]) == is_trained
        kept = {record["name"] for record in records if record["action"] == "keep" and record.get("trained")}
        assert {"conv.bias", "norm.running_mean", "norm.num_batches_tracked"} <= kept
        assert "frozen.bias" not in kept
        assert not container.is_trained("twin.weight")


def entries_of(path):
    """All entries; those of `pqcli.damage` as bytes, as numpy has no bfloat16."""
    forgery = taken_apart(path)
    damage = forgery.entries["pqcli.damage"]
    damage[:2] = ["U8", [len(damage[2])]]
    return load(forgery.bytes())


NAN = struct.pack("<f", math.nan)


def without_the_feature(forgery):
    forgery.manifest["features"].remove("trained")
    forgery.metadata["features"] = ",".join(forgery.manifest["features"])


def with_row(forgery, i, row):
    data = forgery.entries["pqcli.errors"][2]
    forgery.entries["pqcli.errors"][2] = data[: 16 * i] + row + data[16 * (i + 1) :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_the_feature, "trained what is coded as 'pq', or in a file without that feature"),
        (lambda f: of(f).pop("trained"), "the error of tensor 'conv.weight' is stored as"),
        (lambda f: of(f).update(trained=1), "makes no sense"),
        (lambda f: of(f, "frozen.weight").update(trained=True), "'frozen.weight' is stored as .* it was trained since"),
        (lambda f: of(f, "twin.weight").update(trained=True), "trained what is coded as 'copy'"),
        (lambda f: of(f, "head.weight").update(trained=True), "trained what is coded as 'alias'"),
        (lambda f: of(f).update(difference=True), "a difference to a base that was trained since"),
        (lambda f: with_row(f, 1, bytes(16)), "'conv.weight' is stored as .* it was trained since"),
        (lambda f: with_row(f, 1, NAN + bytes(12)), "'conv.weight' is stored as .* it was trained since"),
        (lambda f: with_row(f, 3, NAN * 4), "the error of tensor 'frozen.weight'"),
        (lambda f: f.entries["pqcli.damage"].__setitem__(2, bytes(16)), "damage is told of a tensor that was trained"),
    ],
)
def test_a_file_that_lies_about_training_is_refused(tmp_path, change, message):
    forgery = taken_apart(FILE)
    change(forgery)
    refused(forgery, tmp_path, message)
