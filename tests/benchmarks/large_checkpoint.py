"""A large sharded checkpoint through the command line: memory of each process, time, sizes; made-up bf16 weights.

usage: large_checkpoint.py [--folder /tmp/large] [--gigabytes 6] [--keep] [-- FLAGS OF compress]
Makes a Hugging Face folder of that size: a tensor of 1 GB, 150 or so of 34 MB, and norms, in shards of 1 GB with an
index. Then `compress --dry-run`, `plan`, `compress`, `decode`: a line of JSON each, with the seconds that passed, those
of the processor, and the peak resident set. Exits with 1 where a process took 1.5 GB or more, a plan 5 s or more, or a
decoded tensor has another shape or dtype. Needs twice and a half the size on the disk, and removes all it made.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from pqcli import checkpoint

MOST_BYTES, MOST_SECONDS = 1.5e9, 5.0
SHARD_BYTES = 10**9
LARGEST = (128_000, 4_096)  # 1.05 GB in bfloat16
USUAL = (4_096, 4_096)
PIECE = 1 << 20
MEASURE = """
import json, os, resource, subprocess, sys, time
started = time.monotonic()
process = subprocess.Popen([sys.executable, "-m", "pqcli", *sys.argv[1:]], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
process.returncode = os.waitstatus_to_exitcode(status)
seconds, cpu_seconds = round(time.monotonic() - started, 1), round(usage.ru_utime + usage.ru_stime, 1)
print(json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": usage.ru_maxrss * 1024,
                  "exit_code": process.returncode}))
"""
"""Runs pqcli below a small process: a child is charged with what its parent held when it was started."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/large-checkpoint"))
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--keep", action="store_true", help="leave the folder where it is")
    parser.add_argument("flags", nargs="*", help="of compress")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    try:
        free = shutil.disk_usage(args.folder).free
        if free < 2.5e9 * args.gigabytes:
            sys.exit(f"{args.folder}: {free:,} bytes are free, and {2.5e9 * args.gigabytes:,.0f} are needed")
        sys.exit(run(args.folder, args.gigabytes, args.flags))
    finally:
        if not args.keep:
            shutil.rmtree(args.folder)


def run(folder, gigabytes, flags):
    started = time.monotonic()
    n_tensors, n_bytes = write_folder(folder / "model", gigabytes * 1e9)
    say("made", seconds=round(time.monotonic() - started, 1), n_tensors=n_tensors, n_bytes=n_bytes)
    is_good = True
    for name, command in {
        "compress --dry-run": ["compress", "model", "--dry-run", *flags],
        "plan": ["plan", "model", *flags],
        "compress": ["compress", "model", "-q", *flags],
        "decode": ["decode", "model.pq", "-q"],
    }.items():
        done = subprocess.run([sys.executable, "-c", MEASURE, *command], cwd=folder, stdout=subprocess.PIPE, check=True)
        found = json.loads(done.stdout)
        is_plan = name in {"compress --dry-run", "plan"}
        is_within = found["peak_bytes"] < MOST_BYTES and not (is_plan and found["seconds"] >= MOST_SECONDS)
        is_good = is_good and is_within and found["exit_code"] == 0
        say(name, **found, is_within=is_within)
        if found["exit_code"]:
            return 1
    sizes = {name: sum(path.stat().st_size for path in (folder / name).iterdir()) for name in ("model", "model.pq")}
    with checkpoint.open(folder / "model") as before, checkpoint.open(folder / "model.decoded") as after:
        is_same = [(i.name, i.shape, i.dtype) for i in before.tensors] == [
            (i.name, i.shape, i.dtype) for i in after.tensors
        ]
        name = before.tensors[-2].name
        one, other = before.read(name).float(), after.read(name).float()
        error = float(torch.sum((one - other) ** 2) / torch.sum(one**2))
    say("all", **sizes, is_same_folder=is_same, relative_mse_of_one=round(error, 5))
    return 0 if is_good and is_same else 1


def write_folder(folder, n_bytes):
    """Write the checkpoint, a piece at a time; how many tensors it has, and their bytes."""
    folder.mkdir()
    shapes = {"model.embed_tokens.weight": LARGEST}
    left = n_bytes - 2 * LARGEST[0] * LARGEST[1]
    for i in range(-(-int(left) // (2 * USUAL[0] * USUAL[1]))):
        shapes[f"model.layers.{i}.mlp.weight"] = USUAL
        shapes[f"model.layers.{i}.norm.weight"] = (USUAL[0],)
    shards, size = [{}], 0
    for name, shape in shapes.items():
        tensor_bytes = 2 * torch.Size(shape).numel()
        if size and size + tensor_bytes > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name] = shape
        size += tensor_bytes
    generator = torch.Generator().manual_seed(0)
    pool = (0.02 * torch.randn(16 * PIECE, generator=generator)).bfloat16().view(torch.int16).numpy()
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        write_shard(folder / file, shard, pool, generator)
    total = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return len(shapes), total


def write_shard(path, shapes, pool, generator):
    """A safetensors file; its weights are pieces of the pool, from anywhere in it."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = end // 2
        while left:
            n = min(left, PIECE)
            at = int(torch.randint(len(pool) - n, (1,), generator=generator))
            file.write(pool[at : at + n].data)
            left -= n


def say(what, **figures):
    print(json.dumps({"what": what} | figures), flush=True)


if __name__ == "__main__":
    main()
