"""Makes `damage-v1` and `trellis-damage-v1` (container and JSON). They were made once; never make them again.

    python -m tests.golden.make_damage_v1

They tell what statistics predict of errors: of layers with and without gradients, of an embedding, and of nothing.
"""

import json
import tempfile
from pathlib import Path

import torch
from torch import nn

import pqcli
from pqcli import stats as statistics
from tests.golden.make_plain_v1 import HERE, digests

RECIPES = {
    "damage": {"n_centroids": 16, "block_size": 4},
    "trellis-damage": {"codec": "trellis", "quality": "small", "effort": 4},
}


class Model(nn.Module):
    """An embedding, a convolution, a layer that is watched and felt, and one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv = nn.Embedding(200, 16), nn.Conv1d(16, 24, 3)
        self.layer, self.unused = nn.Linear(24, 40), nn.Linear(24, 40)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(examples, time) -> (examples, time - 2, 40)."""
        return self.layer(self.conv(self.embedding(ids).mT).mT.tanh())


def collected(folder: Path) -> Path:
    """A checkpoint in the folder, and statistics beside it."""
    torch.manual_seed(0)
    model, ids = Model(), torch.arange(320).view(8, 40) ** 2 % 200
    torch.save(model.state_dict(), folder / "model.pt")
    with statistics.collect(model, gradients=True) as stats:
        stats.backward(model(ids))
    found = stats.statistics()
    found.weights["conv.weight"].gradient = None
    statistics.save(found, folder / "stats")
    return folder / "model.pt"


def main() -> None:
    """Write the files beside this script."""
    with tempfile.TemporaryDirectory() as name:
        source = collected(Path(name))
        for codec, settings in RECIPES.items():
            target = HERE / f"{codec}-v1.pq.safetensors"
            pqcli.compress(source, target, pqcli.Recipe(stats=str(source.with_name("stats")), **settings))
            text = json.dumps(digests(pqcli.load(target)), indent=1, ensure_ascii=False)
            (HERE / f"{codec}-v1.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
