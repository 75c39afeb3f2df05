"""Every single bit of a file flipped: each answer is an error or what it was before, and `verify` finds every flip.

    python tests/container/flips.py [CODEC ...]

Takes files of about 5 kB, in memory, and prints what became of their flips: 25 minutes of CPU time, most of them for
decoding with the trellis. Where `verify` finds a tensor that decodes to other bytes, `decode` refuses it by the same
comparison; then it is asked for one flip in `SAMPLED` only.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import pqcli
from pqcli.errors import ContainerError
from tests.container import small

MEMORY = Path("/dev/shm")
SAMPLED = 16


class Flips:
    """A sound file's answers, and what becomes of them when bits of it are flipped."""

    def __init__(self, file: Path, folder: Path) -> None:
        self.data = file.read_bytes()
        self.counts: Counter[str] = Counter()
        self._file, self._dense = folder / "flipped.pq.safetensors", folder / "dense.pt"
        self._file.write_bytes(self.data)
        assert pqcli.verify(self._file) == []
        self._report, self._inspected = self._answer(small.reported), self._answer(small.inspected)
        self._decoded = self._answer(self._dense_bytes)

    def check(self, bits: Iterable[int]) -> None:
        """Flip each of these bits, one at a time; an AssertionError has the number of the first that goes unseen."""
        for bit in bits:
            hurt = bytearray(self.data)
            hurt[bit // 8] ^= 1 << bit % 8
            self._file.write_bytes(hurt)
            self.counts["flips"] += 1
            self.counts[self._outcome(bit)] += 1

    def _outcome(self, bit: int) -> str:
        findings = small.asked(pqcli.verify, self._file)
        assert findings != [], bit
        try:
            pqcli.open(self._file).__exit__(None, None, None)
        except ContainerError:
            return "refused by every command"  # each of them begins like this
        report, inspected = self._answer(small.reported), self._answer(small.inspected)
        assert inspected == self._inspected, bit
        assert report in (None, self._report), bit
        decoded, is_damaged = None, any(finding.name is not None for finding in findings)
        if not is_damaged or bit % SAMPLED == 0:
            decoded = self._answer(self._dense_bytes)
            assert decoded == (None if is_damaged else self._decoded), bit
        return f"found by verify; {_said('report', report)}, {_said('decode', decoded)}"

    def _answer(self, verb: Callable[[Path], Any]) -> Any:
        """What a verb says; None for an error."""
        answer = small.asked(verb, self._file)
        return None if isinstance(answer, type) else answer

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
