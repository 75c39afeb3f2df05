"""Steps by row and errors fed forward: what they promise of errors, bytes and damaged files."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pqcli.core.trellis.feedback import Feedback, RowSteps, triangle
from pqcli.core.trellis.params import TrellisParams
from pqcli.core.trellis.rotation import Rotations
from pqcli.core.trellis.sources import Source
from pqcli.core.trellis.trellis import EncodedStreams, decode, encode


def moments(n, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((8 * n, n)) @ (rng.standard_normal((n, n)) * np.exp2(rng.normal(size=n)))
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def feedback(h, shrinkage=0.01):
    order = np.argsort(-np.diag(h), kind="stable")
    _, d = triangle(h, order, shrinkage)
    steps = np.empty(len(d))
    steps[order] = d**-0.5
    return Feedback(steps / np.exp(np.log(steps).mean()), 0, order, h, shrinkage)


def source(key, rows, columns):
    return Source(key, (rows, columns), rows, columns)


def damage(weights, decoded, h):
    error = (weights - decoded).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", error, h.astype(np.float64), error))


def encoded(weights, second_order, step=0.5, n_threads=2, **options):
    sources = [source(key, *matrix.shape) for key, matrix in weights.items()]
    params = TrellisParams(step, n_states=32, mixing_gain=1.0, **options)
    return sources, encode(
        sources, weights.__getitem__, params, Rotations(), None, n_threads, second_order=second_order
    )


def gaussian(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize("n", [1, 3, 40])
def test_the_triangle_and_the_pivots_give_back_the_shrunk_moments(n):
    h, order = moments(n), np.random.default_rng(1).permutation(n)
    factor, d = triangle(h, order, 0.1)
    upper = np.triu(factor.astype(np.float64), 1) + np.eye(n)
    believed = h * (0.9 + 0.1 * np.eye(n))
    np.testing.assert_allclose((upper * d) @ upper.T, believed[np.ix_(order, order)], rtol=1e-4, atol=1e-4 * h.max())


def test_moments_that_rounding_made_indefinite_are_shrunk_until_they_are_not():
    half = np.ones((20, 20), np.float32) + 0.02 * np.triu(gaussian(20, 20), 1)
    h = (half + half.T) / 2
    assert np.linalg.eigvalsh(h)[0] < 0
    factor, d = triangle(h, np.arange(20), 0.0)
    assert np.isfinite(factor).all()
    assert (d > 0).all()


def test_inputs_that_are_always_zero_do_no_harm():
    h = moments(6)
    h[2], h[:, 2] = 0, 0
    factor, d = triangle(h, np.arange(6), 0.05)
    assert np.isfinite(factor).all()
    assert (d > 0).all()


def test_feedback_leaves_less_damage_than_none_at_the_same_size():
    h, weights = moments(96), {"w": gaussian(300, 96)}
    sources, plain = encoded(weights, None)
    fed_step = 0.5
    for _ in range(6):  # to the same size
        _, fed = encoded(weights, {"w": feedback(h)}, fed_step)
        fed_step *= 2.0 ** (8 * (fed.n_bytes - plain.n_bytes) / weights["w"].size)
    assert abs(fed.n_bytes / plain.n_bytes - 1) < 0.01
    losses = [damage(weights["w"], dict(decode(found, sources))["w"], h) for found in (plain, fed)]
    assert losses[1] < 0.6 * losses[0]


def test_what_is_decoded_is_what_the_encoder_fed_forward():
    """The error that the encoder reports is that of what a reader has."""
    weights = {"a": gaussian(50, 70), "b": gaussian(80, 30, 1), "c": gaussian(20, 33, 2)}
    second_order = {"a": feedback(moments(70)), "b": RowSteps(np.exp2(np.random.default_rng(3).normal(size=80)), 1)}
    sources, found = encoded(weights, second_order)
    assert found.has_rows
    for key, decoded in decode(found, sources):
        error = float(np.sum(np.square(weights[key] - decoded, dtype=np.float64)))
        assert found.squared_errors[key] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("step", [1.0, 1.4])
def test_what_is_fed_forward_decodes_where_kernel_positions_lie_along_a_row(step):
    """As in a transposed convolution, at steps of which some rows know no zero in their odd set, and some do."""
    steps = np.exp2(np.random.default_rng(0).normal(size=64))
    weights, given = gaussian(64, 72), replace(feedback(moments(64)), steps=steps, is_transposed=False)
    sources = [replace(source("w", 64, 72), kernel=3)]
    params = TrellisParams(step, n_states=16, mixing_gain=-1.0)
    found = encode(sources, {"w": weights}.__getitem__, params, Rotations(), None, second_order={"w": given})
    error = np.square(weights - dict(decode(found, sources))["w"], dtype=np.float64).sum()
    assert found.squared_errors["w"] == pytest.approx(float(error), rel=1e-3)


def test_rows_with_steps_of_their_own_have_errors_in_proportion():
    weights, steps = {"w": 4 * gaussian(64, 256)}, np.repeat([1.0, 0.25], 32)
    sources, found = encoded(weights, {"w": RowSteps(steps, 0)})
    error = np.square(weights["w"] - dict(decode(found, sources))["w"]).mean(axis=1)
    assert error[:32].mean() / error[32:].mean() == pytest.approx(16, rel=0.2)


def crossed(n, n_columns, seed=0):
    steps = np.exp2(np.random.default_rng(seed).normal(size=n_columns))
    return replace(feedback(moments(n)), column_steps=steps)


def test_columns_with_steps_of_their_own_have_errors_in_proportion_and_cost_no_other_column():
    weights = {"w": 4 * gaussian(128, 96)}
    steps = np.repeat([1.0, 0.25], 64)
    sources, found = encoded(weights, {"w": replace(feedback(moments(96)), column_steps=steps)})
    decoded = dict(decode(found, sources))["w"]
    error = np.square(weights["w"] - decoded)
    assert error[:64].mean() / error[64:].mean() == pytest.approx(16, rel=0.25)
    assert found.squared_errors["w"] == pytest.approx(float(error.sum()), rel=1e-3)
    alone = {"w": weights["w"][:64]}
    sources, same = encoded(alone, {"w": replace(feedback(moments(96)), column_steps=steps[:64])})
    ours = np.square(alone["w"] - dict(decode(same, sources))["w"]).mean()
    assert ours == pytest.approx(error[:64].mean(), rel=0.25)


@pytest.mark.parametrize("stream_weights", [1 << 8, 1 << 11, 1 << 20])
def test_bytes_depend_on_no_number_of_threads_and_streams_decode_alone(stream_weights):
    weights = {"a": gaussian(64, 48), "plain": gaussian(10, 12), "b": gaussian(40, 24, 1)}
    second_order = {"a": crossed(48, 64), "b": feedback(moments(24))}
    sources, one = encoded(weights, second_order, n_threads=1, stream_weights=stream_weights)
    _, four = encoded(weights, second_order, n_threads=4, stream_weights=stream_weights)
    assert one == four
    whole = dict(decode(one, sources))
    for key in weights:
        np.testing.assert_array_equal(dict(decode(one, sources, [key]))[key], whole[key])


def test_streams_of_one_tensor_carry_errors_from_one_to_the_next():
    """Cutting a tensor into streams must not cost what feedback gains."""
    h, weights = moments(64), {"w": gaussian(256, 64)}
    sources, whole = encoded(weights, {"w": feedback(h)}, step=0.3)
    _, cut = encoded(weights, {"w": feedback(h)}, step=0.3, stream_weights=1 << 12)
    assert len(cut.streams) > 3
    losses = [damage(weights["w"], dict(decode(found, sources))["w"], h) for found in (whole, cut)]
    assert losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.slow
def test_a_wide_layer_is_encoded_in_memory_for_a_few_matrices():
    """Of moments of n inputs about three times n^2 float32 beside them, and of the weights some copies."""
    script = Path(__file__).parents[2] / "benchmarks" / "wide_layer.py"
    found = subprocess.run(
        [sys.executable, script, "--outputs", "1024", "--inputs", "2816"], capture_output=True, text=True, check=True
    )
    about = json.loads(found.stdout)
    assert about["peak_bytes"] - about["before_bytes"] < 4 * 2816**2 * 4 + 8 * 1024 * 2816 * 4


def test_damaged_bytes_are_refused_or_decode_to_finite_weights():
    weights = {"a": gaussian(16, 24), "b": gaussian(24, 8, 1)}
    sources, found = encoded(weights, {"a": crossed(24, 16), "b": RowSteps(np.ones(24), 0)})
    rng = np.random.default_rng(0)
    for _ in range(150):
        side, stream = bytearray(found.side), bytearray(found.streams[0])
        broken = side if rng.random() < 0.4 else stream
        broken[int(rng.integers(len(broken)))] ^= 1 << int(rng.integers(8))
        try:
            decoded = dict(decode(EncodedStreams(bytes(side), (bytes(stream),)), sources))
        except ValueError:
            continue
        assert all(np.isfinite(matrix).all() for matrix in decoded.values())
