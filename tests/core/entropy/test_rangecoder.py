import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqcli.core.entropy.rangecoder import N_INTEGER_MODELS, RATES, RangeCoder

integers = st.lists(st.one_of(st.integers(-3, 3), st.integers(-(2**31) + 1, 2**31 - 1)), max_size=60)


def coded(values, bits):
    coder = RangeCoder.writer(16 * len(values) + 4 * len(bits), N_INTEGER_MODELS + 1)
    for value in values:
        coder.signed(0, value)
    for bit in bits:
        coder.bit(N_INTEGER_MODELS, bit)
    return coder.finish()


@settings(deadline=None)
@given(integers, st.lists(st.integers(0, 1), max_size=300))
def test_what_is_written_is_read_back(values, bits):
    coder = RangeCoder.reader(coded(values, bits), N_INTEGER_MODELS + 1)
    assert [coder.signed(0) for _ in values] == values
    assert [coder.bit(N_INTEGER_MODELS) for _ in bits] == bits
    coder.finish()


def test_a_carry_runs_through_any_number_of_bytes():
    # decisions against the odds keep `low` near the top of the interval, where carries happen
    rng = np.random.default_rng(0)
    for _ in range(200):
        bits = (rng.random(400) < rng.random()).astype(int).tolist()
        coder = RangeCoder.reader(coded([], bits), N_INTEGER_MODELS + 1)
        assert [coder.bit(N_INTEGER_MODELS) for _ in bits] == bits


def test_a_skewed_source_costs_its_entropy():
    bits = (np.random.default_rng(1).random(20_000) < 0.02).astype(int)
    entropy = -(0.02 * np.log2(0.02) + 0.98 * np.log2(0.98)) * len(bits) / 8
    assert len(coded([], bits.tolist())) < 1.05 * entropy


def test_a_stream_cut_short_is_an_error():
    data = coded(list(range(-40, 40)), [])
    coder = RangeCoder.reader(data[:-8], N_INTEGER_MODELS)
    for _ in range(80):
        coder.signed(0)
    with pytest.raises(ValueError, match=r"stream of \d+ bytes; its symbols take \d+"):
        coder.finish()


def test_bytes_after_the_end_are_an_error():
    coder = RangeCoder.reader(coded([1, 2, 3], []) + b"12345678", N_INTEGER_MODELS)
    for _ in range(3):
        coder.signed(0)
    with pytest.raises(ValueError, match="its symbols take"):
        coder.finish()


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_read_without_harm(data):
    coder = RangeCoder.reader(data, N_INTEGER_MODELS)
    values = [coder.signed(0) for _ in range(100)]
    assert all(abs(value) <= 2**32 for value in values)


def test_the_rates_are_those_of_the_specification():
    assert RATES.tolist() == [655360 // (10 * n + 16) for n in range(501)]
