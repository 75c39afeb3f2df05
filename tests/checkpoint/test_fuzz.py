"""The fuzz targets stay alive: a little of each with every run of the tests (`fuzz.py` does it by the million)."""

from __future__ import annotations

import pytest

from tests.checkpoint.fuzz import fuzz


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["pickle", "zip", "legacy", "safetensors", "index", "dcp", "tree"])
def test_random_edits_raise_nothing_but_our_errors(name):
    tried, n_refused, failures = fuzz(name, n_inputs=150, seconds=20, seed=1)
    assert not failures
    assert 0 < n_refused <= tried
