"""What statistics of inputs gain for plain and entropy-constrained PQ: files of the same size, and how well they do.

usage: pq_statistics.py {minilm,resnet20} STATS [STATS ...] [--pq 8 4] [--bytes 2330828 ...]
STATS are files that `kit_stats.py` wrote; each is used in its turn, after none. Prints rows of the table in
docs/measurements.md: for MiniLM the mean squared error of the sentence embedding and STS-B dev, for ResNet-20 the
error of the logits relative to their energy, cross-entropy and accuracy. With `--pq` plain PQ of these block sizes,
k=256; with `--bytes` entropy-constrained PQ of at most so many bytes.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from second_order import KIT, MiniLM, script

import pqcli


class ResNet20:
    def __init__(self, _):
        self.kit = script("eval_resnet_cifar10")
        self.checkpoint = KIT / "models" / "resnet20.th"
        with np.load(KIT / "data" / "cifar10_test1017.npz") as data:
            images = torch.from_numpy(data["x"]).permute(0, 3, 1, 2).float() / 255
            self.labels = torch.from_numpy(data["y"]).long()
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        self.images = (images - mean) / std
        self.expected = self.logits(self.kit.load(str(self.checkpoint)))

    def logits(self, state):
        model = self.kit.ResNet(3).eval()
        model.load_state_dict({name.removeprefix("module."): weight for name, weight in state.items()})
        with torch.inference_mode():
            return torch.cat([model(batch) for batch in self.images.split(256)])

    def score(self, state):
        state = state.get("state_dict", state)
        found = self.logits(state)
        error = float((found - self.expected).square().mean() / self.expected.square().mean())
        entropy = float(torch.nn.functional.cross_entropy(found, self.labels))
        right = 100 * float((found.argmax(1) == self.labels).float().mean())
        return f"logit error {error:.4f}  CE {entropy:.4f}  {right:.2f} %"


class Embedder(MiniLM):
    def score(self, state):
        return super().score({**self.state, **state})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["minilm", "resnet20"])
    parser.add_argument("stats", nargs="+")
    parser.add_argument("--pq", type=int, nargs="*", default=[8, 4])
    parser.add_argument("--bytes", type=int, nargs="*", default=[])
    args = parser.parse_args()
    model = {"minilm": Embedder, "resnet20": ResNet20}[args.model](None)
    wishes = [(f"pq {d}x256", {"block_size": d}) for d in args.pq]
    wishes += [(f"pq, coded, {size:,} B", {"target_bytes": size}) for size in args.bytes]
    for name, wish in wishes:
        for stats in (None, *args.stats):
            started = time.process_time()
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "model.pq.safetensors"
                report = pqcli.compress(model.checkpoint, file, pqcli.Recipe(stats=stats, **wish))
                seconds = time.process_time() - started
                score = model.score(pqcli.load(file))
            given = Path(stats).name.removesuffix(".stats.safetensors") if stats else "none"
            print(f"| {name} | {given} | {report.compressed_bytes:,} | {score} | {seconds:.1f} s |", flush=True)


if __name__ == "__main__":
    main()
