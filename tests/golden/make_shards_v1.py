"""Makes `shards-v1` and `shards-ecpq-v1` (folders, and JSON): containers in several files. Made once; never again.

python -m tests.golden.make_shards_v1
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import pqcli
from tests.golden.make_plain_v1 import HERE, digests

RECIPES = {
    "shards-v1": pqcli.Recipe(n_centroids=8, n_iter=2),
    "shards-ecpq-v1": pqcli.Recipe(rate_weight=0.05),
}


def checkpoint() -> dict[str, torch.Tensor]:
    """Tensors for a few files of 2 kB; one is larger than that."""
    generator = torch.Generator().manual_seed(0)
    state = {f"layers.{i}.weight": torch.randn(48, 32, generator=generator) for i in range(4)}
    return state | {"bias": torch.randn(5, generator=generator), "large": torch.arange(17_000, dtype=torch.int32)}


def main() -> None:
    """Write the folders beside this script."""
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            save_file(checkpoint(), Path(folder) / "model.safetensors", {"format": "pt"})
            shutil.rmtree(HERE / name, ignore_errors=True)
            pqcli.compress(folder, HERE / name, recipe, shard_bytes=2000)
        text = json.dumps(digests(pqcli.load(HERE / name)), indent=1)
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
