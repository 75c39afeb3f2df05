"""Makes `copy-v1` and `trellis-copy-v1` (container and JSON). They were made once; never make them again.

    python -m tests.golden.make_copy_v1

Tensors with the same bytes, quantized and kept, of which one is tied besides.
"""

import torch

import pqcli
from tests.golden.make_plain_v1 import write


def checkpoint() -> dict[str, torch.Tensor]:
    """Equal pairs that share no memory, and one that does."""
    generator = torch.Generator().manual_seed(17)
    weight, table = torch.randn(48, 32, generator=generator), torch.randn(600, generator=generator)
    copy = weight.clone()
    return {
        "first.weight": weight, "table": table, "second.weight": copy, "second.tied": copy, "again": table.clone(),
        "other.weight": torch.randn(48, 32, generator=generator),
    }  # fmt: skip


def main() -> None:
    """Write the files beside this script."""
    recipes = {
        "copy": pqcli.Recipe(n_centroids=32),
        "trellis-copy": pqcli.Recipe(codec="trellis", quality="small"),
    }
    write(checkpoint(), recipes)


if __name__ == "__main__":
    main()
