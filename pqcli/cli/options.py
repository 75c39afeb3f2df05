"""The options of the command line: those that several commands share, and those made from the fields of `Recipe`.

A command that takes a recipe has a parameter `**settings`. `takes_recipe` puts one option for each setting in its place
in the signature that Typer reads, with the field's own help, default and panel; the command gets those that were given.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from pqcli.cli import completion, mistakes
from pqcli.defaults import LINE_LENGTH, SHARD_BYTES, WINDOW_LENGTH
from pqcli.recipe.recipe import Recipe
from pqcli.recipe.settings import KNOWN, MAIN, PLAIN, Setting, options_of

RUNNING = "Files and messages"
"""The panel of options that every command has some of."""
PLACE = "Where the work is done"
"""The panel of options about processes and machines."""
NETWORK = "Running the network"
"""The panel of options about a model and the text that it runs on."""
LIMITS = "For experts: what a file may cost to understand"
"""The panel of the budgets that keep a stranger's file from filling memory."""


_USAGE_ERROR: Any = typer.BadParameter.__base__
"""The class of all errors in what was typed, wherever Typer has it from."""


class _PlainHelp:
    """Whose help shows no type for `--help`, which stands in the panel `help_panel`."""

    help_panel = RUNNING

    def get_help_option(self, ctx: Any) -> TyperOption | None:
        """The option `--help`."""
        option: TyperOption | None = super().get_help_option(ctx)  # type: ignore[misc]
        if option is not None:
            option.metavar = ""
            option.rich_help_panel = self.help_panel
        return option

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """What Typer makes of the words that were typed; an error of it says what to do."""
        try:
            found: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        except typer.BadParameter as error:
            error.message = mistakes.plainer(error.message)
            raise
        except _USAGE_ERROR as error:
            error.message += mistakes.hint(ctx.info_name, error.message)
            raise
        return found

    def get_params(self, ctx: Any) -> list[Any]:
        """Arguments and options: help shows names of types neither for arguments nor for options without a value."""
        parameters: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for parameter in parameters:
            if isinstance(parameter, TyperArgument):
                parameter.display_type_rich = _nothing  # type: ignore[method-assign]
            elif getattr(parameter, "is_flag", False) and parameter.metavar is None:
                parameter.metavar = ""
            if parameter.name == "show_completion":  # Typer's own, for those who install it by hand: the docs tell
                parameter.hidden = True
        return parameters


def _nothing(ctx: Any) -> None:
    """No type: the help of an argument says what it is."""


class Command(_PlainHelp, TyperCommand):
    """A command whose help shows no type for `--help` and other options that take no value."""


class Group(_PlainHelp, TyperGroup):
    """Likewise for a command that has commands."""

    help_panel = MAIN


class Dtype(StrEnum):
    """Dtypes that `decode --dtype` converts to."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class ComputeDtype(StrEnum):
    """Dtypes that a model can run in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Split(StrEnum):
    """What an example of a text is."""

    auto = "auto"
    lines = "lines"
    windows = "windows"


class Format(StrEnum):
    """Forms a report can take."""

    table = "table"
    json = "json"
    csv = "csv"
    html = "html"


def examples(*lines: str) -> str:
    """The end of a command's help: calls for its common jobs, a line each."""
    return "\n".join(f"Example: {line}" for line in lines)


def flag(*names: str, help: str, panel: str = RUNNING) -> Any:  # noqa: A002 - named like Typer's
    """An option that takes no value."""
    return typer.Option(*names, help=help, metavar="", rich_help_panel=panel)


def path(text: str) -> Path:
    """A path that is typed. An empty one is a variable that was never set, and not the current folder."""
    if not text:
        raise typer.BadParameter("an empty name; the current folder is called .")
    return Path(text)


