"""Full disks, limits, signals, kills: an output is whole or not there, and the old one stays."""

import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pqcli.jobs.compress import compress
from pqcli.jobs.decode import decode
from pqcli.jobs.verify import verify
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "120"}


@pytest.fixture
def big(tmp_path) -> Path:
    """A checkpoint whose compressed form takes some 400 kB, most of it kept."""
    folder = tmp_path / "in"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    state = {f"w{i}": torch.randn(128, 64, generator=generator) for i in range(4)}
    save_file({**state, "kept": torch.arange(100_000, dtype=torch.int32)}, folder / "big.safetensors")
    return folder / "big.safetensors"


def pqcli(*arguments: object, cwd: Path, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pqcli", *map(str, arguments)],
        cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, **options,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def limit_file_size(n_bytes: int):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


def told(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for word in words:
        assert word in " ".join(done.stderr.split()), done.stderr


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("n_bytes", [1_000, 100_000, 400_000])
def test_a_file_size_limit_leaves_the_folder_as_it_was(big, tmp_path, exists, n_bytes):
    out = tmp_path / "out"
    out.mkdir()
    if exists:
        (out / "x.pq.safetensors").write_bytes(b"the old one")
    before = contents(out)
    done = pqcli("compress", big, "-o", "x.pq.safetensors", "--force", cwd=out, preexec_fn=limit_file_size(n_bytes))
    told(done, 1, "cannot write", "x.pq.safetensors", "size limit")
    assert contents(out) == before


@pytest.mark.parametrize("target", ["x.pt", "x.safetensors", "folder"])
def test_a_file_size_limit_while_decoding_leaves_the_folder_as_it_was(big, tmp_path, target):
    out = tmp_path / "out"
    out.mkdir()
    assert pqcli("compress", big, "-o", "x.pq.safetensors", cwd=out).returncode == 0
    if target != "folder":
        (out / target).write_bytes(b"the old one")
    before = contents(out)
    done = pqcli("decode", "x.pq.safetensors", "-o", target, "--force", cwd=out, preexec_fn=limit_file_size(100_000))
    told(done, 1, "cannot write", "size limit")
    assert contents(out) == before
    assert not (out / "folder").exists()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 300 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_folder_as_it_was_and_says_what_to_do(big, tiny_disk):
    (tiny_disk / "x.pq.safetensors").write_bytes(b"the old one")
    before = contents(tiny_disk)
    done = pqcli("compress", big, "-o", "x.pq.safetensors", "--force", cwd=tiny_disk)
    told(done, 1, "cannot write", "the disk is too full: writing it takes", "are free")
    assert contents(tiny_disk) == before


def test_a_full_disk_while_decoding_or_reporting_leaves_the_folder_as_it_was(big, tiny_disk, tmp_path):
    assert pqcli("compress", big, "-o", tmp_path / "x.pq.safetensors", cwd=tmp_path).returncode == 0
    for target in ("dense.pt", "dense.safetensors", "dense"):
        told(pqcli("decode", tmp_path / "x.pq.safetensors", "-o", target, cwd=tiny_disk), 1, "disk is")
        assert list(tiny_disk.iterdir()) == []
    (tiny_disk / "filler").write_bytes(bytes(290 << 10))
    report = pqcli("report", tmp_path / "x.pq.safetensors", "--format", "html", "-o", "r.html", cwd=tiny_disk)
    told(report, 1, "disk is")
    assert [path.name for path in tiny_disk.iterdir()] == ["filler"]


def test_the_disk_needs_room_for_the_output_twice_at_most(big, tiny_disk, tmp_path):
    """A container of 120 kB fits on a disk of 300."""
    save_file({"kept": torch.arange(30_000, dtype=torch.int32)}, tmp_path / "s.safetensors")
    assert pqcli("compress", tmp_path / "s.safetensors", "-o", "x.pq.safetensors", cwd=tiny_disk).returncode == 0


@pytest.fixture(scope="module")
def slow_work(tmp_path_factory) -> Path:
    """A checkpoint of one tensor that keeps a machine busy for long."""
    folder = tmp_path_factory.mktemp("slow")
    save_file({"w": torch.randn(4096, 2048)}, folder / "slow.safetensors")
    return folder / "slow.safetensors"


CODECS = {
    "plain": ["--block-size", "8", "--n-centroids", "8192", "--n-iter", "1000"],
    "trellis": ["--codec", "trellis", "--effort", "2048", "--target-bits", "3"],
    "ecpq": ["--target-bits", "2"],
}
SOON = 5
"""Seconds: the work ends within one, and a machine that tests share is late."""


def start(*arguments: object, cwd: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "pqcli", *map(str, arguments)],
        cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("number", "delay"),
    [
        (signal.SIGINT, 1.0),
        pytest.param(signal.SIGTERM, 0.1, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 2.3, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 3.7, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_work_soon_with_its_code_and_the_old_file_stays(slow_work, tmp_path, codec, number, delay):
    process, moment = None, delay
    while process is None or process.poll() is not None:  # a quick machine is done by then: an earlier moment
        (tmp_path / "x.pq.safetensors").write_bytes(b"the old one")
        process = start("compress", slow_work, "-o", "x.pq.safetensors", "--force", *CODECS[codec], cwd=tmp_path)
        wait_for_work(process, moment)
        moment /= 2
    sent = time.monotonic()
    process.send_signal(number)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number, err
    assert out == ""
    assert err == "error: interrupted; nothing was written\n"
    assert time.monotonic() - sent < SOON
    assert contents(tmp_path) == {"x.pq.safetensors": b"the old one"}


def test_a_second_signal_while_the_work_is_stopping_ends_it_at_once_with_one_message(slow_work, tmp_path):
    (tmp_path / "x.pq.safetensors").write_bytes(b"the old one")
    process = start("compress", slow_work, "-o", "x.pq.safetensors", "--force", *CODECS["trellis"], cwd=tmp_path)
    wait_for_work(process, 1)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode in {130, 143}, err  # two that wait to be heard come in no order
    assert (out, err) == ("", "error: interrupted; nothing was written\n")
    assert time.monotonic() - sent < SOON
    assert contents(tmp_path) == {"x.pq.safetensors": b"the old one"}


def test_a_second_run_on_one_output_is_refused_and_a_killed_one_blocks_nobody(slow_work, big, tmp_path):
    first = start("compress", slow_work, "-o", "x.pq.safetensors", *CODECS["plain"], cwd=tmp_path)
    wait_for_work(first, 0)
    second = pqcli("compress", big, "-o", "x.pq.safetensors", cwd=tmp_path)
    first.kill()
    first.communicate()
    told(second, 1, f"another pqcli (process {first.pid}) is writing 'x.pq.safetensors'")
    assert pqcli("compress", big, "-o", "x.pq.safetensors", cwd=tmp_path).returncode == 0
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["x.pq.safetensors"]


KILLS = """
import os, random, signal, sys, time
import torch, pqcli, pqcli.codecs.plain, pqcli.jobs.compress

torch.set_num_threads(1)  # no threads before a fork
source, target, n = sys.argv[1], sys.argv[2], int(sys.argv[3])


def forked():
    child = os.fork()
    if not child:
        pqcli.compress(source, target, force=True)
        os._exit(0)
    return child


def timed():
    started = time.monotonic()
    os.waitpid(forked(), 0)
    return time.monotonic() - started


timed()
pqcli.verify(target, source)  # now everything is imported, here and so in every child
takes, draw, runs, killed, wholes = min(timed() for _ in range(3)), random.Random(0), 0, 0, 0
os.unlink(target)
while killed < n:
    runs += 1
    child = forked()
    time.sleep(draw.uniform(0, takes))
    os.kill(child, signal.SIGKILL)
    killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    if os.path.exists(target):
        wholes += 1
        assert pqcli.verify(target, source) == []
pqcli.compress(source, target, force=True)
print(f"{runs} runs of {takes:.2f} s, {killed} killed before they ended;", end=" ")
print(f"{wholes} outputs found, all whole; left:", *os.listdir("."))
"""


@pytest.mark.exhaustive
def test_kills_at_random_moments_leave_no_output_or_a_whole_one(big, tmp_path, capsys):
    """At any moment of a run, its reading again and its rename among them; the next run removes what they left."""
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLS, big, "x.pq.safetensors", "50"],
        cwd=tmp_path / "out", env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("left: x.pq.safetensors\n")
    with capsys.disabled():
        print(f"\n{done.stdout}", end="")


def wait_for_work(process: subprocess.Popen, delay: float = 1) -> None:
    """Until the process has opened its spool, which it does when the work begins."""
    for _ in range(600):
        links = Path(f"/proc/{process.pid}/fd")
        try:
            if any("(deleted)" in str(link.readlink()) for link in links.iterdir()):
                break
        except OSError:
            pass
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    time.sleep(delay)


@pytest.mark.parametrize("verb", ["save", "compress", "decode"])
def test_what_a_killed_process_leaves_is_removed_by_the_next_one(made, tmp_path, verb):
    """It is killed where most lies about: the dense file of `save` and what is being written."""
    target = tmp_path / ("x.pt" if verb == "decode" else "x.pq.safetensors")
    script = """
import os, signal, sys, torch, pqcli, pqcli.atomic
pqcli.atomic.move = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
verb, source, target = sys.argv[1:]
if verb == "save":
    pqcli.save({"w": torch.randn(128, 64)}, target)
getattr(pqcli, verb)(source, target)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, verb, made[verb == "decode"], target],
        env=ENVIRONMENT, capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [path.suffix for path in tmp_path.iterdir() if not path.name.endswith("-lock")]
    assert sorted(left) == ([".pqcli", ".pt"] if verb == "save" else [".pqcli"])
    if verb == "decode":
        decode(made[1], target)
    else:
        compress(made[0], target)
    assert list(tmp_path.iterdir()) == [target]


@pytest.fixture
def strace() -> str:
    found = shutil.which("strace")
    if not found:
        pytest.skip("strace is not installed")
    probe = subprocess.run([found, "-o", os.devnull, sys.executable, "-c", ""], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("strace may not trace here")
    return found


@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_at_the_rename_leaves_the_old_file_or_none_and_the_next_run_works(big, tmp_path, strace, exists):
    out = tmp_path / "out"
    out.mkdir()
    if exists:
        (out / "x.pq.safetensors").write_bytes(b"the old one")
    command = [sys.executable, "-m", "pqcli", "compress", str(big), "-o", "x.pq.safetensors", "--force"]
    inject = ["-f", "-o", os.devnull, "-e", "trace=rename,renameat,renameat2", "-e",
              "inject=rename,renameat,renameat2:signal=SIGKILL:when=1"]  # fmt: skip
    subprocess.run(
        [strace, *inject, *command], cwd=out, env={**ENVIRONMENT, "NUMBA_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    target = out / "x.pq.safetensors"
    if target.exists():  # the kill may come before the call or after it: both files are whole
        assert target.read_bytes() == b"the old one" or pqcli("verify", target, cwd=out).returncode == 0
    assert pqcli("compress", big, "-o", "x.pq.safetensors", "--force", cwd=out).returncode == 0
    assert pqcli("verify", "x.pq.safetensors", "--against", big, cwd=out).returncode == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A small checkpoint and its container."""
    folder = tmp_path_factory.mktemp("made")
    generator = torch.Generator().manual_seed(0)
    save_file({"w": torch.randn(128, 64, generator=generator)}, folder / "m.safetensors")
    assert pqcli("compress", "m.safetensors", cwd=folder).returncode == 0
    return folder / "m.safetensors", folder / "m.pq.safetensors"


RENAME = "rename,renameat,renameat2"
COMMANDS = {
    "compress": ("x.pq.safetensors", lambda made: ["compress", made[0], "-o", "x.pq.safetensors"]),
    "decode": ("x.pt", lambda made: ["decode", made[1], "-o", "x.pt"]),
    "report": ("x.html", lambda made: ["report", made[1], "--format", "html", "-o", "x.html"]),
}


def traced(
    strace: str, log: Path, calls: str, *options: str, arguments: list, cwd: Path
) -> subprocess.CompletedProcess:
    """pqcli under strace, which writes the calls, and the files they are about, to `log`."""
    return subprocess.run(
        [strace, "-f", "-y", "-o", log, "-e", f"trace={calls}", *options, sys.executable, "-m", "pqcli", *arguments],
        cwd=cwd, env={**ENVIRONMENT, "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def numbers(made, tmp_path_factory):
    """By command: which of the main thread's writes go to the spool, and which to the output; counted from 1."""

    @functools.cache
    def of(strace: str, command: str) -> dict[str, list[int]]:
        out = tmp_path_factory.mktemp(command)
        arguments = COMMANDS[command][1](made)
        assert traced(strace, out / "log", "write", arguments=arguments, cwd=out).returncode == 0
        lines = (out / "log").read_text(errors="replace").splitlines()
        writes = [line for line in lines if line.split()[0] == lines[0].split()[0] and " write(" in line]
        files = [line.partition("<")[2].partition(">")[0] for line in writes]
        return {
            "spool": [i for i, file in enumerate(files, 1) if file.startswith(f"{out}/#")],
            "output": [i for i, file in enumerate(files, 1) if file.endswith(".pqcli")],
        }

    return of


@pytest.mark.parametrize(
    ("command", "call", "error", "words"),
    [
        ("compress", "spool 0", "ENOSPC", "the disk is full"),
        ("compress", "spool -1", "EIO", "input/output error"),
        ("compress", "output 0", "EDQUOT", "the disk quota is used up"),
        ("compress", "fsync", "EIO", "input/output error"),
        ("compress", "fsync", "ENOSPC", "the disk is full"),
        ("compress", RENAME, "EIO", "input/output error"),
        ("compress", RENAME, "EXDEV", "it is a mount point"),
        ("decode", "output 0", "EIO", "input/output error"),
        ("decode", "output -1", "ENOSPC", "the disk is full"),
        ("decode", "fsync", "EDQUOT", "the disk quota is used up"),
        ("decode", RENAME, "ENOSPC", "the disk is full"),
        ("report", "output 0", "ENOSPC", "the disk is full"),
        ("report", "fsync", "EIO", "input/output error"),
        ("report", RENAME, "EXDEV", "it is a mount point"),
    ],
)
def test_an_error_of_the_disk_is_told_and_leaves_the_old_file(
    made, numbers, tmp_path, strace, command, call, error, words
):
    target, arguments = COMMANDS[command]
    out = tmp_path / "out"
    out.mkdir()
    (out / target).write_bytes(b"the old one")
    calls, when = call, ""
    if " " in call:
        kind, which = call.split()
        calls, when = "write", f":when={numbers(strace, command)[kind][int(which)]}"
    inject = ("-e", f"inject={calls}:error={error}{when}")
    done = traced(strace, Path(os.devnull), calls, *inject, arguments=[*arguments(made), "--force"], cwd=out)
    told(done, 1, "cannot write", target, words)
    assert contents(out) == {target: b"the old one"}


@pytest.mark.parametrize("command", ["compress", "decode"])
def test_a_disk_that_lies_about_what_it_wrote_is_found(made, numbers, tmp_path, strace, command):
    """The call says that all was written, and nothing was."""
    n_bytes = 100
    when = numbers(strace, command)["output"][0]
    inject = ("-e", f"inject=write:retval={n_bytes}:when={when}")
    arguments = COMMANDS[command][1](made)
    done = traced(strace, Path(os.devnull), "write", *inject, arguments=arguments, cwd=tmp_path)
    told(done, 1, "cannot write", "the disk gives back other bytes than were written")
    assert contents(tmp_path) == {}


def test_a_disk_that_cannot_confirm_the_name_is_told_and_the_file_is_whole(made, tmp_path, strace):
    inject = ("-e", "inject=fsync:error=EIO:when=2")  # the first is of the file, the second of its folder
    arguments = COMMANDS["compress"][1](made)
    done = traced(strace, Path(os.devnull), "fsync", *inject, arguments=arguments, cwd=tmp_path)
    told(done, 1, "'x.pq.safetensors' is written, but the disk could not confirm its name")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pq.safetensors"]
    assert verify(tmp_path / "x.pq.safetensors", made[0]) == []


@pytest.mark.parametrize("options", [["-OO"], []])
def test_optimised_python_and_the_environment_of_torch_change_nothing(made, tmp_path, options):
    environment = ENVIRONMENT if options else {**ENVIRONMENT, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    done = subprocess.run(
        [sys.executable, *options, "-m", "pqcli", "compress", made[0], "-o", "x.pq.safetensors"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.pq.safetensors").read_bytes() == made[1].read_bytes()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_told(big, tmp_path):
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    told(pqcli("compress", big, "-o", out / "x.pq.safetensors", cwd=tmp_path), 1, "cannot write", "permission denied")


def test_the_input_may_vanish_or_shrink_meanwhile_without_a_wrong_result(tmp_path):
    save_file({f"w{i}": torch.randn(1024, 1024) for i in range(8)}, tmp_path / "m.safetensors")
    process = subprocess.Popen(
        [sys.executable, "-m", "pqcli", "compress", "m.safetensors", "--n-centroids", "1024"],
        cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_work(process)
    os.truncate(tmp_path / "m.safetensors", 1 << 20)
    out, err = process.communicate(timeout=300)
    if process.returncode:  # it had not read everything yet
        assert (process.returncode, out) == (1, "")
        assert "truncated" in err
        assert "Traceback" not in err
        assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_modes_follow_the_umask_and_links_stay_links(big, tmp_path):
    old = os.umask(0o027)
    try:
        assert pqcli("compress", big, "-o", tmp_path / "x.pq.safetensors", cwd=tmp_path).returncode == 0
        assert pqcli("decode", tmp_path / "x.pq.safetensors", "-o", tmp_path / "d.pt", cwd=tmp_path).returncode == 0
    finally:
        os.umask(old)
    for name in ("x.pq.safetensors", "d.pt"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "y").write_bytes(b"old")
    (tmp_path / "link.pq.safetensors").symlink_to(tmp_path / "real" / "y")
    assert pqcli("compress", big, "-o", tmp_path / "link.pq.safetensors", "--force", cwd=tmp_path).returncode == 0
    assert (tmp_path / "link.pq.safetensors").is_symlink()
    assert pqcli("verify", tmp_path / "real" / "y", cwd=tmp_path).returncode == 0
