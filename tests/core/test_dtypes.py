"""Conversions give the bits that torch gives, and arrays and tensors are one memory."""

import numpy as np
import pytest
import torch

from pqcli.core.arrays import as_array, as_tensor
from pqcli.core.dtypes import converted, dtype_of, name_of, saturated
from pqcli.core.pq import pq
from pqcli.tensors.info import ITEM_BYTES

FLOATS = ("float64", "float32", "float16", "bfloat16")
FLOATS8 = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu")


def singles():
    """Every upper half of a float32, with lower halves on, and next to, what ties are for 16 bits."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0x0FFF, 0x1000, 0x1001], np.uint32)
    return (upper[:, None] | lower).reshape(-1)


def words_of(dtype):
    """All values of a small dtype; of a large one, those near what narrower ones have between two of their own."""
    size = ITEM_BYTES[dtype]
    if size < 4:
        return np.arange(1 << 8 * size, dtype=f"u{size}")
    if size == 4:
        return singles()
    with np.errstate(invalid="ignore"):
        exact = singles().view(np.float32).astype(np.float64).view(np.uint64)
    return np.concatenate([exact, exact + np.uint64(1), exact - np.uint64(1)])


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS + FLOATS8)
def test_conversions_give_the_bits_that_torch_gives(dtype, to):
    values = words_of(dtype).view(dtype_of(dtype))
    values = values[: values.size // 64 * 64]  # what torch does one by one, at the end, can give it another NaN
    found = converted(values, to)
    assert name_of(found.dtype) == to
    expected = as_array(as_tensor(values).to(getattr(torch, to)))
    assert np.array_equal(found.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_saturation_gives_the_bits_that_torch_gives(dtype, to):
    values = words_of(dtype).view(dtype_of(dtype))
    values = values[: values.size // 64 * 64]
    expected = as_array(pq.saturated(as_tensor(values), getattr(torch, to)))
    assert np.array_equal(saturated(values, to).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)])
def test_an_array_and_its_tensor_are_one_memory(dtype, shape):
    n = int(np.prod(shape)) * ITEM_BYTES[dtype]
    data = np.arange(n, dtype=np.uint8) % 2  # what a bool may be
    array = data.view(dtype_of(dtype)).reshape(shape)
    tensor = as_tensor(array)
    assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{dtype}", shape)
    back = as_array(tensor)
    assert (back.dtype, back.shape, name_of(back.dtype)) == (array.dtype, shape, dtype)
    assert np.array_equal(back.reshape(-1).view(np.uint8), data)
    assert not n or np.shares_memory(back, data)


def test_a_tensor_of_what_must_not_be_written_to_is_a_copy():
    array = np.frombuffer(bytes(8), np.float32)
    as_tensor(array).fill_(1)
    assert not array.any()


def test_views_come_as_their_elements():
    matrix = torch.arange(6.0).reshape(2, 3)
    assert as_array(matrix.t()).tolist() == matrix.t().tolist()
    numbers = torch.tensor([1 + 2j, 3 - 4j])
    assert as_array(numbers.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert as_array(numbers.conj().imag).tolist() == [-2, 4]
