"""Every default that help shows, or tells in words, is the one of the code that uses it."""

import inspect
import re
from dataclasses import fields

import pytest

from docs.generate import COMMANDS
from pqcli.codecs.trellis.session import TrellisSession
from pqcli.jobs import calibrate, compare, compress, executors, report
from pqcli.recipe.recipe import Recipe
from pqcli.recipe.settings import settings_of, size
from pqcli.stats import collecting

SAMPLING = {field.name: field.default for field in fields(calibrate.Sampling)}


def default_of(function, name):
    return inspect.signature(function).parameters[name].default


USED = {
    ("compress", "device"): default_of(compress.compress, "device"),
    ("compress", "shard_size"): default_of(compress.compress, "shard_bytes"),
    ("report", "format_"): "table",  # the command's own
    ("report", "split"): SAMPLING["split"],
    ("calibrate", "split"): SAMPLING["split"],
    ("calibrate", "seed"): SAMPLING["seed"],
    ("calibrate", "dtype"): SAMPLING["dtype"],
    ("calibrate", "gradients"): default_of(calibrate.calibrate, "gradients"),
    ("calibrate", "full_width"): default_of(collecting.collect, "full_width"),
    ("calibrate", "block_width"): default_of(collecting.collect, "block_width"),
    ("calibrate", "device"): default_of(calibrate.calibrate, "device"),
}
"""What the code uses where an option that is no setting of a recipe is not given."""
OPTIONS = [
    (name, parameter)
    for name, command in COMMANDS.items()
    for parameter in command.params
    if parameter.param_type_name == "option"
]


def used(command, parameter):
    """What the code behind an option takes without it."""
    if command in ("compress", "plan") and parameter.name in settings_of(Recipe):
        return getattr(Recipe(), parameter.name)
    return USED[command, parameter.name]


@pytest.mark.parametrize(
    ("command", "parameter"),
    [one for one in OPTIONS if one[1].default not in (None, False, (), [])],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_default_of_every_option_is_what_the_code_uses(command, parameter):
    shown = getattr(parameter.default, "value", parameter.default)
    wanted = used(command, parameter)
    assert (size(shown) if parameter.name == "shard_size" else shown) in (wanted, str(wanted))
    if parameter.is_flag is not True:
        with COMMANDS[command].make_context(command, [], resilient_parsing=True) as context:
            assert f"[default: {shown}]" in parameter.get_help_record(context)[1]


def test_no_option_that_was_left_out_has_a_default_in_the_code_that_help_does_not_show():
    """Options without a default are None, False or empty for the code as well."""
    jobs = {"compress": compress.compress, "report": report.report, "calibrate": calibrate.calibrate}
    for command, parameter in OPTIONS:
        taken = inspect.signature(jobs[command]).parameters if command in jobs else {}
        if parameter.name in taken and parameter.default in (None, False, (), []):
            assert taken[parameter.name].default in (None, False, (), inspect.Parameter.empty), (
                command,
                parameter.name,
            )


class Sized:
    """A session of so many weights."""

    effort = None

    def __init__(self, n):
        self._n_weights = n


SAMPLES = "drawn at random; without it, {} windows or {} lines"
DRAWN = inspect.signature(calibrate.drawn).parameters
TOLD = {
    ("calibrate", "samples"): SAMPLES.format(DRAWN["n_windows"].default, DRAWN["n_lines"].default),
    ("report", "samples"): SAMPLES.format(compare.N_WINDOWS_COMPARED, compare.N_LINES_COMPARED),
    ("calibrate", "length"): f"{calibrate.WINDOW_LENGTH} for windows and {calibrate.LINE_LENGTH} for lines",
    ("report", "length"): f"{calibrate.WINDOW_LENGTH} for windows and {calibrate.LINE_LENGTH} for lines",
    ("calibrate", "batch"): f"{calibrate.WINDOWS_AT_ONCE} windows or {calibrate.LINES_AT_ONCE} lines",
}


@pytest.mark.parametrize(
    ("command", "parameter"),
    [one for one in OPTIONS if re.search(r"[Ww]ithout it.*\d", one[1].help)],
    ids=lambda value: getattr(value, "name", value),
)
def test_numbers_that_help_tells_in_words_are_those_of_the_code(command, parameter):
    if parameter.name == "effort":
        told = re.findall(r"(\d+) for fewer than (\d+) million", parameter.help)
        for states, millions in told:
            assert TrellisSession._n_states.fget(Sized(int(millions) * 10**6 - 1)) == int(states)
        last = int(parameter.help.rstrip(".").rsplit(" ", 1)[1])
        assert TrellisSession._n_states.fget(Sized(int(told[-1][1]) * 10**6)) == last
    elif parameter.name == "max_memory":
        told = re.search(r"about (\d+) MB", parameter.help)[1]
        beside = default_of(executors.Threads, "in_flight_bytes") + executors.BASE_MEMORY_BYTES
        assert int(told) == pytest.approx(beside / 1e6, abs=0.5)
    else:
        assert TOLD[command, parameter.name] in parameter.help
