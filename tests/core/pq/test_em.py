"""EM against a slow, obvious version, and the invariants that its docstring states."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pqcli.core import metrics
from pqcli.core.importance import Importance
from pqcli.core.pq import blocks, em, pq
from pqcli.errors import EmptyClusterResolveError


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def ancestor_em(vectors, codebook, n_iter):
    """The ancestor's EM without its faults, one vector and one cluster at a time."""
    codebook = codebook.clone()
    assignments = []
    for _ in range(n_iter):
        assignments = [int(((codebook - x) ** 2).sum(1).argmin()) for x in vectors]
        for j in range(len(codebook)):
            members = [x for x, a in zip(vectors, assignments, strict=True) if a == j]
            if members:
                codebook[j] = torch.stack(members).mean(0)
    return codebook, [int(((codebook - x) ** 2).sum(1).argmin()) for x in vectors]


def squared_error(cut, codebook):
    matrix = blocks.join(codebook, em.assign(cut, codebook), cut.rows, cut.columns)
    original = torch.cat([cut.body.view(cut.rows, -1), cut.tail], 1)
    return float((matrix - original).double().square().sum())


def test_same_start_gives_the_same_assignments_as_the_ancestors_em():
    cut = blocks.cut(gaussian(40, 32), 8)
    start = cut.body[torch.randperm(160, generator=torch.Generator().manual_seed(3))[:12]]
    for n_iter in (1, 2, 5):
        fitted = em.lloyd(cut, start, em.Options(n_centroids=12, n_iter=n_iter), torch.Generator())
        codebook, assignments = ancestor_em(cut.body, start, n_iter)
        assert em.assign(cut, fitted.codebook).tolist() == assignments
        torch.testing.assert_close(fitted.codebook, codebook)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 9), st.integers(1, 40), st.integers(0, 9), st.booleans())
def test_the_objective_never_rises_and_no_cluster_is_left_empty(rows, columns, block_size, k, seed, sparse):
    matrix = gaussian(rows, columns, seed)
    if sparse:
        matrix[matrix.abs() < 1] = 0
    cut = blocks.cut(matrix, min(block_size, columns))
    fitted = em.fit(cut, em.Options(n_centroids=k, n_iter=8, seed=seed))
    assert all(b <= a * (1 + 1e-5) + 1e-9 for a, b in zip(fitted.objective, fitted.objective[1:], strict=False))
    assert len(fitted.codebook) <= k
    assert squared_error(cut, fitted.codebook) <= fitted.objective[-1] * (1 + 1e-4) + 1e-4


def test_initial_centroids_are_distinct_even_where_most_vectors_are_alike():
    matrix = gaussian(300, 8)
    matrix[:250] = 1.0
    start = em.initial_codebook(blocks.cut(matrix, 8), 40, torch.Generator().manual_seed(0))
    assert len(start.codebook.unique(dim=0)) == 40


def test_no_more_distinct_vectors_than_centroids_is_lossless_and_the_codebook_shrinks_to_fit():
    matrix = gaussian(5, 8).repeat(20, 1)
    fitted = em.fit(blocks.cut(matrix, 8), em.Options(n_centroids=16))
    assert fitted.codebook.shape == (5, 8)
    assert squared_error(blocks.cut(matrix, 8), fitted.codebook) == 0


def test_minus_zero_and_zero_are_one_vector():
    matrix = torch.zeros(4, 2)
    matrix[0] = -0.0
    assert len(em.fit(blocks.cut(matrix, 2), em.Options(n_centroids=4)).codebook) == 1


def test_empty_clusters_are_filled_when_all_starting_centroids_but_one_are_far_away():
    cut = blocks.cut(gaussian(400, 4), 4)
    start = torch.full((32, 4), 1e4)
    start[0] = 0
    fitted = em.lloyd(cut, start, em.Options(n_centroids=32, n_iter=1), torch.Generator().manual_seed(0))
    counts = torch.bincount(em.assign(cut, fitted.codebook), minlength=32)
    assert int((counts > 0).sum()) == 32


def test_a_crowd_of_identical_vectors_does_not_keep_clusters_empty():
    matrix = gaussian(1000, 8)
    matrix[:900] = 0
    cut = blocks.cut(matrix, 8)
    start = torch.full((64, 8), 1e4)
    start[0] = 0
    fitted = em.lloyd(cut, start, em.Options(n_centroids=64, n_iter=3), torch.Generator().manual_seed(0))
    assert len(em.assign(cut, fitted.codebook).unique()) == 64


