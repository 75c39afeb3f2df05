"""The command line: parse, call the pipeline, hand the result to the console. It does no work, and prints nothing.

torch and everything that needs it are imported inside the commands, after what can be checked without it: help, and
errors in arguments, inputs and outputs come at once.
Every failure leaves through `_run`, the one place that turns an exception into a message and an exit code:
0 done, 1 an error of pqcli's own tree, 2 usage, 3 a check failed, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from enum import Enum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from pqcli.atomic import check_target
from pqcli.container.peek import check_container
from pqcli.errors import CheckFailedError, OutputError, PQError, UsageError
from pqcli.version import __version__

if TYPE_CHECKING:
    from pqcli.cli.console import Console
    from pqcli.recipe.recipe import Recipe

EXIT_INTERRUPTED = 130
BUDGET = "How much to spend (at most one), and on what"

app = typer.Typer(
    name="pqcli",
    help="Compress trained checkpoints by product quantization, and get the same checkpoint back.\n\n"
    "Saves storage and transfer, not arithmetic: decode before you run the model.",
    epilog="Example: pqcli compress model.pt --block-size 8",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class CodebookDtype(StrEnum):
    """Dtypes a codebook can be stored in."""

    fp16 = "fp16"
    fp32 = "fp32"


class CodecName(StrEnum):
    """What turns weights into bytes."""

    pq = "pq"
    trellis = "trellis"
    auto = "auto"


class QualityName(StrEnum):
    """Named points on the curve of size against error."""

    tiny = "tiny"
    small = "small"
    balanced = "balanced"
    high = "high"
    near_lossless = "near-lossless"


class Dtype(StrEnum):
    """Dtypes that `decode --dtype` converts to."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Format(StrEnum):
    """Forms a report can take."""

    table = "table"
    json = "json"
    csv = "csv"
    html = "html"


Source = Annotated[
    Path,
    typer.Argument(metavar="SRC", help="Checkpoint: .pt, .pth, .bin, .th, .safetensors, or a Hugging Face folder."),
]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A .pq.safetensors file.")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", show_default="STEM.pq.safetensors beside SRC", help="Where to write.")
]
BlockSize = Annotated[
    str | None,
    typer.Option(
        show_default="auto", help="Weights per block: a number, or auto (by the kind of layer).", metavar="N|auto"
    ),
]
NCentroids = Annotated[
    int | None, typer.Option(show_default="256", help="Centroids per codebook, 1 to 65536.", metavar="K")
]
NIter = Annotated[int | None, typer.Option(show_default="20", help="Most EM iterations.", metavar="I")]
Sample = Annotated[
    str | None,
    typer.Option(show_default="auto", help="Blocks per tensor that EM trains on.", metavar="N|auto|all"),
]
Restarts = Annotated[
    int | None,
    typer.Option(show_default="1", help="Starts of EM per tensor; the best one is kept.", metavar="N"),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        show_default="largest tensor + 0.5GB",
        help="Memory to stay within where a single tensor allows it: 4GB lets more tensors run side by side.",
        metavar="SIZE",
    ),
]
Codec = Annotated[
    CodecName | None,
    typer.Option(show_default="pq", help="pq: codebooks, random access. trellis: the smallest file. auto: by tensor."),
]
Quality = Annotated[
    QualityName | None, typer.Option(help="A named point on the curve of size against error.", rich_help_panel=BUDGET)
]
TargetSize = Annotated[
    str | None, typer.Option(help="Largest file, such as 6MB.", metavar="SIZE", rich_help_panel=BUDGET)
]
TargetRatio = Annotated[
    float | None, typer.Option(help="Least ratio of original to file.", metavar="R", rich_help_panel=BUDGET)
]
TargetBits = Annotated[
    float | None, typer.Option(help="Most bits per quantized weight.", metavar="B", rich_help_panel=BUDGET)
]
MaxRelativeMse = Annotated[
    float | None, typer.Option(help="Largest relative MSE of all weights.", metavar="X", rich_help_panel=BUDGET)
]
MinSqnr = Annotated[
    float | None, typer.Option(help="Least signal to noise ratio in dB.", metavar="DB", rich_help_panel=BUDGET)
]
RateWeight = Annotated[
    float | None,
    typer.Option(
        help="Price of a bit, in squares of the typical weight: 0.03 is about 2 bits.",
        metavar="L",
        rich_help_panel=BUDGET,
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        show_default="0.5",
        help="Which error counts: mse (0, one error for all weights) to relative (1, one for all tensors).",
        metavar="X",
        rich_help_panel=BUDGET,
    ),
]
Effort = Annotated[
    int | None,
    typer.Option(
        show_default="by size", help="States of the trellis, 4 to 2048: more find less error.", metavar="N",
        rich_help_panel=BUDGET,
    ),
]  # fmt: skip
Config = Annotated[
    str | None,
    typer.Option(help="A recipe: a YAML file, or a preset's name (see `pqcli presets`).", metavar="FILE|PRESET"),
]
Include = Annotated[
    list[str] | None,
    typer.Option(help="Quantize only tensors that match (glob, or re:REGEX); repeatable.", metavar="PAT"),
]
ModelOnly = Annotated[
    bool,
    typer.Option("--model-only", help="Leave training state (optimizer moments and the like) out of the result."),
]
Exclude = Annotated[list[str] | None, typer.Option(help="Keep tensors that match exactly; repeatable.", metavar="PAT")]
Device = Annotated[str, typer.Option(help="Where the EM of plain PQ runs: auto, cpu, cuda, cuda:0, mps.")]
Seed = Annotated[int | None, typer.Option(show_default="0", help="Seed of the initial centroids.")]
CodebookType = Annotated[CodebookDtype | None, typer.Option(show_default="fp16", help="Dtype codebooks are stored in.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and the asked-for result.")]
Against = Annotated[
    Path | None,
    typer.Option(help="The original checkpoint: measure everything again from the two files.", metavar="ORIGINAL"),
]


