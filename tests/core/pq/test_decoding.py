"""Looking blocks up in arrays gives what looking them up in tensors gives, and that is what was cut."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pqcli.core.arrays import as_array, as_tensor
from pqcli.core.pq import blocks, decoding


@given(st.integers(0, 40), st.integers(1, 30), st.integers(1, 9), st.integers(1, 300), st.integers(0, 9))
def test_arrays_and_tensors_are_joined_alike(rows, columns, block_size, k, seed):
    rng = np.random.default_rng(seed)
    codebook = rng.standard_normal((k, block_size)).astype(np.float32)
    assignments = rng.integers(0, k, rows * -(-columns // block_size)).astype(np.uint8 if k <= 256 else np.int32)
    found = decoding.join(codebook, assignments, rows, columns)
    assert np.array_equal(found, as_array(blocks.join(as_tensor(codebook), as_tensor(assignments), rows, columns)))


@pytest.mark.parametrize("columns", [48, 50])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_matrices_of_more_than_one_stretch_are_joined(dtype, columns):
    matrix = torch.randn(7000, columns, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    per_row = -(-columns // 8)
    padded = torch.nn.functional.pad(matrix, (0, 8 * per_row - columns)).reshape(-1, 8)
    found = decoding.join(as_array(padded), np.arange(len(padded), dtype=np.int32), *matrix.shape)
    assert np.array_equal(found.view(np.uint8), as_array(matrix).view(np.uint8))
