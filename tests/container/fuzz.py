"""Random edits of sound containers of every codec: each gives an answer or one of pqcli's errors.

    python -m tests.container.fuzz --inputs 10000 --seconds 60

Half of the edits are of bytes, half of the manifest or an entry with a true checksum. Prints the number of inputs.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import pytest

from tests.container import small
from tests.container.forging import taken_apart

ODD = (None, True, -1, 0, 1, 7, 1 << 20, 1 << 62, 10**30, 0.5, "", "keep", "pq", "float16", [], {}, [1, 2])


def edited(file: Path, rng: random.Random) -> bytes:
    """A sound file with a few things changed."""
    if rng.random() < 0.5:
        data = bytearray(file.read_bytes())
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data[: rng.choice((len(data), len(data), rng.randrange(len(data))))])
    forgery = taken_apart(file)
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.5:
            change_manifest(forgery.manifest, rng)
        else:
            entry = forgery.entries[rng.choice([key for key in forgery.entries if key != "pqcli.manifest"])]
            data = bytearray(entry[2]) or bytearray(1)
            data[rng.randrange(len(data))] = rng.randrange(256)
            entry[2] = bytes(data)
    return forgery.bytes()


def change_manifest(node: object, rng: random.Random) -> None:
    """Change one value somewhere below."""
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not (isinstance(node[key], dict | list) and node[key]) or rng.random() < 0.1:
            node[key] = rng.choice(ODD)
            return
        node = node[key]


def main() -> None:
    """Edit and ask until there have been enough inputs, or it has taken long enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, n = random.Random(asked.seed), 0
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        files = []
        for codec in small.RECIPES:
            (Path(folder) / codec).mkdir()
            files.append(small.make(codec, Path(folder) / codec, patch))
        target = Path(folder) / "edited.pq.safetensors"
        started = time.monotonic()  # the files are made: kernels may have been compiled for that
        while n < asked.inputs and time.monotonic() - started < asked.seconds:
            data = edited(rng.choice(files), rng)
            target.write_bytes(data)
            try:
                small.answers(target)
            except BaseException:
                Path("failed.pq.safetensors").write_bytes(data)
                print(f"input {n} of seed {asked.seed} failed; it is in failed.pq.safetensors")
                raise
            n += 1
    print(f"container: {n:,} inputs in {time.monotonic() - started:.0f} s, no failure")


if __name__ == "__main__":
    main()
