"""A small family: a base, and fine-tunes of it that differ by little; what is new, reshaped, tied or kept besides."""

import torch

import pqcli

CODECS = {
    "plain": pqcli.Recipe(n_centroids=16, n_iter=4),
    "ecpq": pqcli.Recipe(quality="balanced"),
    "trellis": pqcli.Recipe(codec="trellis", effort=4),
    "auto": pqcli.Recipe(codec="auto", effort=4),
}


def gaussian(*shape, seed=0, rms=0.1):
    return rms * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base_state():
    pruned = gaussian(48, 32, seed=9)
    pruned[:, ::2] = 0
    embedding = gaussian(64, 32, seed=1)
    return {
        "embed.weight": embedding, "head.weight": embedding, "fc.weight": gaussian(96, 40, seed=2),
        "conv.weight": gaussian(24, 16, 3, 3, seed=3), "half.weight": gaussian(64, 48, seed=4).half(),
        "pruned.weight": pruned, "frozen.weight": gaussian(64, 64, seed=5), "fc.bias": gaussian(96, seed=6),
        "frozen.bias": gaussian(96, seed=7), "resized.weight": gaussian(40, 32, seed=8), "unlike.weight": gaussian(
            48, 48, seed=10), "steps": torch.tensor(900), "ids": torch.arange(40), "gone.weight": gaussian(8, 8),
        "large.bias": gaussian(20_000, seed=11),
    }  # fmt: skip


def tuned(state, seed=20, rms=1e-4):
    """A fine-tune: all but the frozen tensors moved by noise."""
    found = {name: tensor.clone() for name, tensor in state.items() if name not in {"gone.weight", "head.weight"}}
    for i, (name, tensor) in enumerate(found.items()):
        if tensor.is_floating_point() and not name.startswith("frozen"):
            moved = tensor.float() + gaussian(*tensor.shape, seed=seed + i, rms=rms)
            found[name] = moved.to(tensor.dtype)
    found["pruned.weight"][state["pruned.weight"] == 0] = 0
    found["head.weight"] = found["embed.weight"]
    found["steps"] = torch.tensor(1000)
    found["resized.weight"] = gaussian(44, 32, seed=30)
    found["unlike.weight"] = gaussian(48, 48, seed=31)
    found["new.weight"] = gaussian(40, 40, seed=32)
    return found


def saved(folder, name, state):
    torch.save(state, folder / name)
    return folder / name


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bytes_of(a), bytes_of(b))
