"""From statistics of inputs to steps and feedback: what the rules promise."""

import numpy as np
import pytest

from pqcli.core.second_order import (
    SHRINKAGES,
    TRUST,
    Moments,
    RowImportance,
    Weights,
    best_shrinkage,
    excess_damage,
    prepare,
)
from pqcli.core.trellis.feedback import Blocks, Feedback, RowSteps


def sampled(n_samples, n=24, seed=0, mixing_seed=0, spread=None):
    mixing = np.random.default_rng(mixing_seed).standard_normal((n, n))
    if spread is not None:
        mixing = np.eye(n) + spread * mixing
    inputs = np.random.default_rng(seed).standard_normal((n_samples, n)) @ mixing
    return (inputs.T @ inputs / n_samples).astype(np.float32)


def test_few_samples_are_believed_less_than_many():
    few, many = ((sampled(n, seed=1, spread=0.2), sampled(n, seed=2, spread=0.2)) for n in (40, 20_000))
    assert best_shrinkage(few) > best_shrinkage(many)
    assert best_shrinkage(many) == min(SHRINKAGES)


def test_halves_that_contradict_each_other_are_believed_least():
    halves = sampled(5000), sampled(5000, seed=1, mixing_seed=1)
    assert best_shrinkage(halves) == max(SHRINKAGES)


def test_the_excess_damage_of_the_truth_is_the_rate_distortion_limit():
    """With both halves right, damage at equal bits is the geometric mean of the moments' energies."""
    h = sampled(5000)
    expected = np.linalg.slogdet(h.astype(np.float64))[1] / len(h)
    assert excess_damage((h, h), [0.0])[0] == pytest.approx(expected, abs=1e-3)
    assert (excess_damage((h, h), [0.05, 0.5]) > expected).all()


def test_steps_fall_with_the_root_of_gradients_and_of_moments_as_far_as_these_are_trusted():
    h = sampled(5000)
    known = {"a": Moments(h, 8.0, 1.0), "b": Moments(4 * h, 8.0, 1.0), "c": Moments(h, 32.0, 4.0)}
    found = prepare({key: Weights(100, 1.0) for key in known}, known)
    assert found.steps["a"] / found.steps["b"] == pytest.approx(2**TRUST, rel=1e-3)
    assert found.steps["a"] / found.steps["c"] == pytest.approx(4**TRUST, rel=1e-3)
    assert np.prod(list(found.steps.values())) == pytest.approx(1), "a level means what it did"


def test_without_gradients_the_typical_step_of_a_layer_is_what_it_is_without_data():
    h = sampled(5000)
    known = {"weak": Moments(h), "strong": Moments(9 * h), "felt": Moments(h, 8.0, 1.0)}
    found = prepare({key: Weights(100, step) for key, step in zip(known, (1.0, 3.0, 2.0), strict=True)}, known)
    assert found.steps == pytest.approx({"weak": 1.0, "strong": 3.0, "felt": 2.0})
    assert np.ptp(found.rows["strong"].steps) > 0.1
    rows = prepare({"e": Weights(40, 0.5)}, {"e": RowImportance.of(np.array([0.0, 1, 100, 1e7]), None)})
    assert (rows.steps["e"], np.ptp(rows.rows["e"].steps) > 0) == (0.5, True)


def test_blocks_along_the_diagonal_ask_for_what_one_matrix_with_zeros_beside_them_does():
    whole, halves = sampled(5000), (slice(0, 10), slice(10, None))
    parts = tuple(np.ascontiguousarray(whole[part, part]) for part in halves)
    filled = np.zeros_like(whole)
    for half, part in zip(halves, parts, strict=True):
        filled[half, half] = part
    known = {"blocks": Moments(Blocks(parts), 8.0, 1.0), "whole": Moments(filled, 8.0, 1.0)}
    found = prepare({key: Weights(100, 1.0) for key in known}, known)
    assert found.steps["blocks"] == pytest.approx(found.steps["whole"])
    assert found.rows["blocks"].steps == pytest.approx(found.rows["whole"].steps, rel=1e-4)
    assert [len(part.order) for part in found.rows["blocks"].feeding()] == [10, len(whole) - 10]


