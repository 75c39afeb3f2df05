"""Decoding takes numpy and a few small libraries: it gives the same bits where nothing else can be imported."""

import json
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pqcli
from pqcli.core.arrays import as_tensor
from pqcli.tensors.info import ITEM_BYTES
from tests.conftest import REPOSITORY
from tests.golden.make_plain_v1 import digests

GOLDEN = REPOSITORY / "tests" / "golden"
FILES = [*sorted(GOLDEN.glob("*.pq.safetensors")), *sorted(GOLDEN.glob("shards-*/*.index.json"))]
QUANTIZED = ("float64", "float32", "float16", "bfloat16")
MODULES = {"PyYAML": "yaml", "jinja2": "jinja2"}
TO_INSTALL = "error: this needs torch, which pqcli-decoder does without; install pqcli in its place"
RECIPES = {
    "plain": pqcli.Recipe(n_centroids=8, n_iter=2),
    "ecpq": pqcli.Recipe(rate_weight=0.2),
    "trellis": pqcli.Recipe(codec="trellis", quality="small", effort=4),
}


def needed(project):
    """The modules of what a distribution depends on."""
    listed = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {re.split(r"[<>=\[]", name)[0] for name in listed}
    return {MODULES.get(name, name) for name in names}


BLOCKED = needed(REPOSITORY) - needed(REPOSITORY / ".decoder") | {"scipy", "ray", "transformers"}
"""What installing pqcli brings and `pqcli-decoder` does not."""


def of_every_dtype():
    """Tensors to quantize, of every dtype that can be, some with zeros and with columns left over, and kept ones."""
    generator = torch.Generator().manual_seed(0)
    state = {
        f"{dtype}.weight": torch.randn(24, 30, generator=generator).to(getattr(torch, dtype)) for dtype in QUANTIZED
    }
    state["float16.weight"][3] = 0
    state["bfloat16.weight"][:, 5] = 0
    for dtype, n_bytes in ITEM_BYTES.items():
        if dtype not in {"complex32", "complex128"}:
            data = (
                torch.arange(6 * n_bytes, dtype=torch.uint8) % 2 if dtype == "bool" else torch.arange(6 * n_bytes) * 41
            )
            state[f"{dtype}.kept"] = data.to(torch.uint8).view(getattr(torch, dtype))
    return state


def installed(package, python, *more):
    """Have pip do something with a package; skips where there is no index to get from what it needs."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", *python, "install" if python else "wheel", "--quiet", *more, package],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "No matching distribution" in done.stderr or "Could not fetch URL" in done.stderr:
        pytest.skip(f"pip finds no index here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr


def bits(tensor):
    return (tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a process without torch tells of golden files, of files of every codec and dtype, and of a folder."""
    folder = tmp_path_factory.mktemp("alone")
    model = folder / "model"
    model.mkdir()
    save_file(of_every_dtype(), model / "model.safetensors")
    (model / "config.json").write_text("{}")
    made = [pqcli.compress(model, folder / "model.pq", RECIPES["plain"]).output]
    for name, recipe in RECIPES.items():
        made.append(pqcli.compress(model / "model.safetensors", folder / f"{name}.pq.safetensors", recipe).output)
    (folder / "out").mkdir()
    done = subprocess.run(
        [sys.executable, REPOSITORY / "tests" / "jobs" / "decoding_alone.py", ",".join(BLOCKED), folder / "out",
         *made, "--", *FILES],
        capture_output=True, text=True, cwd=REPOSITORY, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, made, json.loads(done.stdout)


def test_nothing_is_imported_that_only_encoding_needs(alone):
    assert "torch" in BLOCKED
    assert not BLOCKED & {*alone[2]["modules"]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_golden_files_decode_to_the_tensors_they_always_decoded_to(alone, path):
    found = alone[2][str(path)]
    stem = path.parent.name if path.suffix == ".json" else path.name.removesuffix(".pq.safetensors")
    assert found["tensors"] == json.loads((GOLDEN / f"{stem}.json").read_text(encoding="utf-8"))
    assert found["findings"] == []


def test_every_codec_and_dtype_decodes_to_what_torch_is_given(alone):
    folder, made, told = alone
    for number, path in enumerate(made):
        found = told[path]
        assert [found[key][0] for key in ("decode", "half", "verify", "inspect")] == [0, 0, 0, 0], found
        dense = pqcli.load(path)
        assert found["tensors"] == digests(dense)
        file = folder / "out" / (f"{number}/model.safetensors" if Path(path).is_dir() else f"{number}.safetensors")
        assert {key: bits(tensor) for key, tensor in load_file(file).items()} == {k: bits(t) for k, t in dense.items()}
    assert (folder / "out" / "0" / "config.json").read_text() == "{}"


def test_converting_rounds_as_torch_does(alone):
    folder, made, _ = alone
    for number, path in enumerate(made):
        found = load_file(folder / "out" / f"{number}.half.safetensors")
        for name, tensor in pqcli.load(path).items():
            expected = tensor.half() if tensor.is_floating_point() else tensor
            assert bits(found[name]) == bits(expected), name


def test_a_tensor_is_asked_for_as_an_array_or_as_one_of_torch():
    with pqcli.open(GOLDEN / "plain-v1.pq.safetensors") as container:
        for info in container.infos:
            assert bits(as_tensor(container.numpy(info.name))) == bits(container.decode(info.name))


def test_what_needs_torch_says_in_one_line_what_to_install(alone):
    for key in ("pt", "compress"):
        code, message = alone[2][key]
        assert (code, " ".join(message.split())) == (1, TO_INSTALL)


@pytest.mark.exhaustive
def test_the_decoder_alone_decodes_where_only_its_own_dependencies_are_installed(tmp_path):
    """A minute: a wheel is built, and what it depends on fetched."""
    installed(REPOSITORY / ".decoder", (), "--no-deps", "--wheel-dir", tmp_path)
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (wheel,) = tmp_path.glob("pqcli_decoder-*.whl")
    installed(wheel, ("--python", python))
    there = {path.name for path in (tmp_path / "venv" / "lib").glob("*/site-packages/*")}
    assert "numpy" in there
    assert not BLOCKED & there
    command = tmp_path / "venv" / "bin" / "pqcli"
    for file in FILES:
        subprocess.run([command, "verify", file], cwd=tmp_path, check=True)
    file = GOLDEN / "plain-v1.pq.safetensors"
    subprocess.run([command, "decode", file, "-o", "model.safetensors"], cwd=tmp_path, check=True)
    expected = json.loads((GOLDEN / "plain-v1.json").read_text(encoding="utf-8"))
    assert digests(load_file(tmp_path / "model.safetensors")) == expected
    for arguments in (["decode", file, "-o", "model.pt"], ["compress", "model.safetensors"]):
        done = subprocess.run([command, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert (done.returncode, " ".join(done.stderr.split())) == (1, TO_INSTALL)
