"""Makes `trellis-mixing-v1` (container and JSON). It was made once; a change of pqcli must not make it again.

    python -m tests.golden.make_mixing_v1

Two networks' worth of small tensors, waves among them, of which some streams are coded by mixing.
"""

import json
import tempfile
from pathlib import Path

import torch

import pqcli
from tests.golden.make_plain_v1 import HERE, digests


def checkpoint() -> dict:
    """Smooth filters of one and of many channels, kernels of few and of many positions, a dense and a tall matrix."""
    generator = torch.Generator().manual_seed(20261125)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    steps = torch.arange(96) * (0.05 + 0.4 * torch.rand(64, 1, generator=generator))
    return {
        "waves.weight": torch.cos(steps + 6 * torch.rand(64, 1, generator=generator)).reshape(64, 1, 96),
        "smooth.weight": gaussian(16, 12, 40).cumsum(2) / 6,
        "conv.weight": gaussian(24, 16, 3, 3) * torch.rand(24, 16, 1, 1, generator=generator),
        "depthwise.weight": gaussian(40, 1, 3, 3),
        "dense.weight": gaussian(96, 80) * torch.rand(96, 1, generator=generator),
        "tall.weight": gaussian(600, 6),
        "half.weight": (0.01 * gaussian(48, 64)).half(),
        "sparse.weight": gaussian(64, 64) * (torch.rand(64, 64, generator=generator) < 0.05),
        "outlier.weight": gaussian(32, 32) * (1 + 1e4 * (torch.arange(1024).reshape(32, 32) == 333)),
        "bias": gaussian(24),
    }


def main() -> None:
    """Write the files beside this script."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.pt"
        torch.save(checkpoint(), source)
        target = HERE / "trellis-mixing-v1.pq.safetensors"
        pqcli.compress(source, target, pqcli.Recipe(codec="trellis", quality="small"))
        text = json.dumps(digests(pqcli.load(target)), indent=1, ensure_ascii=False)
        (HERE / "trellis-mixing-v1.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
