"""The documentation is part of the product: its examples run, its tables are complete, its links lead somewhere."""

import ast
import inspect
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

import pqcli
from pqcli import errors
from pqcli.cli.commands import app
from pqcli.cli.running import EXIT_INTERRUPTED
from pqcli.codecs.rate.budget import QUALITY_STEPS
from pqcli.container import layout
from pqcli.recipe import loading

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "pqcli"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FORMAT = (PACKAGE / "FORMAT.md").read_text(encoding="utf-8")
ROOT = get_command(app)
COMMANDS = ROOT.commands
OF_ONE_COMMAND = [(name, parameter) for name, command in COMMANDS.items() for parameter in command.params]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def rows(first_column: str) -> list[list[str]]:
    """Cells of the README's table whose head begins with these words."""
    lines = README.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return table
        table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return table


def words(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


def shown_commands() -> list[str]:
    """Every call of pqcli that the README shows: on a line of its own, or in the table of commands."""
    lines = re.findall(r"^(?: {4}|\$ | {4}\$ )(pqcli [a-z][^\n]*)$", README, re.MULTILINE)
    return lines + [cells[2].strip("`") for cells in rows("command")]


def parse(line: str) -> None:
    """Parse a call of pqcli as the shell and Typer would, without running it."""
    program, name, *arguments = shlex.split(line, comments=True)
    assert program == "pqcli"
    COMMANDS[name].make_context(name, list(arguments))


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_an_example_that_parses(name):
    command = COMMANDS[name]
    assert command.help
    assert command.epilog.startswith(f"Example: pqcli {name}")
    parse(command.epilog.removeprefix("Example: "))


@pytest.mark.parametrize(("name", "parameter"), OF_ONE_COMMAND, ids=lambda value: getattr(value, "name", value))
def test_every_argument_and_option_has_help(name, parameter):
    assert parameter.help, f"{name} {parameter.name}"
    assert parameter.help.endswith("."), f"{name} {parameter.name}: help is a sentence"


# --- README -----------------------------------------------------------------------------------------------------------


def test_the_readme_lists_every_command_and_no_other():
    assert {cells[0].strip("`") for cells in rows("command")} == set(COMMANDS)


def test_the_readme_lists_every_option_with_the_commands_that_have_it():
    table = {}
    for options, commands, _ in rows("option | of"):
        for option in re.findall(r"`(--?[a-z-]+)", options):
            table[option] = set(COMMANDS) if commands == "all" else set(commands.split(", "))
    found = {}
    for name, parameter in OF_ONE_COMMAND:
        for option in parameter.opts:
            if option.startswith("-"):
                found.setdefault(option, set()).add(name)
    for parameter in ROOT.params:
        for option in parameter.opts:
            found.setdefault(option, set()).add("pqcli")
    assert table == found


def test_every_call_that_the_readme_shows_parses():
    shown = shown_commands()
    assert len(shown) > 15
    for line in shown:
        parse(line)


def test_the_readme_explains_every_exit_code():
    codes = {0, EXIT_INTERRUPTED} | {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PQError)
    }
    assert {int(cells[0]) for cells in rows("code")} == codes


def test_the_readme_names_every_preset():
    assert {name for cells in rows("preset") for name in words(cells[0])} == set(loading.preset_names())


def test_the_readme_names_everything_public():
    documented = set(re.findall(r"`pqcli\.(\w+)", " ".join(cells[0] for cells in rows("name"))))
    assert documented == set(pqcli.__all__)


def test_the_readme_shows_the_signature_of_every_public_function():
    shown = {}
    for call in words(" ".join(cells[0] for cells in rows("name"))):
        if "(" in call:
            function = ast.parse(f"def {call.removeprefix('pqcli.')}: pass").body[0]
            shown[function.name] = ast.unparse(function.args)
    functions = [name for name in pqcli.__all__ if inspect.isfunction(getattr(pqcli, name))]
    assert set(shown) == set(functions)
    for name in functions:
        signature = inspect.signature(getattr(pqcli, name))
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
        text = str(inspect.Signature(bare))
        expected = ast.unparse(ast.parse(f"def f{text}: pass").body[0].args)
        assert shown[name] == expected, name


def test_the_readme_states_the_steps_behind_the_names_of_quality():
    for name, step in QUALITY_STEPS.items():
        assert f"`{name}` {step}" in README


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_module_table_lists_every_module(path):
    relative = path.relative_to(PACKAGE)
    if relative == Path("__init__.py"):
        return
    name = f"{relative.parent}/" if path.name == "__init__.py" else str(relative)
    assert name in {word for cells in rows("module") for word in words(cells[0])}


def test_the_module_table_lists_nothing_that_is_not_there():
    for cells in rows("module"):
        for word in words(cells[0]):
            assert (PACKAGE / word).exists(), word


def test_the_readme_shows_the_layers_that_import_linter_enforces():
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = "\n".join("    " + layer.replace("pqcli.", "") for layer in contracts[0]["layers"])
    assert f"\n\n{layers}\n\n" in README


def test_make_has_every_target_that_the_readme_tells_of():
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)\b(?=`|  )", README)) <= targets


@pytest.mark.parametrize(("text", "folder"), [(README, REPOSITORY), (FORMAT, PACKAGE)], ids=["README", "FORMAT"])
def test_links_lead_to_files_and_headings_that_exist(text, folder):
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("https://"):
            assert (folder / target).is_file(), target


def test_scripts_that_the_readme_names_exist():
    for path in re.findall(r"(?:tests|configs|pqcli)/[\w/]+\.(?:py|md|yaml)", README):
        assert (REPOSITORY / path).is_file(), path


def test_the_python_of_the_readme_runs(model, monkeypatch):
    monkeypatch.chdir(model.parent)
    names: dict[str, object] = {}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    assert Path("model.decoded.pt").is_file()


def test_the_recipes_of_the_readme_are_valid(tmp_path):
    for i, text in enumerate(blocks("yaml")):
        path = tmp_path / f"recipe{i}.yaml"
        path.write_text(text, encoding="utf-8")
        assert loading.load(str(path)).rules


# --- FORMAT -----------------------------------------------------------------------------------------------------------


def test_the_specification_describes_exactly_the_features_there_are():
    found = re.search(r"^\| feature \|.*?\n\n", FORMAT, re.DOTALL | re.MULTILINE)
    assert found
    assert set(re.findall(r"^\| `([^`]+)` \|", found.group(), re.MULTILINE)) == layout.FEATURES
    for feature in layout.FEATURES:
        assert re.search(rf"^## Feature `{feature}`", FORMAT, re.MULTILINE), feature


def test_the_documents_break_their_lines():
    for text in (README, FORMAT):
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
        long = [line for line in prose.splitlines() if len(line) > 125 and not line.startswith(("|", "    "))]
        assert not long
