"""Names and places: whatever a path is, one message and nothing changed, or the work done and the name shown safely."""

import os
import socket
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from pqcli.cli.commands import app

COMPRESS, DECODE = ("compress", "m.safetensors"), ("decode", "m.pq.safetensors")
REPORT = ("report", "m.pq.safetensors", "--format", "html")
WRITERS = {"compress": COMPRESS, "decode": DECODE, "report": REPORT}
READERS = ("compress", "plan", "decode", "report", "inspect", "verify")
ENDINGS = {"compress": ".pq.safetensors", "decode": ".safetensors", "report": ".html"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, bytes]:
    """The bytes of a small checkpoint and of its container."""
    folder = tmp_path_factory.mktemp("made")
    save_file({"w": torch.randn(64, 16, generator=torch.Generator().manual_seed(0))}, folder / "m.safetensors")
    assert CliRunner().invoke(app, ["compress", str(folder / "m.safetensors")]).exit_code == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def here(made, tmp_path, monkeypatch) -> Path:
    """The current folder: both files, and nothing else."""
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pqcli(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def snapshot(folder: Path) -> dict[str, object]:
    """What lies in a folder, by name: the content of files, what links say, the mode of the rest."""

    def content(path: Path) -> object:
        if path.is_symlink():
            return path.readlink()
        return path.read_bytes() if path.is_file() else stat.S_IFMT(path.stat().st_mode)

    return {os.fsdecode(path.relative_to(folder)): content(path) for path in folder.rglob("*")}


def refused(folder: Path, *arguments: object, words: str) -> None:
    """One message with these words, printable, on stderr; the folder is as it was."""
    before = snapshot(folder)
    done = pqcli(*arguments)
    assert done.exit_code in {1, 2}, done.output
    assert not isinstance(done.exception, Exception), done.exception
    assert done.stdout == ""
    flat = " ".join(done.stderr.split())
    assert words in flat, flat
    assert all(line.isprintable() for line in done.stderr.splitlines())
    assert snapshot(folder) == before


# --- where to write ---------------------------------------------------------------------------------------------------


def place(name: str, folder: Path, ending: str = "") -> Path:
    """A place for an output that is none, by what is wrong with it."""
    path = folder / f"place{ending}"
    match name:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "socket":
            socket.socket(socket.AF_UNIX).bind(str(path))
        case "link to a folder":
            (folder / "real").mkdir()
            path.symlink_to("real")
        case "link to a device":
            path.symlink_to("/dev/null")
        case "loop of links":
            path.symlink_to("other")
            (folder / "other").symlink_to(path.name)
        case "link into a missing folder":
            path.symlink_to("missing/x")
        case "existing":
            path.write_bytes(b"old")
        case "below a file":
            (folder / "file").write_bytes(b"old")
            return folder / "file" / path.name
        case "in a missing folder":
            return folder / "missing" / path.name
        case "too long":
            return folder / ("x" * 256 + ending)
        case "too long a path":
            return folder.joinpath(*["x" * 200] * 30, path.name)
    return path


PLACES = {
    "folder": "it is a folder", "fifo": "a device, pipe or socket", "socket": "a device, pipe or socket",
    "link to a folder": "it is a folder", "link to a device": "a device, pipe or socket",
    "loop of links": "run in a circle", "link into a missing folder": "its folder does not exist",
    "existing": "exists already; use --force", "below a file": "a file, not a folder",
    "in a missing folder": "its folder does not exist", "too long": "the name is too long",
    "too long a path": "the name is too long",
}  # fmt: skip


FILES_ONLY = {"folder", "link to a folder"}
"""A checkpoint may be a folder, so `decode` writes into one; see below."""


@pytest.mark.parametrize(
    ("command", "name"),
    [(command, name) for command in WRITERS for name in PLACES if command != "decode" or name not in FILES_ONLY],
)
def test_a_place_that_takes_no_file_is_told_and_nothing_changes(here, command, name):
    force = () if name == "existing" else ("--force",)
    refused(here, *WRITERS[command], "-o", place(name, here, ENDINGS[command]), *force, words=PLACES[name])


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
def test_a_device_is_no_output(here, command, device):
    refused(here, *WRITERS[command], "-o", device, "--force", words="cannot write")


def test_a_folder_with_something_in_it_is_no_place_for_a_checkpoint_of_a_folder(here):
    (here / "place").mkdir()
    (here / "place" / "something").write_bytes(b"old")
    refused(here, *DECODE, "-o", "place", words="is not empty; use --force to write into it")
    (here / "place" / "model-7.safetensors").write_bytes(b"old")
    refused(here, *DECODE, "-o", "place", "--force", words="holds other weights (model-7.safetensors)")


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("spelling", ["plain", "roundabout", "link", "hard link"])
def test_the_input_is_never_the_output(here, command, spelling):
    source = Path(WRITERS[command][1])
    match spelling:
        case "roundabout":
            source = Path("..", here.name, source)
        case "link":
            Path("link.safetensors").symlink_to(source)
            source = Path("link.safetensors")
        case "hard link":
            os.link(source, "hard.safetensors")
            source = Path("hard.safetensors")
    refused(here, *WRITERS[command], "-o", source, "--force", words=f"'{source}' is the input itself")


def test_the_original_that_is_compared_with_is_never_the_output(here):
    refused(here, *REPORT, "--against", "m.safetensors", "-o", "m.safetensors", "--force", words="is the input itself")


def test_a_shard_of_the_input_is_never_the_output(here, made):
    (here / "in").mkdir()
    (here / "in" / "model.safetensors").write_bytes(made["m.safetensors"])
    refused(here, "compress", "in", "-o", "in/model.safetensors", "--force", words="is a part of the input")
    assert pqcli("compress", "in", "-o", "in/new.pq.safetensors").exit_code == 0
    assert pqcli("compress", "in", "-o", "in/new.pq.safetensors", "--force").exit_code == 0


def test_the_container_is_not_written_over_by_a_shard_of_its_name(here, made):
    (here / "in").mkdir()
    (here / "in" / "model.safetensors").write_bytes(made["m.pq.safetensors"])
    refused(here, "decode", "in/model.safetensors", "-o", "in", "--force", words="'in' holds the input")


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize(
    "name",
    ["line\nbreak", "bell\a\x1b[31m", "größe 日本 🙂", "[red]markup[bold]", "-x", "a b", "\u202egnp", "'\"`$(id)"],
)
def test_any_name_that_a_file_can_have_is_written_and_shown_safely(here, command, name):
    target = name + ENDINGS[command]
    done = pqcli(*WRITERS[command], "-o", f"./{target}")
    assert done.exit_code == 0, done.output
    assert (here / target).is_file()
    assert all(line.isprintable() for line in (done.stdout + done.stderr).splitlines())
    again = pqcli(*WRITERS[command], "-o", f"./{target}")
    assert again.exit_code == 1
    assert "exists already" in again.stderr
    assert all(line.isprintable() for line in again.stderr.splitlines())
    assert len(list(here.iterdir())) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="file names are text on a Mac")
