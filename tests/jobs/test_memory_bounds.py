"""Memory is bounded by the largest tensor, not by the model: more than 700 MB through less, in and out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pqcli import checkpoint
from pqcli.tensors.info import TensorInfo
from tests.conftest import REPOSITORY

LIMIT_BYTES = 7e8
LARGEST = (2_560, 7_812)  # 80 MB in float32
N_LARGE = 8
DTYPES = {"float32": LARGEST, "bfloat16": (LARGEST[0] * 2, LARGEST[1])}

pytestmark = pytest.mark.slow


MEASURE = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, "-m", "pqcli", *sys.argv[1:]])
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
print(usage.ru_maxrss * 1024)
sys.exit(process.returncode)
"""
"""Runs pqcli below a small process: a child is charged with what its parent held when it was started."""


def peak_bytes(folder: Path, *arguments: object) -> int:
    """The largest resident set of `pqcli ARGUMENTS`, which must succeed."""
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return int(found.stdout.splitlines()[-1])


def write_large(path: Path, dtype: str) -> None:
    """A checkpoint of over 700 MB whose largest tensors have 80 MB; written tensor by tensor."""
    shapes = {f"layer.{i}.weight": DTYPES[dtype] for i in range(N_LARGE)}
    shapes |= {f"small.{i}.weight": (1024, 512) for i in range(60)} | {f"small.{i}.bias": (1024,) for i in range(60)}
    infos = [TensorInfo(name, shape, dtype) for name, shape in shapes.items()]
    pattern = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))

    def read(name: str) -> torch.Tensor:
        rows, columns = shapes[name] if len(shapes[name]) == 2 else (shapes[name][0], 1)
        return pattern.repeat(-(-rows * columns // len(pattern)))[: rows * columns].view(shapes[name])

    format_ = "pt" if path.suffix == ".pt" else "safetensors"
    n_bytes = checkpoint.write(path, infos, read, {}, format=format_)
    assert n_bytes > LIMIT_BYTES


@pytest.mark.parametrize(("name", "dtype"), [("large.pt", "float32"), ("large.safetensors", "bfloat16")])
def test_more_than_700_megabytes_pass_through_less(tmp_path, name, dtype):
    write_large(tmp_path / name, dtype)
    options = ["--n-iter", 1, "--n-centroids", 4, "--quiet"]
    peaks = {"compress": peak_bytes(tmp_path, "compress", name, *options)}
    peaks["decode"] = peak_bytes(tmp_path, "decode", "large.pq.safetensors", "--quiet")
    peaks["verify"] = peak_bytes(tmp_path, "verify", "large.pq.safetensors", "--against", name, "--quiet")
    print({verb: f"{peak / 1e6:.0f} MB" for verb, peak in peaks.items()})
    for path in tmp_path.iterdir():
        path.unlink()
    assert max(peaks.values()) < LIMIT_BYTES, peaks
