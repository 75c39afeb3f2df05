"""Makes `trained-v1` (container and JSON). They were made once; never make them again.

    python -m tests.golden.make_trained_v1

A small network was compressed, attached, trained for a step, and exported: codebooks and kept tensors that were
trained, others that were frozen, tied weights, exact zeros, a copy, and damage that statistics had predicted.
"""

import json
import tempfile
from pathlib import Path

import torch
from torch import nn

import pqcli
from pqcli import stats as statistics
from tests.golden.make_plain_v1 import HERE, digests


class Model(nn.Module):
    """Tied weights with a row of zeros, a convolution whose blocks are padded, and layers that are not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(200, 16, padding_idx=0)
        self.conv = nn.Conv1d(16, 24, 3)
        self.norm = nn.BatchNorm1d(24)
        self.layer, self.frozen, self.twin = nn.Linear(24, 16), nn.Linear(16, 40), nn.Linear(16, 40)
        self.head = nn.Linear(16, 200, bias=False)
        self.head.weight = self.embedding.weight
        self.twin.load_state_dict(self.frozen.state_dict())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(examples, time) -> (examples, time - 2, 200)."""
        x = self.norm(self.conv(self.embedding(ids).mT)).mT
        return self.head(self.layer(x).tanh()) + (self.frozen(self.layer(x)) - self.twin(self.layer(x))).sum()


def main() -> None:
    """Write the files beside this script."""
    torch.manual_seed(0)
    model, ids = Model(), torch.arange(320).view(8, 40) ** 2 % 200
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with statistics.collect(model) as stats:
            model(ids)
        statistics.save(stats.statistics(), folder / "stats")
        recipe = pqcli.Recipe(block_size=5, n_centroids=16, stats=str(folder / "stats"))
        pqcli.save(model.state_dict(), folder / "model.pq.safetensors", recipe)
        pqcli.attach(model, folder / "model.pq.safetensors")
        model.frozen.requires_grad_(False)
        model.twin.requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(ids).square().mean().backward()
        optimizer.step()
        target = HERE / "trained-v1.pq.safetensors"
        pqcli.export(model, folder / "model.pq.safetensors", target)
    text = json.dumps(digests(pqcli.load(target)), indent=1, ensure_ascii=False)
    (HERE / "trained-v1.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
