"""Training goes on after a checkpoint was compressed with its training state: loss curves, bytes, and spacings.

usage: training_state.py [--folder OUT] [--only {spacing,bytes,curves}] [--tasks NAME ...] [--steps 150]

Three runs of small real networks: ResNet-20 on the kit's 1,500 CIFAR-10 images with AdamW and with SGD and momentum,
and a transformer on bytes of WikiText-2 with AdamW. Each trains for `--steps` steps and saves a whole checkpoint: model,
optimizer, schedule, generator state. Then

    spacing   what spacings of eight bits do to moments and to the step that AdamW would take next, and their bytes
    bytes     what the training state takes: raw, without loss, in eight bits, and as bitsandbytes has eight bits
    curves    `pqcli compress`, `pqcli decode`, and as many steps again with the same data in the same order: losses
              beside those of the run that was never interrupted and of one whose optimizer starts anew

Ends with 1 where a run from a file without loss differs from the uninterrupted one in any loss, or where one from
eight bits is further from it than a tenth of what starting anew does.
"""

import argparse
import copy
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

KIT = Path(os.environ.get("PQCLI_KIT", Path(__file__).parents[3] / "shared" / "kit"))
BATCH, CONTEXT = 64, 128


# --- tasks ------------------------------------------------------------------------------------------------------------


class Images:
    """ResNet-20 on the kit's training images, flipped and shifted at random."""

    def __init__(self) -> None:
        spec = importlib.util.spec_from_file_location("eval_resnet_cifar10", KIT / "eval_resnet_cifar10.py")
        self._kit = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._kit)
        with np.load(KIT / "data" / "cifar10_train1500.npz") as data:
            images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).float() / 255
            self._labels = torch.from_numpy(data["y"]).long()
        self._images = functional.pad(
            (images - images.mean((0, 2, 3), True)) / images.std((0, 2, 3), keepdim=True), [4] * 4
        )

    def model(self) -> nn.Module:
        return self._kit.ResNet(3)

    def loss(self, model: nn.Module) -> torch.Tensor:
        chosen = torch.randint(len(self._images), (BATCH,))
        y, x = torch.randint(9, (2,)).tolist()
        batch = self._images[chosen, :, y : y + 32, x : x + 32]
        batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
        return functional.cross_entropy(model(batch), self._labels[chosen])


class Transformer(nn.Module):
    """A causal transformer on bytes."""

    def __init__(self, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(256, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        hidden = self.embed(text) + self.place(torch.arange(text.shape[1]))
        return self.head(self.norm(self.layers(hidden, mask, is_causal=True)))


class Text:
    """The transformer on windows of WikiText-2."""

    def __init__(self) -> None:
        self._text = torch.frombuffer(
            bytearray((KIT / "data" / "wikitext2_calibration.txt").read_bytes()), dtype=torch.uint8
        )

    def model(self) -> nn.Module:
        return Transformer()

    def loss(self, model: nn.Module) -> torch.Tensor:
        starts = torch.randint(len(self._text) - CONTEXT - 1, (16,))
        windows = torch.stack([self._text[start : start + CONTEXT + 1] for start in starts]).long()
        logits = model(windows[:, :-1])
        return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


TASKS = {
    "ResNet-20, AdamW": (Images, lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)),
    "ResNet-20, SGD": (Images, lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)),
    "transformer, AdamW": (Text, lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)),
}


@dataclass
class Run:
    """A training run: all that a checkpoint of it holds."""

    task: Any
    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: Any

    @classmethod
    def of(cls, name: str) -> "Run":
        made, optimizer_of = TASKS[name]
        torch.manual_seed(0)
        task = made()
        model = task.model()
        optimizer = optimizer_of(model.parameters())
        return cls(task, model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1000))

    def steps(self, n: int) -> list[float]:
        losses = []
        for _ in range(n):
            loss = self.task.loss(self.model)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            losses.append(loss.item())
        return losses

    def save(self, path: Path) -> None:
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "rng_state": torch.get_rng_state(),
            },
            path,
        )

    def load(self, path: Path, *, with_state: bool = True) -> None:
        saved = torch.load(path, weights_only=True)
        self.model.load_state_dict(saved["model"])
        if with_state:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        torch.set_rng_state(saved["rng_state"])
