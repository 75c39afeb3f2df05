"""What training the codebooks gains: ResNet-20 in plain PQ learns from the dense network, and keeps its bytes.

usage: distillation.py [--block-size 9] [--n-centroids 256] [--epochs 30] [--hold-out 300]
The compressed file is attached to a model, whose codebooks, biases and batch norms learn to do what the dense network
does on the kit's 1,500 CIFAR-10 training images, mirrored and moved; no label is looked at. It is exported, decoded,
and the decoded file is scored. With `--hold-out` the last so many of the 1,500 are not trained on, and only they are
scored: settings were chosen so (by the error of the logits: the dense network has learnt these labels), and the test
images are there for the last word. Prints rows of the table in docs/fine-tuning.md: bytes, top-1, cross-entropy, and
the squared error of the logits relative to their energy.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from second_order import KIT, script
from torch.nn import functional

import pqcli

BATCH = 100


def images(name):
    """Normalised images (n, 3, 32, 32) and labels of one of the kit's files."""
    with np.load(KIT / "data" / name) as data:
        x = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).float() / 255
        y = torch.from_numpy(data["y"]).long()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    return (x - mean) / std, y


def augmented(x, generator):
    """Mirrored or not, and moved by up to four pixels, each image by itself; `channels_last`, which runs quicker."""
    n, _, height, width = x.shape
    padded = functional.pad(x, (4, 4, 4, 4))
    flip = torch.rand(n, generator=generator) < 0.5
    dx, dy = torch.randint(0, 9, (2, n), generator=generator)
    rows = dy[:, None] + torch.arange(height)
    columns = dx[:, None] + torch.where(flip[:, None], torch.arange(width - 1, -1, -1), torch.arange(width))
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Watched:
    """A network, and what its blocks give in a run."""

    def __init__(self, model):
        self.model, self.features = model, []
        for layer in (model.layer1, model.layer2, model.layer3):
            for block in layer:
                block.register_forward_hook(lambda _module, _inputs, output: self.features.append(output))

    def __call__(self, x):
        """Every block's output, and the logits last; in float32, as in bfloat16 their differences would be noise."""
        self.features.clear()
        logits = self.model(x)
        return [output.float() for output in (*self.features, logits)]


def loss_of(found, wanted):
    """How far the student is from the teacher: squared errors relative to the energy, of each block and of the logits.

    The logits count as much as all blocks together.
    """
    *blocks, logits = [(a - b).square().mean() / b.square().mean() for a, b in zip(found, wanted, strict=True)]
    return torch.stack(blocks).mean() + logits


def distil(model, teacher, x, args):
    """Train the student on images `x`, with all that is no codebook too: that costs no byte."""
    generator = torch.Generator().manual_seed(args.seed)
    student, teacher = Watched(model), Watched(teacher)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    per_epoch = len(x) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.epochs * per_epoch, pct_start=0.1)
    model.train()
    for epoch in range(args.epochs):
        started, total = time.process_time(), 0.0
        for chosen in torch.randperm(len(x), generator=generator)[: per_epoch * BATCH].split(BATCH):
            batch = augmented(x[chosen], generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=not args.float32):
                with torch.no_grad():
                    wanted = teacher(batch)
                found = student(batch)
            optimizer.zero_grad()
            loss = loss_of(found, wanted)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / per_epoch
        if args.verbose:
            print(f"  epoch {epoch + 1}: loss {total:.4f}  {time.process_time() - started:.1f} s", flush=True)


def settle(model, x, generator):
    """Batch norm's statistics anew: means over the images, where training has left running ones of moving weights."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    model.train()
    with torch.no_grad():
        for _ in range(2):
            for batch in x[torch.randperm(len(x), generator=generator)].split(250):
                model(augmented(batch, generator))
    for norm in norms:
        norm.momentum = 0.1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-size", type=int, default=9)
    parser.add_argument("--n-centroids", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--hold-out", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--float32", action="store_true", help="train in float32, and not in bfloat16")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    kit = script("eval_resnet_cifar10")
    checkpoint = KIT / "models" / "resnet20.th"
    x, y = images("cifar10_train1500.npz")
    n = len(x) - args.hold_out
    x, (seen, labels) = x[:n], (x[n:], y[n:]) if args.hold_out else images("cifar10_test1017.npz")

    def logits(path):
        """What the network of a dense checkpoint says."""
        model = kit.ResNet(3).eval()
        model.load_state_dict(kit.load(str(path)))
        with torch.inference_mode():
            return torch.cat([model(batch) for batch in seen.split(250)])

    expected = logits(checkpoint)

    def row(what, path, n_bytes):
        found = logits(path)
        right = 100 * (found.argmax(1) == labels).float().mean().item()
        entropy = functional.cross_entropy(found, labels).item()
        error = ((found - expected).square().mean() / expected.square().mean()).item()
        print(f"| {what} | {n_bytes:,} | {right:.2f} % | {entropy:.4f} | {error:.4f} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        file, exported, decoded = (Path(folder) / f"{stem}.pq.safetensors" for stem in ("file", "exported", "decoded"))
        decoded = Path(folder) / "decoded.pt"

        def exported_row(what):
            pqcli.export(model, file, exported, force=True)
            pqcli.decode(exported, decoded, force=True)
            row(what, decoded, exported.stat().st_size)

        row("dense", checkpoint, checkpoint.stat().st_size)
        pqcli.compress(checkpoint, file, pqcli.Recipe(block_size=args.block_size, n_centroids=args.n_centroids))
        pqcli.decode(file, decoded)
        row("compressed", decoded, file.stat().st_size)
        teacher, model = kit.ResNet(3).eval().requires_grad_(False), kit.ResNet(3)
        teacher.load_state_dict(kit.load(str(checkpoint)))
        pqcli.attach(model, file)
        generator = torch.Generator().manual_seed(args.seed + 1)
        started = time.process_time()
        settle(model, x, generator)
        exported_row("statistics of batch norms anew")
        distil(model, teacher, x, args)
        settle(model, x, generator)
        exported_row(f"trained for {args.epochs} epochs")
        assert pqcli.verify(exported) == []
        print(f"{time.process_time() - started:.0f} s of processor time", flush=True)


if __name__ == "__main__":
    main()
