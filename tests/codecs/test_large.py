"""Large tensors are read a piece at a time, and become the bytes that they become when they are read as a whole."""

import pytest
import torch
from safetensors.torch import save_file

import pqcli
from pqcli.codecs.plain import large
from pqcli.core.pq import far


def weights(rows, columns, dtype=torch.float32):
    return (0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))).to(dtype)


def with_rows_of_zeros():
    found = weights(3000, 40)
    found[::7] = 0
    return found


def with_zeros():
    found = weights(3000, 40, torch.bfloat16)
    found[torch.rand(found.shape, generator=torch.Generator().manual_seed(1)) < 0.05] = 0
    return found


RECIPE = pqcli.Recipe(block_size=8, n_centroids=64, sample=4000, n_iter=6)
CASES = {
    "float32": (weights(3000, 40), RECIPE, True),
    "all vectors from the start": (weights(3000, 40), pqcli.Recipe(block_size=8, sample="all", n_iter=3), True),
    "stages": (weights(40_000, 48, torch.bfloat16), pqcli.Recipe(block_size=4, n_centroids=32, n_iter=8), True),
    "bfloat16": (weights(3000, 40, torch.bfloat16), RECIPE, True),
    "float16, eight bits": (weights(3000, 40).half(), pqcli.Recipe(block_size=8, n_centroids=256, sample=8000), True),
    "two starts, nine bits": (
        weights(3000, 40), pqcli.Recipe(block_size=4, n_centroids=300, sample=9000, restarts=2, n_iter=4), True
    ),
    "rows of zeros": (with_rows_of_zeros(), RECIPE, True),
    "zeros": (with_zeros(), RECIPE, True),
    "convolution": (weights(600, 360).view(600, 40, 3, 3), pqcli.Recipe(block_size=9, sample=4000, n_iter=3), True),
    "rows that do not divide": (weights(3000, 41), RECIPE, False),
    "few values": (torch.arange(3).repeat(40_000).float().view(3000, 40), RECIPE, False),
    "few distinct blocks": (weights(10, 40).repeat(300, 1), RECIPE, False),
    "tiny": (weights(3000, 40) * 1e-20, RECIPE, False),
    "not finite": (weights(3000, 40).index_fill_(0, torch.tensor([2500]), torch.nan), RECIPE, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_large_tensor_becomes_the_same_bytes_without_ever_being_read_as_a_whole(name, tmp_path, monkeypatch):
    tensor, recipe, is_far = CASES[name]
    save_file({"w": tensor}, tmp_path / "m.safetensors")
    pqcli.compress(tmp_path / "m.safetensors", tmp_path / "whole.pq.safetensors", recipe)
    made = []
    piece = large.piece
    monkeypatch.setattr(large, "LARGE_BYTES", 1000)
    monkeypatch.setattr(far, "PIECE", 8192)
    monkeypatch.setattr(large, "piece", lambda *arguments: made.append(piece(*arguments)) or made[-1])
    pqcli.compress(tmp_path / "m.safetensors", tmp_path / "far.pq.safetensors", recipe)
    assert (tmp_path / "far.pq.safetensors").read_bytes() == (tmp_path / "whole.pq.safetensors").read_bytes()
    assert [found is not None for found in made] == [is_far] * len(made)
    assert bool(made) or not is_far
