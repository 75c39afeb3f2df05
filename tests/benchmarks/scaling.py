"""What 70 B and 405 B weights would take on many workers: arithmetic, from unit times measured on this machine.

    python tests/benchmarks/scaling.py [--storage GB/s] [--driver-cores N]

Encodes some of each kind of layer here, on one core, and takes the CPU time of a weight; then lets the executor's own
order (largest first, two tasks a worker, a bounded number of bytes in flight) run through the tasks of a whole
checkpoint on simulated workers that share the storage's bandwidth, with a driver that pays for every task and writes
every byte. What the driver alone does (with the trellis codec: decoding all streams to measure their errors, fitting
rotations) is added at its own rate. Nothing here was run on a cluster.
"""

import argparse
import heapq
import pickle
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import pqcli
from pqcli import checkpoint
from pqcli.codecs import registry
from pqcli.codecs.base import Weights, load
from pqcli.jobs.events import ignore
from pqcli.jobs.executors import Threads, running
from pqcli.jobs.remote import TASKS_A_WORKER
from pqcli.plan import plan

CPU = torch.device("cpu")
MODELS = {
    "70 B": {"width": 8192, "inner": 28672, "layers": 80, "heads": 1024, "words": 128256},
    "405 B": {"width": 16384, "inner": 53248, "layers": 126, "heads": 1024, "words": 128256},
}
WORKERS = (1, 16, 64, 256, 1000)
CODECS = {
    "plain PQ 8x256": pqcli.Recipe(block_size=8, n_centroids=256),
    "trellis, balanced": pqcli.Recipe(codec="trellis", quality="balanced"),
}


@dataclass(frozen=True)
class Rates:
    """Seconds of one core for a weight, bytes written for a weight, weights of a task at most (0: a tensor)."""

    encode: float
    driver: float
    written: float
    task_weights: int
    per_task: float


def shapes(about):
    """The matrices of a Llama model of that size."""
    w, inner, heads = about["width"], about["inner"], about["heads"]
    layer = [(w, w), (heads, w), (heads, w), (w, w), (inner, w), (inner, w), (w, inner)]
    return [(about["words"], w)] * 2 + layer * about["layers"]


def measured(name, recipe, folder):
    """Rates of a codec: a checkpoint of 12 M weights, its jobs run one by one here."""
    generator = torch.Generator().manual_seed(0)
    path = folder / "m.safetensors"
    save_file({f"l{i}.weight": 0.02 * torch.randn(2048, 2048, generator=generator) for i in range(3)}, path)
    n = 3 * 2048 * 2048
    torch.set_num_threads(1)
    with checkpoint.open(path) as opened:
        weights = Weights(opened)
        codec = load(registry.chosen(recipe.codec, has_budget=bool(recipe.spending)).name)
        survey = codec.survey(plan.make(recipe, opened.tensors).entries, weights, running(Threads(CPU), ignore))
        level = 0.5 * survey.unit
        started = time.process_time()
        jobs = codec.fit(survey, weights, recipe, level, lambda *_: None).jobs(level)
        fitted = time.process_time() - started
        started = time.process_time()
        pieces = [job.run(CPU) for job in jobs]
        encode = (time.process_time() - started) / n
        started = time.perf_counter()
        for job, piece in zip(jobs, pieces, strict=True):
            pickle.loads(pickle.dumps(job)), pickle.loads(pickle.dumps(piece))
        per_task = (time.perf_counter() - started) / len(jobs)
        written = len(pickle.dumps(pieces)) / n
    file = folder / "m.pq.safetensors"
    pqcli.compress(path, file, recipe, force=True)
    started = time.process_time()
    with pqcli.open(file) as container:
        for record in container.records:
            container.decode(record.name)
    decoding = (time.process_time() - started) / n if recipe.whole_codec else 0.0
    task_weights = max(job.n_weights for job in jobs) if recipe.whole_codec else 0
    driver = decoding + fitted / n if recipe.whole_codec else 0.0
    return Rates(encode, driver, written, task_weights, per_task)


def makespan(sizes, rates, n_workers, storage, dispatch):
    """Seconds until the last result is written: list scheduling, largest first, by workers that share the storage."""
    left = sorted(sizes, reverse=True)
    free = [(0.0, i) for i in range(n_workers)]
    reading = 2.0 / storage  # seconds a weight, were it alone
    driver, reader, end = 0.0, 0.0, 0.0
    running_until = []
    for size in left:
        at, worker = heapq.heappop(free)
        if len(running_until) >= TASKS_A_WORKER * n_workers:
            at = max(at, heapq.heappop(running_until))
        driver = max(driver, at) + dispatch + rates.per_task  # the driver sends one task at a time
        reader = max(reader, driver) + size * reading  # and the storage has one bandwidth for all
        done = max(reader, driver) + size * rates.encode
        heapq.heappush(free, (done, worker))
        heapq.heappush(running_until, done)
        end = max(end, done)
    return end


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--storage", type=float, default=5.0, help="GB/s of the shared storage")
    parser.add_argument("--driver-cores", type=int, default=32)
    parser.add_argument("--dispatch", type=float, default=2e-3, help="seconds that sending a task takes (cluster.py)")
    given = parser.parse_args()
    for name, recipe in CODECS.items():
        with tempfile.TemporaryDirectory() as folder:
            rates = measured(name, recipe, Path(folder))
        print(
            f"{name}: {1e9 * rates.encode:.0f} ns of one core a weight, {8 * rates.written:.2f} bits; the driver "
            f"{1e9 * rates.driver:.0f} ns a weight, {1e3 * rates.per_task:.1f} ms a task"
        )
        for model, about in MODELS.items():
            sizes = []
            for rows, columns in shapes(about):
                total = rows * columns
                parts = max(1, -(-total // rates.task_weights)) if rates.task_weights else 1
                sizes += [total // parts] * parts
            own = rates.driver * sum(sizes) / given.driver_cores
            row = [f"{model} ({sum(sizes) / 1e9:.0f} G weights, {len(sizes):,} tasks, driver {own / 3600:.2f} h)"]
            for n in WORKERS:
                took = makespan(sizes, rates, n, given.storage * 1e9, given.dispatch) + own
                row.append(f"{n} workers {took / 3600:.2f} h")
            print("  " + " | ".join(row))


if __name__ == "__main__":
    main()
