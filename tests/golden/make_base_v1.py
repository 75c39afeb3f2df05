"""Makes `base-v1` (container, JSON, and its base), and `base-chain-v1`, whose base is the first. They were made once; a
change of pqcli must not make them again.

    python -m tests.golden.make_base_v1

One holds trellis-coded and kept differences to a checkpoint, tensors as in it and new ones; the other plain PQ to what
the first decodes to.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

import pqcli
from tests.golden.make_plain_v1 import digests

HERE = Path(__file__).parent


def states() -> list[dict[str, torch.Tensor]]:
    """A base, a fine-tune, and one of that."""
    generator = torch.Generator().manual_seed(20261126)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    pruned = gaussian(40, 24)
    pruned[:, ::2] = 0
    base = {
        "fc.weight": gaussian(48, 32),
        "half.weight": gaussian(40, 32).half(),
        "wide.weight": gaussian(40, 32).bfloat16(),
        "pruned.weight": pruned,
        "frozen.weight": gaussian(48, 24),
        "cast.weight": gaussian(40, 24),
        "fc.bias": gaussian(48),
        "steps": torch.tensor(900),
        "large.bias": gaussian(17_000),
    }
    found = [base]
    for i in (1, 2):
        state = {name: (t.float() + 1e-3 * gaussian(*t.shape)).to(t.dtype) for name, t in found[-1].items()}
        state["pruned.weight"][:, ::2] = 0
        state["frozen.weight"], state["steps"] = base["frozen.weight"], torch.tensor(900 + 100 * i)
        state["wide.weight"] = state["wide.weight"].float()
        state["cast.weight"] = base["cast.weight"].half()
        state[f"new{i}.weight"] = gaussian(40, 24)
        found.append(state)
    return found


if __name__ == "__main__":
    base, first, second = states()
    save_file(base, HERE / "base-v1.base.safetensors")
    for name, state, before, recipe in (
        ("base-v1", first, "base-v1.base.safetensors", pqcli.Recipe(codec="trellis", quality="small", effort=8)),
        ("base-chain-v1", second, "base-v1.pq.safetensors", pqcli.Recipe(n_centroids=16, n_iter=4)),
    ):
        source, target = HERE / "source.safetensors", HERE / f"{name}.pq.safetensors"
        save_file(state, source)
        pqcli.compress(source, target, recipe, base=HERE / before)
        source.unlink()
        target.with_name(f"{name}.json").write_text(json.dumps(digests(pqcli.load(target)), indent=1), encoding="utf-8")