def test_empty_clusters_that_cannot_be_filled_raise_and_say_how_many():
    cut = blocks.cut(gaussian(100, 4), 4)
    start = torch.full((8, 4), 1e4)
    start[0] = 0
    with pytest.raises(EmptyClusterResolveError, match="7 of 8 clusters are still empty after 0 passes"):
        em.lloyd(cut, start, em.Options(n_centroids=8, max_tentatives=0), torch.Generator())


def test_padding_does_not_pull_on_centroids():
    """All values are 5; were the padding's zeros averaged in, centroids would drift towards 0."""
    matrix = torch.full((10, 11), 5.0) + 0.01 * gaussian(10, 11)
    fitted = em.fit(blocks.cut(matrix, 4), em.Options(n_centroids=4))
    assert float((fitted.codebook - 5).abs().max()) < 0.1


def test_training_on_a_sample_still_assigns_and_refines_on_everything():
    cut = blocks.cut(gaussian(4000, 8), 8)
    everything = squared_error(cut, em.fit(cut, em.Options(n_centroids=16)).codebook)
    sampled = squared_error(cut, em.fit(cut, em.Options(n_centroids=16, sample=1000)).codebook)
    assert sampled < 1.02 * everything


def test_the_answer_depends_on_the_seed_only():
    cut = blocks.cut(gaussian(500, 8), 8)
    first, second = (em.fit(cut, em.Options(n_centroids=16, seed=7)).codebook for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, em.fit(cut, em.Options(n_centroids=16, seed=8)).codebook)


@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-7])
def test_where_there_are_fewer_points_than_centroids_the_codebook_shrinks_instead_of_failing(noise):
    """Float32 tells the vectors apart, but not their distances: a weight that has hardly left its initial constant."""
    weight = 1 + noise * torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    cut = blocks.cut(weight, 8)
    fitted = em.fit(cut, em.Options(n_centroids=64))
    decoded = blocks.join(fitted.codebook, em.assign(cut, fitted.codebook), 256, 64)
    assert 1 <= len(fitted.codebook) <= 64
    assert float((decoded - weight).abs().max()) <= 1e-6


def test_a_short_last_block_that_repeats_a_full_one_is_no_point_of_its_own():
    """Three points in the body, the same three in the tail: a fourth centroid can never be of use."""
    values = torch.randn(3, 1, generator=torch.Generator().manual_seed(0)).repeat(8, 4)
    cut = blocks.cut(values, 3)
    fitted = em.fit(cut, em.Options(n_centroids=4))
    decoded = blocks.join(fitted.codebook, em.assign(cut, fitted.codebook), 24, 4)
    assert torch.allclose(decoded, values, rtol=1e-6)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 60), st.integers(1, 20), st.integers(1, 9), st.integers(1, 40), st.integers(0, 9), st.booleans(),
    st.floats(1, 2),
)  # fmt: skip
@example(rows=2, columns=11, block_size=1, k=12, seed=1, sparse=False, relaxation=1.25)
def test_the_objective_never_rises_at_any_step_up_to_twice_lloyds(
    rows, columns, block_size, k, seed, sparse, relaxation
):
    matrix = gaussian(rows, columns, seed)
    if sparse:
        matrix[matrix.abs() < 1] = 0
    cut = blocks.cut(matrix, min(block_size, columns))
    fitted = em.fit(cut, em.Options(n_centroids=k, n_iter=8, seed=seed, relaxation=relaxation))
    resolution = 1e-6 * float(matrix.double().square().sum())  # scores are float32
    assert all(b <= a + resolution for a, b in zip(fitted.objective, fitted.objective[1:], strict=False))
    assert squared_error(cut, fitted.codebook) <= fitted.objective[-1] + resolution


def test_longer_steps_reach_in_fewer_iterations_what_lloyds_steps_reach():
    cut = blocks.cut(gaussian(3000, 16), 8)
    lloyd = em.fit(cut, em.Options(n_centroids=64, n_iter=20))
    relaxed = em.fit(cut, em.Options(n_centroids=64, n_iter=14, relaxation=em.RELAXATION))
    assert squared_error(cut, relaxed.codebook) < 1.001 * squared_error(cut, lloyd.codebook)


def test_of_several_starts_the_best_is_kept():
    cut = blocks.cut(gaussian(300, 8), 8)
    errors = [em.fit(cut, em.Options(n_centroids=16, seed=seed)).objective[-1] for seed in (5, 6, 7)]
    assert em.fit(cut, em.Options(n_centroids=16, seed=5, restarts=3)).objective[-1] == min(errors)


