"""The wheel: built as for the index, installed into a fresh environment, and used there."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import pqcli
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.integrations


def run(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The one wheel of this machine's platform; the compiler comes from the index."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, REPOSITORY]
    done = subprocess.run([*map(str, build)], capture_output=True, text=True, check=False)
    if "No matching distribution" in done.stderr:
        pytest.skip(f"pip finds no index here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def fresh(wheel, tmp_path_factory):
    """The command in an environment that has the wheel; what it depends on is that of the tests."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder)
    (site,) = folder.glob("lib/*/site-packages")
    run(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--no-deps", wheel)
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin" / "pqcli"


def test_one_wheel_serves_every_python_of_its_platform_and_every_processor(wheel):
    assert re.fullmatch(r"pqcli-[\d.]+-py3-none-(manylinux|musllinux|macosx)_\d+_\d+_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(name.startswith("pqcli/core/native/loops-") for name in names) in (1, 3)
    assert {"pqcli/py.typed", "pqcli/FORMAT.md", "pqcli/report.html.j2"} <= {*names}
    assert any(name.startswith("pqcli/configs/") for name in names)


def test_its_page_on_an_index_is_the_readme_without_links_that_lead_nowhere_there(wheel):
    files = zipfile.ZipFile(wheel)
    (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
    head, _, page = files.read(name).decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    assert head.count("Classifier: ") >= 10
    assert page.startswith("# pqcli\n")
    assert [link for link in re.findall(r"\]\(([^)]+)\)", page) if not link.startswith("http")] == []


def test_it_compresses_and_decodes_where_nothing_of_the_repository_is(fresh, tmp_path):
    state = {"a.weight": torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), "a.bias": torch.ones(9)}
    save_file(state, tmp_path / "model.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    where = {"cwd": tmp_path, "env": environment}
    assert run(fresh, "--version", **where).split() == ["pqcli", pqcli.__version__]
    for codec in ("pq", "trellis"):
        run(fresh, "compress", "model.safetensors", "-o", "x.pq.safetensors", "--codec", codec, "--force", **where)
        run(fresh, "decode", "x.pq.safetensors", "-o", "again.safetensors", "--force", **where)
        again, here = load_file(tmp_path / "again.safetensors"), pqcli.load(tmp_path / "x.pq.safetensors")
        assert all(torch.equal(again[name], here[name]) for name in state), codec
    python = fresh.with_name("python")
    assert str(fresh.parents[1]) in run(python, "-c", "import pqcli; print(pqcli.__file__)", **where)
