"""What starts at once: help, and plans of checkpoints that are far larger than memory."""

import json
import os
import resource
import struct
import subprocess
import sys
from math import prod

import pytest

from tests.conftest import REPOSITORY

HIDDEN, INNER, LAYERS, WORDS = 8192, 28672, 57, 128256
SHARD_BYTES = 5 * 10**9


def names():
    """The tensors of a language model of 51 billion weights, with their shapes."""
    yield "model.embed_tokens.weight", [WORDS, HIDDEN]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", [HIDDEN]
        for name in ("q_proj", "o_proj"):
            yield f"{layer}.self_attn.{name}.weight", [HIDDEN, HIDDEN]
        for name in ("k_proj", "v_proj"):
            yield f"{layer}.self_attn.{name}.weight", [1024, HIDDEN]
        yield f"{layer}.post_attention_layernorm.weight", [HIDDEN]
        for name in ("gate_proj", "up_proj"):
            yield f"{layer}.mlp.{name}.weight", [INNER, HIDDEN]
        yield f"{layer}.mlp.down_proj.weight", [HIDDEN, INNER]
    yield "lm_head.weight", [WORDS, HIDDEN]


def headers_of_100_gigabytes(folder):
    """A folder of bfloat16 shards whose weights are holes in the files; returns the size of all."""
    shards, n_bytes = [{}], 0
    for name, shape in names():
        size = 2 * prod(shape)
        if n_bytes + size > SHARD_BYTES:
            shards, n_bytes = [*shards, {}], 0
        offsets = [n_bytes, n_bytes + size]
        shards[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": offsets}
        n_bytes += size
    places = {}
    for i, header in enumerate(shards, 1):
        file = folder / f"model-{i:05}-of-{len(shards):05}.safetensors"
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(file, 8 + len(text) + max(entry["data_offsets"][1] for entry in header.values()))
        places |= dict.fromkeys(header, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def run(*arguments):
    """What a Python process prints, the modules that it imports, and the CPU seconds that it takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *map(str, arguments)],
        capture_output=True, text=True, cwd=REPOSITORY, check=True,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    return done.stdout, imported, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["compress", "--help"]], ids=" ".join)
def test_help_and_version_need_no_large_library(arguments):
    _, imported, _ = run("-m", "pqcli", *arguments)
    assert not imported & {"torch", "numpy", "safetensors", "yaml"}


def test_a_plan_of_100_gigabytes_takes_headers_alone(tmp_path):
    """But for its prediction of time, which is measured, with torch."""
    try:
        n_bytes = headers_of_100_gigabytes(tmp_path)
    except OSError as error:
        pytest.skip(f"this file system holds no sparse files of 5 GB: {error}")
    assert n_bytes > 10**11
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from pqcli.jobs.folders.compressing import preview_folder\n"
        "from pqcli.recipe.recipe import Recipe\n"
        "found = preview_folder(Path(sys.argv[1]), None, Recipe(), lambda plan: None)\n"
        "print(found.original_bytes, len(found.plan.entries))\n"
    )
    found, imported, seconds = run("-c", code, tmp_path)
    assert [*map(int, found.split())] == [n_bytes, sum(1 for _ in names())]
    assert "torch" not in imported
    assert seconds < 2
