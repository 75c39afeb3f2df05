"""Makes `plain-v1.pq.safetensors` and `plain-v1.json`. They were made once; a change of pqcli must not make them again.

    python -m tests.golden.make_plain_v1

The container holds plain PQ in format version 1, with one tensor for every turn the format can take. The JSON holds
what it must decode to for ever: dtype, shape and SHA-256 of the bytes of every tensor.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import torch

import pqcli

HERE = Path(__file__).parent


def checkpoint() -> dict:
    """A nested training checkpoint that uses everything format version 1 can do without a whole-checkpoint codec."""
    generator = torch.Generator().manual_seed(20261123)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    embedding = gaussian(400, 32)
    state = {
        "embed.weight": embedding,
        "padded.weight": gaussian(64, 30),
        "odd.weight": gaussian(96, 24),
        "wide.weight": gaussian(300, 32),
        "constant.weight": torch.full((64, 32), 0.1),
        "tiny.weight": gaussian(160, 32) * 1e-7,
        "half.weight": gaussian(96, 32).half(),
        "brain.weight": gaussian(96, 32).bfloat16(),
        "double.weight": gaussian(64, 32).double(),
        "conv.weight": gaussian(16, 8, 3, 3),
        "experts": gaussian(4, 8, 40),
        "dir/näme 1.weight": gaussian(64, 32),
        "head.weight": embedding,
        "bias": gaussian(33),
        "half.bias": gaussian(7).half(),
        "mask": torch.tensor([[True, False, True]]),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 5),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "large.int": torch.arange(20_000, dtype=torch.int32) * 7919,
        "large.fnuz": (torch.arange(70_000) % 251).to(torch.uint8).view(torch.float8_e4m3fnuz),
    }
    return {"state_dict": state, "epoch": 3, "args": {"lr": [0.1, 1e-3]}}


def recipe() -> pqcli.Recipe:
    """Codebooks of 1 to 9 bits, blocks that do not divide, both codebook dtypes."""
    return pqcli.Recipe(
        n_iter=5,
        rules=(
            pqcli.Rule(match="odd", block_size=3, n_centroids=13),
            pqcli.Rule(match="wide", block_size=4, n_centroids=300),
            pqcli.Rule(match="padded", block_size=8, n_centroids=16),
            pqcli.Rule(match="half", block_size=4, n_centroids=64, codebook_dtype="fp32"),
            pqcli.Rule(match="*", n_centroids=32),
        ),
    )


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, dict]:
    """Dtype, shape and SHA-256 of the bytes of each tensor."""
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "sha256": hashlib.sha256(
                tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
            ).hexdigest(),
        }
        for name, tensor in tensors.items()
    }


def write(checkpoint: dict, recipes: dict[str, pqcli.Recipe]) -> None:
    """`NAME-v1`, container and JSON, of a checkpoint with each of the recipes."""
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in recipes.items():
            source, target = Path(folder) / "model.pt", HERE / f"{name}-v1.pq.safetensors"
            torch.save(checkpoint, source)
            pqcli.compress(source, target, recipe)
            text = json.dumps(digests(pqcli.load(target)), indent=1, ensure_ascii=False)
            (HERE / f"{name}-v1.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Write both files beside this script."""
    target = HERE / "plain-v1.pq.safetensors"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "model.pt"
        torch.save(checkpoint(), source)
        report = pqcli.compress(source, target, recipe(), force=True)
    for tensor in report.tensors:
        print(tensor.name, tensor.scheme, tensor.bytes)
    print(report.compressed_bytes)
    text = json.dumps(digests(pqcli.load(target)), indent=1, ensure_ascii=False)
    (HERE / "plain-v1.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
