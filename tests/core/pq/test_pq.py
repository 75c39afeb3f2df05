"""PQ of one tensor, and the places where the ancestor breaks."""

import pytest
import torch

import pqcli
from pqcli.core.pq import blocks, em, pq


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_mse(weight, decoded):
    return float((weight.double() - decoded.double()).square().sum() / weight.double().square().sum())


def ancestor_decode(centroids, assignments, shape, block_size):
    """fairseq's layout: column `block * out + o` of the transposed matrix holds block `block` of output `o`."""
    rows, columns = shape[0], int(torch.tensor(shape[1:]).prod())
    n_blocks = columns // block_size
    matrix = torch.empty(rows, columns, dtype=centroids.dtype)
    for block in range(n_blocks):
        for row in range(rows):
            matrix[row, block * block_size : (block + 1) * block_size] = centroids[assignments[block * rows + row]]
    return matrix.view(shape)


@pytest.mark.parametrize("shape", [(16, 24), (6, 4, 3, 3), (10, 8, 1, 1), (12, 1, 3, 3), (5, 4, 6), (4, 2, 2, 2, 2)])
def test_assignments_are_in_fairseqs_block_major_order(shape):
    weight = gaussian(*shape)
    block_size = 3 if shape[-1] == 3 else 4 if len(shape) < 5 else 8
    quantizer = pqcli.PQ(weight, block_size, n_centroids=8).encode()
    expected = ancestor_decode(quantizer.centroids, quantizer.assignments, shape, block_size)
    assert torch.equal(quantizer.decode(), expected)
    assert quantizer.assignments.dtype == torch.int64


def test_block_major_order_translates_both_ways():
    row_major = torch.arange(12)
    assert torch.equal(blocks.from_block_major(blocks.to_block_major(row_major, 3), 3), row_major)


def test_where_the_ancestor_aborts_the_result_is_as_good_as_lloyds():
    """Linear 64x64, block 8, k=256: the ancestor reaches 0.477, plain Lloyd 0.328."""
    weight = gaussian(64, 64)
    quantizer = pqcli.PQ(weight, 8).encode()
    assert relative_mse(weight, quantizer.decode()) ** 0.5 < 0.335


def test_as_many_vectors_as_centroids_is_exact():
    weight = gaussian(32, 64)
    assert torch.equal(pqcli.PQ(weight, 8, n_centroids=256).encode().decode(), weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_dtype_is_clustered_in_float32_and_comes_back(dtype):
    weight = gaussian(256, 64).to(dtype)
    quantizer = pqcli.PQ(weight, 8, n_centroids=64).encode()
    reference = pqcli.PQ(weight.float(), 8, n_centroids=64).encode()
    assert quantizer.decode().dtype == dtype
    assert torch.equal(quantizer.assignments, reference.assignments)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 1e37])
def test_weights_of_any_magnitude_are_quantized_alike(scale):
    weight = gaussian(128, 32).double()
    error = relative_mse(weight, pqcli.PQ(weight, 8, n_centroids=32).encode().decode())
    scaled = (weight * scale).float()
    encoded = pq.encode(scaled, (128, 32), 8, em.Options(n_centroids=32))
    assert encoded.error.relative_mse == pytest.approx(error, rel=0.05)


def test_a_float16_codebook_that_would_overflow_or_vanish_stays_float32():
    for scale, dtype in ((1.0, torch.float16), (1e6, torch.float32), (1e-7, torch.float32)):
        encoded = pq.encode(gaussian(64, 64) * scale, (64, 64), 8, em.Options(n_centroids=16))
        assert encoded.tensor.codebook.dtype == dtype


def test_the_error_is_measured_after_the_codebook_is_rounded():
    weight = gaussian(64, 64)
    encoded = pq.encode(weight, (64, 64), 8, em.Options(n_centroids=16))
    assert encoded.error.relative_mse == pytest.approx(relative_mse(weight, pq.decode(encoded.tensor)), rel=1e-9)


def test_stored_assignments_belong_to_the_stored_centroids():
    weight = gaussian(100, 16)
    tensor = pq.encode(weight, (100, 16), 4, em.Options(n_centroids=16, n_iter=2)).tensor
    distances = torch.cdist(weight.view(-1, 4), tensor.codebook.float())
    chosen = distances.gather(1, tensor.assignments.long()[:, None]).squeeze(1)
    torch.testing.assert_close(chosen, distances.min(1).values)


@pytest.mark.parametrize(("rows", "columns", "block_size"), [(7, 30, 8), (1, 5, 8), (9, 1, 4), (3, 17, 16)])
def test_columns_that_do_not_divide_are_padded_and_come_back_in_shape(rows, columns, block_size):
    weight = gaussian(rows, columns)
    decoded = pqcli.PQ(weight, block_size, n_centroids=512).encode().decode()
    assert torch.equal(decoded, weight)


def test_zero_rows_and_constant_weights_come_back():
    assert pqcli.PQ(torch.zeros(0, 8), 4).encode().decode().shape == (0, 8)
    constant = torch.full((64, 64), -3.0)
    quantizer = pqcli.PQ(constant, 8).encode()
    assert quantizer.n_centroids == 1
    assert torch.equal(quantizer.decode(), constant)


def test_values_near_the_limit_of_float16_do_not_become_infinite():
    weight = torch.full((64, 8), 65504.0, dtype=torch.float16)
    weight[::2] = 65472.0
    assert bool(torch.isfinite(pqcli.PQ(weight, 8, n_centroids=1).encode().decode()).all())


def test_nan_and_vectors_are_refused_with_a_clear_message():
    with pytest.raises(ValueError, match="NaN or infinite"):
        pqcli.PQ(torch.tensor([[float("nan"), 1.0]]), 2).encode()
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        pqcli.PQ(torch.zeros(8), 2)
    with pytest.raises(ValueError, match="call encode"):
        pqcli.PQ(torch.zeros(8, 8), 2).decode()


def test_the_objective_is_the_mean_squared_distance_of_each_iteration():
    weight = gaussian(256, 32)
    quantizer = pqcli.PQ(weight, 8, n_centroids=32).encode()
    assert quantizer.objective == sorted(quantizer.objective, reverse=True)
    final = (weight - quantizer.decode()).square().sum() / len(quantizer.assignments)
    assert float(final) <= quantizer.objective[-1] * 1.0001