@app.callback(invoke_without_command=False)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        typer.echo(f"pqcli {__version__}")
        raise typer.Exit


@app.command(epilog="Example: pqcli compress model.pt --block-size 8")
def compress(
    src: Source,
    output: Output = None,
    block_size: BlockSize = None,
    n_centroids: NCentroids = None,
    n_iter: NIter = None,
    sample: Sample = None,
    restarts: Restarts = None,
    max_memory: MaxMemory = None,
    codec: Codec = None,
    quality: Quality = None,
    target_size: TargetSize = None,
    target_ratio: TargetRatio = None,
    target_bits: TargetBits = None,
    max_relative_mse: MaxRelativeMse = None,
    min_sqnr: MinSqnr = None,
    rate_weight: RateWeight = None,
    objective: Objective = None,
    effort: Effort = None,
    config: Config = None,
    include: Include = None,
    exclude: Exclude = None,
    model_only: ModelOnly = False,
    device: Device = "auto",
    seed: Seed = None,
    codebook_dtype: CodebookType = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")] = False,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress a checkpoint: codebooks and packed assignments in one safetensors file."""

    def work(console: Console) -> None:
        recipe = _recipe(
            config,
            block_size=_number_or_auto("--block-size", block_size),
            n_centroids=n_centroids,
            n_iter=n_iter,
            sample=_number_or_auto("--sample", sample),
            restarts=restarts,
            codec=codec,
            quality=quality,
            target_bytes=_bytes("--target-size", target_size),
            target_ratio=target_ratio,
            target_bits=target_bits,
            max_relative_mse=max_relative_mse,
            min_sqnr=min_sqnr,
            rate_weight=rate_weight,
            max_memory=_bytes("--max-memory", max_memory),
            objective=_number_or_word("--objective", objective),
            effort=effort,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            model_only=model_only or None,
            seed=seed,
            codebook_dtype=codebook_dtype,
        )
        _check_source(src)
        _check_output(output, src, force=force)
        from pqcli.jobs import pipeline

        if dry_run:
            found = pipeline.preview(src, output, recipe)
            pipeline.check_possible(found, device, force=force)
            console.plan(found)
            return
        weights = pipeline.weights_to_compress(src, recipe)
        with console.progress(weights, f"Compressing {src.name}") as progress:
            report = pipeline.compress(src, output, recipe, device=device, force=force, progress=progress.advance)
        console.summary(report)

    _run(work, json=json, quiet=quiet)


@app.command(epilog="Example: pqcli plan model.pt --config kill-the-bits-small")
def plan(
    src: Source,
    block_size: BlockSize = None,
    n_centroids: NCentroids = None,
    n_iter: NIter = None,
    sample: Sample = None,
    restarts: Restarts = None,
    max_memory: MaxMemory = None,
    codec: Codec = None,
    quality: Quality = None,
    target_size: TargetSize = None,
    target_ratio: TargetRatio = None,
    target_bits: TargetBits = None,
    max_relative_mse: MaxRelativeMse = None,
    min_sqnr: MinSqnr = None,
    rate_weight: RateWeight = None,
    objective: Objective = None,
    effort: Effort = None,
    config: Config = None,
    include: Include = None,
    exclude: Exclude = None,
    model_only: ModelOnly = False,
    seed: Seed = None,
    codebook_dtype: CodebookType = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="Show how --codec auto decides: candidates, bits, error, cost (reads the weights)."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show what compress would do to each tensor, why, and the size it would give; write nothing."""

    def work(console: Console) -> None:
        recipe = _recipe(
            config,
            block_size=_number_or_auto("--block-size", block_size),
            n_centroids=n_centroids,
            n_iter=n_iter,
            sample=_number_or_auto("--sample", sample),
            restarts=restarts,
            codec=codec,
            quality=quality,
            target_bytes=_bytes("--target-size", target_size),
            target_ratio=target_ratio,
            target_bits=target_bits,
            max_relative_mse=max_relative_mse,
            min_sqnr=min_sqnr,
            rate_weight=rate_weight,
            max_memory=_bytes("--max-memory", max_memory),
            objective=_number_or_word("--objective", objective),
            effort=effort,
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            model_only=model_only or None,
            seed=seed,
            codebook_dtype=codebook_dtype,
        )
        _check_source(src)
        from pqcli.jobs import pipeline

        if explain:
            console.choices(pipeline.explain(src, recipe))
        else:
            console.plan(pipeline.preview(src, None, recipe))

    _run(work, json=json)


@app.command(epilog="Example: pqcli decode model.pq.safetensors -o model.safetensors")
def decode(
    file: File,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            show_default="STEM.decoded, suffix as the source",
            help="A .pt or .safetensors file, or a folder.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(show_default="as in the source", help="Convert floating tensors.")
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rebuild the dense checkpoint: same keys, order, shapes and dtypes."""

    def work(console: Console) -> None:
        check_container(file)
        from pqcli.jobs import pipeline

        with console.progress(pipeline.n_weights(file), f"Decoding {file.name}") as progress:
            target = pipeline.decode(
                file, output, dtype=dtype.value if dtype else None, force=force, progress=progress.advance
            )
        if json:
            console.json({"input": str(file), "output": str(target), "output_bytes": _size(target)})
        else:
            console.note(f"wrote {target}")

    _run(work, json=json, quiet=quiet)


@app.command(epilog="Example: pqcli report model.pq.safetensors --sort relative_mse")
def report(
    file: File,
    against: Against = None,
    format_: Annotated[Format, typer.Option("--format", help="Form of the report.")] = Format.table,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", show_default="stdout", help="Write to this file.")
    ] = None,
    sort: Annotated[
        str | None, typer.Option(help="Order by this column, such as relative_mse or bytes.", metavar="KEY")
    ] = None,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 3 if a layer or the total lies above: relative_mse=0.1; repeatable.", metavar="KEY=X"
        ),
    ] = None,
    force: Force = False,
    json: Annotated[bool, typer.Option("--json", help="Same as --format json.")] = False,
    quiet: Quiet = False,
) -> None:
    """Show the reconstruction error and the size, layer by layer."""
    chosen = Format.json if json else format_

    def work(console: Console) -> None:
        from pqcli.reports import checks

        if sort:
            checks.check_sortable(sort)
        for text in fail_above or []:
            checks.check_condition(text)
        check_container(file)
        if against:
            _check_source(against)
        _check_output(output, file, force=force)
        from pqcli.jobs import pipeline

        weights = pipeline.n_weights(file) if against else 0
        with console.progress(weights, f"Measuring {file.name}") as progress:
            found = pipeline.report(file, against, progress=progress.advance)
        if sort:
            found = checks.sort(found, sort)
        failures = [failure for text in fail_above or [] if (failure := checks.check(found, text))]
        if output:
            pipeline.write_text(output, console.rendered(found, chosen.value), force=force)
            console.note(f"wrote {output}")
        else:
            console.report(found, chosen.value)
        if failures:
            raise CheckFailedError("\n".join(failures))

    _run(work, json=chosen is Format.json, quiet=quiet)


