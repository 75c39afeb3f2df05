"""Random edits of sound containers of every codec: each gives an answer or one of pqcli's errors, and soon.

    python -m tests.container.fuzz --inputs 10000 --seconds 60

Some edits are of bytes; some are of the header, the manifest or an entry, with a true checksum, as a stranger can make
one. Prints the number of inputs.
"""

import argparse
import faulthandler
import json
import random
import tempfile
import time
from pathlib import Path

import pytest

from tests.container import small
from tests.container.forging import Forgery, taken_apart

ODD = (None, True, -1, 0, 1, 7, 1 << 20, 1 << 62, 10**30, 0.5, "", "keep", "pq", "float16", [], {}, [1, 2])
MOMENTS = Path(__file__).parents[1] / "golden" / "moments-v1.pq.safetensors"
"""A small file with optimizer moments in eight bits."""
HANGS = 120
"""Seconds after which an input is taken to hang: then the process ends, and says where it was."""


def edited(file: Path, other: Path, rng: random.Random) -> bytes:
    """A sound file with a few things changed, or with parts of another one in it."""
    if rng.random() < 0.5:
        return with_other_bytes(file.read_bytes(), other.read_bytes(), rng)
    forgery, stranger = taken_apart(file), taken_apart(other)
    for _ in range(rng.choice((1, 1, 2))):
        rng.choice((change_manifest, change_entry, change_header, change_hash))(forgery, stranger, rng)
    return forgery.bytes()


def with_other_bytes(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Bytes replaced, inserted, left out or doubled; the file cut short, or continued by another one."""
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 2, 8, 64, 1000)))
        strange = bytes(rng.randrange(256) for _ in range(rng.choice((1, 1, 3, 8))))
        data = rng.choice((
            data[:at] + strange + data[at + len(strange) :],
            data[:at] + strange + data[at:],
            data[:at] + data[end:],
            data[:end] + data[at:],
            data[:at],
            data[:at] + other[at:],
            data[:at] + other[rng.randrange(len(other)) :],
        ))  # fmt: skip
    return data


def change_manifest(forgery: Forgery, stranger: Forgery, rng: random.Random) -> None:
    """One value somewhere: an odd one, one of the same manifest, or one of the other file's."""
    node = forgery.manifest
    while isinstance(node, dict | list) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not (isinstance(node[key], dict | list) and node[key]) or rng.random() < 0.1:
            others = [*forgery.manifest["tensors"], *stranger.manifest["tensors"]]
            node[key] = rng.choice((rng.choice(ODD), rng.choice(others), rng.choice(list(rng.choice(others).values()))))
            return
        node = node[key]


def change_entry(forgery: Forgery, stranger: Forgery, rng: random.Random) -> None:
    """The bytes of one entry, and perhaps its shape, so that it still lies where the header says."""
    entry = forgery.entries[rng.choice([key for key in forgery.entries if key != "pqcli.manifest"])]
    other = rng.choice([entry[2] for entry in stranger.entries.values() if entry[2]])
    entry[2] = with_other_bytes(bytes(entry[2]), other, rng)
    if rng.random() < 0.7:
        entry[:2] = ["U8", [len(entry[2])]]


def change_header(forgery: Forgery, _stranger: Forgery, rng: random.Random) -> None:
    """The text of the header, or its metadata."""
    if rng.random() < 0.3:
        forgery.metadata[rng.choice(list(forgery.metadata))] = rng.choice(("", "1", "2", "pq", "trellis,zeros", "é"))
        return

    def text(head: dict) -> bytes:
        about = head[rng.choice([key for key in head if key != "__metadata__"])]
        about[rng.choice(list(about))] = rng.choice((*ODD, "U8", "F32", [0, 1 << 40]))
        whole = json.dumps(head).encode()
        return with_other_bytes(whole, whole, rng) if rng.random() < 0.3 else whole

    forgery.header_text = text


def change_hash(forgery: Forgery, _stranger: Forgery, rng: random.Random) -> None:
    """All hashes of tensors, so that what decodes is believed to be right."""
    entry = forgery.entries["pqcli.hashes"]
    entry[2] = rng.randbytes(len(entry[2]))


def sound_files(folder: Path) -> list[Path]:
    """A small file of every codec, and one with moments."""
    with pytest.MonkeyPatch.context() as patch:
        files = []
        for codec in small.RECIPES:
            (folder / codec).mkdir()
            files.append(small.make(codec, folder / codec, patch))
        return [*files, MOMENTS]


def ask(data: bytes, target: Path) -> None:
    """Ask everything of a file of these bytes; whatever is raised but pqcli's errors is raised."""
    target.write_bytes(data)
    faulthandler.dump_traceback_later(HANGS, exit=True)
    try:
        small.answers(target)
    finally:
        faulthandler.cancel_dump_traceback_later()


def main() -> None:
    """Edit and ask until there have been enough inputs, or it has taken long enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rng, n = random.Random(asked.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        files = sound_files(Path(folder))
        started = time.monotonic()  # the files are made: kernels may have been compiled for that
        while n < asked.inputs and time.monotonic() - started < asked.seconds:
            data = edited(rng.choice(files), rng.choice(files), rng)
            try:
                ask(data, Path(folder) / "edited.pq.safetensors")
            except BaseException:
                Path("failed.pq.safetensors").write_bytes(data)
                print(f"input {n} of seed {asked.seed} failed; it is in failed.pq.safetensors")
                raise
            n += 1
    print(f"container: {n:,} inputs in {time.monotonic() - started:.0f} s, no failure")


if __name__ == "__main__":
    main()
