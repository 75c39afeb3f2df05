"""How long a compression will take on this machine, and how much memory: found out by compressing something small.

Nothing is remembered and no rate is written down anywhere: the loop that compresses (`pqcli.jobs.compress`) runs on two
small checkpoints of random weights, with the recipe's own codec and settings, and what its stages took is carried over
to the size of the real one. That takes a fraction of a second, and sees what the machine is like at this moment: its
processors, its load, and which kernels are compiled already.

Each stage is taken as linear in its work: weights, for most. Plain PQ's encoding has two kinds of work, iterations of
EM and all else; drafts and shared codebooks look at samples that stop growing; where statistics are used, the work on a
weight grows with the columns of its matrix. A budget takes as many rounds as it does on the small checkpoint, which is
not certain: an estimate, that should be right within a factor of two.

Memory: what this process holds once it has done the small work, and what tasks in flight take (`Task.n_bytes`), as the
executors bound it; whole-checkpoint codecs hold their result on top, several times while a budget is searched for.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors.torch import save_file

from pqcli import checkpoint as checkpoints
from pqcli.codecs import registry
from pqcli.codecs.base import Weights, record_of
from pqcli.codecs.plain import PlainJob, options_of
from pqcli.container.peek import SUFFIX
from pqcli.core.threads import n_threads
from pqcli.errors import PQError
from pqcli.jobs import compress as compressing
from pqcli.jobs.executors import Threads
from pqcli.jobs.opening import NOT_CODED
from pqcli.recipe.recipe import Recipe

if TYPE_CHECKING:
    from pqcli.jobs.events import Event
    from pqcli.plan.plan import Plan, PlanEntry

SMALL, LARGER, LARGEST = 1 << 13, 1 << 16, 1 << 18
"""Weights of each of the tensors of the small checkpoints; the largest is for plain PQ, which is quick."""
ITERATIONS: Final = 10
"""Iterations of EM that are timed."""
LEAST: Final = 1 << 16
"""Weights below which there is nothing to predict: it takes about as long as finding out."""
DRAFTED: Final = 1 << 22
"""Weights that drafts look at most (`codecs.trellis.session`), or shared codebooks are learned from."""
HELD_WHILE_SEARCHING: Final = 3
"""Results in memory at most while a budget is searched for."""
USUAL_BITS: Final = 4.0
"""Bits a weight of a result whose size is not known yet."""
COLUMNS: Final = 512
"""Columns of the random matrices; with statistics, whose work grows with columns, those that real ones have."""
MOST_COLUMNS: Final = 2048
STREAM_WEIGHTS: Final = 1 << 20
"""Weights in a stream of the trellis, which one thread codes (`core.trellis.params`)."""


LONGEST_START: Final = 5.0
"""A process that imported this later had done other things before."""
_LOADED: Final = min(time.process_time(), LONGEST_START)


@dataclass(frozen=True)
class Prediction:
    """About how long `compress` will take, without the start of the program, and its largest memory."""

    seconds: float
    memory_bytes: int


@dataclass
class _Clock:
    """A hook that notes how long each stage takes: it lasts until the next one begins."""

    seconds: dict[str, float] = field(default_factory=dict)
    _stage: str = "starting"
    _since: float = field(default_factory=time.perf_counter)

    def __call__(self, event: Event) -> None:
        if event.stage != self._stage:
            self.turn(event.stage)

    def turn(self, stage: str) -> None:
        """The next stage begins."""
        now = time.perf_counter()
        self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now


def predict(plan: Plan, recipe: Recipe, device: torch.device, workers: int | None = None) -> Prediction | None:
    """What compressing by this plan will take; None where little or nothing is to be quantized.

    `workers` is the number of processes that do the work, where not threads do.
    """
    coded = [entry for entry in plan.entries if entry.action not in NOT_CODED]
    n_weights = sum(entry.info.numel for entry in coded)
    if n_weights < LEAST:
        return None
    executor = Threads.within(device, recipe.max_memory)
    row = registry.chosen(recipe.codec, has_budget=bool(recipe.spending))
    if row.name == registry.PLAIN:
        seconds = _seconds_of_plain(coded, recipe, executor)
    else:
        seconds = _seconds_of_streams(coded, recipe, executor)
    memory = _base_bytes() + _in_flight(coded, recipe, executor)
    if row.name != registry.PLAIN:
        is_searched = bool(recipe.spending) and recipe.quality is None and recipe.rate_weight is None
        memory += (HELD_WHILE_SEARCHING if is_searched else 1) * _result_bytes(plan, recipe, n_weights)
    if workers is not None:
        seconds = _started(workers) + seconds * n_threads() / min(workers, n_threads())
        memory += workers * _base_bytes()
    return Prediction(seconds, memory)


# --- seconds ----------------------------------------------------------------------------------------------------------


def _seconds_of_plain(coded: Sequence[PlanEntry], recipe: Recipe, executor: Threads) -> float:
    """From two runs that differ in iterations alone: what an iteration takes, and what all else takes a weight."""
    largest = max(coded, key=lambda entry: entry.info.numel)
    scheme = largest.scheme
    if scheme is None:
        return 0.0
    small = replace(
        recipe, rules=(), include=(), exclude=(), stats=None, sample="all", block_size=scheme.block_size,
        n_centroids=scheme.n_centroids, n_iter=1,
    )  # fmt: skip
    started = _run(SMALL, COLUMNS, small, executor)  # loads kernels as well, once
    little, once = (_run(n, COLUMNS, small, executor) for n in (SMALL + COLUMNS, LARGEST))
    often = _run(LARGEST, COLUMNS, replace(small, n_iter=1 + ITERATIONS), executor)
    n_weights = LARGEST * _n_tensors()
    a_product = max(_total(often) - _total(once), 0.0) / ITERATIONS / (n_weights * scheme.n_centroids)
    a_weight = max(_total(once) - _total(little), 0.0) / (n_weights - SMALL * _n_tensors())
    work = sum(_em_work(entry) for entry in coded) * recipe.restarts
    return _total(started) + a_product * work + a_weight * sum(entry.info.numel for entry in coded)


def _em_work(entry: PlanEntry) -> float:
    """Products that EM computes for a tensor: blocks of an iteration, centroids, and the length of a block."""
    scheme = entry.scheme
    if scheme is None:
        return 0.0
    all_blocks = scheme.sample or entry.n_vectors
    on_samples = [(n, n_iter) for n, n_iter in scheme.stages]
    left = max(scheme.n_iter - sum(n_iter for _, n_iter in on_samples), 1)
    blocks = sum(n * n_iter for n, n_iter in on_samples) + all_blocks * left
    return float(blocks) * scheme.n_centroids * scheme.block_size


def _seconds_of_streams(coded: Sequence[PlanEntry], recipe: Recipe, executor: Threads) -> float:
    """From a run that is nearly all start and one that is nearly all work: each stage a line through the two."""
    n_weights = sum(entry.info.numel for entry in coded)
    recipe, columns = _alike(recipe, n_weights), COLUMNS
    if recipe.stats is not None:  # the work on a weight grows with the columns of its matrix
        columns = min(sum(entry.info.numel * entry.columns for entry in coded) // n_weights, MOST_COLUMNS)
    first, small, larger = (_run(n, columns, recipe, executor) for n in (SMALL, SMALL + columns, LARGER))
    total = _total(first)  # what the first run took more than the second is the loading of kernels, once
    done, difference = SMALL * _n_tensors(), (LARGER - SMALL) * _n_tensors()
    in_streams = min(n_threads(), max(n_weights // STREAM_WEIGHTS, 1))
    for stage, seconds in larger.items():
        rate = max(seconds - small.get(stage, 0.0), 0.0) / difference
        is_sampled = stage == "searching" or (stage == "learning" and recipe.codec == registry.PLAIN)
        work = min(n_weights, DRAFTED) if is_sampled else n_weights
        if stage in ("encoding", "measuring") and recipe.codec != registry.PLAIN:
            work //= in_streams  # the small checkpoint is one stream, on one thread
        total += rate * max(work - done, 0)
    return total


def _alike(recipe: Recipe, n_weights: int) -> Recipe:
    """A recipe that asks of a small checkpoint what this one asks of the whole."""
    from pqcli.codecs.trellis.session import n_states

    changes: dict[str, object] = {"rules": (), "include": (), "exclude": ()}
    if recipe.codec != registry.PLAIN:
        changes["effort"] = n_states(n_weights, recipe.effort)
    if recipe.target_bytes is not None:
        bits = min(max(8 * recipe.target_bytes / n_weights, 1.0), 12.0)
        changes |= {"target_bytes": None, "target_bits": bits}
    if recipe.target_ratio is not None:
        changes |= {"target_ratio": None, "target_bits": min(max(32 / recipe.target_ratio, 1.0), 12.0)}
    return replace(recipe, **changes)  # type: ignore[arg-type]


@cache
def _run(n_weights_each: int, columns: int, recipe: Recipe, executor: Threads) -> Mapping[str, float]:
    """Seconds by stage of compressing random matrices of so many weights, a few for every thread."""
    with _random(n_weights_each, columns) as (checkpoint, stats):
        if recipe.stats is not None:
            _collect(checkpoint, columns, stats)
            recipe = replace(recipe, stats=str(stats))
        clock = _Clock()
        target = Path(checkpoint.path).with_name(f"small{SUFFIX}")
        # a budget that so small a checkpoint cannot meet takes about as long as one that it can
        with suppress(PQError):
            compressing.compress_opened(checkpoint, target, recipe, executor, hook=clock)
        clock.turn("done")
    return clock.seconds


@contextmanager
def _random(n_weights_each: int, columns: int) -> Iterator[tuple[checkpoints.Checkpoint, Path]]:
    """An open checkpoint of random matrices, and a place for statistics of their inputs."""
    generator = torch.Generator().manual_seed(n_weights_each)
    rows = max(n_weights_each // columns, 1)
    tensors = {f"{i}.weight": torch.randn((rows, columns), generator=generator) for i in range(_n_tensors())}
    with tempfile.TemporaryDirectory(prefix="pqcli-") as folder:
        path, stats = Path(folder) / "small.safetensors", Path(folder) / "small.stats.safetensors"
        save_file(tensors | {f"{i}.bias": torch.randn(rows, generator=generator) for i in range(_n_tensors())}, path)
        with checkpoints.open(path) as found:
            yield found, stats


def _collect(checkpoint: checkpoints.Checkpoint, columns: int, path: Path) -> None:
    """Write statistics of random inputs to the matrices of a checkpoint."""
    from pqcli.stats.collecting import collect

    tensors = {info.name: checkpoint.read(info.name) for info in checkpoint.tensors if len(info.shape) > 1}
    inputs = torch.randn((2 * columns, columns), generator=torch.Generator().manual_seed(columns))
    with collect(tensors) as seen, torch.no_grad():
        for tensor in tensors.values():
            torch.nn.functional.linear(inputs, tensor)
    seen.save(path)


def _n_tensors() -> int:
    return 2 * n_threads()


def _total(seconds: Mapping[str, float]) -> float:
    return sum(seconds.values())


def _started(workers: int) -> float:
    """Seconds that so many processes take to start, by the processor time that it took this one."""
    return _LOADED * -(-workers // max(os.cpu_count() or 1, 1))


# --- bytes ------------------------------------------------------------------------------------------------------------


def _base_bytes() -> int:
    """The largest memory of this process so far, which has all loaded that the work needs."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _result_bytes(plan: Plan, recipe: Recipe, n_weights: int) -> int:
    """About the size of the file: what is kept, and the budget or else as many bits as most want."""
    kept = sum(entry.predicted_bytes for entry in plan.entries if entry.action in NOT_CODED)
    return kept + (recipe.target_bytes or int((recipe.target_bits or USUAL_BITS) * n_weights / 8))


def _in_flight(coded: Sequence[PlanEntry], recipe: Recipe, executor: Threads) -> int:
    """What tasks take that run side by side: within the executor's bound, unless one alone takes more."""
    sizes = _task_bytes(coded, recipe)
    return max(max(sizes), min(sum(sizes), executor.in_flight_bytes))


def _task_bytes(coded: Sequence[PlanEntry], recipe: Recipe) -> list[int]:
    row = registry.chosen(recipe.codec, has_budget=bool(recipe.spending))
    if row.name == registry.PLAIN:
        weights = Weights(_Unread())
        return [PlainJob(record_of(entry), weights, options_of(entry, recipe)).n_bytes for entry in coded]
    return [16 * entry.info.numel for entry in coded]


class _Unread:
    """The checkpoint of jobs that are asked for their size alone."""

    def read(self, name: str) -> torch.Tensor:
        """Never called."""
        raise NotImplementedError(name)

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Never called."""
        raise NotImplementedError(f"{name}[{start}:{stop}]")
