import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pqcli.core.pq import packing


def obvious_pack(values: list[int], bits: int) -> bytes:
    whole = sum(value << (i * bits) for i, value in enumerate(values))
    return whole.to_bytes(packing.packed_bytes(len(values), bits), "little")


@given(st.data(), st.integers(0, 16), st.integers(0, 50))
def test_packing_is_one_long_little_endian_integer_and_unpacks_to_the_same_assignments(data, bits, n):
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n))
    packed = packing.pack(np.array(values, np.int32), bits)
    assert packed.tobytes() == obvious_pack(values, bits)
    assert packing.unpack(packed, n, bits).tolist() == values


@pytest.mark.parametrize(("k", "bits"), [(1, 0), (2, 1), (3, 2), (256, 8), (257, 9), (65536, 16)])
def test_bits_per_assignment_is_the_rounded_up_logarithm(k, bits):
    assert packing.n_bits(k) == bits


def test_an_assignment_that_does_not_fit_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="from 0 to 4 do not fit 2 bits"):
        packing.pack(np.array([0, 4]), 2)


def test_data_of_the_wrong_length_is_refused_with_the_numbers():
    with pytest.raises(ValueError, match="3 bytes where 10 assignments of 3 bits take 4"):
        packing.unpack(np.zeros(3, np.uint8), 10, 3)
