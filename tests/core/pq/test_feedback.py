"""Plain PQ under the moments of a layer's inputs: better outputs, and what each of its steps promises."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pqcli.core.feeding import Inputs
from pqcli.core.pq import em, pq
from pqcli.core.pq.feedback import Layer, suits

SHAPES = [((40, 36), 4, 1), ((40, 30), 4, 1), ((30, 40), 4, 0)]
"""(matrix, block size, axis of the inputs): blocks that divide, a short last block, weights stored transposed."""


def drawn(shape, axis, seed=0):
    """A matrix, and moments of inputs of which a few directions hold most of the energy."""
    rng = np.random.default_rng(seed)
    n = shape[axis]
    mixing = rng.standard_normal((n, n)) * np.exp(-np.arange(n) / 6)
    moments = mixing @ mixing.T + 0.05 * np.eye(n)
    return rng.standard_normal(shape).astype(np.float32), Inputs(moments.astype(np.float32), 0.0, axis)


def damage(matrix, decoded, inputs):
    errors = (matrix - decoded).astype(np.float64)
    across = errors if inputs.axis == 1 else errors.T
    return float(np.einsum("ij,ij->", across @ inputs.believed(), across))


def decoded(matrix, block_size, layer, found):
    tensor = pq.PQTensor(
        matrix.shape, torch.float32, matrix.shape, torch.from_numpy(found.codebook),
        torch.from_numpy(layer.in_order(found)),
    )  # fmt: skip
    return pq.decode(tensor).numpy()


def started(matrix, block_size, inputs, k=16):
    layer = Layer.of(matrix, block_size, inputs)
    codebook = np.random.default_rng(1).standard_normal((k, block_size)).astype(np.float32)
    return layer, layer.fed_forward(codebook)


@pytest.mark.parametrize(("shape", "block_size", "axis"), SHAPES)
def test_outputs_err_less_than_with_the_nearest_centroids(shape, block_size, axis):
    matrix, inputs = drawn(shape, axis)
    options = em.Options(n_centroids=16, seed=1)
    errors = []
    for given in (None, inputs):
        encoded = pq.encode(torch.from_numpy(matrix), shape, block_size, options, torch.float32, inputs=given)
        assert torch.equal(pq.decode(encoded.tensor), encoded.decoded)
        errors.append(damage(matrix, encoded.decoded.numpy(), inputs))
    assert errors[1] < 0.6 * errors[0], errors


@pytest.mark.parametrize(("shape", "block_size", "axis"), SHAPES)
def test_no_round_raises_the_damage_and_the_damage_is_that_of_what_is_decoded(shape, block_size, axis):
    matrix, inputs = drawn(shape, axis)
    layer, found = started(matrix, block_size, inputs)
    lost = damage(matrix, np.zeros_like(matrix), inputs)
    before = layer.damage(found)
    for _ in range(3):
        for step in (layer.fitted, layer.descended):
            found = step(found)
            assert layer.damage(found) <= before * (1 + 1e-5)
            before = layer.damage(found)
            own = damage(matrix, decoded(matrix, block_size, layer, found), inputs) / lost
            assert own == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize(("shape", "block_size", "axis"), SHAPES)
def test_in_the_end_no_other_centroid_for_a_block_would_do_better(shape, block_size, axis):
    matrix, inputs = drawn(shape, axis)
    layer, found = started(matrix, block_size, inputs, k=6)
    for _ in range(20):
        found = layer.descended(found)
    best = layer.damage(found)
    rng = np.random.default_rng(3)
    for _ in range(60):
        other = found.assignments.copy()
        place = tuple(int(rng.integers(n)) for n in other.shape)
        other[place] = rng.integers(len(found.codebook))
        assert layer.damage(replace(found, assignments=other)) >= best * (1 - 1e-6)


def test_the_codebook_is_that_of_least_squares(monkeypatch):
    monkeypatch.setattr("pqcli.core.pq.feedback.SOLVER_STEPS", 200)
    matrix, inputs = drawn((40, 12), 1)
    layer, found = started(matrix, 4, inputs, k=5)
    codebook = layer.fitted(found).codebook
    root = np.linalg.cholesky(layer.moments.astype(np.float64))
    unknowns = [
        (root.T @ layer._decoded(unit.reshape(5, 4).astype(np.float32), found.assignments)).ravel()
        for unit in np.eye(20)
    ]
    exact = np.linalg.lstsq(np.stack(unknowns, 1), (root.T @ layer.weights).ravel(), rcond=None)[0]
    assert codebook.ravel() == pytest.approx(exact, abs=2e-3)


def test_inputs_that_do_not_vary_together_ask_for_the_nearest_centroids():
    matrix, _ = drawn((30, 24), 1)
    inputs = Inputs(np.eye(24, dtype=np.float32), 0.0)
    layer, found = started(matrix, 4, inputs)
    vectors = torch.from_numpy(matrix.reshape(-1, 4))
    nearest = torch.cdist(vectors, torch.from_numpy(found.codebook)).argmin(1)
    assert np.array_equal(layer.in_order(found), nearest.numpy())


def test_a_codebook_is_fitted_to_some_outputs_of_a_large_layer(monkeypatch):
    monkeypatch.setattr("pqcli.core.pq.feedback.FITTED_VECTORS", 6)
    matrix, inputs = drawn((40, 36), 1)
    layer, found = started(matrix, 4, inputs)
    assert layer.damage(layer.refined(found.codebook)) < layer.damage(found)


def test_short_blocks_along_the_outputs_are_left_to_em():
    matrix, inputs = drawn((30, 42), 0)
    assert not suits(inputs, matrix.shape, 4)
    encoded = pq.encode(torch.from_numpy(matrix), matrix.shape, 4, em.Options(n_centroids=16), inputs=inputs)
    assert encoded.error.relative_mse < 1
    with pytest.raises(ValueError, match="blocks of 4 do not divide 42 outputs"):
        Layer.of(matrix, 4, inputs)


def test_in_doubt_inputs_of_which_nothing_was_seen_still_count_and_loud_ones_stay_loud():
    diagonal = np.array([1.0] * 6 + [0.0, 1000.0], np.float32)
    mean_squares = Inputs(np.diag(diagonal), 0.0, doubt=0.3).mean_squares
    assert mean_squares[6] > 0.05 * mean_squares[0]
    assert mean_squares[7] > 500 * mean_squares[0]
