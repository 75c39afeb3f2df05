"""The commands: parse, call the job, hand the result to the console. They do no work, and print nothing.

torch and everything that needs it are imported inside the commands, after what can be checked without it: help, and
errors in arguments, inputs and outputs come at once. Every failure leaves through `running.run`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcli.atomic import check_output
from pqcli.cli import completion, statistics
from pqcli.cli.options import (
    LONGEST_SHARD,
    NETWORK,
    Against,
    Base,
    Command,
    Config,
    Device,
    DryRun,
    Dtype,
    EmbedFiles,
    File,
    Force,
    Format,
    Fresh,
    Group,
    Json,
    Length,
    Limit,
    MoreTexts,
    NoVerify,
    OfBase,
    Output,
    Quiet,
    Ray,
    ShardSize,
    Source,
    Split,
    Split_,
    Texts,
    WithCopies,
    Workers,
    examples,
    flag,
    takes_recipe,
)
from pqcli.cli.running import run
from pqcli.container.peek import SUFFIX, check_container, is_container
from pqcli.defaults import N_LINES_COMPARED, N_WINDOWS_COMPARED
from pqcli.errors import CheckFailedError, RecipeError, UsageError
from pqcli.jobs.folders.outputs import check_folder_output, default_folder, goes_to_folder
from pqcli.limits import limits_of
from pqcli.version import __version__

if TYPE_CHECKING:
    from pqcli.cli.console import Console
    from pqcli.recipe.recipe import Recipe

LEAST_SHARD = 1000
"""The smallest `--shard-size`: more entries than that have a header."""

app = typer.Typer(
    name="pqcli",
    cls=Group,
    help="Compress trained checkpoints by product quantization, and get the same checkpoint back.\n\n"
    "Saves storage and transfer, not arithmetic: decode before you run the model.",
    epilog=examples(
        "pqcli compress model.pt --block-size 8",
        "pqcli decode model.pq.safetensors",
        "pqcli COMMAND --help",
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=False)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True, metavar="")] = False,
) -> None:
    if version:
        typer.echo(f"pqcli {__version__}")
        raise typer.Exit


@app.command(
    cls=Command,
    epilog=examples(
        "pqcli compress model.pt --block-size 8",
        "pqcli compress folder/ -o folder.pq",
        "pqcli compress model.pt --target-size 6MB --codec trellis",
        "pqcli compress model.pt --config transformer --dry-run",
        "pqcli compress model.pt --quality balanced --exclude 'lm_head*'",
        "pqcli compress tuned.pt --base model.pt --codec trellis",
    ),
)
@takes_recipe
def compress(
    src: Source,
    output: Output = None,
    *,
    config: Config = None,
    base: Base = None,
    dry_run: DryRun = False,
    device: Device = "auto",
    ray: Ray = None,
    workers: Workers = None,
    with_copies: WithCopies = False,
    embed_files: EmbedFiles = False,
    shard_size: ShardSize = LONGEST_SHARD,
    force: Force = False,
    fresh: Fresh = False,
    no_verify: NoVerify = False,
    limit: Limit = None,
    json: Json = False,
    quiet: Quiet = False,
    **settings: Any,
) -> None:
    """Compress a checkpoint: codebooks and packed assignments in one safetensors file; of a folder, a folder."""

    def work(console: Console) -> None:
        recipe = _recipe(console, config, settings, device)
        limits = limits_of(limit or ())
        shard_bytes = _shard_bytes(shard_size)
        source, target = _located(src, output)
        _check_source(source)
        _check_bases(base)
        if goes_to_folder(source, target):
            check_folder_output(target or default_folder(source), source, force=force)
        else:
            _say_idle_of_folders(console, with_copies=with_copies, shard_size=shard_size)
            if target and target.suffix != ".safetensors":
                console.note(f"'{target}' will be a safetensors file; x{SUFFIX} is the name by which others tell it")
        if target and not goes_to_folder(source, target):
            check_output(target, source, *(base or ()), force=force)
        if dry_run:
            from pqcli.jobs import preview

            found = preview.preview(
                source,
                target,
                recipe,
                with_copies=with_copies,
                embed_files=embed_files,
                shard_bytes=shard_bytes,
                base=base or (),
                device=device,
                ray=ray,
                workers=workers,
                foretold=console.foretold,
                limits=limits,
            )
            preview.check_possible(found, device, force=force)
            console.plan(found)
            return
        from pqcli.jobs import compress

        with console.progress(src.name) as hook:
            report = compress.compress(
                source,
                target,
                recipe,
                device=device,
                with_copies=with_copies,
                embed_files=embed_files,
                shard_bytes=shard_bytes,
                force=force,
                fresh=fresh,
                ray=ray,
                workers=workers,
                verify=not no_verify,
                base=base or (),
                progress=hook,
                limits=limits,
            )
        console.summary(report)
        if recipe.whole_codec and not recipe.stats:
            console.note(_what_statistics_are_for(src))

    run(work, json=json, quiet=quiet)


@app.command(
    cls=Command,
    epilog=examples(
        "pqcli plan model.pt --config kill-the-bits-small",
        "pqcli plan model.pt --codec trellis --target-bits 2",
        "pqcli plan model.pt --codec auto --quality high --explain",
    ),
)
@takes_recipe
def plan(
    src: Source,
    *,
    config: Config = None,
    base: Base = None,
    explain: Annotated[
        bool,
        flag("--explain", help="Show how --codec auto decides: candidates, bits, error, cost (reads the weights)."),
    ] = False,
    limit: Limit = None,
    json: Json = False,
    **settings: Any,
) -> None:
    """Show what compress would do to each tensor, why, and the size it would give; write nothing."""

    def work(console: Console) -> None:
        recipe, limits = _recipe(console, config, settings), limits_of(limit or ())
        source, target = _located(src, None)
        _check_source(source)
        _check_bases(base)
        from pqcli.jobs import preview

        if explain:
            console.choices(preview.explain(source, recipe, base=base or (), limits=limits))
        else:
            found = preview.preview(source, target, recipe, base=base or (), foretold=console.foretold, limits=limits)
            console.plan(found)

    run(work, json=json)


@app.command(
    cls=Command,
    epilog=examples(
        "pqcli decode model.pq.safetensors -o model.safetensors",
        "pqcli decode tuned.pq.safetensors --base model.pt",
    ),
)
def decode(
    file: File,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="PATH",
            help="A .pt or .safetensors file, or a folder; without it, NAME.decoded with the source's suffix.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Convert floating tensors; without it, they are as in the source.")
    ] = None,
    base: OfBase = None,
    force: Force = False,
    no_verify: NoVerify = False,
    limit: Limit = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rebuild the dense checkpoint: same keys, order, shapes and dtypes."""

    def work(console: Console) -> None:
        limits = limits_of(limit or ())
        check_container(file, limits)
        _check_bases(base)
        from pqcli.jobs import decode

        with console.progress(file.name) as hook:
            target = decode.decode(
                file,
                output,
                dtype=dtype.value if dtype else None,
                force=force,
                verify=not no_verify,
                base=base or (),
                progress=hook,
                limits=limits,
            )
        if json:
            console.json({"input": str(file), "output": str(target), "output_bytes": _size(target)})
        else:
            console.note(f"wrote {target}")

    run(work, json=json, quiet=quiet)


