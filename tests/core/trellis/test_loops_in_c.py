"""The loops in C: the same on every instruction level, and of the constants and trellises that Python knows."""

import re
from pathlib import Path

import numpy as np
import pytest

from pqcli.core.entropy import mixing, rangecoder
from pqcli.core.importance import Importance
from pqcli.core.native import library
from pqcli.core.native.memory import empty_in_lines
from pqcli.core.trellis import loops, mixing_loops, params, rotation_loops, row_search, viterbi_loops
from pqcli.core.trellis.params import N_STATES, TrellisParams, next_states
from pqcli.core.trellis.row_search import RowSearch, Searched
from pqcli.core.trellis.sources import Source
from pqcli.core.trellis.trellis import decode, encode, fit_rotations
from tests.core.trellis.test_feedback import feedback, gaussian, moments
from tests.core.trellis.test_viterbi import COSTS, SCALE, Search, walk_cost

SOURCES = Path(library.__file__).parent


def row_searched(weights, n_states):
    n_rows, n_columns = weights.shape
    found = Searched(
        np.full(weights.shape, 99, np.int32), np.empty_like(weights), np.empty(n_rows, np.float32),
        np.empty(n_rows, np.uint8),
    )  # fmt: skip
    nothing = np.zeros((n_rows, n_rows), np.float32)
    RowSearch(COSTS, next_states(n_states), np.full(n_columns, SCALE, np.float32)).fill(
        weights, np.ones(n_rows, np.float32), np.arange(n_rows), slice(0, n_rows), np.zeros_like(weights), nothing,
        np.empty_like(weights), found,
    )  # fmt: skip
    return found


@pytest.mark.parametrize("n_states", N_STATES)
@pytest.mark.parametrize("spread", [0.4, 1.3])
def test_a_row_alone_costs_what_it_costs_among_others(n_states, spread):
    weights = np.random.default_rng(n_states).normal(0, spread, (1, 70)).astype(np.float32)
    found = row_searched(weights, n_states)
    labels = np.full(70, found.row_labels[0], np.uint8)
    levels = np.empty_like(found.levels)
    columns = np.full(70, SCALE, np.float32)
    Search(COSTS, next_states(n_states)).fill(weights, found.row_scale, columns, labels, levels)
    alone, together = (walk_cost(weights[0], labels, row[0], n_states, np.ones(70)) for row in (found.levels, levels))
    rounding = 70 * (2 / viterbi_loops.METRIC_UNIT + 1 / viterbi_loops.RESOLUTION**2)
    assert abs(alone - together) <= rounding + 0.01 * together  # costs are those of class 24 here, not the row's


def test_a_trellis_without_a_walk_is_refused(monkeypatch):
    monkeypatch.setitem(params.POLYNOMIALS, 8, (0o15, 0o2))
    with pytest.raises(ValueError, match=r"no walk for a trellis of 8 states crossed by \(2, 1\)"):
        RowSearch(COSTS, next_states(8), np.full(9, SCALE, np.float32))


def everything():
    """Bytes and weights of a model that takes every loop: rotations, both coders, importance, feedback."""
    rng = np.random.default_rng(0)
    smooth = rng.normal(size=(16, 8, 1)) * np.exp(-np.arange(9) / 3) + 0.1 * rng.normal(size=(16, 8, 9))
    low = rng.normal(size=(70, 3)) @ rng.normal(size=(3, 48)) + 0.2 * rng.normal(size=(70, 48))
    weights = {"conv": smooth.reshape(16, 72), "linear": low, "fed": gaussian(40, 48), "wild": gaussian(6, 100) ** 5}
    weights = {key: np.ascontiguousarray(matrix, np.float32) for key, matrix in weights.items()}
    sources = [
        Source(key, matrix.shape, *matrix.shape, kernel=9 if key == "conv" else 1) for key, matrix in weights.items()
    ]
    rotations = fit_rotations(sources[:2], weights.__getitem__, dict.fromkeys(weights, 0.4))
    second_order = {"fed": feedback(moments(48))}
    importance = {"wild": Importance(np.ones(6, np.float32), np.exp(rng.normal(size=100)).astype(np.float32))}
    results = []
    for n_states, mixing_gain in ((4, 1.0), (64, 0.0)):
        options = TrellisParams(0.4, n_states, mixing_gain=mixing_gain)
        coded = encode(sources, weights.__getitem__, options, rotations, None, 1, importance, second_order)
        decoded = [matrix.tobytes() for _, matrix in decode(coded, sources, None, 1)]
        results.append((coded.side, coded.streams, decoded))
    assert rotations.use
    return results


def every_row_walk():
    weights = gaussian(2, 300)
    found = [row_searched(weights, n_states) for n_states in N_STATES]
    return [(rows.levels.tobytes(), rows.targets.tobytes(), rows.row_scale.tobytes()) for rows in found]


def test_every_instruction_level_gives_the_same_bytes():
    found = []
    for level in library.levels():
        with library.at(level):
            assert library.level() == level
            found.append((everything(), every_row_walk()))
    assert all(other == found[0] for other in found[1:])


def test_constants_in_c_are_those_in_python():
    source = "".join(path.read_text() for path in sorted(SOURCES.glob("*.[ch]")) if is_of_trellis(path))
    source = re.sub(r"/\*.*?\*/", "", source, flags=re.DOTALL)
    said = re.findall(r"\b([A-Z][A-Z_]+) = ([^,}]+)[,}]", source)
    said += re.findall(r"^#define ([A-Z][A-Z_]+) (-?[\d.]+) *$", source, re.MULTILINE)
    values: dict[str, float] = {}
    for name, text in said:
        values[name] = eval(text.replace("/", "//"), {}, values)
    values["LANES"] = values.pop("RUNS")
    compared = 0
    for module in (loops, mixing_loops, rotation_loops, row_search, viterbi_loops, mixing, rangecoder):
        for name, value in values.items():
            known = getattr(module, name, getattr(module, f"_{name}", None))
            if known is not None:
                assert known == value, name
                compared += 1
    assert compared >= 25


def is_of_trellis(path):
    return path.name.startswith(("trellis", "viterbi", "row_", "rotation", "rangecoder", "mixing"))


def test_polynomials_in_c_are_those_in_python():
    blocks = re.findall(
        r"#define N_STATES (\d+)\n#define H0 (\d+)\n#define H1 (\d+)", (SOURCES / "row_search.c").read_text()
    )
    assert {int(n): (int(h0, 8), int(h1, 8)) for n, h0, h1 in blocks} == {n: params.POLYNOMIALS[n] for n in N_STATES}


def test_arrays_in_lines_begin_where_a_cache_line_does():
    for shape in ((3,), (2, 8, 32), (0, 5)):
        array = empty_in_lines(shape, np.uint16)
        assert array.shape == shape
        assert array.flags.c_contiguous
        assert array.size == 0 or array.ctypes.data % 64 == 0