@app.command(epilog="Example: pqcli inspect model.pq.safetensors --tensor fc.weight")
def inspect(
    file: File,
    tensor: Annotated[list[str] | None, typer.Option(help="Only this tensor; repeatable.", metavar="NAME")] = None,
    json: Json = False,
) -> None:
    """Show what a container holds: format version, features, source, recipe, and each tensor's record."""

    def work(console: Console) -> None:
        check_container(file)
        from pqcli.jobs import pipeline

        found = pipeline.inspect(file, tensor)
        if json:
            console.json(found)
        else:
            console.inspection(found)

    _run(work, json=json)


@app.command(epilog="Example: pqcli verify model.pq.safetensors --against model.pt")
def verify(file: File, against: Against = None, json: Json = False, quiet: Quiet = False) -> None:
    """Check structure and hashes; with the original, that kept tensors are identical and errors as reported."""

    def work(console: Console) -> None:
        check_container(file)
        if against:
            _check_source(against)
        from pqcli.jobs import pipeline

        with console.progress(pipeline.n_weights(file), f"Verifying {file.name}") as progress:
            findings = pipeline.verify(file, against, progress=progress.advance)
        left_out = pipeline.left_out(file) if against else ()
        if left_out:
            console.note(f"not compared, because --model-only left it out: {', '.join(left_out)}")
        if json:
            console.json({
                "input": str(file),
                "ok": not findings,
                "findings": [{"name": finding.name, "problem": finding.problem} for finding in findings],
            })  # fmt: skip
        if findings:
            lines = [f"tensor {finding.name!r} {finding.problem}" for finding in findings]
            raise CheckFailedError(f"{file}: {len(findings)} problems\n" + "\n".join(lines))
        if not json:
            console.note(f"{file}: every tensor decodes to the bytes that were compressed")

    _run(work, json=json, quiet=quiet)


