"""What only the Triton kernel promises; that it is right, test_kernels.py shows in Triton's interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pqcli.core.kernels import cuda

names = "vectors stride n columns n_tiles k weights assignments scores totals scales n_copies".split()
kinds = "*fp32 i32 i32 *fp32 i32 i32 *fp32 *i32 *fp64 *i64 *fp64 i32".split()
constants = {"D": 8, "WEIGHTED": True, "ACCUMULATE": True, "BLOCK_N": 256, "BLOCK_K": 16}
signature = dict(zip(names, kinds)) | dict.fromkeys(constants, "constexpr")
source = ASTSource(cuda._sweep_kernel, signature, constexprs=constants)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
assert compiled.asm["ptx"].count("fma.rn.f32") >= 256
assert "cubin" in compiled.asm
"""


def test_the_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)