@app.command(
    cls=Command,
    epilog=examples(
        "pqcli report model.pq.safetensors --sort relative_mse",
        "pqcli report model.pq.safetensors --model ./my-model --text held-out.txt --by-layer",
    ),
)
def report(
    file: File,
    more: MoreTexts = None,
    *,
    against: Against = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --against: what errors do to outputs, predicted from these statistics."
        ),
    ] = None,
    base: OfBase = None,
    format_: Annotated[Format, typer.Option("--format", help="Form of the report.")] = Format.table,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="PATH", help="Write to this file; without it, to stdout.")
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(
            help="Order by this column, such as relative_mse or bytes.",
            metavar="KEY",
            autocompletion=completion.sort_keys,
        ),
    ] = None,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            help="Exit with 3 if a layer or the total lies above: relative_mse=0.1; repeatable.",
            metavar="KEY=X",
            autocompletion=completion.conditions,
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=NETWORK,
            help="The original's Hugging Face folder: run both networks, and say how far the outputs are.",
        ),
    ] = None,
    text: Texts = None,
    by_layer: Annotated[
        bool, flag("--by-layer", help="Compare the outputs of every layer, too.", panel=NETWORK)
    ] = False,
    split: Split_ = Split.auto,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            rich_help_panel=NETWORK,
            help=f"Examples, drawn at random; without it, {N_WINDOWS_COMPARED} windows or {N_LINES_COMPARED} lines.",
        ),
    ] = None,
    length: Length = None,
    force: Force = False,
    limit: Limit = None,
    json: Annotated[bool, flag("--json", help="Same as --format json.")] = False,
    quiet: Quiet = False,
) -> None:
    """Show the reconstruction error and the size, layer by layer; with --model, how far the whole network is."""
    chosen = Format.json if json else format_
    texts = [*(text or []), *(more or [])]

    def work(console: Console) -> None:
        from pqcli.reports import checks

        _check_comparison(model, text, more, chosen, by_layer=by_layer)
        if model is None:
            ways = {"--samples": samples is not None, "--length": length is not None, "--split": split != Split.auto}
            given = [name for name, is_given in ways.items() if is_given]
            if given:
                raise UsageError(f"{' and '.join(given)}: how text is run goes with --model FOLDER, which runs it")
        if sort:
            checks.check_sortable(sort)
        for condition in fail_above or []:
            checks.check_condition(condition)
        limits = limits_of(limit or ())
        check_container(file, limits)
        if against:
            _check_source(against)
        _check_bases(base)
        if output:
            check_output(output, file, *filter(None, [against]), *(base or ()), force=force)
        from pqcli.jobs import report

        with console.progress(file.name) as hook:
            found = report.report(file, against, base=base or (), stats=stats, progress=hook, limits=limits)
        if sort:
            found = checks.sort(found, sort)
        failures = [failure for limit_ in fail_above or [] if (failure := checks.check(found, limit_))]
        network = None
        if model:
            from pqcli.jobs import calibrate, compare

            with console.progress(file.name) as hook:
                network = compare.compare_folder(
                    model, file, texts, calibrate.Sampling(split.value, samples, length),
                    by_layer=by_layer, base=base or (), progress=hook,
                )  # fmt: skip
        if output:
            report.write_text(output, console.rendered(found, chosen.value, network), force=force)
            console.note(f"wrote {output}")
        else:
            console.report(found, chosen.value, network)
        if failures:
            raise CheckFailedError("\n".join(failures))

    run(work, json=chosen is Format.json, quiet=quiet)