@app.command(epilog="Example: pqcli presets")
def presets(json: Json = False) -> None:
    """List the presets that --config takes by name."""

    def work(console: Console) -> None:
        from pqcli.recipe import loading

        found = {name: loading.load(name).description for name in loading.preset_names()}
        if json:
            console.json(found)
        else:
            console.presets(found)

    _run(work, json=json)


def _check_source(path: Path) -> None:
    """Raise what opening this checkpoint would raise, as far as its first bytes tell: torch takes seconds to import."""
    from pqcli import checkpoint

    checkpoint.sniff(path)


def _check_output(output: Path | None, source: Path, *, force: bool) -> None:
    """Likewise for a file that will be written; of the source itself the pipeline says more."""
    if output and not (output.exists() and output.samefile(source)):
        check_target(output, force=force)


def _recipe(config: str | None, **flags: object) -> Recipe:
    """The recipe of `--config` (or the default), with the flags that were given as the last word."""
    from pqcli.recipe import flags as recipe_flags
    from pqcli.recipe import loading
    from pqcli.recipe.recipe import Recipe

    base = loading.load(config) if config else Recipe()
    given = {name: value.value if isinstance(value, Enum) else value for name, value in flags.items()}
    return recipe_flags.override(base, **given)


def _number_or_auto(flag: str, text: str | None) -> int | str | None:
    if text is None or text in {"auto", "all"}:
        return text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"{flag} {text!r}: give a whole number such as 8, or auto") from None


def _number_or_word(flag: str, text: str | None) -> float | str | None:
    if text is None or text in {"mse", "relative"}:
        return text
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"{flag} {text!r}: give mse, relative, or a number between 0 (mse) and 1 (relative)") from None


def _bytes(flag: str, text: str | None) -> int | None:
    """A size such as 6MB, 512kB, 1.5MiB or 53152 in bytes."""
    if text is None:
        return None
    number = text.strip().rstrip("bBiIkKmMgG")
    unit = text.strip()[len(number) :].strip().lower().removesuffix("b")
    scales = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
    try:
        size = int(float(number) * scales[unit])
    except (ValueError, KeyError, OverflowError):
        raise UsageError(f"{flag} {text!r}: give a size such as 6MB, 512kB, 1.5MiB, or a number of bytes") from None
    if size < 1:
        raise UsageError(f"{flag} {text!r}: must be at least one byte")
    return size


def _size(path: Path) -> int:
    return sum(part.stat().st_size for part in path.rglob("*")) if path.is_dir() else path.stat().st_size


def _run(work: Callable[[Console], None], *, json: bool = False, quiet: bool = False) -> None:
    """Do the work; end the process with the right exit code and, for a failure, one message and no traceback."""
    from pqcli.cli.console import Console

    console = Console(quiet=quiet, json=json)
    with _terminable():
        try:
            work(console)
        except PQError as error:
            console.error(error)
            _exit(error.exit_code)
        except KeyboardInterrupt:
            console.error(OutputError("interrupted; nothing was written"))
            sys.stdout.flush()
            os._exit(EXIT_INTERRUPTED)  # at once: the interpreter would wait for threads deep inside a kernel
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the reader has left: nothing to tell, and nothing to flush
            _exit(0)
        except MemoryError as error:
            console.error(OutputError(f"out of memory ({error or 'no details'}); nothing was written"))
            _exit(1)
        except OSError as error:
            console.error(
                OutputError(f"{error.filename or 'the system'}: {error.strerror or error}; nothing was written")
            )
            _exit(1)


def _exit(code: int) -> NoReturn:
    raise typer.Exit(code)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that temporary files are removed."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
