"""The file of a journal: torn, damaged, planted, or with no room on the disk; and what it holds."""

import contextlib
import errno
import os
import pickle
import stat
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import pqcli
from pqcli.atomic import JOURNAL_ENDING
from pqcli.codecs.base import Original, Piece, StreamPiece, Use, Weights
from pqcli.codecs.kept import KeptJob
from pqcli.codecs.rate.survey import Seen
from pqcli.container import writer
from pqcli.core.metrics import Error
from pqcli.jobs.journal import journal as journals
from pqcli.jobs.journal.file import JournalFile, StrangeError, journal_path
from pqcli.jobs.journal.fingerprints import Fingerprints
from pqcli.jobs.journal.values import KNOWN, decoded, encoded
from pqcli.recipe.recipe import Recipe
from pqcli.tensors.info import TensorInfo
from pqcli.tensors.records import Kept, Plain, Record
from tests.conftest import file_size_limit

RECIPE = Recipe(block_size=8, n_centroids=16, n_iter=2)
N_TENSORS = 4


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(journals, "AFTER_SECONDS", 0)


@pytest.fixture
def source(tmp_path):
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "m.safetensors"
    save_file({f"w{i}": torch.randn(32, 64, generator=generator) for i in range(N_TENSORS)}, path)
    return path


