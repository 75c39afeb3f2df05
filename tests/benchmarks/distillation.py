"""What training the codebooks gains: ResNet-20 in plain PQ learns from the dense network, and keeps its bytes.

usage: distillation.py [--block-size 9] [--n-centroids 256] [--epochs 60] [--hold-out 300]
The compressed file is attached to a model, whose codebooks, biases and batch norms learn to do what the dense network
does on the kit's 1,500 CIFAR-10 training images; what is scored is the decoded file that is exported. No label is
looked at. With `--hold-out` the last so many of the 1,500 are not trained on, and only they are scored: settings were
chosen so, and the test images are there for the last word. Prints the rows of the table in docs/fine-tuning.md.
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
    """Mirrored or not, and moved by up to four pixels, each image by itself."""
    n, _, height, width = x.shape
    padded = functional.pad(x, (4, 4, 4, 4))
    flip = torch.rand(n, generator=generator) < 0.5
    dx, dy = torch.randint(0, 9, (2, n), generator=generator)
    rows = dy[:, None] + torch.arange(height)
    columns = dx[:, None] + torch.where(flip[:, None], torch.arange(width - 1, -1, -1), torch.arange(width))
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mixed(x, generator):
    """Half of the images with some of another one in it: the dense network says what that is."""
    share = torch.rand(len(x), 1, 1, 1, generator=generator)
    share = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, share, torch.ones(()))
    return share * x + (1 - share) * x[torch.randperm(len(x), generator=generator)]


class Watched:
    """A network and what its blocks give in the last run."""

    def __init__(self, model):
        self.model, self.features = model, []
        for layer in (model.layer1, model.layer2, model.layer3):
            for block in layer:
                block.register_forward_hook(lambda _module, _inputs, output: self.features.append(output))

    def __call__(self, x):
        self.features.clear()
        return self.model(x), list(self.features)


def loss_of(student, teacher, args):
    """How far the student is from the teacher: logits and, block by block, features, each relative to its energy."""
    (logits, features), (wanted, theirs) = student, teacher
    terms = [(a - b).square().mean() / b.square().mean() for a, b in zip(features, theirs, strict=True)]
    found = (
        args.features * torch.stack(terms).mean()
        + args.logits * (logits - wanted).square().mean() / wanted.square().mean()
    )
    if args.kl:
        t = args.temperature
        kl = functional.kl_div(
            (logits / t).log_softmax(1), (wanted / t).log_softmax(1), log_target=True, reduction="batchmean"
        )
        found = found + args.kl * t * t * kl
    return found


def distil(model, teacher, x, args):
    """Train the student on images `x`."""
    generator = torch.Generator().manual_seed(args.seed)
    student, teacher = Watched(model), Watched(teacher)
    codebooks = [p for n, p in model.named_parameters() if n.endswith(".original")]
    others = [p for n, p in model.named_parameters() if not n.endswith(".original")]
    optimizer = torch.optim.Adam([{"params": codebooks, "lr": args.lr}, {"params": others, "lr": args.lr_rest}])
    n_steps = args.epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [args.lr, args.lr_rest], n_steps, pct_start=0.1)
    started = time.perf_counter()
    for epoch in range(args.epochs):
        model.train()
        total = 0.0
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH):
            if len(chosen) < BATCH:
                continue
            batch = augmented(x[chosen], generator)
            if args.mix:
                batch = mixed(batch, generator)
            with torch.no_grad():
                wanted = teacher(batch)
            optimizer.zero_grad()
            loss = loss_of(student(batch), wanted, args)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / (len(x) // BATCH)
        if args.verbose and (epoch % 5 == 4 or epoch == 0):
            print(f"  epoch {epoch + 1}: loss {total:.4f}  {time.perf_counter() - started:.0f} s", flush=True)


def settle(model, x, generator, n_passes=3):
    """Batch norm's statistics anew: the mean over whole passes, which the momentum of training only approaches."""
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(n_passes):
            for batch in x[torch.randperm(len(x), generator=generator)].split(250):
                model(augmented(batch, generator))
    for norm in norms:
        norm.momentum = 0.1


def score(model, x, y, expected):
    """Top-1, cross-entropy and the error of logits relative to their energy."""
    model.eval()
    with torch.inference_mode():
        found = torch.cat([model(batch) for batch in x.split(250)])
    right = 100 * float((found.argmax(1) == y).float().mean())
    error = float((found - expected).square().mean() / expected.square().mean())
    return f"{right:.2f} % | {float(functional.cross_entropy(found, y)):.4f} | {error:.4f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--block-size", type=int, default=9)
    parser.add_argument("--n-centroids", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--hold-out", type=int, default=0)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--lr-rest", type=float, default=2e-3)
    parser.add_argument("--features", type=float, default=1.0)
    parser.add_argument("--logits", type=float, default=1.0)
    parser.add_argument("--kl", type=float, default=0.0)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--mix", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    kit = script("eval_resnet_cifar10")
    checkpoint = KIT / "models" / "resnet20.th"
    teacher = kit.ResNet(3)
    teacher.load_state_dict(kit.load(str(checkpoint)))
    teacher.eval().requires_grad_(False)
    x, _ = train = images("cifar10_train1500.npz")
    if args.hold_out:
        n = len(x) - args.hold_out
        x, scored = x[:n], (train[0][n:], train[1][n:])
    else:
        scored = images("cifar10_test1017.npz")
    with torch.inference_mode():
        expected = torch.cat([teacher(batch) for batch in scored[0].split(250)])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "resnet20.pq.safetensors"
        recipe = pqcli.Recipe(block_size=args.block_size, n_centroids=args.n_centroids)
        pqcli.compress(checkpoint, file, recipe)
        model = kit.ResNet(3)
        print("dense", score(teacher, *scored, expected), flush=True)
        pqcli.attach(model, file)
        print("compressed", file.stat().st_size, score(model, *scored, expected), flush=True)
        generator = torch.Generator().manual_seed(1)
        settle(model, x, generator)
        print("settled", score(model, *scored, expected), flush=True)
        distil(model, teacher, x, args)
        print("trained", score(model, *scored, expected), flush=True)
        settle(model, x, generator)
        print("trained, settled", score(model, *scored, expected), flush=True)


if __name__ == "__main__":
    main()
