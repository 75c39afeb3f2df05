"""Every single bit of a file flipped: each answer is an error or what it was before, and `verify` finds every flip.

    python tests/container/flips.py [CODEC ...]

Takes files of about 5 kB, in memory, and prints what became of their flips.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import pqcli
from pqcli.errors import ContainerError
from tests.container import small

MEMORY = Path("/dev/shm")


class Flips:
    """A sound file's answers, and what becomes of them when bits of it are flipped."""

    def __init__(self, file: Path, folder: Path) -> None:
        self.data = file.read_bytes()
        self.counts: Counter[str] = Counter()
        self._file, self._dense = folder / "flipped.pq.safetensors", folder / "dense.pt"
        self._file.write_bytes(self.data)
        self._report, self._inspected, self._decoded = self._answers()
        assert pqcli.verify(self._file) == []

    def check(self, bits: Iterable[int]) -> None:
        """Flip each of these bits, one at a time; an AssertionError has the number of the first that goes unseen."""
        for bit in bits:
            hurt = bytearray(self.data)
            hurt[bit // 8] ^= 1 << bit % 8
            self._file.write_bytes(hurt)
            self.counts["flips"] += 1
            self.counts[self._outcome(bit)] += 1

    def _outcome(self, bit: int) -> str:
        assert small.asked(pqcli.verify, self._file) != [], bit
        try:
            pqcli.open(self._file).__exit__(None, None, None)
        except ContainerError:
            return "refused by every command"  # each of them begins like this
        report, inspected, decoded = self._answers()
        assert inspected == self._inspected, bit
        assert report in (None, self._report), bit
        assert decoded in (None, self._decoded), bit
        return f"found by verify; {_said('report', report)}, {_said('decode', decoded)}"

    def _answers(self) -> tuple[Any, ...]:
        """What report, inspect and decode say; None for an error."""
        answers = [small.asked(verb, self._file) for verb in (small.reported, small.inspected, self._dense_bytes)]
        return tuple(None if isinstance(answer, type) else answer for answer in answers)

    def _dense_bytes(self, file: Path) -> bytes:
        self._dense.unlink(missing_ok=True)
        pqcli.decode(file, self._dense, verify=False)
        return self._dense.read_bytes()


def _said(verb: str, answer: Any) -> str:
    return f"{verb} {'refuses' if answer is None else 'as before'}"


def all_bits(codec: str) -> str:
    """Flip every bit of such a file; what became of the flips, as a person reads it."""
    started = time.process_time()
    shared = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=shared) as folder, pytest.MonkeyPatch.context() as patch:
        flips = Flips(small.make(codec, Path(folder), patch, five_kb=True), Path(folder))
        flips.check(range(8 * len(flips.data)))
    counts = dict(sorted(flips.counts.items()))
    assert counts.pop("flips") == 8 * len(flips.data)
    lines = [f"{codec}: {8 * len(flips.data):,} flips of {len(flips.data):,} bytes, no change unseen"]
    lines += [f"  {n:,} {outcome}" for outcome, n in counts.items()]
    return "\n".join([*lines, f"  {time.process_time() - started:.0f} s of CPU time"])


def main() -> None:
    """Flip all bits of files of these codecs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("codecs", nargs="*", default=list(small.RECIPES), metavar="CODEC")
    torch.set_num_threads(1)
    for codec in parser.parse_args().codecs:
        print(all_bits(codec), flush=True)


if __name__ == "__main__":
    main()
