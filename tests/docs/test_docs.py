"""The documentation is part of the product: its examples run, its tables are complete, its links lead somewhere."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

import pqcli
from docs import generate
from pqcli import errors
from pqcli.cli import interrupts
from pqcli.cli.commands import app
from pqcli.codecs.rate.budget import QUALITY_STEPS
from pqcli.container import layout
from pqcli.recipe import loading, recipe
from tests.conftest import REPOSITORY

PACKAGE = REPOSITORY / "pqcli"
DOCS = REPOSITORY / "docs"
DOCUMENTS = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for path in (REPOSITORY / "README.md", PACKAGE / "FORMAT.md", *sorted(DOCS.glob("*.md")))
}
README = DOCUMENTS["README.md"]
FORMAT = DOCUMENTS["pqcli/FORMAT.md"]
CLI = DOCUMENTS["docs/cli.md"]
ROOT = get_command(app)
COMMANDS = generate.COMMANDS
OF_ONE_COMMAND = [(name, parameter) for name, command in COMMANDS.items() for parameter in command.params]


def examples(language: str) -> list[tuple[str, str]]:
    """(document, code) of every fenced block in this language."""
    expression = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [(document, code) for document, text in DOCUMENTS.items() for code in expression.findall(text)]


def rows(text: str, first_column: str) -> list[list[str]]:
    """Cells of the first table whose head begins with this word."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    table = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return table


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next of its kind."""
    level = heading.split(" ")[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^{level} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, heading
    return found.group(1)


def shown_commands() -> list[tuple[str, str]]:
    """(document, line) of every call of pqcli that stands on a line of its own."""
    expression = re.compile(r"^(?: {4}|\$ | {4}\$ )(pqcli [a-z][^\n]*)$", re.MULTILINE)
    return [(document, line) for document, text in DOCUMENTS.items() for line in expression.findall(text)]


def parse(line: str) -> None:
    """Parse a call of pqcli as the shell and Typer would, without running it."""
    program, *words = shlex.split(line, comments=True)
    assert program == "pqcli"
    n = 2 if " ".join(words[:2]) in COMMANDS else 1
    COMMANDS[" ".join(words[:n])].make_context(words[0], words[n:])


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_examples_that_parse(name):
    command = COMMANDS[name]
    assert command.help
    examples_of_help = [line for line in command.epilog.splitlines() if line.strip()]
    assert examples_of_help
    for example in examples_of_help:
        assert example.startswith(f"Example: pqcli {name}")
        parse(example.removeprefix("Example: "))


@pytest.mark.parametrize(("name", "parameter"), OF_ONE_COMMAND, ids=lambda value: getattr(value, "name", value))
def test_every_argument_and_option_has_help(name, parameter):
    assert parameter.help, f"{name} {parameter.name}"
    assert parameter.help.endswith("."), f"{name} {parameter.name}: help is a sentence"


# --- what is generated ------------------------------------------------------------------------------------------------


def test_generated_parts_say_what_the_code_says():
    stale = [path.name for path in generate.outdated()]
    assert not stale, f"{', '.join(stale)} differ from the code: run `make docs`"


def test_every_part_that_can_be_generated_stands_in_one_document():
    placed = [name for text in DOCUMENTS.values() for name in re.findall(r"<!-- generated: ([a-z ]+) -->", text)]
    assert sorted(placed) == sorted(generate.PARTS)


def test_a_generated_part_is_written_anew_and_the_rest_left_alone():
    text = "before\n<!-- generated: layers -->\nold\n<!-- end of generated -->\nafter\n"
    found = generate.regenerated(text)
    assert found.startswith("before\n")
    assert found.endswith("\nafter\n")
    assert generate.layers() in found
    assert "old" not in found
    assert generate.regenerated(found) == found


@pytest.mark.parametrize("name", COMMANDS)
def test_the_reference_shows_every_option_of_a_command(name):
    shown = section(CLI, f"### {name}")
    for parameter in COMMANDS[name].params:
        for option in parameter.opts:
            if option.startswith("-"):
                assert re.search(rf"^\| `[^`]*{option}\b", shown, re.MULTILINE), option


def test_the_options_of_pqcli_itself_are_told_of():
    for parameter in ROOT.params:
        assert f"{parameter.opts[0]}`" in CLI


def test_the_reference_shows_every_setting_of_recipes_and_rules():
    shown = set(re.findall(r"^\| `(\w+)` \|", DOCUMENTS["docs/recipes.md"], re.MULTILINE))
    for kind in (recipe.Recipe, recipe.Rule):
        assert set(kind.__dataclass_fields__) <= shown


def test_the_reference_names_everything_public_with_its_signature():
    shown = " ".join(cells[0] for cells in rows(DOCUMENTS["docs/python.md"], "name"))
    assert set(re.findall(r"`pqcli\.(\w+)", shown)) == set(pqcli.__all__)
    assert (
        "`pqcli.decode(file, output=None, *, dtype=None, force=False, verify=True, base=(), progress=None, "
        "limits=None)`" in shown
    )


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_architecture_names_every_module(path):
    shown = section(DOCUMENTS["docs/architecture.md"], f"### {path.parent.relative_to(REPOSITORY).as_posix()}/")
    assert path.name == "__init__.py" or f"- `{path.name}`: " in shown


def test_the_architecture_shows_the_layers_that_import_linter_enforces():
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    for layer in contracts[0]["layers"]:
        assert f"    {layer.replace('pqcli.', '')}\n" in DOCUMENTS["docs/architecture.md"]


# --- what is written by hand ------------------------------------------------------------------------------------------


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 260


def test_the_readme_has_a_sentence_for_every_folder():
    shown = {folder: " ".join(rest) for folder, *rest in rows(README, "folder")}
    for folder in sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}):
        *above, name = folder.relative_to(PACKAGE).parts
        if above:
            assert f"`{name}/`" in shown[f"`pqcli/{'/'.join(above)}/`"], folder
        else:
            assert shown[f"`pqcli/{name}/`"], folder


def test_the_readme_names_no_folder_that_is_not_there():
    for folder, *_ in rows(README, "folder"):
        assert (REPOSITORY / folder.strip("`")).is_dir(), folder


def test_the_readme_leads_to_every_document():
    linked = set(re.findall(r"\]\(([^)\s#]+)", section(README, "## Where to read more")))
    assert linked == set(DOCUMENTS) - {"README.md"}


def test_every_call_that_the_documents_show_parses():
    shown = shown_commands()
    assert len(shown) > 15
    for document, line in shown:
        try:
            parse(line)
        except Exception as error:
            raise AssertionError(f"{document}: {line}") from error


def test_every_exit_code_is_explained():
    codes = {0, *map(interrupts.exit_code, interrupts.SIGNALS)} | {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.PQError)
    }
    assert {int(cells[0]) for cells in rows(CLI, "code")} == codes


def test_the_steps_behind_the_names_of_quality_are_stated():
    for name, step in QUALITY_STEPS.items():
        assert f"`{name}` {step}" in CLI


def test_make_has_every_target_that_the_documents_tell_of():
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for document, text in DOCUMENTS.items():
        assert set(re.findall(r"\bmake ([a-z]+)\b(?=`|  )", text)) <= targets, document


def headings(text: str) -> set[str]:
    """The anchors that a forge gives a document's headings."""
    outside = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files_and_headings_that_exist(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", DOCUMENTS[document]):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = ((REPOSITORY / document).parent / target).resolve() if target else REPOSITORY / document
        assert path.is_file(), link
        if anchor:
            assert anchor in headings(path.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_the_documents_name_exist(document):
    for path in re.findall(r"(?<![\w/])(?:tests|configs|docs|pqcli)/[\w/]+\.(?:py|md|yaml)", DOCUMENTS[document]):
        assert (REPOSITORY / path).is_file(), path


@pytest.mark.parametrize("document", sorted({document for document, _ in examples("python")} - {"pqcli/FORMAT.md"}))
def test_the_python_of_the_documents_runs(document, model, monkeypatch):
    monkeypatch.chdir(model.parent)
    names: dict[str, object] = {}
    for found, code in examples("python"):
        if found == document:
            exec(compile(code, document, "exec"), names)
    assert Path("model.pq.safetensors").is_file()


def test_the_recipes_of_the_documents_are_valid(tmp_path):
    found = examples("yaml")
    assert found
    for i, (_, text) in enumerate(found):
        path = tmp_path / f"recipe{i}.yaml"
        path.write_text(text, encoding="utf-8")
        assert loading.load(str(path)).rules


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_documents_break_their_lines(document):
    prose = re.sub(r"^```.*?^```", "", DOCUMENTS[document], flags=re.DOTALL | re.MULTILINE)
    assert not [line for line in prose.splitlines() if len(line) > 125 and not line.startswith(("|", "    "))]


def test_every_measurement_has_a_date():
    text = DOCUMENTS["docs/measurements.md"]
    tables = re.findall(r"<!-- table: ([\w-]+) -->(.*?)<!-- end of table: \1 -->", text, re.DOTALL)
    assert len(tables) == text.count("<!-- table: ")
    for name, table in tables:
        assert re.search(r"2026-\d\d-\d\d|[A-Z][a-z]+ 2026", table), name


# --- FORMAT -----------------------------------------------------------------------------------------------------------


def test_the_specification_describes_exactly_the_features_there_are():
    found = re.search(r"^\| feature \|.*?\n\n", FORMAT, re.DOTALL | re.MULTILINE)
    assert found
    assert set(re.findall(r"^\| `([^`]+)` \|", found.group(), re.MULTILINE)) == layout.known_features()
    for feature in layout.known_features():
        assert re.search(rf"^## Feature `{feature}`", FORMAT, re.MULTILINE), feature