@pytest.fixture
def target(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "x.pq.safetensors"


@pytest.fixture
def left(source, target, monkeypatch):
    """The journal of a run that was killed when all was done but the file itself, and the bytes of that file."""

    def dies(*_arguments, **_options):
        raise KeyboardInterrupt

    pqcli.compress(source, target, RECIPE, journal=False)
    whole = target.read_bytes()
    target.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(writer.Writer, "finish", dies)
        with pytest.raises(KeyboardInterrupt):
            pqcli.compress(source, target, RECIPE)
    (path,) = target.parent.iterdir()
    return path, whole


def resumed(source, target, whole) -> int:
    """How many tensors a run finds that ends well, and leaves nothing."""
    report = pqcli.compress(source, target, RECIPE)
    assert target.read_bytes() == whole
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert report.warnings == ()
    return int(report.resumed.split()[1]) if report.resumed else 0


def test_a_journal_is_a_hidden_file_of_its_owner_alone_beside_the_output(left, target):
    path, _ = left
    assert path == journal_path(target)
    assert path.name.startswith(f".{target.name}.")
    assert path.name.endswith(JOURNAL_ENDING)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("lost", [1, 20, 400])
def test_a_torn_tail_is_cut_off_and_forgotten(left, source, target, lost):
    path, whole = left
    os.truncate(path, path.stat().st_size - lost)
    assert resumed(source, target, whole) == N_TENSORS - 1


@pytest.mark.parametrize("tail", [bytes(500), b"x" * 500, struct.pack("<QQ16s", 8, 1 << 60, b"") + bytes(8)])
def test_what_lies_behind_the_last_whole_frame_is_forgotten(left, source, target, tail):
    path, whole = left
    with path.open("ab") as file:
        file.write(tail)
    assert resumed(source, target, whole) == N_TENSORS


@pytest.mark.parametrize("n_bytes", [0, 5, 16, 60])
def test_a_journal_torn_in_its_first_frame_is_none(left, source, target, n_bytes):
    path, whole = left
    os.truncate(path, n_bytes)
    assert resumed(source, target, whole) == 0


def test_a_damaged_frame_ends_what_is_believed(left, source, target):
    path, whole = left
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert 0 < resumed(source, target, whole) < N_TENSORS


@pytest.mark.parametrize("what", ["writable", "link", "pipe", "folder"])
def test_what_a_stranger_may_have_put_in_its_place_is_left_alone_and_the_run_goes_without(left, source, target, what):
    path, whole = left
    if what == "writable":
        path.chmod(0o666)
    else:
        elsewhere = path.rename(target.parent.parent / "elsewhere")
        {"link": lambda: path.symlink_to(elsewhere), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}[what]()
    report = pqcli.compress(source, target, RECIPE)
    assert target.read_bytes() == whole
    assert report.resumed == ""
    (warning,) = report.warnings
    assert warning.startswith(f"no journal was kept: '{path}' is in the way and was left alone (")
    assert os.path.lexists(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_a_journal_of_another_user_is_not_read(left, source, target):
    path, _ = left
    os.chown(path, 12345, 12345)
    assert "somebody else" in pqcli.compress(source, target, RECIPE).warnings[0]


class Bomb:
    def __reduce__(self):
        return os.system, ("touch /tmp/pqcli-journal-bomb",)


@pytest.mark.parametrize("data", [
    pickle.dumps(Bomb()), b"o" + b"".join(encoded("os:system")) + b"".join(encoded({"command": "true"})),
    b"".join(encoded("x"))[:-1], b"", b"?", b"l" + struct.pack("<Q", 1 << 62), b"l\1" + bytes(7) + b"N" * 2,
    (b"l\1" + bytes(7)) * 5000, b"z\1" + bytes(7) + b"l" + bytes(8), b"d\1" + bytes(7) + b"N",
    b"a" + b"".join(b"".join(encoded(part)) for part in ("|O", (1,), bytes(8))),
    b"a" + b"".join(b"".join(encoded(part)) for part in ("<f4", (1 << 40,), bytes(8))),
    b"a" + b"".join(b"".join(encoded(part)) for part in ("<f4", "no shape", bytes(8))),
    b"o" + b"".join(encoded("pqcli.tensors.records:Kept")) + b"".join(encoded({"of": 1})),
    b"o" + b"".join(encoded("pqcli.tensors.records:Kept")) + b"".join(encoded({1: 1})),
    b"o" + b"".join(encoded([])) + b"".join(encoded({})), b"s\1" + bytes(7) + b"\xff",
])  # fmt: skip
def test_planted_bytes_are_no_value_and_run_nothing(data):
    with pytest.raises(ValueError):  # noqa: PT011 - what is wrong with them matters to nobody
        decoded(data, None)
    assert not os.path.exists("/tmp/pqcli-journal-bomb")  # noqa: PTH110


@given(st.lists(st.sampled_from([*b"NTFifsbagtldzow", 0, 1, 2, 255]), max_size=60).map(bytes))
def test_any_bytes_are_a_value_or_a_value_error(data):
    with contextlib.suppress(ValueError):
        decoded(data, None)


def test_a_planted_result_runs_nothing_and_is_found_anew(left, source, target):
    path, whole = left
    file, frames = JournalFile.found(path)
    for frame in frames[1:]:
        file.append([frame.head], [pickle.dumps(Bomb())])
    for head in (pickle.dumps(Bomb()), *(b"".join(encoded(value)) for value in (3, ([], 1, 2, 3, 4), (b"", 1, 2, 3)))):
        file.append([head], [])
    file.close()
    pqcli.compress(source, target, RECIPE)
    assert target.read_bytes() == whole
    assert not os.path.exists("/tmp/pqcli-journal-bomb")  # noqa: PTH110


def test_results_come_back_as_they_were():
    info = TensorInfo("a\ud800", (4, 3), "float32", overlaps="b")
    record = Record(info, Plain(2, 16, "float16", 4), "why", "linear", 3)
    error = Error(3, 1.5, float("inf"), np.float64(0.1), -0.0, 2.0)
    weights = Weights(None)
    values = [
        Piece(record, b"digest", (("k", b"data"), ("l", np.arange(5, dtype=np.uint8))), None, error, Use(3, None, 0.5)),
        [StreamPiece(i, bytes([i]), (np.float32(1.5), np.zeros((2, 0, 3)))) for i in range(2)],
        Seen(exact=KeptJob(Record(info, Kept(7)), weights, is_compact=True), original=Original(1.0, 2.0)),
        {"a": frozenset({1, -1, 1 << 70}), 2: (None, [], "\0")},
    ]
    for value in values:
        found = decoded(b"".join(encoded(value)), weights)
        assert repr(found) == repr(value)
        assert type(found) is type(value)
    assert decoded(b"".join(encoded(values[2])), weights).exact.weights is weights
    assert decoded(b"".join(encoded(error)), None).squared_error.dtype == np.float64
    for unknown in (object(), torch.zeros(3), np.array([object()]), TypeError, RECIPE):
        with pytest.raises(TypeError, match="a journal holds no"):
            encoded(unknown)


def test_every_known_class_is_a_frozen_dataclass_of_this_package_without_code_of_its_own_when_made():
    import importlib

    for name in KNOWN:
        module, _, kind = name.partition(":")
        made = getattr(importlib.import_module(module), kind)
        assert module.startswith("pqcli.")
        assert made.__dataclass_params__.frozen
        assert not hasattr(made, "__post_init__")


def test_a_fingerprint_changes_with_any_field_and_not_with_the_process():
    info = TensorInfo("a", (4, 3), "float32")
    job = KeptJob(Record(info, Kept()), Weights(None), is_compact=True)
    keys = [
        Fingerprints(scope).key(stage, task)
        for scope, stage, task in [
            ("", "keeping", job), ("vae", "keeping", job), ("", "encoding", job),
            ("", "keeping", KeptJob(job.record, Weights(None), is_compact=False)),
            ("", "keeping", KeptJob(Record(info, Kept(), "why"), Weights(None), is_compact=True)),
            ("", "keeping", np.zeros(3, np.float32)), ("", "keeping", np.zeros((3, 1), np.float32)),
            ("", "keeping", torch.zeros(3)), ("", "keeping", [np.float32(0), 0.0, 0, False, None, "", b""]),
        ]
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert keys[0] == Fingerprints().key("keeping", KeptJob(Record(info, Kept()), Weights(1), is_compact=True))
    assert Fingerprints().key("keeping", object()) is None


# --- the disk ---------------------------------------------------------------------------------------------------------


def warned(report, why):
    (warning,) = report.warnings
    assert warning.startswith(f"no journal was kept: {why}; ")
    return True


def test_a_journal_that_the_disk_does_not_take_is_given_up_and_the_run_ends_well(source, target, monkeypatch):
    pqcli.compress(source, target, RECIPE, journal=False)
    whole, append = target.read_bytes(), JournalFile.append
    n_appended = 0

    def full(self, head, result):
        nonlocal n_appended
        n_appended += 1
        if n_appended == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return append(self, head, result)

    monkeypatch.setattr(JournalFile, "append", full)
    report = pqcli.compress(source, target, RECIPE, force=True)
    assert warned(report, "the disk is full")
    assert (target.read_bytes(), n_appended) == (whole, 3)
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_a_disk_with_room_for_the_output_but_not_for_the_journal_gets_the_output(source, target, monkeypatch):
    """Wherever the output runs out of room, the journal makes some, and the bytes are those that they would be."""
    pqcli.compress(source, target, RECIPE, journal=False)
    whole, is_full = target.read_bytes(), writer.Writer._write
    path = journal_path(target)

    def refuses(call):
        def refusing(*arguments):
            if path.exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            return call(*arguments)

        return refusing

    class Spool:
        def __init__(self, file):
            self.file, self.n_written = file, 0

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.n_written += 1
            if self.n_written % 3 == 0 and path.exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data[:7])

    with monkeypatch.context() as patched:
        patched.setattr(writer.Writer, "_write", refuses(is_full))
        assert warned(pqcli.compress(source, target, RECIPE, force=True), "the disk is full")
        assert target.read_bytes() == whole
    made = writer.tempfile.TemporaryFile
    monkeypatch.setattr(writer.tempfile, "TemporaryFile", lambda **options: Spool(made(**options)))
    assert warned(pqcli.compress(source, target, RECIPE, force=True), "the disk is full")
    assert target.read_bytes() == whole


def test_a_limit_on_the_size_of_files_that_only_the_journal_reaches_costs_the_journal(source, target):
    pqcli.compress(source, target, RECIPE, journal=False)
    whole = target.read_bytes()
    with file_size_limit(len(whole)):
        report = pqcli.compress(source, target, RECIPE, force=True)
    assert target.read_bytes() == whole
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert report.warnings == () or warned(report, "File too large")


def test_a_folder_where_only_the_output_may_be_written_costs_the_journal(source, target, monkeypatch):
    def strange(*_arguments):
        raise StrangeError("it is, or may be written to by, somebody else")

    monkeypatch.setattr(JournalFile, "made", strange)
    assert warned(pqcli.compress(source, target, RECIPE), "it is, or may be written to by, somebody else")
