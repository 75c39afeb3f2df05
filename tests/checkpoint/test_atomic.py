"""Files appear whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from pqcli.atomic import atomic_writer
from pqcli.errors import OutputError
from tests.conftest import file_size_limit


def put(target, content=b"new", **options):
    with atomic_writer(target, force=options.pop("force", False)) as file:
        file.write(content)


def test_the_file_appears_at_the_end_with_the_mode_of_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_writer(tmp_path / "x", force=False) as file:
            file.write(b"hello")
            assert not (tmp_path / "x").exists()
            file.seek(0)
            file.write(b"J")
    finally:
        os.umask(before)
    assert (tmp_path / "x").read_bytes() == b"Jello"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, error):
    (tmp_path / "x").write_bytes(b"old")

    def fail():
        with atomic_writer(tmp_path / "x", force=True) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_an_existing_file_is_replaced_only_by_force(tmp_path):
    put(tmp_path / "x", b"old")
    with pytest.raises(OutputError, match="exists already; use --force"):
        put(tmp_path / "x")
    put(tmp_path / "x", force=True)
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    def race():
        with atomic_writer(tmp_path / "x", force=False):
            (tmp_path / "x").write_bytes(b"theirs")

    with pytest.raises(OutputError, match="exists already"):
        race()
    assert (tmp_path / "x").read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_symbolic_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real" / "x")
    put(tmp_path / "link", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "x").read_bytes() == b"new"
    (tmp_path / "dangling").symlink_to(tmp_path / "real" / "y")
    put(tmp_path / "dangling")
    assert (tmp_path / "real" / "y").read_bytes() == b"new"


def test_what_is_no_ordinary_file_is_refused_even_by_force(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    (tmp_path / "file").write_bytes(b"")
    for target, message in [
        (tmp_path, "it is a folder"),
        (tmp_path / "fifo", "a device, pipe or socket"),
        (tmp_path / "missing" / "x", "its folder does not exist"),
        (tmp_path / "file" / "x", "is a file, not a folder"),
        (tmp_path / ("x" * 300), "the name is too long"),
        (tmp_path / "a", "run in a circle"),
        (tmp_path / "nul\0l", "null byte"),
    ]:
        with pytest.raises(OutputError, match=message):
            put(target, force=True)


def test_a_long_name_is_no_problem(tmp_path):
    put(tmp_path / ("語" * 80))
    put(tmp_path / ("x" * 255))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path):
    with file_size_limit(1 << 20), pytest.raises(OutputError, match="size limit of the file system"):
        put(tmp_path / "x", bytes(2 << 20))
    assert not list(tmp_path.iterdir())


def test_importing_it_does_not_import_torch():
    code = "import pqcli.atomic, sys; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
