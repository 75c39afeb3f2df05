"""Options come from the fields of a recipe: help, YAML and Python cannot tell different things."""

import inspect
import re
from dataclasses import dataclass, fields

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pqcli.cli import options
from pqcli.cli.commands import app
from pqcli.recipe.checks import whole
from pqcli.recipe.recipe import Recipe, Rule
from pqcli.recipe.reference import reference
from pqcli.recipe.settings import PLAIN, options_of, setting, settings_of

OF_A_RECIPE = ["compress", "plan"]
COMMANDS = get_command(app).commands


def shown(command: str, columns: int = 120) -> str:
    done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": str(columns)})
    assert done.exit_code == 0
    return done.output


@pytest.mark.parametrize("command", OF_A_RECIPE)
def test_every_setting_with_a_panel_is_an_option_with_the_help_and_default_of_its_field(command):
    parameters = {parameter.name: parameter for parameter in COMMANDS[command].params}
    for made in options_of(Recipe):
        option = parameters[made.name]
        assert option.opts == [made.flag]
        assert option.help == made.help
        if isinstance(made.default, int | float | str) and not isinstance(made.default, bool):
            assert option.default == str(made.default)


@pytest.mark.parametrize("command", OF_A_RECIPE)
def test_every_default_that_help_shows_is_the_codes(command):
    text = re.sub(r"[\s│]+", " ", shown(command))
    for made in options_of(Recipe):
        entry = text.split(f" {made.flag} ", 1)[1].split(" --", 1)[0]
        expected = [] if made.default in (None, ()) or isinstance(made.default, bool) else [str(made.default)]
        assert re.findall(r"\[default: ([^]]+)\]", entry) == expected, made.flag


@pytest.mark.parametrize("columns", [80, 120])
def test_the_help_of_compress_is_three_screens(columns):
    lines = shown("compress", columns).splitlines()
    assert len(lines) <= 3 * (48 if columns == 80 else 34)
    first = "\n".join(lines[: 48 if columns == 80 else 34])
    for name in ("--output", "--codec", "--quality", "--target-size", "--block-size", "--target-bits"):
        assert name in first


def test_the_help_of_the_program_shows_no_types_and_how_to_go_on():
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100"}).output
    assert "<bool>" not in text
    assert "--install-completion" in text
    assert "Example: pqcli COMMAND --help" in text


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("columns", [80, 120])
def test_help_shows_no_type_of_flags_and_no_default_in_brackets(command, columns):
    text = shown(command, columns)
    assert not re.findall(r"<[a-z]\w*>|<Path>|BOOLEAN|TEXT  ", text)
    assert "[default: (" not in text
    assert max(map(len, text.splitlines())) <= columns


def test_the_options_that_most_people_need_come_first():
    panel = shown("compress").split("╭─ Options")[1].split("╰")[0]
    names = [
        "--output",
        "--codec",
        "--quality",
        "--target-size",
        "--block-size",
        "--config",
        "--dry-run",
    ]
    assert re.findall(r"│ (--[a-z-]+)", panel) == names


def test_a_new_field_is_an_option_a_key_and_a_line_of_the_reference(monkeypatch):
    @dataclass(frozen=True)
    class Longer(Recipe):
        patience: int = setting(3, check=whole(1), metavar="N", panel=PLAIN, help="How long to wait.")

    monkeypatch.setattr(options, "Recipe", Longer)
    signature = inspect.signature(options.takes_recipe(lambda **settings: None))
    assert signature.parameters["patience"].default == "3"
    assert signature.parameters["patience"].annotation.__metadata__[0].help == "How long to wait."
    monkeypatch.setattr("pqcli.recipe.reference.Recipe", Longer)
    assert "| `patience` | `--patience` | `N` | `3` | How long to wait. |" in reference()
    assert Longer(patience=4).patience == 4


def test_the_reference_names_every_setting():
    of_a_recipe, of_a_rule = (
        re.findall(r"^\| `(\w+)`", part, re.MULTILINE) for part in reference().split("### A rule")
    )
    assert sorted(of_a_recipe) == sorted(item.name for item in fields(Recipe)) == sorted(settings_of(Recipe))
    assert sorted(of_a_rule) == sorted(item.name for item in fields(Rule))


def test_a_wrong_codec_is_refused_with_the_codecs_there_are(pqcli_command, model):
    done = pqcli_command("compress", model, "--codec", "trelis")
    assert done.returncode == 2
    assert "Value error" not in done.stderr
    assert "--codec: must be 'pq', 'trellis' or 'auto'; got 'trelis' (did you mean 'trellis'?)" in done.stderr
    assert "did you mean 'trellis'" in done.stderr


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--effort", "8"], "without effect with codec pq and no budget: --effort"),
        (["--codec", "trellis", "--block-size", "4"], "without effect with codec trellis: --block-size"),
        (
            ["--target-bits", "2", "--n-centroids", "16"],
            "without effect with codec pq and --target-bits: --n-centroids",
        ),
        (["--block-size", "4"], None),
    ],
)
def test_options_without_effect_are_said_in_one_line(pqcli_command, model, flags, told):
    done = pqcli_command("plan", model, *flags)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "without effect" in line]
    assert lines == ([told] if told else [])


def test_part_of_a_name_hints_at_the_pattern_with_stars(pqcli_command, model):
    done = pqcli_command("plan", model, "--include", "embed.w")
    assert done.returncode == 1
    assert "'*embed.w*' matches 1 tensor" in " ".join(done.stderr.split())
