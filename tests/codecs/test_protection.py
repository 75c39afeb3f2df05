"""A budget of error protects every tensor and row, or says what it gave up."""

import math

import pytest
import torch

import pqcli
from pqcli.codecs.rate.budget import Goal, Trial, error_bound, search
from pqcli.codecs.rate.protection import Watch
from pqcli.codecs.rate.survey import weak_row
from pqcli.jobs.report import inspect
from pqcli.recipe.recipe import Recipe
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.records import Coded, Record


def gaussian(*shape, rms=0.05, seed=0):
    return rms * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lopsided():
    """A strong row in one tensor, a weak tensor beside strong ones, a mask that holds nearly all the energy."""
    outlier = gaussian(128, 96, seed=1)
    outlier[7] *= 100
    return {
        "fc.weight": gaussian(256, 96, seed=2), "outlier.weight": outlier, "weak.weight": gaussian(96, 96, rms=0.002),
        "visible.weight": torch.ones(256, 256).tril(),
    }  # fmt: skip


def row_errors(weight, decoded):
    return (weight - decoded).double().square().sum(1) / weight.double().square().sum(1)


@pytest.mark.parametrize("codec", ["pq", "trellis"])
@pytest.mark.parametrize("bound", [{"max_relative_mse": 0.02}, {"min_sqnr": 20.0}], ids=str)
def test_no_tensor_and_no_row_is_lost_to_a_budget_that_others_meet(codec, bound, tmp_path):
    state, source, file = lopsided(), tmp_path / "model.pt", tmp_path / "model.pq.safetensors"
    torch.save(state, source)
    recipe = Recipe(codec=codec, **bound)
    asked = error_bound(recipe)
    report = pqcli.compress(source, file, recipe)
    decoded = pqcli.load(file)
    assert torch.equal(decoded["visible.weight"], state["visible.weight"])
    assert report.relative_mse <= asked
    assert report.warnings == ()
    for name in ("fc.weight", "outlier.weight", "weak.weight"):
        errors = row_errors(state[name], decoded[name])
        assert float(errors.median()) <= 4 * asked, name
        assert float(errors.max()) <= 6 * asked, name


def test_what_is_given_up_is_said(tmp_path):
    """With one absolute error for all weights, as asked for, weak tensors are lost; the report and its JSON say so."""
    torch.save(lopsided(), tmp_path / "model.pt")
    report = pqcli.compress(
        tmp_path / "model.pt", recipe=Recipe(codec="trellis", objective=0.0, max_relative_mse=0.02, effort=4)
    )
    (tensors, *_) = report.warnings
    assert tensors.startswith(
        "the relative MSE of 0.02 is met on the whole, but 2 tensors lie above 0.08: 'weak.weight'"
    )
    assert report.to_json()["warnings"] == list(report.warnings)


def test_only_a_budget_of_error_bounds_errors():
    assert error_bound(Recipe(max_relative_mse=0.1)) == 0.1
    assert math.isclose(error_bound(Recipe(min_sqnr=20.0)), 0.01)
    assert error_bound(Recipe(target_bits=2.0)) is None
    assert error_bound(Recipe()) is None


def test_weak_rows_and_lost_tensors_are_told_apart():
    watch = Watch(0.01)
    weight, info = gaussian(100, 64), TensorInfo("fc.weight", (100, 64), "float32")
    record = Record(info, Coded("trellis"))
    assert watch.warnings() == ()
    watch.see(record, weight, weight)
    assert watch.warnings() == ()
    rows = weight.clone()
    rows[[3, 5]] *= 0.5  # a quarter of their energy is lost
    watch.see(record, weight, rows)
    (said,) = watch.warnings()
    assert said.endswith("2 weak rows lie above 0.06: 2 of 100 in 'fc.weight' (up to 0.25)")


def test_rows_of_zeros_are_no_weak_rows():
    weight = gaussian(100, 64)
    weight[:50] = 0
    assert 0.03 < weak_row(weight) < 0.05
    assert weak_row(torch.zeros(4, 4)) == 0


def test_a_search_ends_where_no_level_makes_more_error():
    tried = []

    def attempt(level):
        tried.append(level)
        return Trial(level, min(level, 0.004), level)

    found = search(Goal("relative_mse", 0.02, 0.02), lambda level: min(level, 0.004), attempt, 0.01, 1.0)
    assert found.measured == 0.004
    assert len(tried) <= 3


def test_report_and_inspect_repeat_what_was_given_up_of_whole_tensors(tmp_path):
    torch.save(lopsided(), tmp_path / "model.pt")
    recipe = Recipe(codec="trellis", objective=0.0, max_relative_mse=0.02, effort=4)
    said = pqcli.compress(tmp_path / "model.pt", recipe=recipe).warnings
    file = tmp_path / "model.pq.safetensors"
    assert pqcli.report(file).warnings == said[:1]
    assert pqcli.report(file, tmp_path / "model.pt").warnings == said[:1]
    assert inspect(file)["warnings"] == list(said[:1])
