"""The feature `damage`: read by a second reader after FORMAT.md alone, kept by a golden file, and forged."""

import json
import struct
import zlib

import numpy as np
import pytest
import safetensors
import torch

import pqcli
from tests.conftest import REPOSITORY
from tests.container.forging import taken_apart
from tests.container.test_format_coded import check_checksum
from tests.container.test_hostile import refused

GOLDEN = REPOSITORY / "tests" / "golden"


def read_damage(path):
    """FORMAT.md, `pqcli.damage`: what is told of every quantized tensor, by name."""
    with safetensors.safe_open(path, "pt") as file:
        manifest = json.loads(zlib.decompress(file.get_tensor("pqcli.manifest").numpy().tobytes()))
        words = file.get_tensor("pqcli.damage").view(torch.int16).numpy().view(np.uint16)
    check_checksum(path.read_bytes(), has_checksum=True)
    rows = (words.astype(np.uint32) << 16).view(np.float32)
    quantized = [r["name"] for r in manifest["tensors"] if r["action"] not in ("keep", "alias", "copy", "base")]
    return dict(zip(quantized, rows.tolist(), strict=True))


@pytest.mark.parametrize("name", ["damage-v1", "trellis-damage-v1"])
def test_golden_files_tell_a_second_reader_what_they_tell_us(name):
    path = GOLDEN / f"{name}.pq.safetensors"
    told = read_damage(path)
    assert np.isnan(told["unused.weight"]).all()
    assert np.isnan(told["conv.weight"]).tolist() == [False, True]
    with pqcli.open(path) as container:
        assert "damage" in container.manifest.features
        for key, row in told.items():
            found = container.damage(key)
            expected = (np.nan, np.nan) if found is None else (found.output_mse, found.damage or np.nan)
            np.testing.assert_equal(tuple(row), expected)


@pytest.mark.parametrize("row", [(-1.0, 0.0), (0.5, -2.0), (float("inf"), 0.0), (0.5, float("inf"))])
def test_a_damage_that_none_can_be_is_refused(tmp_path, row):
    forgery = taken_apart(GOLDEN / "damage-v1.pq.safetensors")
    entry = forgery.entries["pqcli.damage"]
    entry[2] = b"".join(struct.pack("<f", number)[2:] for number in row) + entry[2][4:]
    refused(forgery, tmp_path, "the damage of tensor 'embedding.weight'")


def test_the_entry_is_there_exactly_where_the_feature_is(tmp_path):
    without = taken_apart(GOLDEN / "damage-v1.pq.safetensors")
    del without.entries["pqcli.damage"]
    refused(without, tmp_path, "no entry 'pqcli.damage'")
    unnamed = taken_apart(GOLDEN / "damage-v1.pq.safetensors")
    unnamed.metadata["features"] = "checksum,pq"
    unnamed.manifest["features"] = ["checksum", "pq"]
    refused(unnamed, tmp_path, "no record calls for entry 'pqcli.damage'")
    longer = taken_apart(GOLDEN / "damage-v1.pq.safetensors")
    longer.entries["pqcli.damage"][1:] = [[5, 2], bytes(20)]
    refused(longer, tmp_path, "entry 'pqcli.damage' is bfloat16")
