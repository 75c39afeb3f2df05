"""What was written is read again before it is put in place: a disk that lies, or a mistake of pqcli's, is found."""

import os
import stat

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import pqcli
from pqcli import atomic
from pqcli.cli.commands import app
from pqcli.container import writer
from pqcli.errors import OutputError
from tests.container import small

CODECS = ("plain", "ecpq", "trellis")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A container of each codec; its source lies beside it."""
    with pytest.MonkeyPatch.context() as patch:
        return {codec: small.make(codec, tmp_path_factory.mktemp(codec), patch, large=True) for codec in CODECS}


@pytest.fixture
def lying_disk(monkeypatch):
    """Lets every file be damaged when it is synced: after it was written, before it is read again."""
    fsync = os.fsync

    def damage_with(damage):
        def synced(descriptor):
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode):
                damage(descriptor, found.st_size)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", synced)

    return damage_with


def flip(share):
    """Flips a bit of the byte that lies at this share of the file."""

    def damage(descriptor, n_bytes):
        at = min(int(share * n_bytes), n_bytes - 1)
        os.pwrite(descriptor, bytes([os.pread(descriptor, 1, at)[0] ^ 16]), at)

    return damage


def shorten(descriptor, n_bytes):
    os.ftruncate(descriptor, n_bytes - 1)


def outputs(files, codec, folder):
    """Each way to write something, by the name of what it writes."""
    container = files[codec]
    recipe = small.RECIPES[codec]
    return {
        "x.pq.safetensors": lambda path, **how: pqcli.compress(container.with_name("model.pt"), path, recipe, **how),
        "x.pt": lambda path, **how: pqcli.decode(container, path, **how),
        "x.safetensors": lambda path, **how: pqcli.decode(container, path, **how),
        "x": lambda path, **how: pqcli.decode(container, path, **how),
    }


NAMES = ("x.pq.safetensors", "x.pt", "x.safetensors", "x")
WRITTEN = [(name, codec) for name in NAMES for codec in CODECS if name == NAMES[0] or codec == "plain"]


@pytest.mark.parametrize(("name", "codec"), WRITTEN)
@pytest.mark.parametrize("damage", [flip(0), flip(0.3), flip(0.7), flip(1), shorten])
def test_a_disk_that_gives_back_other_bytes_is_told_and_the_old_file_stays(
    files, tmp_path, lying_disk, name, codec, damage
):
    if name != "x":
        (tmp_path / name).write_bytes(b"the old one")
    lying_disk(damage)
    with pytest.raises(OutputError, match=rf"{name}.*: the disk gives back other bytes than were written, in the"):
        outputs(files, codec, tmp_path)[name](tmp_path / name, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ([] if name == "x" else [name])
    assert name == "x" or (tmp_path / name).read_bytes() == b"the old one"


@pytest.mark.parametrize(("name", "codec"), WRITTEN)
def test_no_verify_does_not_read_again(files, tmp_path, lying_disk, name, codec):
    lying_disk(flip(0.7))
    outputs(files, codec, tmp_path)[name](tmp_path / name, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("command", ["compress", "decode"])
def test_the_command_line_reads_again_unless_told_not_to(files, tmp_path, lying_disk, command):
    source = files["plain"].with_name("model.pt") if command == "compress" else files["plain"]
    target = tmp_path / ("x.pq.safetensors" if command == "compress" else "x.pt")
    lying_disk(flip(0.7))
    done = CliRunner().invoke(app, [command, str(source), "-o", str(target)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "the disk gives back other bytes" in " ".join(done.stderr.split())
    assert not any(tmp_path.iterdir())
    assert CliRunner().invoke(app, [command, str(source), "-o", str(target), "--no-verify"]).exit_code == 0
    if command == "compress":
        done = CliRunner().invoke(app, ["verify", str(target)])
        assert done.exit_code == 3, done.output


@pytest.mark.parametrize("key", ["pqcli.manifest", "pqcli.hashes", "pqcli.errors", "pqcli.kept"])
@pytest.mark.parametrize("codec", CODECS)
def test_an_entry_that_is_written_wrongly_is_found(files, tmp_path, monkeypatch, codec, key):
    """A mistake before the bytes reach the disk: their checksums agree, and they are not what was meant."""
    put = writer.Writer._put

    def wrongly(self, name, pieces):
        pieces = [bytes(memoryview(piece)) for piece in pieces]
        if name == key:
            pieces = [bytes([piece[0] ^ 255]) + piece[1:-1] + bytes([piece[-1] ^ 255]) for piece in pieces]
        put(self, name, pieces)

    monkeypatch.setattr(writer.Writer, "_put", wrongly)
    what = "what was written is not what was meant"
    with pytest.raises(OutputError, match=rf"x\.pq\.safetensors': {what}") as caught:
        outputs(files, codec, tmp_path)["x.pq.safetensors"](tmp_path / "x.pq.safetensors")
    assert ".pqcli" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codec", ["ecpq", "trellis"])
def test_streams_that_are_written_wrongly_are_found(files, tmp_path, monkeypatch, codec):
    put = writer.Writer._put

    def wrongly(self, name, pieces):
        put(self, name, [bytes(piece)[::-1] for piece in pieces] if name == "pqcli.coded" else pieces)

    monkeypatch.setattr(writer.Writer, "_put", wrongly)
    with pytest.raises(OutputError, match="the streams on the disk are not those that were coded"):
        outputs(files, codec, tmp_path)["x.pq.safetensors"](tmp_path / "x.pq.safetensors")
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=20)), max_size=8))
def test_bytes_that_are_written_over_raise_no_false_alarm(tmp_path_factory, writes):
    target = tmp_path_factory.mktemp("over") / "x"
    expected = bytearray()
    with atomic.atomic_writer(target, check=lambda _: None) as file:
        for start, data in writes:
            file.seek(start)
            file.write(data)
            if data:
                expected.extend(bytes(max(0, start + len(data) - len(expected))))
                expected[start : start + len(data)] = data
    assert target.read_bytes() == expected


def test_memory_does_not_stand_in_for_the_disk(tmp_path, monkeypatch):
    """What is read again is asked of the disk, where the system lets its cache be dropped."""
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: asked.append(given[3]))
    with atomic.atomic_writer(tmp_path / "x", check=lambda _: None) as file:
        file.write(torch.zeros(10).numpy().tobytes())
    assert asked == [os.POSIX_FADV_DONTNEED]