@pytest.mark.parametrize("command", WRITERS)
def test_a_name_that_is_no_text_is_written_and_read(here, command):
    target = os.fsdecode(b"\xff\xfe") + ENDINGS[command]
    done = pqcli(*WRITERS[command], "-o", target)
    assert done.exit_code == 0, done.output
    assert os.fsencode(target) in [os.fsencode(path.name) for path in here.iterdir()]
    done.output.encode()  # it can be shown


@pytest.mark.parametrize("command", WRITERS)
def test_a_link_stays_a_link_and_its_file_is_replaced_or_made(here, command):
    ending = ENDINGS[command]
    (here / "real").mkdir()
    for name, old in (("old", b"old"), ("new", None)):
        if old:
            (here / "real" / (name + ending)).write_bytes(old)
        (here / (name + "-link" + ending)).symlink_to(f"real/{name}{ending}")
        assert pqcli(*WRITERS[command], "-o", name + "-link" + ending, "--force").exit_code == 0
        assert (here / (name + "-link" + ending)).is_symlink()
        assert (here / "real" / (name + ending)).stat().st_size > 100
    assert {path.name for path in (here / "real").iterdir()} == {"old" + ending, "new" + ending}


@pytest.mark.parametrize("command", WRITERS)
def test_permissions_follow_the_umask_or_are_those_of_the_file_replaced(here, command):
    target = here / ("x" + ENDINGS[command])
    before = os.umask(0o027)
    try:
        assert pqcli(*WRITERS[command], "-o", target).exit_code == 0
        assert stat.S_IMODE(target.stat().st_mode) == 0o640
        target.chmod(0o606)
        if os.geteuid() == 0:
            os.chown(target, 12, 34)
        assert pqcli(*WRITERS[command], "-o", target, "--force").exit_code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o606
    if os.geteuid() == 0:
        assert (target.stat().st_uid, target.stat().st_gid) == (12, 34)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("command", WRITERS)