@app.command(cls=Command, epilog=examples("pqcli inspect model.pq.safetensors --tensor fc.weight"))
def inspect(
    file: File,
    tensor: Annotated[
        list[str] | None,
        typer.Option(help="Only this tensor; repeatable.", metavar="NAME", autocompletion=completion.tensors),
    ] = None,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Show what a container holds: format version, features, source, recipe, and each tensor's record."""

    def work(console: Console) -> None:
        limits = limits_of(limit or ())
        check_container(file, limits)
        from pqcli.jobs import report

        found = report.inspect(file, tensor, limits=limits)
        if json:
            console.json(found)
        else:
            console.inspection({name: value for name, value in found.items() if name != "containers"})
            for container in found.get("containers", ()):
                console.inspection(container)

    run(work, json=json)


@app.command(cls=Command, epilog=examples("pqcli verify model.pq.safetensors --against model.pt"))
def verify(
    file: File,
    against: Against = None,
    *,
    base: OfBase = None,
    limit: Limit = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check structure and hashes; with the original, that kept tensors are identical and errors as reported."""

    def work(console: Console) -> None:
        limits = limits_of(limit or ())
        check_container(file, limits)
        if against:
            _check_source(against)
        _check_bases(base)
        from pqcli.cli import readable, tables
        from pqcli.jobs import verify

        with console.progress(file.name) as hook:
            findings = verify.verify(file, against, base=base or (), progress=hook, limits=limits)
        left_out = verify.left_out(file, limits=limits) if against else ()
        if left_out:
            console.note(f"not compared, because --model-only left it out: {', '.join(left_out)}")
        trained = verify.trained_in(file, limits=limits)
        if trained and against:
            names = readable.joined(trained, tables.N_NAMED)
            console.note(f"not compared, because they were trained since they were compressed: {names}")
        if json:
            console.json({
                "input": str(file),
                "ok": not findings,
                "findings": [{"name": finding.name, "problem": finding.problem} for finding in findings],
            })  # fmt: skip
        if findings:
            raise CheckFailedError(f"{file}: {len(findings)} problems\n" + "\n".join(map(str, findings)))
        if not json:
            beside = ", and the files beside the weights are the same" if file.is_dir() and against else ""
            done = "written" if trained else "compressed"
            console.note(f"{file}: every tensor decodes to the bytes that were {done}{beside}")

    run(work, json=json, quiet=quiet)


app.command(cls=Command, epilog=statistics.CALIBRATE_EXAMPLES)(statistics.calibrate)
app.add_typer(statistics.group)


@app.command(cls=Command, epilog=examples("pqcli presets"))
def presets(json: Json = False) -> None:
    """List the presets that --config takes by name."""

    def work(console: Console) -> None:
        from pqcli.recipe import loading

        found = {name: loading.load(name).description for name in loading.preset_names()}
        if json:
            console.json(found)
        else:
            console.presets(found)

    run(work, json=json)


def _shard_bytes(text: str) -> int:
    """The bytes of `--shard-size`."""
    from pqcli.recipe.settings import size

    try:
        n_bytes = size(text)
    except RecipeError as error:
        raise UsageError(f"--shard-size: {error}") from None
    if not isinstance(n_bytes, int) or n_bytes < LEAST_SHARD:
        raise UsageError(f"--shard-size {text}: give at least {LEAST_SHARD:,} bytes")
    return n_bytes


def _located(source: Path, output: Path | None) -> tuple[Path, Path | None]:
    """Where the source lies and where the output goes; a model of the Hugging Face Hub is fetched for it."""
    from pqcli.checkpoint.hub import located

    place = located(source)
    return place.path, output or place.output()


def _what_statistics_are_for(src: Path) -> str:
    """A line for those who compressed without statistics, with a codec that can use them."""
    can_run = src.is_dir() and (src / "config.json").is_file()
    how = f"`pqcli calibrate {shlex.quote(str(src))} --text FILE`" if can_run else "`pqcli.collect(model)` in Python"
    return f"the same bytes can harm the network's output less: give --stats the statistics that {how} makes"


def _check_comparison(
    model: Path | None,
    texts: Sequence[Path] | None,
    more: Sequence[Path] | None,
    form: Format,
    *,
    by_layer: bool,
) -> None:
    """Raise UsageError for options of a comparison that cannot be meant."""
    if model is None and (texts or by_layer):
        raise UsageError("--text and --by-layer go with --model FOLDER, the network that is run")
    if model is None and more:
        raise UsageError(
            f"'{more[0]}': what stands behind FILE is text to run, and goes with --model FOLDER; the original "
            "checkpoint is named with --against"
        )
    if model is not None and not texts and not more:
        raise UsageError("--model wants text to run; name some with --text FILE")
    if model is not None and form not in {Format.table, Format.json}:
        raise UsageError(f"--model goes with --format table or json, not {form.value}")


def _check_source(path: Path) -> None:
    """Raise what opening this checkpoint would raise, as far as its first bytes tell: torch takes seconds to import."""
    from pqcli.checkpoint.sniff import sniff

    sniff(path)


def _check_bases(bases: Sequence[Path] | None) -> None:
    """Likewise for bases, which may be containers."""
    for path in bases or ():
        if not is_container(path):
            _check_source(path)


def _recipe(console: Console, config: str | None, settings: Mapping[str, Any], device: str = "auto") -> Recipe:
    """The recipe of `--config` (or the default) with the flags that were given as the last word; says what is idle."""
    from pqcli.recipe import effect, flags, loading
    from pqcli.recipe.recipe import Recipe

    recipe = flags.override(loading.load(config) if config is not None else Recipe(), **settings)
    idle = [flags.flag_of(name) if name in settings else name for name in effect.without_effect(recipe, settings)]
    if device != "auto" and recipe.whole_codec:
        idle.append("--device")
    if idle:
        console.note(f"without effect {effect.situation(recipe)}: {', '.join(idle)}")
    return recipe


def _say_idle_of_folders(console: Console, *, with_copies: bool, shard_size: str) -> None:
    """Say which options were given that only the compression of a folder into a folder has a use for."""
    given = {"--with-copies": with_copies, "--shard-size": shard_size != LONGEST_SHARD}
    idle = [name for name, is_given in given.items() if is_given]
    if idle:
        console.note(f"without effect, because the result is one file: {', '.join(idle)}")


def _size(path: Path) -> int:
    return sum(part.stat().st_size for part in path.rglob("*")) if path.is_dir() else path.stat().st_size
