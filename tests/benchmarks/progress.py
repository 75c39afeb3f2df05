"""Whether the time left is true: what the bar promises during a job, against what the job then took.

    python tests/benchmarks/progress.py CHECKPOINT [--stats FILE] [--case NAME]

Prints for each case how long each stage took, and the promise at a quarter, half, three quarters and nine tenths of
the time, each as a multiple of the time that was really left; then the worst promise from a quarter of the way on, and
for how much of that time there was none. The stages' CPU times are what `Codec.costs` is made of.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

import pqcli
from pqcli.jobs.events import Event
from pqcli.jobs.pace import Pace

CASES = {
    "plain": {},
    "plain 4x256": {"block_size": 4, "n_centroids": 256},
    "ecpq, bytes": {"codec": "pq", "target_ratio": 39.0},
    "ecpq, error": {"codec": "pq", "max_relative_mse": 0.1},
    "trellis": {"codec": "trellis"},
    "trellis, 64 states": {"codec": "trellis", "effort": 64},
    "trellis, bytes": {"codec": "trellis", "target_ratio": 39.0},
    "trellis, error": {"codec": "trellis", "max_relative_mse": 0.1},
    "auto": {"codec": "auto", "target_ratio": 20.0},
}
LOOKED = 0.05
"""Seconds between two looks at the bar."""
MARKS = (0.25, 0.5, 0.75, 0.9)


def main() -> None:
    """Every case, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--stats")
    parser.add_argument("--case", choices=CASES)
    options = parser.parse_args()
    for name, wish in CASES.items():
        if options.case in (None, name):
            measure(name, options.checkpoint, pqcli.Recipe(**wish, stats=options.stats))


def measure(name: str, checkpoint: Path, recipe: pqcli.Recipe) -> None:
    """One case: compress, look at the bar all the while, and compare."""
    started, cpu = time.perf_counter(), time.process_time()
    pace = Pace()
    stages: list[list] = []
    promises: list[tuple[float, float | None]] = []
    ended = threading.Event()

    def hook(event: Event) -> None:
        now = time.perf_counter()
        is_new = not stages or stages[-1][0] != event.stage or (event.done == 0 and stages[-1][3] > 0)
        if is_new:
            stages.append([event.stage, now, time.process_time(), 0])
        stages[-1][3] = event.done
        pace.see(event, now)

    def look() -> None:
        while not ended.wait(LOOKED):
            now = time.perf_counter()
            promises.append((now, pace.left(now)))

    watcher = threading.Thread(target=look)
    watcher.start()
    with tempfile.TemporaryDirectory() as folder:
        pqcli.compress(checkpoint, Path(folder) / "x.pq.safetensors", recipe, progress=hook)
    end, end_cpu = time.perf_counter(), time.process_time()
    ended.set()
    watcher.join()
    print(f"{checkpoint.name}, {name}: {end - started:.1f} s, {end_cpu - cpu:.1f} s of CPU")
    for (stage, at, at_cpu, _), after in zip(stages, [*stages[1:], ["", end, end_cpu, 0]], strict=True):
        print(f"    {stage:10} {after[1] - at:6.1f} s {after[2] - at_cpu:6.1f} s of CPU")
    late = [(at, left) for at, left in promises if (at - started) / (end - started) >= MARKS[0]]
    said = [(at, left / (end - at)) for at, left in late if left is not None and end - at > 1]
    for mark in MARKS:
        at = started + mark * (end - started)
        nearest = min(promises, key=lambda one: abs(one[0] - at), default=(at, None))
        text = "nothing" if nearest[1] is None else f"{nearest[1] / (end - nearest[0]):.2f} of what was left"
        print(f"    at {mark:.0%}: {text}")
    if said:
        low, high = min(ratio for _, ratio in said), max(ratio for _, ratio in said)
        print(f"    from a quarter on {low:.2f} to {high:.2f}, within a factor of two for "
              f"{sum(0.5 <= ratio <= 2 for _, ratio in said) / len(late):.0%} of the time, "
              f"nothing said for {sum(left is None for _, left in late) / len(late):.0%}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
