"""`calibrate`: statistics of the inputs of a Hugging Face model's layers, from text that runs through it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pqcli import checkpoint as checkpoints
from pqcli.atomic import check_target
from pqcli.claim import check_space, claimed
from pqcli.defaults import (
    BLOCK_WIDTH,
    FULL_WIDTH,
    LINE_LENGTH,
    LINES_AT_ONCE,
    N_LINES,
    N_WINDOWS,
    WINDOW_LENGTH,
    WINDOWS_AT_ONCE,
)
from pqcli.errors import CheckpointError, StatsError, UsageError
from pqcli.integrations import loading, running, texts
from pqcli.integrations.places import is_weight, places
from pqcli.jobs.bars import Progress, hook_of, showing
from pqcli.jobs.devices import resolve_device
from pqcli.jobs.events import Event, Stage
from pqcli.stats.collecting import collect
from pqcli.stats.files import n_bytes_of, save
from pqcli.stats.moments import gradient_of
from pqcli.stats.renaming import renamed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from pqcli.integrations.loading import Runnable
    from pqcli.stats.collecting import Collector
    from pqcli.stats.moments import Statistics
    from pqcli.stats.renaming import Place

SUFFIX = ".stats.safetensors"
SPLITS = ("auto", "lines", "windows")


@dataclass(frozen=True)
class Sampling:
    """Which examples are drawn from the texts, and how they run.

    split       "lines" (each line is an example), "windows" (stretches of running text), or "auto": lines for encoders
                and classifiers, windows for models that write
    samples     how many examples; None: 128 windows, or 2,048 lines
    length      most tokens of an example; None: 512 for windows and 256 for lines, or what the model takes
    batch       examples that run at once; None: 4 windows, or 32 lines
    seed        draws the examples, the labels and the projections
    dtype       what the model computes in: float32, bfloat16 or float16
    """

    split: str = "auto"
    samples: int | None = None
    length: int | None = None
    batch: int | None = None
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UsageError(f"split must be one of {', '.join(SPLITS)}, not {self.split!r}")
        for name in ("samples", "length", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")


@dataclass(frozen=True)
class Calibrated:
    """What a calibration gave.

    `unseen` are weights of the checkpoint of which the file knows nothing: they were not found in the model, no layer
    used them while it was watched, or the output does not depend on it. `random` are parameters that the model has and
    the checkpoint does not.
    """

    output: str
    output_bytes: int
    seconds: float
    model: str
    split: str
    n_examples: int
    n_tokens: int
    n_weights: int
    unseen: tuple[str, ...]
    random: tuple[str, ...]


@showing
def calibrate(
    folder: str | Path,
    text: Sequence[str | Path],
    output: str | Path | None = None,
    sampling: Sampling | None = None,
    *,
    gradients: bool = True,
    full_width: int = FULL_WIDTH,
    block_width: int = BLOCK_WIDTH,
    device: str = "auto",
    force: bool = False,
    progress: Progress = None,
) -> Calibrated:
    """Run text through the model of a Hugging Face folder and write `NAME.stats.safetensors`, by default beside it.

    Statistics have the names of the checkpoint's tensors. Nothing is fetched from a network, and no code of the folder
    is run. Memory: the model, the activations of one batch with `gradients`, and about 4 c^2 bytes for each input of c
    columns (up to `full_width`; beyond it 4 c `block_width`). The file appears whole or not at all.

    Raises MissingExtraError without transformers, StatsError where the model or the texts are not what is needed,
    CheckpointError, OutputError or UsageError.
    """
    started = time.perf_counter()
    sampling, hook = sampling or Sampling(), hook_of(progress)
    folder, paths = Path(folder), [Path(path) for path in text]
    target = Path(output) if output else default_output(folder)
    where = resolve_device(device)
    check_target(target, force=force)
    with claimed(target), checkpoints.open(_folder(folder)) as checkpoint:
        hook(Event("loading", 0, 1))
        runnable = loading.load(folder, sampling.dtype)
        examples = drawn(runnable, paths, sampling)
        weights = [info for info in checkpoint.tensors if is_weight(info)]
        found = places(checkpoint, runnable.model, Stage(hook, "naming", sum(info.numel for info in weights)))
        if not found:
            raise StatsError(f"'{folder}': none of its {len(weights)} weights is one of the model's")
        runnable.model.to(where)
        stage = Stage(hook, "calibrating", sum(map(len, examples.ids)))
        with collect(
            runnable.model,
            gradients=gradients,
            full_width=full_width,
            block_width=block_width,
            seed=sampling.seed,
            split_stacks=any(place.index is not None for place in found.values()),
        ) as stats:
            watched(runnable, examples, stats, stage, sampling.seed, lambda: _check_room(target, stats, found))
        named = renamed(stats.statistics(), _felt(found, stats.statistics()) if gradients else found)
        if not named.weights:
            raise StatsError(f"'{folder}': no layer of the model used one of the checkpoint's weights")
        save(named, target, force=force)
    return Calibrated(
        output=str(target),
        output_bytes=target.stat().st_size,
        seconds=time.perf_counter() - started,
        model=type(runnable.model).__name__,
        split=examples.split,
        n_examples=len(examples.ids),
        n_tokens=sum(map(len, examples.ids)),
        n_weights=len(named.weights) + len(named.aliases),
        unseen=tuple(info.name for info in weights if info.name not in named),
        random=runnable.missing,
    )


def default_output(folder: Path) -> Path:
    """`NAME.stats.safetensors` beside a folder."""
    folder = folder.resolve() if folder.name in {"", ".", ".."} else folder
    return folder.with_name(folder.name + SUFFIX)


@dataclass(frozen=True)
class Examples:
    """Token ids of the examples that were drawn, how they were cut, and how many run at once."""

    ids: list[list[int]]
    split: str
    batch: int


def drawn(
    runnable: Runnable, paths: Sequence[Path], sampling: Sampling, n_windows: int = N_WINDOWS, n_lines: int = N_LINES
) -> Examples:
    """Examples for a model; `n_windows` or `n_lines` of them where the sampling leaves it open."""
    split = sampling.split
    if split == "auto":
        split = "lines" if runnable.reads_sentences else "windows"
    n, length, batch = (
        (n_lines, LINE_LENGTH, LINES_AT_ONCE) if split == "lines" else (n_windows, WINDOW_LENGTH, WINDOWS_AT_ONCE)
    )
    if runnable.max_length is not None:
        length = min(length, runnable.max_length)
        if sampling.length is not None and sampling.length > runnable.max_length:
            raise UsageError(f"the model takes at most {runnable.max_length} tokens, not {sampling.length}")
    cut = texts.lines if split == "lines" else texts.windows
    ids = cut(runnable.tokenizer, paths, sampling.samples or n, sampling.length or length, sampling.seed)
    if runnable.is_pair and split == "lines":
        return Examples(ids, split, 1)  # what is read and what is written would be padded differently
    return Examples(ids, split, sampling.batch or batch)


def watched(
    runnable: Runnable, examples: Examples, stats: Collector, stage: Stage, seed: int, after_first: Callable[[], None]
) -> None:
    """Run the examples; `after_first` is called once, when all layers have been seen."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    padding = getattr(runnable.tokenizer, "pad_token_id", None) or 0
    for i, batch in enumerate(texts.batches(examples.ids, examples.batch, padding)):
        with torch.set_grad_enabled(stats.has_gradients):
            output = running.output_of(runnable, batch, generator)
            if stats.has_gradients:
                stats.backward(output)
        if not i:
            after_first()
        stage(batch.n_tokens, "")


def _felt(found: Mapping[str, Place], seen: Statistics) -> dict[str, Place]:
    """Without the weights that ran and that the output does not feel, such as a pooler that nobody asks.

    Among weights with a gradient number one without would be given steps in another unit.
    """

    def is_felt(place: Place) -> bool:
        weight = seen.weights.get(seen.aliases.get(place.watched, place.watched))
        return weight is not None and gradient_of(weight) is not None

    return {name: place for name, place in found.items() if is_felt(place)}


def _check_room(target: Path, stats: Collector, found: Mapping[str, Place]) -> None:
    check_space(target, n_bytes_of(renamed(stats.statistics(), found)))


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise CheckpointError(f"'{folder}' is no folder; calibrate wants the folder of a Hugging Face model")
    return folder
