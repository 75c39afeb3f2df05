"""Rewrites the parts of the documentation that are taken from the code, so that they cannot drift from it.

    python docs/generate.py            # rewrite them in place
    python docs/generate.py --check    # exit with 1, naming the files, if one is out of date

A generated part lies between `<!-- generated: NAME -->` and `<!-- end of generated -->`; `PARTS` says who writes which.
All else in these files is written by hand and left alone.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from typer.main import get_command

import pqcli
from pqcli.cli.commands import app
from pqcli.recipe import loading
from pqcli.recipe.reference import reference

DOCS = Path(__file__).parent
REPOSITORY = DOCS.parent
PACKAGE = REPOSITORY / "pqcli"
COMMAND_LINE = get_command(app)


def flat(group: Any, before: str = "") -> dict[str, Any]:
    """The commands by what is typed: those of a group have its name before their own."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        typed = f"{before}{name}"
        found |= flat(command, f"{typed} ") if hasattr(command, "commands") else {typed: command}
    return found


COMMANDS = flat(COMMAND_LINE)


# --- the command line -------------------------------------------------------------------------------------------------


def commands() -> str:
    """A section for every command: what it does, examples, its arguments and options."""
    return "\n\n".join(_command(name) for name in COMMANDS)


def _command(name: str) -> str:
    command = COMMANDS[name]
    with command.make_context(name, [], resilient_parsing=True) as context:
        panels: dict[str, list[str]] = {}
        for parameter in command.params:
            usage, meaning = parameter.get_help_record(context)
            panel = "" if parameter.rich_help_panel in (None, "Options") else parameter.rich_help_panel
            panels.setdefault(panel, []).append(_row(f"`{usage}`", *_default(meaning)))
    tables = [
        "\n".join(
            [*([f"**{panel}:**", ""] if panel else []), _row("option", "meaning", "default"), "|---|---|---|", *rows]
        )
        for panel, rows in panels.items()
    ]
    return "\n\n".join([f"### {name}", _prose(command.help), _examples(command.epilog), *tables])


def _examples(epilog: str) -> str:
    """The calls that help shows below the options, a line each."""
    return "\n".join("    " + line.removeprefix("Example: ") for line in epilog.splitlines() if line.strip())


def _default(meaning: str) -> tuple[str, str]:
    """A help text and the default that Typer put behind it."""
    found = re.fullmatch(r"(.*?)(?:  \[(?:default: \(?(.*?)\)?|(required))\])?", meaning, re.DOTALL)
    assert found is not None  # noqa: S101 - the expression matches every text
    text, default, required = found.groups()
    return text, default or required or ""


def exit_codes() -> str:
    """What the exit codes of the error tree are for."""
    from pqcli import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PQError)]
    meanings = [re.sub(r" Exit code \d+\.$", "", _summary(inspect.getdoc(kind))) for kind in kinds]
    rows = [_row(f"`{kind.__name__}`", kind.exit_code, text) for kind, text in zip(kinds, meanings, strict=True)]
    return "\n".join([_row("error", "exit code", "meaning"), "|---|---|---|", *rows])


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe_reference() -> str:
    """Every setting of a recipe and of a rule, with option, values, default and meaning."""
    return reference().rstrip()


def presets() -> str:
    """The presets and their own descriptions."""
    rows = [
        _row(f"[`{name}`](../configs/{name}.yaml)", loading.load(name).description) for name in loading.preset_names()
    ]
    return "\n".join([_row("preset", "what it does"), "|---|---|", *rows])


# --- Python -----------------------------------------------------------------------------------------------------------


def public_names() -> str:
    """Everything that `import pqcli` offers, with signatures."""
    rows = []
    for name in pqcli.__all__:
        thing = getattr(pqcli, name)
        signature = _signature(thing) if inspect.isfunction(thing) else ""
        meaning = "The version." if name == "__version__" else _summary(inspect.getdoc(thing))
        rows.append(_row(f"`pqcli.{name}{signature}`", meaning))
    return "\n".join([_row("name", "what it is"), "|---|---|", *rows])


def _signature(function: Callable[..., object]) -> str:
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(inspect.Signature(bare)).replace("'", '"')


# --- architecture -----------------------------------------------------------------------------------------------------


def layers() -> str:
    """The contract that import-linter enforces."""
    document = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    contract = document["tool"]["importlinter"]["contracts"][0]["layers"]
    return "\n".join("    " + layer.replace("pqcli.", "") for layer in contract)


def modules() -> str:
    """Folder by folder: its sentence, and that of every module in it."""
    folders = sorted({path.parent for path in PACKAGE.rglob("*.py")}, key=lambda folder: folder.as_posix())
    return "\n\n".join(_folder(folder) for folder in folders)


def _folder(folder: Path) -> str:
    name = folder.relative_to(REPOSITORY).as_posix()
    said = _docstring(folder / "__init__.py")
    lines = [
        _item(f"- `{path.name}`: {_docstring(path)}")
        for path in sorted(folder.glob("*.py"))
        if path.name != "__init__.py"
    ]
    return "\n".join([f"### {name}/", "", _prose(said), *(["", *lines] if lines else [])])


def _docstring(path: Path) -> str:
    return _summary(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _summary(docstring: str | None) -> str:
    """The first line of a docstring; nothing of none."""
    return docstring.splitlines()[0] if docstring else ""


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _item(text: str) -> str:
    return "\n  ".join(_lines(text, 118))


def _prose(text: str) -> str:
    return "\n".join(_lines(" ".join(text.split()), 120))


def _lines(text: str, width: int) -> Iterator[str]:
    """Text broken between words, but not inside code."""
    line = ""
    for word in re.findall(r"(?:`[^`]*`|[^\s`])+", text):
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word
    yield line


# --- putting it in place ----------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "errors": exit_codes,
    "recipe": recipe_reference,
    "presets": presets,
    "public names": public_names,
    "layers": layers,
    "modules": modules,
}
_PART = re.compile(r"(<!-- generated: (?P<name>[a-z ]+) -->\n).*?(<!-- end of generated -->)", re.DOTALL)


def regenerated(text: str) -> str:
    """A document with its generated parts as they should be."""
    return _PART.sub(lambda found: f"{found[1]}\n{PARTS[found['name']]()}\n\n{found[3]}", text)


def outdated(paths: Iterable[Path] | None = None) -> dict[Path, str]:
    """The documents that differ from what the code says, with what they should hold."""
    texts = {path: path.read_text(encoding="utf-8") for path in paths or sorted(DOCS.glob("*.md"))}
    wanted = {path: regenerated(text) for path, text in texts.items()}
    return {path: text for path, text in wanted.items() if text != texts[path]}


def main(arguments: list[str]) -> int:
    """Rewrite, or only check."""
    found = outdated()
    for path, text in found.items():
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
        sys.stdout.write(
            f"{path.relative_to(REPOSITORY)}: {'out of date' if '--check' in arguments else 'rewritten'}\n"
        )
    return 1 if found and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
