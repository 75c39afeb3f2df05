import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqcli.core.trellis.rotation import Rotation, apply, fit_rotations
from pqcli.core.trellis.sources import Source


def random_rotation(size, k, seed=0, precision=6):
    basis = np.random.default_rng(seed).integers(-(2**precision), 2**precision, (k, size))
    return Rotation(basis.astype(np.int32), (precision,) * k)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_a_rotation_keeps_lengths_and_is_undone(size, k, seed):
    rotation = random_rotation(size, min(k, size), seed)
    weights = np.random.default_rng(seed).standard_normal((70, 3 * size)).astype(np.float32)
    rotated = weights.copy()
    apply(rotated, rotation, inverse=False)
    np.testing.assert_allclose(np.linalg.norm(rotated), np.linalg.norm(weights), rtol=1e-5)
    apply(rotated, rotation, inverse=True)
    np.testing.assert_allclose(rotated, weights, atol=2e-5)


def test_the_first_coordinates_are_those_along_the_basis():
    rotation = random_rotation(12, 3)
    basis = np.linalg.qr(rotation.basis.T.astype(float))[0]
    weights = np.random.default_rng(1).standard_normal((5, 12)).astype(np.float32)
    expected = np.abs(weights @ basis)
    apply(weights, rotation, inverse=False)
    np.testing.assert_allclose(np.abs(weights[:, :3]), expected, atol=1e-5)


def test_reflections_are_those_of_plain_float_arithmetic():
    """A slow Householder, each operation in IEEE order, gives the same floats: what another implementation must do."""
    rotation = random_rotation(7, 4, seed=3)
    rest = [[float(v) * 2.0**-p for v in row] for row, p in zip(rotation.basis, rotation.precisions, strict=True)]
    normals, coefficients = rotation.reflections()
    for i in range(4):
        norm2 = 0.0
        for j in range(i, 7):
            norm2 += rest[i][j] * rest[i][j]
        rest[i][i] += float(np.sqrt(norm2)) * (-1.0 if rest[i][i] < 0 else 1.0)
        largest = abs(rest[i][i])
        normal = [0.0] * i + [float(np.float32(rest[i][j] / largest)) for j in range(i, 7)]
        length2 = 0.0
        for j in range(i, 7):
            length2 += normal[j] * normal[j]
        assert normals[i].tolist() == normal
        assert coefficients[i] == np.float32(2.0 / length2)
        for later in range(i + 1, 4):
            dot = 0.0
            for j in range(i, 7):
                dot += normal[j] * rest[later][j]
            dot *= 2.0 / length2
            for j in range(i, 7):
                rest[later][j] -= dot * normal[j]


@pytest.mark.parametrize("basis", [np.zeros((2, 5)), np.ones((3, 5)), np.eye(5)[:4]])
def test_a_degenerate_basis_still_gives_a_rotation(basis):
    rotation = Rotation(basis.astype(np.int32), (0,) * len(basis))
    weights = np.random.default_rng(0).standard_normal((9, 5)).astype(np.float32)
    rotated = weights.copy()
    apply(rotated, rotation, inverse=False)
    apply(rotated, rotation, inverse=True)
    np.testing.assert_allclose(rotated, weights, atol=1e-4)


def test_a_rotation_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a rotation of 4 does not fit 6 columns"):
        apply(np.zeros((2, 6), np.float32), random_rotation(4, 2), inverse=False)


def test_smooth_kernels_share_one_pooled_rotation_and_noise_gets_none():
    rng = np.random.default_rng(0)
    smooth = rng.standard_normal((64, 32, 1)) + 0.3 * rng.standard_normal((64, 32, 9))
    weights = {"a": smooth.reshape(64, 288), "b": 2 * smooth[:32].reshape(32, 288), "c": rng.standard_normal((64, 288))}
    weights = {key: value.astype(np.float32) for key, value in weights.items()}
    sources = [Source(key, (len(w), 32, 3, 3), len(w), 288, 9) for key, w in weights.items()]
    fitted = fit_rotations(sources[:2], weights.__getitem__, {"a": 0.5, "b": 0.5})
    assert fitted.use == {"a": 0, "b": 0}
    assert fit_rotations(sources[2:], weights.__getitem__, {"c": 0.5}).items == ()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_low_rank_matrix_gets_its_leading_directions(transposed):
    rng = np.random.default_rng(0)
    matrix = (
        5 * rng.standard_normal((1500, 2)) @ rng.standard_normal((2, 48)) + rng.standard_normal((1500, 48))
    ).astype(np.float32)
    matrix = np.ascontiguousarray(matrix.T) if transposed else matrix
    source = Source("w", matrix.shape, *matrix.shape)
    fitted = fit_rotations([source], lambda _: matrix, {"w": 0.5})
    assert len(fitted.items) == 1
    assert len(fitted.items[0].basis) >= 2
    assert fitted.items[0].size == 48
    assert fitted.transposed == (frozenset({"w"}) if transposed else frozenset())


@pytest.mark.parametrize("value", [0.0, 1e-40, 1e38, 1.0])
def test_extreme_weights_are_fitted_without_complaint(value):
    sources = [Source("w", (32, 32), 32, 32), Source("c", (8, 8, 3, 3), 8, 72, 9)]
    weights = {"w": np.full((32, 32), value, np.float32), "c": np.full((8, 72), value, np.float32)}
    with np.errstate(all="raise", under="ignore"):
        fit_rotations(sources, weights.__getitem__, {"w": max(value, 1e-30), "c": max(value, 1e-30)})