def test_a_folder_that_may_not_be_written_is_told(here, command):
    (here / "sealed").mkdir(mode=0o555)
    refused(here, *WRITERS[command], "-o", f"sealed/x{ENDINGS[command]}", words="permission denied")


def test_two_outputs_of_one_name_in_different_spelling_are_one(here):
    (here / "sub").mkdir()
    assert pqcli(*COMPRESS, "-o", "sub/../x.pq.safetensors").exit_code == 0
    refused(here, *COMPRESS, "-o", here / "x.pq.safetensors", words="exists already")


# --- what to read -----------------------------------------------------------------------------------------------------

ODD_INPUTS = {
    "missing": "", "folder": "", "fifo": "", "socket": "", "loop of links": "", "dangling link": "", "empty": "",
    "one byte": "", "text": "", "zeros": "", "below a file": "", "too long": "", "null device": "", "no name": "",
    "device without end": "",
}  # fmt: skip


def odd_input(name: str, folder: Path) -> str:
    path = folder / "odd"
    match name:
        case "folder":
            path.mkdir()
        case "fifo" | "socket" | "loop of links":
            place(name, folder).rename(path)
            if name == "loop of links":
                (folder / "other").unlink()
                (folder / "other").symlink_to("odd")
        case "dangling link":
            path.symlink_to("nothing")
        case "empty":
            path.write_bytes(b"")
        case "one byte":
            path.write_bytes(b"\x80")
        case "text":
            path.write_text("<html>404</html>")
        case "zeros":
            path.write_bytes(bytes(4096))
        case "below a file":
            path.write_bytes(b"x")
            return "odd/x"
        case "too long":
            return "x" * 300
        case "null device":
            return "/dev/null"
        case "device without end":
            return "/dev/zero"
        case "no name":
            return ""
    return str(path)


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("name", ODD_INPUTS)
def test_what_is_no_input_is_told_at_once_and_nothing_is_written(here, command, name):
    refused(here, command, odd_input(name, here), words="")


@pytest.mark.parametrize("command", ["report", "verify"])
@pytest.mark.parametrize("name", ["missing", "folder", "fifo", "empty", "text", "device without end"])
def test_what_is_no_original_is_told_at_once(here, command, name):
    refused(here, command, "m.pq.safetensors", "--against", odd_input(name, here), words="")


@pytest.mark.parametrize("command", READERS)
def test_an_input_behind_links_or_with_an_odd_name_is_read(here, command):
    own = WRITERS["compress"][1] if command in {"compress", "plan"} else "m.pq.safetensors"
    odd = here / "a\n[b]\x1b.x"
    odd.symlink_to(own)
    done = pqcli(command, odd)
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
