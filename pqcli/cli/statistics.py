"""The commands about statistics of layers' inputs: `calibrate` collects them, `stats` shows and adds up their files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pqcli.cli import completion
from pqcli.cli.options import (
    NETWORK,
    Command,
    ComputeDtype,
    Force,
    Group,
    Json,
    Length,
    MoreTexts,
    Quiet,
    Split,
    Split_,
    Texts,
    examples,
)
from pqcli.cli.running import run
from pqcli.defaults import BLOCK_WIDTH, FULL_WIDTH, LINES_AT_ONCE, N_LINES, N_WINDOWS, WINDOWS_AT_ONCE
from pqcli.errors import UsageError

if TYPE_CHECKING:
    from pqcli.cli.console import Console

group = typer.Typer(
    name="stats",
    cls=Group,
    help="Show and add up statistics of layers' inputs.",
    epilog=examples("pqcli stats show model.stats.safetensors"),
    no_args_is_help=True,
)

CALIBRATE_EXAMPLES = examples(
    "pqcli calibrate ./my-model --text book.txt letters.txt",
    "pqcli calibrate ./my-encoder --text sentences.txt --samples 5000 -o encoder.stats.safetensors",
)


def calibrate(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A Hugging Face folder: config, tokenizer, weights.")
    ],
    more: MoreTexts = None,
    *,
    text: Texts = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", help="Where to write; without it, NAME.stats.safetensors beside FOLDER."
        ),
    ] = None,
    split: Split_ = Split.auto,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=NETWORK,
            help=f"Examples, drawn at random; without it, {N_WINDOWS} windows or {N_LINES} lines.",
        ),
    ] = None,
    length: Length = None,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=NETWORK,
            help=f"Examples at once; without it, {WINDOWS_AT_ONCE} windows or {LINES_AT_ONCE} lines.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=NETWORK, help="Draws the examples, and labels or projections.")
    ] = 0,
    gradients: Annotated[
        bool,
        typer.Option(
            "--gradients/--no-gradients", help="Whether to find out how much the output feels each layer.", metavar=""
        ),
    ] = True,
    full_width: Annotated[
        int, typer.Option(metavar="N", help="Inputs wider than this keep blocks of their moments only.")
    ] = FULL_WIDTH,
    block_width: Annotated[int, typer.Option(metavar="N", help="Width of those blocks.")] = BLOCK_WIDTH,
    dtype: Annotated[
        ComputeDtype, typer.Option(rich_help_panel=NETWORK, help="What the model computes in.")
    ] = ComputeDtype.float32,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            rich_help_panel=NETWORK,
            autocompletion=completion.devices,
            help="Where the model runs: auto, cpu, cuda, cuda:0, mps.",
        ),
    ] = "auto",
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run text through a Hugging Face model and write statistics of its layers' inputs, for compress --stats.

    Needs transformers, which pqcli's extra of that name installs. Uses no network, and runs no code from the folder.
    """

    def work(console: Console) -> None:
        files = [*(text or []), *(more or [])]
        if not files:
            raise UsageError("there is no text to run; name some with --text FILE")
        from pqcli.jobs import calibrate

        sampling = calibrate.Sampling(split.value, samples, length, batch, seed, dtype.value)
        with console.progress(folder.name) as hook:
            done = calibrate.calibrate(
                folder, files, output, sampling,
                gradients=gradients, full_width=full_width, block_width=block_width,
                device=device, force=force, progress=hook,
            )  # fmt: skip
        console.calibrated(done)

    run(work, json=json, quiet=quiet)


@group.command(cls=Command, epilog=examples("pqcli stats show model.stats.safetensors"))
def show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Statistics, or an importance matrix of llama.cpp.")],
    json: Json = False,
) -> None:
    """Show what a file of statistics knows of each weight: samples, inputs, what is kept, gradient, size."""

    def work(console: Console) -> None:
        from pqcli.jobs import statistics

        console.statistics(statistics.show(file))

    run(work, json=json)


@group.command(
    cls=Command, epilog=examples("pqcli stats merge a.stats.safetensors b.stats.safetensors -o c.stats.safetensors")
)
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Statistics of one model, two files or more.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write the sum.")],
    *,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add up statistics of several runs or machines: the result is that of one run over all their samples."""

    def work(console: Console) -> None:
        from pqcli.jobs import statistics

        n_weights = statistics.merge(files, output, force=force)
        if json:
            console.json({"output": str(output), "output_bytes": output.stat().st_size, "n_weights": n_weights})
        else:
            console.note(f"wrote {output}: {n_weights} weights")

    run(work, json=json, quiet=quiet)
