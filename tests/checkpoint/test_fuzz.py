"""The fuzz targets stay alive: a little of each with every run of the tests (`fuzz.py` does it by the million)."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.checkpoint.fuzz import fuzz


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["pickle", "module", "zip", "legacy", "safetensors", "index", "dcp", "tree"])
def test_random_edits_raise_nothing_but_our_errors(name):
    tried, n_refused, failures = fuzz(name, n_inputs=150, seconds=20, seed=1)
    assert not failures
    assert 0 < n_refused <= tried


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["zip", "legacy", "safetensors", "index", "dcp"])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(2, 2**32))
def test_any_edits_of_valid_files_raise_nothing_but_our_errors(name, seed):
    _, _, failures = fuzz(name, n_inputs=100, seconds=30, seed=seed)
    assert not failures
