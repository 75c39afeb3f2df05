import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pqcli.core.entropy import ans


def levels(rng, n_classes, n_symbols, spread=200):
    return rng.integers(-spread, 1, (n_classes, n_symbols))


def drawn(rng, tables, n):
    """Symbols and classes as the tables predict them."""
    n_classes = len(tables.frequencies)
    classes = rng.integers(n_classes, size=n).astype(np.uint8)
    slots = rng.integers(ans.TOTAL, size=n)
    return tables.lookup[classes, slots], classes


@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 60)), elements=st.integers(-(2**40), 2**40)),
    st.data(),
)
def test_frequencies_sum_to_the_total_and_never_lose_the_essential_symbol(table, data):
    essential = data.draw(st.integers(0, table.shape[1] - 1))
    frequencies = ans.frequencies(table, essential)
    assert (frequencies.sum(1) == ans.TOTAL).all()
    assert (frequencies >= 0).all()
    assert (frequencies[:, essential] > 0).all()


def test_the_largest_alphabet_gets_frequencies_too():
    assert ans.frequencies(np.zeros((1, ans.MAX_SYMBOLS), int)).sum() == ans.TOTAL


def test_an_octave_of_level_is_a_factor_of_two():
    frequencies = ans.frequencies(np.array([[0, -ans.OCTAVE, -2 * ans.OCTAVE, -2 * ans.OCTAVE]]))
    assert frequencies.tolist() == [[ans.TOTAL // 2, ans.TOTAL // 4, ans.TOTAL // 8, ans.TOTAL // 8]]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 300), st.integers(0, 3000))
def test_symbols_come_back_for_any_table(seed, n_classes, n_symbols, n):
    rng = np.random.default_rng(seed)
    tables = ans.Tables(ans.frequencies(levels(rng, n_classes, n_symbols)))
    symbols, classes = drawn(rng, tables, n)
    data = ans.encode(symbols, classes, tables)
    assert np.array_equal(ans.decode(data, classes, tables), symbols)


def test_the_coded_size_is_within_one_percent_of_the_ideal_entropy():
    rng = np.random.default_rng(0)
    tables = ans.Tables(ans.frequencies(levels(rng, 4, 200, spread=100)))
    symbols, classes = drawn(rng, tables, 50_000)
    ideal = tables.bits[classes, symbols].sum() / 8
    assert ideal <= len(ans.encode(symbols, classes, tables)) <= 1.01 * ideal


def test_a_certain_symbol_costs_nothing():
    tables = ans.Tables(np.array([[0, ans.TOTAL]], np.int32))
    symbols, classes = np.ones(100_000, np.uint16), np.zeros(100_000, np.uint8)
    assert len(ans.encode(symbols, classes, tables)) == ans.STATE_BYTES


def test_a_symbol_that_its_table_lacks_is_refused():
    tables = ans.Tables(np.array([[0, ans.TOTAL]], np.int32))
    with pytest.raises(ValueError, match="absent from its table"):
        ans.encode(np.zeros(1, np.uint16), np.zeros(1, np.uint8), tables)


def test_frequencies_that_do_not_sum_to_the_total_are_refused():
    with pytest.raises(ValueError, match="must sum to 32768"):
        ans.Tables(np.array([[1, 2]], np.int32))


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 2000))
def test_random_bytes_end_in_an_error_or_in_symbols(data, n):
    rng = np.random.default_rng(n)
    tables = ans.Tables(ans.frequencies(levels(rng, 3, 20)))
    classes = rng.integers(3, size=n).astype(np.uint8)
    try:
        symbols = ans.decode(data, classes, tables)
    except ValueError:
        return
    assert (tables.frequencies[classes, symbols] > 0).all()


@pytest.mark.parametrize("damage", ["cut", "grown", "flipped"])
def test_damage_is_noticed(damage):
    rng = np.random.default_rng(1)
    tables = ans.Tables(ans.frequencies(levels(rng, 2, 50)))
    symbols, classes = drawn(rng, tables, 1000)
    data = ans.encode(symbols, classes, tables)
    damaged = {"cut": data[:-4], "grown": data + bytes(4), "flipped": data[:40] + bytes([data[40] ^ 1]) + data[41:]}
    with pytest.raises(ValueError, match="damaged"):
        ans.decode(damaged[damage], classes, tables)