def test_inputs_that_samples_do_not_use_keep_bits_for_other_data():
    h = np.diag(np.array([1.0, 1, 1, 0], np.float32))
    steps = prepare({"w": Weights(100, 1.0)}, {"w": Moments(h, 8.0, 1.0)}).rows["w"].steps
    assert steps[3] / steps[0] == pytest.approx((0.05 * 0.75) ** -0.5, rel=1e-3)


def test_tensors_of_which_nothing_is_known_keep_their_step():
    tensors = {"known": Weights(100, 2.0), "unknown": Weights(50, 0.7)}
    found = prepare(tensors, {"known": Moments(1000 * sampled(100), 100.0, 1.0)})
    assert found.steps["unknown"] == 0.7
    assert found.steps["known"] == pytest.approx(2.0)
    assert set(found.rows) == {"known"}


def test_frequent_rows_get_finer_steps_within_bounds():
    known = {"e": RowImportance.of(np.array([0.0, 1, 100, 1e7]), 1.0)}
    found = prepare({"e": Weights(40, 1.0)}, known).rows["e"]
    assert isinstance(found, RowSteps)
    assert not isinstance(found, Feedback)
    assert (np.diff(found.steps) <= 0).all()
    assert found.steps.max() / found.steps.min() == 16


def test_an_embedding_is_weighed_against_a_layer_by_its_gradient():
    known = {"layer": Moments(sampled(5000), 1.0, 1.0), "e": RowImportance.of(np.full(10, 3.0), 1.0)}
    known_more = {**known, "e": RowImportance.of(np.full(10, 3.0), 100.0)}
    tensors = {"layer": Weights(100, 1.0), "e": Weights(100, 1.0)}
    ratios = [prepare(tensors, about).steps for about in (known, known_more)]
    assert (ratios[0]["e"] / ratios[0]["layer"]) / (ratios[1]["e"] / ratios[1]["layer"]) == pytest.approx(10**TRUST)


def test_rows_of_a_tied_embedding_count_as_outputs_too():
    head = Moments(2 * np.eye(6, dtype=np.float32), n_samples=50.0)
    found = RowImportance.of(np.array([10.0, 0.0]), 3.0, head, np.array([0.0, 0.1]))
    roots = np.sqrt([10.05, 0.05])  # the lookups' part goes by their roots, and adds up to what it was
    drawn = np.array([0, 50 * 0.1]) + 0.01  # nor does a row that was not drawn count for nothing
    np.testing.assert_allclose(found.rows, 3 * 10.1 * roots / roots.sum() + 2 * drawn)


def test_a_tied_embedding_knows_which_of_its_columns_are_felt():
    moments = np.diag([4.0, 1.0, 1.0, 1.0]).astype(np.float32)
    head = Moments(moments, n_samples=100.0, noise=0.1)
    about = RowImportance.of(np.full(5, 1.0), 1e-6, head, np.full(5, 0.2))
    plan = prepare({"e": Weights(20, 1.0)}, {"e": about})
    rows = plan.rows["e"]
    assert isinstance(rows, Feedback)
    assert rows.steps[1] / rows.steps[0] == pytest.approx(2, rel=0.01)
    np.testing.assert_allclose(rows.column_steps, 1)


def test_noise_tells_how_far_to_believe_where_halves_are_missing():
    assert Moments(sampled(100), noise=0.17).shrinkage() == 0.17
    assert Moments(sampled(100), noise=0.001).shrinkage() == 0.05
    assert Moments(sampled(100), noise=0.9).shrinkage() == max(SHRINKAGES)


def test_rows_never_seen_count_as_those_seen_once_suggest():
    few_rare, many_rare = (np.repeat([0.0, 1.0, 50.0], counts) for counts in ([90, 1, 9], [60, 20, 20]))
    ratios = [about.rows[0] / about.rows[-1] for about in (RowImportance.of(x, 1.0) for x in (few_rare, many_rare))]
    assert ratios[1] ** 2 > 5 * ratios[0] ** 2
