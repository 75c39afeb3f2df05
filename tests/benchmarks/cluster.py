"""What it costs to have other processes do the work: CPU and wall time against threads, at equal cores.

    python tests/benchmarks/cluster.py [--megabytes 1000] [--places threads workers ray]

Compresses random weights (plain PQ, 8x256, and a tenth of them with the trellis codec) by threads, by worker processes
and by a Ray cluster of this machine, one after another in one process; starting the cluster is timed by itself. All
files must have the same bytes.
"""

import argparse
import hashlib
import os
import resource
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import pqcli
from pqcli.core.threads import n_threads

RECIPES = {
    "plain PQ 8x256": pqcli.Recipe(block_size=8, n_centroids=256),
    "trellis": pqcli.Recipe(codec="trellis", quality="small"),
}


def write(path, n_bytes):
    generator = torch.Generator().manual_seed(0)
    n = max(1, n_bytes // (4 * 2048 * 2048))
    save_file({f"l{i}.weight": 0.02 * torch.randn(2048, 2048, generator=generator) for i in range(n)}, path)
    return path.stat().st_size


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--places", nargs="+", default=["threads", "workers", "ray"])
    given = parser.parse_args()
    options = {"threads": {}, "workers": {"workers": n_threads()}, "ray": {"ray": "auto"}}
    if "ray" in given.places:
        import ray

        started = time.perf_counter()
        ray.init(num_cpus=n_threads(), include_dashboard=False, log_to_driver=False)
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        print(f"a cluster of {n_threads()} cores starts in {time.perf_counter() - started:.1f} s")
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            source = Path(folder) / f"{name}.safetensors"
            n_bytes = write(source, given.megabytes * 10**6 // (1 if recipe.codec != "trellis" else 10))
            seen, usual = set(), 0.0
            for place in given.places:
                target = Path(folder) / f"{place}.pq.safetensors"
                before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
                pqcli.compress(source, target, recipe, **options[place])
                took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
                own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                usual = usual or took
                seen.add(hashlib.sha256(target.read_bytes()).hexdigest())
                print(
                    f"{name}, {n_bytes / 1e6:,.0f} MB, {place}: {took:.1f} s ({100 * (took / usual - 1):+.0f} %), "
                    f"{own:.1f} s of CPU in this process"
                )
            assert len(seen) == 1, "other bytes"


if __name__ == "__main__":
    main()