Source = Annotated[
    Path,
    typer.Argument(
        metavar="SRC", parser=path, help="Checkpoint: .pt, .pth, .bin, .th, .safetensors, or a folder of a model."
    ),
]
File = Annotated[
    Path, typer.Argument(metavar="FILE", parser=path, help="A .pq.safetensors file, or a compressed folder.")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="PATH", rich_help_panel=MAIN,
        help="Where to write; without it, STEM.pq.safetensors or FOLDER.pq beside SRC. x.safetensors: always one file.",
    ),
]  # fmt: skip
Config = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|PRESET", rich_help_panel=MAIN, autocompletion=completion.recipes,
        help="A recipe: a YAML file, or a preset's name (see `pqcli presets`).",
    ),
]  # fmt: skip
Base = Annotated[
    list[Path] | None,
    typer.Option(
        "--base", metavar="BASE", rich_help_panel=KNOWN,
        help="What SRC was made from, a checkpoint or a .pq.safetensors file: differences to it are coded. Repeated: "
        "that one's own base.",
    ),
]  # fmt: skip
OfBase = Annotated[
    list[Path] | None,
    typer.Option(
        "--base", metavar="BASE",
        help="Base of a FILE that holds differences to it, or that one's own; repeatable. Without it, what lies beside "
        "FILE under its name.",
    ),
]  # fmt: skip
DryRun = Annotated[bool, flag("--dry-run", help="Show what would be done, and write nothing.", panel=MAIN)]
Device = Annotated[
    str,
    typer.Option(
        metavar="DEVICE", rich_help_panel=PLAIN, autocompletion=completion.devices,
        help="Where the EM of plain PQ runs: auto, cpu, cuda, cuda:0, mps.",
    ),
]  # fmt: skip
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray", metavar="ADDRESS", rich_help_panel=PLACE, autocompletion=completion.clusters,
        help="Have a Ray cluster do the work: auto for the one that this machine belongs to, local for one of its own, "
        "or its address. All nodes must see the checkpoint under the same path.",
    ),
]  # fmt: skip
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", metavar="N", rich_help_panel=PLACE,
        help="Have N processes of this machine do the work, in turn on the GPUs there are, in place of threads.",
    ),
]  # fmt: skip
WithCopies = Annotated[bool, flag("--with-copies", help="Of a folder, copy the same model in other formats as well.")]
ShardSize = Annotated[
    str,
    typer.Option(
        "--shard-size", metavar="SIZE", rich_help_panel=RUNNING,
        help="Of a folder: containers above this size become several files with an index.",
    ),
]  # fmt: skip
EmbedFiles = Annotated[
    bool, flag("--embed-files", help="Of a folder and with -o x.pq.safetensors, put its small files into the file.")
]
Force = Annotated[bool, flag("--force", "-f", help="Replace an existing output.")]
Fresh = Annotated[bool, flag("--fresh", help="Start anew where a killed run of this output could be gone on with.")]
NoVerify = Annotated[bool, flag("--no-verify", help="Do not read the output again to check it.")]
Json = Annotated[bool, flag("--json", help="Print one JSON document on stdout.")]
Quiet = Annotated[bool, flag("--quiet", "-q", help="Print nothing but errors and the asked-for result.")]
MoreTexts = Annotated[
    list[Path] | None, typer.Argument(metavar="[TEXT]...", help="More texts: `--text *.txt` may name several.")
]
Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", metavar="FILE...", rich_help_panel=NETWORK, help="Plain text to run; repeatable."),
]
Split_ = Annotated[
    Split,
    typer.Option(
        "--split", rich_help_panel=NETWORK,
        help="Examples are lines, or windows of running text; auto: lines for encoders.",
    ),
]  # fmt: skip
Length = Annotated[
    int | None,
    typer.Option(
        metavar="N", rich_help_panel=NETWORK,
        help=f"Most tokens of an example; without it, {WINDOW_LENGTH} for windows and {LINE_LENGTH} for lines.",
    ),
]  # fmt: skip
Limit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=N", rich_help_panel=LIMITS, autocompletion=completion.limits,
        help="Raise a limit that a message names, for a file that you trust; repeatable.",
    ),
]  # fmt: skip
Against = Annotated[
    Path | None,
    typer.Option(help="The original checkpoint: measure everything again from the two files.", metavar="ORIGINAL"),
]


LONGEST_SHARD = f"{SHARD_BYTES // 10**9}GB"
"""The default of `--shard-size`, as it is typed."""


def takes_recipe(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each setting of a recipe, between its positional and its keyword parameters.

    It is called with those settings alone that were given: a default shown in help is the recipe's own and must not
    override a configuration.
    """
    options = [_parameter(setting) for setting in options_of(Recipe)]
    names = [option.name for option in options]
    own = inspect.signature(command, eval_str=True).parameters.values()
    first = [parameter for parameter in own if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    last = [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY]
    keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in options]

    @functools.wraps(command)
    def called(context: typer.Context, **values: Any) -> None:
        given = {name: values.pop(name) for name in names}
        command(**values, **{name: value for name, value in given.items() if was_given(context, name)})

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    signature = inspect.Signature([context, *first, *keywords, *last])
    called.__signature__ = signature  # type: ignore[attr-defined]
    called.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    del called.__wrapped__  # or its annotations would be taken for these
    return called


def was_given(context: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _parameter(setting: Setting) -> inspect.Parameter:
    """The parameter that Typer makes an option of; a value stays text, which the recipe reads."""
    default = setting.default
    kind: Any = str | None
    if isinstance(default, bool):
        kind = bool
    elif isinstance(default, tuple):
        kind, default = list[str], list(default)
    elif default is not None:
        default = str(default)
    choices = setting.choices
    metavar = "" if kind is bool else setting.metavar
    if choices and "|" not in metavar and len("|".join(choices())) <= len("pq|trellis|auto"):
        metavar = "|".join(choices())
    option = typer.Option(
        setting.flag,
        help=setting.help,
        metavar=metavar,
        rich_help_panel=setting.panel,
        autocompletion=(lambda: list(choices())) if choices else None,
    )
    annotation = Annotated[kind, option]
    return inspect.Parameter(
        setting.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation
    )