def test_starting_on_growing_samples_ends_where_all_vectors_lead():
    cut = blocks.cut(gaussian(8000, 8), 8)
    options = em.Options(n_centroids=16, relaxation=em.RELAXATION)
    everything = squared_error(cut, em.fit(cut, options).codebook)
    stages = ((1000, 5), (2000, 5), (4000, 5))
    gradual = squared_error(cut, em.fit(cut, em.Options(n_centroids=16, relaxation=1.85, stages=stages)).codebook)
    assert gradual < 1.01 * everything


def test_a_spread_sample_takes_one_vector_of_every_stretch():
    cut = blocks.cut(torch.arange(1000.0)[:, None], 1)
    drawn = em.spread_sample(cut, 100, torch.Generator().manual_seed(0)).body.flatten()
    assert (drawn // 10).tolist() == list(range(100))
    assert len(set((drawn % 10).tolist())) > 5
    assert em.spread_sample(cut, 600, torch.Generator()) is cut


def weighed_error(matrix, encoded, importance):
    return metrics.weighted_squared_error(matrix, encoded.decoded, importance)


@pytest.mark.parametrize(("columns", "block_size"), [(24, 4), (26, 4), (24, 8)])
@pytest.mark.parametrize("axis", [0, 1])
def test_importance_lowers_the_error_that_it_weighs(columns, block_size, axis):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(300, columns, generator=generator)
    factors = torch.exp(1.5 * torch.randn(matrix.shape[axis], generator=generator)).numpy()
    importance = Importance.of_rows(factors, columns) if axis == 0 else Importance.of_columns(factors, 300)
    options = em.Options(n_centroids=16, n_iter=15)
    plain = pq.encode(matrix, (300, columns), block_size, options)
    weighed = pq.encode(matrix, (300, columns), block_size, options, importance=importance)
    assert weighed_error(matrix, weighed, importance) < 0.97 * weighed_error(matrix, plain, importance)
    assert weighed.error.squared_error > plain.error.squared_error
    assert all(b <= a * (1 + 1e-5) for a, b in zip(weighed.objective, weighed.objective[1:], strict=False))


def test_uniform_importance_is_none():
    matrix = torch.randn(100, 26, generator=torch.Generator().manual_seed(0))
    importance = Importance(np.full(100, 3.0, np.float32), np.ones(26, np.float32))
    options = em.Options(n_centroids=16, n_iter=5)
    one, other = (pq.encode(matrix, (100, 26), 4, options, importance=i) for i in (None, importance))
    assert torch.equal(one.decoded, other.decoded)
    assert one.objective == other.objective


def test_the_centroid_with_the_least_weighed_error_is_taken():
    generator = torch.Generator().manual_seed(2)
    matrix, codebook = torch.randn(40, 9, generator=generator), torch.randn(7, 4, generator=generator)
    rows, columns = (torch.rand(n, generator=generator).add(0.1) for n in (40, 9))
    cut = blocks.cut(matrix, 4, Importance(rows.numpy(), columns.numpy()))
    assignments = em.assign(cut, codebook).view(40, 3)
    for b, part in enumerate((slice(0, 4), slice(4, 8), slice(8, 9))):
        differences = matrix[:, None, part] - codebook[None, :, : part.stop - part.start]
        assert torch.equal(assignments[:, b].long(), (differences.square() * columns[part]).sum(2).argmin(1))


def test_no_cluster_is_left_empty_where_values_are_weighed():
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(60, 10, generator=generator).round(decimals=0)
    factors = torch.rand(10, generator=generator).add(0.1).numpy()
    cut = blocks.cut(matrix, 4, Importance.of_columns(factors, 60))
    codebook = em.lloyd(cut, torch.full((12, 4), 9.0), em.Options(n_centroids=12, n_iter=30), generator).codebook
    counts = torch.bincount(em.assign(cut, codebook).long(), minlength=len(codebook))
    assert len(codebook) == 12
    assert counts.min() > 0


def test_importance_of_another_shape_or_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"importance of \(3, 4\) for a matrix 4 x 4"):
        blocks.cut(torch.zeros(4, 4), 2, Importance.of_columns(np.ones(4, np.float32), 3))
    with pytest.raises(ValueError, match="importance of every column must be a positive number"):
        Importance.of_columns(np.array([1, 0], np.float32), 3)
