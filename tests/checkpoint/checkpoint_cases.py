"""Real-looking checkpoints, and what the tests of the checkpoint package do with them again and again."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pqcli import checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def small_model() -> nn.Module:
    """Layers of all sorts; the last one is tied to the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Linear(8, 11))
    model[4].weight = model[0].weight
    return model


def nested_checkpoint() -> dict[Any, Any]:
    """What a training script saves: a state dict among counters, settings and optimizer state."""
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 17,
        "best_acc1": torch.tensor(0.5),
        "args": {"lr": 0.1, "name": "résumé", "flags": (1, None, True), "nan": float("nan"), "inf": float("-inf")},
        "betas": [0.9, 0.999],
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
        "device": torch.device("cuda:1"),
        "blob": b"\x00\xff",
        "z": 1 + 2j,
        "big": 2**80,
        5: "an integer key",
        (1, "a"): "a tuple key",
        "ordered": OrderedDict(b=1, a=2),
        "negative_zero": -0.0,
    }


def round_trip(source: Path, target: Path, format_: str | None = None) -> checkpoint.Checkpoint:
    """Read `source`, write it to `target`, and give the (closed) checkpoint."""
    with checkpoint.open(source) as opened:
        format_ = format_ or opened.format
        checkpoint.write(target, opened.tensors, opened.read, opened.skeleton, format=format_)
    return opened


def assert_same(left: Any, right: Any) -> None:
    """Equal in type, order and value; tensors bit for bit."""
    assert type(left) is type(right), (type(left), type(right))
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        assert bits(left) == bits(right)
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
        assert getattr(left, "_metadata", None) == getattr(right, "_metadata", None)
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        assert repr(left) == repr(right)


def bits(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes in row-major order."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return dense.view(torch.uint8).numpy().tobytes() if dense.numel() else b""
