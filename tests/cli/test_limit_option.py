"""`--limit`: every budget of reading is named where it is met, and is set by every command that opens a file."""

import pytest
import torch
from typer.testing import CliRunner

import pqcli
from pqcli.cli.commands import app
from pqcli.errors import UsageError
from pqcli.limits import Limits, limits_of
from tests.conftest import REPOSITORY

OPENS_A_CHECKPOINT = ["compress", "plan"]
OPENS_A_CONTAINER = ["decode", "report", "inspect", "verify"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "m.pt"
    generator = torch.Generator().manual_seed(0)
    wide = torch.ones(1).expand(300)
    torch.save({
        "w": torch.randn(32, 16, generator=generator), "wide": wide, "more": [[[1] * 20] * 20] * 3, "text": "x" * 400,
    }, path)  # fmt: skip
    return path


@pytest.fixture
def container(source):
    pqcli.compress(source, recipe=pqcli.Recipe(block_size=4, n_centroids=16))
    return source.with_name("m.pq.safetensors")


def done(*arguments):
    result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "400"})
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


@pytest.mark.parametrize("command", OPENS_A_CHECKPOINT)
@pytest.mark.parametrize(
    ("name", "low", "enough"),
    [
        ("n_operations", 50, 1000),
        ("n_entries", 50, 5000),
        ("depth", 2, 3),
        ("n_bytes", 300, 5000),
        ("seconds", "1e-9", 60),
    ],
)
def test_limits_of_a_checkpoint(source, command, name, low, enough, monkeypatch):
    monkeypatch.setattr("pqcli.checkpoint.limits._TICKS", 1)
    code, said = done(command, source, "--limit", f"{name}={low}")
    assert code == 1
    assert f"--limit {name}=N" in said
    assert "more than" in said
    code, said = done(command, source, "--limit", f"{name}={enough}")
    assert code == 0, said


def test_a_view_larger_than_its_file(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(1).expand(1000, 100)}, path)
    code, said = done("plan", path, "--limit", "view_bytes=1000")
    assert (code, "--limit view_bytes=N" in said) == (1, True)
    assert done("plan", path, "--limit", "view_bytes=400000")[0] == 0


def test_what_is_written_out_from_few_operations(tmp_path, monkeypatch):
    monkeypatch.setattr("pqcli.checkpoint.limits._FREE_ENTRIES", 10)
    path, inner = tmp_path / "m.pt", [0] * 50
    torch.save({"w": torch.ones(2), "x": [inner] * 200}, path)
    code, said = done("plan", path)
    assert (code, "--limit expansion=N" in said) == (1, True)
    assert done("plan", path, "--limit", "expansion=200")[0] == 0


@pytest.mark.parametrize("command", OPENS_A_CONTAINER)
@pytest.mark.parametrize(("name", "low", "enough"), [("json_bytes", 500, 1e6), ("decoded_bytes", 1, 1e6)])
def test_limits_of_a_container(container, command, name, low, enough, monkeypatch):
    monkeypatch.setattr("pqcli.container.door.DENSE_BYTES_PER_BYTE", 0)
    monkeypatch.setattr("pqcli.container.door.TENSOR_BYTES", 0)
    code, said = done(command, container, "--limit", f"{name}={low}")
    assert code == (3 if command == "verify" and name == "decoded_bytes" else 1)
    assert f"--limit {name}=N" in said
    assert "is damaged" not in said
    assert done(command, container, "--limit", f"{name}={enough:.0f}")[0] == 0


@pytest.mark.parametrize("command", ["report", "verify"])
def test_limits_hold_for_the_original_too(source, container, command):
    code, said = done(command, container, "--against", source, "--limit", "n_operations=50")
    assert (code, "--limit n_operations=N" in said) == (1, True)


def test_a_checkpoint_that_needs_a_limit_is_decoded_with_it(source, monkeypatch):
    monkeypatch.setattr("pqcli.limits.Limits.__init__.__defaults__", _lower(n_entries=50))
    file = source.with_name("m.pq.safetensors")
    assert done("compress", source)[0] == 1
    assert done("compress", source, "--limit", "n_entries=5000")[0] == 0
    code, said = done("decode", file)
    assert (code, "--limit n_entries=N" in said) == (1, True)
    assert done("decode", file, "--limit", "n_entries=5000")[0] == 0


def _lower(**changes):
    return tuple(changes.get(name, value) for name, value in vars(Limits()).items())


def test_limits_are_read_in_any_notation():
    assert limits_of(["n_entries=5e6", "n_bytes=1_000", "seconds=0.5"]) == Limits(
        n_entries=5_000_000, n_bytes=1000, seconds=0.5
    )


@pytest.mark.parametrize(
    "text", ["entries=5", "n_entries", "n_entries=", "n_entries=-1", "n_entries=inf", "n_entries=x"]
)
def test_a_limit_that_cannot_be_meant_is_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r"as in n_entries=\d"):
        limits_of([text])


def test_no_depth_overflows_the_stack(tmp_path):
    value = torch.ones(2)
    for _ in range(5000):
        value = [value]
    import sys

    sys.setrecursionlimit(100_000)
    try:
        torch.save({"w": torch.ones(2), "x": value}, tmp_path / "m.pt")
    finally:
        sys.setrecursionlimit(1000)
    code, said = done("plan", tmp_path / "m.pt", "--limit", "depth=1000000")
    assert (code, "nested deeper than can be followed" in said) == (1, True)


def test_the_documentation_names_every_limit_with_its_default():
    page = (REPOSITORY / "docs" / "cli.md").read_text()
    for name, default in vars(Limits()).items():
        assert f"| `{name}` | {default:,.0f} |" in page
