"""Peak memory is about the largest tensor, not the model: reading and writing, every format."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

MIB = 1 << 20
N_TENSORS, TENSOR_MIB = 8, 40

MAKE = f"""
import sys, torch
from safetensors.torch import save_file
path, kind = sys.argv[1:]
value = {{f"layer{{i}}": torch.full(({TENSOR_MIB * MIB // 4},), float(i)) for i in range({N_TENSORS})}}
if kind == "safetensors":
    save_file(value, path)
else:
    torch.save({{"state_dict": value}}, path, _use_new_zipfile_serialization=kind == "zip")
"""

COPY = """
import resource, sys
from pathlib import Path
from pqcli import checkpoint
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source, target, format_ = sys.argv[1:]
import torch
torch.ones(1000).sum()
before = rss()
with checkpoint.open(source) as opened:
    checkpoint.write(Path(target), opened.tensors, opened.read, opened.skeleton, format=format_)
print((rss() - before) // 1024)
"""


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_copying_320_mib_holds_one_tensor_of_40(tmp_path, kind):
    run(MAKE, tmp_path / "a", kind)
    for format_ in ("pt", "safetensors"):
        grown_mib = int(run(COPY, tmp_path / "a", tmp_path / "b", format_).stdout)
        assert grown_mib < TENSOR_MIB + 40, f"{kind} to {format_}: grew by {grown_mib} MiB"
        (tmp_path / "b").unlink()
