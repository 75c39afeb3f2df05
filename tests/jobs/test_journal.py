"""Killed runs: the same call goes on where they stopped, and makes the same bytes; another one is refused.

A run is killed in the process itself: its executor raises what Ctrl-C raises after so many results.
"""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pqcli
from pqcli.atomic import JOURNAL_ENDING
from pqcli.cli.interrupts import message
from pqcli.container.writer import Writer
from pqcli.errors import CheckpointError, JournalError, OutputError
from pqcli.jobs import executors
from pqcli.jobs.journal import journal as journals
from pqcli.jobs.journal.fingerprints import Fingerprints
from pqcli.jobs.journal.values import encoded
from pqcli.recipe.recipe import Recipe
from tests.conftest import REPOSITORY
from tests.families.family import CODECS, base_state, saved
from tests.families.family import tuned as tuned_of

TARGET = "x.pq.safetensors"


class Killed(KeyboardInterrupt):
    pass


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Every run is long enough for a journal, and every task and result is of a kind that journals know."""
    monkeypatch.setattr(journals, "AFTER_SECONDS", 0)
    refused = []

    def strict(value):
        try:
            return encoded(value)
        except TypeError as error:
            refused.append(error)
            raise

    def key(self, stage, task):
        found = of(self, stage, task)
        if found is None:
            refused.append(task)
        return found

    of = Fingerprints.key
    monkeypatch.setattr(journals, "encoded", strict)
    monkeypatch.setattr(Fingerprints, "key", key)
    yield
    assert refused == []


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {f"layer.{i}.weight": torch.randn(48, 64, generator=generator) for i in range(5)}
    state["layer.5.weight"] = torch.randint(0, 3, (64, 64), generator=generator).float()  # of few values
    return state | {"bias": torch.randn(64, generator=generator), "ids": torch.arange(20_000)}


@pytest.fixture
def source(state, tmp_path) -> Path:
    path = tmp_path / "in" / "m.safetensors"
    path.parent.mkdir()
    save_file(state, path)
    return path


@pytest.fixture
def kill(monkeypatch):
    """`kill(n)` kills runs after so many results of tasks, `kill(None)` lets them live; a list of what was run."""
    run, results = [], executors.Threads.results
    left = [None]

    def counted(self, tasks, hear) -> Iterator:
        for place, found in results(self, tasks, hear):
            if left[0] == 0:
                raise Killed
            if left[0] is not None:
                left[0] -= 1
            run.append(tasks[place].name)
            yield place, found

    def after(n):
        left[0] = n
        run.clear()
        return run

    monkeypatch.setattr(executors.Threads, "results", counted)
    return after


def journal_in(folder: Path) -> Path | None:
    found = [path for path in folder.iterdir() if path.name.endswith(JOURNAL_ENDING)]
    assert len(found) <= 1
    return found[0] if found else None


def killed(kill, n: int, source: Path, target: Path, recipe: Recipe, **options) -> None:
    kill(n)
    with pytest.raises(Killed):
        pqcli.compress(source, target, recipe, **options)
    kill(None)


RECIPES = {
    "plain": Recipe(block_size=8, n_centroids=16),
    "trellis": Recipe(codec="trellis", quality="small", effort=8),
    "trellis to a size": Recipe(codec="trellis", target_bits=2, effort=8),
    "trellis to an error": Recipe(codec="trellis", min_sqnr=20, effort=8),
    "ecpq": Recipe(target_bits=2),
    "auto": Recipe(codec="auto", quality="small", effort=8),
}


def undisturbed(kill, source: Path, folder: Path, recipe: Recipe, **options) -> tuple[bytes, int]:
    """The bytes of a run, and how many tasks it takes."""
    run = kill(None)
    folder.mkdir()
    pqcli.compress(source, folder / TARGET, recipe, journal=False, **options)
    return (folder / TARGET).read_bytes(), len(run)


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_killed_again_and_again_ends_with_the_bytes_of_one_that_was_not(kill, source, tmp_path, name):
    recipe = RECIPES[name]
    expected, n_tasks = undisturbed(kill, source, tmp_path / "whole", recipe)
    (tmp_path / "out").mkdir()
    kills, report = 0, None
    while report is None:
        run = kill(max(4, n_tasks // 3))
        try:
            report = pqcli.compress(source, tmp_path / "out" / TARGET, recipe)
        except Killed:
            kills += 1
            assert journal_in(tmp_path / "out")
            assert kills < n_tasks
    assert kills >= 2
    assert (tmp_path / "out" / TARGET).read_bytes() == expected
    assert len(run) < n_tasks
    assert "were done" in report.resumed
    assert not report.warnings
    assert [path.name for path in (tmp_path / "out").iterdir()] == [TARGET]


def test_a_run_killed_at_its_end_does_no_task_again_but_reading_what_is_kept_as_it_is(
    kill, source, tmp_path, monkeypatch
):
    def dies(*_arguments, **_options):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Writer, "finish", dies)
        with pytest.raises(Killed):
            pqcli.compress(source, tmp_path / TARGET, RECIPES["trellis"])
        with pytest.raises(Killed):
            pqcli.compress(source, tmp_path / "plain.pq.safetensors", RECIPES["plain"])
    assert pqcli.compress(source, tmp_path / TARGET, RECIPES["trellis"]).resumed == "encoding, 1 of 1 parts were done"
    run = kill(None)
    report = pqcli.compress(source, tmp_path / "plain.pq.safetensors", RECIPES["plain"])
    assert report.resumed == "encoding, 6 of 6 tensors were done"
    assert sorted(run) == ["bias", "ids"]


@pytest.mark.parametrize("codec", ["plain", "trellis"])
def test_a_run_with_a_base_goes_on(kill, tmp_path, codec):
    base, tuned = saved(tmp_path, "base.pt", base_state()), saved(tmp_path, "tuned.pt", tuned_of(base_state()))
    expected, n_tasks = undisturbed(kill, tuned, tmp_path / "whole", CODECS[codec], base=base)
    out = tmp_path / "whole" / "out.pq.safetensors"  # in the same folder: a file says where its base lies
    killed(kill, n_tasks - 1, tuned, out, CODECS[codec], base=base)
    run = kill(None)
    assert pqcli.compress(tuned, out, CODECS[codec], base=base).resumed
    assert out.read_bytes() == expected
    assert len(run) < n_tasks - 4
    killed(kill, n_tasks - 1, tuned, out.with_name("other.pq.safetensors"), CODECS[codec], base=base)
    torch.save(base_state(), base)
    with pytest.raises(JournalError, match=r"'base.pt' was last changed 20.* UTC and now 20"):
        pqcli.compress(tuned, out.with_name("other.pq.safetensors"), CODECS[codec], base=base)


@pytest.mark.parametrize("codec", ["plain", "trellis", "ecpq"])
def test_a_run_with_statistics_goes_on(kill, tmp_path, codec):
    torch.manual_seed(0)
    network = torch.nn.Sequential(*(torch.nn.Linear(48, 48) for _ in range(3)))
    save_file(network.state_dict(), tmp_path / "n.safetensors")
    with pqcli.collect(network) as stats:
        network(torch.randn(200, 48))
    stats.save(tmp_path / "n.stats.safetensors")
    recipe = replace(CODECS[codec], stats=str(tmp_path / "n.stats.safetensors"))
    expected, n_tasks = undisturbed(kill, tmp_path / "n.safetensors", tmp_path / "whole", recipe)
    killed(kill, n_tasks - 1, tmp_path / "n.safetensors", tmp_path / TARGET, recipe)
    run = kill(None)
    assert pqcli.compress(tmp_path / "n.safetensors", tmp_path / TARGET, recipe).resumed
    assert (tmp_path / TARGET).read_bytes() == expected
    assert len(run) < n_tasks - 1


def test_a_folder_goes_on_with_the_component_at_which_it_was_killed(kill, source, tmp_path):
    folder = tmp_path / "pipe"
    for name in ("unet", "vae"):
        (folder / name).mkdir(parents=True)
        shutil.copy(source, folder / name / "diffusion_pytorch_model.safetensors")
    (folder / "model_index.json").write_text("{}")
    run = kill(None)
    pqcli.compress(folder, tmp_path / "whole.pq", RECIPES["plain"])
    n_tasks = len(run)
    killed(kill, n_tasks * 3 // 4, folder, tmp_path / "out.pq", RECIPES["plain"])
    run = kill(None)
    report = pqcli.compress(folder, tmp_path / "out.pq", RECIPES["plain"])
    assert report.resumed.startswith("vae/diffusion_pytorch_model.pq.safetensors: encoding, ")
    assert len(run) < n_tasks // 2 + 2
    for path in (tmp_path / "whole.pq").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "out.pq" / path.relative_to(tmp_path / "whole.pq")).read_bytes()
    assert journal_in(tmp_path) is None


def test_another_input_recipe_or_device_is_refused_with_what_has_changed(kill, source, state, tmp_path, monkeypatch):
    target, recipe = tmp_path / TARGET, RECIPES["plain"]
    killed(kill, 6, source, target, recipe)
    left = journal_in(tmp_path).read_bytes()

    def refused(words, recipe=recipe):
        with pytest.raises(JournalError, match=words) as caught:
            pqcli.compress(source, target, recipe)
        assert caught.value.exit_code == 4
        assert str(caught.value).endswith("give the same command as then to go on, or --fresh to start anew")
        assert journal_in(tmp_path).read_bytes() == left

    refused("n_centroids was 16 and is 32;", replace(recipe, n_centroids=32))
    refused("n_iter was not set and is 7; seed was not set and is 3;", replace(recipe, n_iter=7, seed=3))
    with monkeypatch.context() as patched:
        patched.setattr("pqcli.jobs.journal.identity.__version__", "9.9")
        refused("pqcli was 0.1.0 and is 9.9;")
        patched.setattr("pqcli.jobs.journal.identity.__version__", "0.1.0")
        patched.setattr(torch, "__version__", "0.3")
        refused("torch was .* and is 0.3;")
    save_file({**state, "bias": state["bias"] + 1}, source)
    refused(r"'m.safetensors' was last changed 20[^;]* UTC and now 20[^;]* UTC;")
    save_file({**state, "more": torch.zeros(3)}, source)
    refused(r"'m.safetensors' had [\d,]+ B and has [\d,]+;")
    assert not target.exists()


def test_fresh_starts_anew_and_a_moved_input_does_not(kill, source, tmp_path):
    killed(kill, 6, source, tmp_path / TARGET, RECIPES["plain"])
    moved = source.rename(tmp_path / "m.safetensors")
    killed(kill, 3, moved, tmp_path / TARGET, RECIPES["plain"])
    run = kill(None)
    report = pqcli.compress(moved, tmp_path / TARGET, RECIPES["plain"], fresh=True)
    assert (report.resumed, len(run)) == ("", 8)
    assert journal_in(tmp_path) is None


def test_a_short_run_and_one_without_a_journal_write_none(source, tmp_path, monkeypatch):
    def nothing(*_):
        raise AssertionError("a journal was begun")

    monkeypatch.setattr(journals.JournalFile, "made", nothing)
    pqcli.compress(source, tmp_path / TARGET, RECIPES["plain"], journal=False)
    pqcli.save(load_file(source), tmp_path / "saved.pq.safetensors", RECIPES["plain"])
    pqcli.preview(source, recipe=RECIPES["trellis"])
    monkeypatch.setattr(journals, "AFTER_SECONDS", 60)
    pqcli.compress(source, tmp_path / "short.pq.safetensors", RECIPES["plain"])


def test_what_is_found_in_the_first_half_minute_goes_into_the_journal_when_it_has_passed(
    kill, source, tmp_path, monkeypatch
):
    """It passes before the last of five results that are found before the kill, besides two kept tensors."""

    def found_again(held_bytes, later=0.0):
        added = itertools.count(1)

        def add(self, place, found):
            monkeypatch.setattr(journals, "AFTER_SECONDS", later if next(added) == 7 else 1e9)
            return usual(self, place, found)

        usual = journals.Round.add
        with monkeypatch.context() as patched:
            patched.setattr(journals, "HELD_BYTES", held_bytes)
            patched.setattr(journals.Round, "add", add)
            killed(kill, 7, source, tmp_path / TARGET, RECIPES["plain"], force=True)
        run = kill(None)
        pqcli.compress(source, tmp_path / TARGET, RECIPES["plain"], force=True)
        return 8 - len(run)

    assert found_again(1 << 20) == 5
    assert found_again(0) == 1
    assert found_again(1 << 20, later=1e9) == 0


def test_a_run_that_fails_by_itself_leaves_nothing_and_one_that_the_disk_fails_leaves_its_journal(
    source, tmp_path, monkeypatch
):
    for error, is_left in ((CheckpointError("no good"), False), (OutputError("no disk"), True)):

        def fails(*_arguments, error=error, **_options):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(Writer, "finish", fails)
            with pytest.raises(type(error)):
                pqcli.compress(source, tmp_path / TARGET, RECIPES["plain"])
        assert (journal_in(tmp_path) is not None) == is_left


def test_a_resumed_run_tells_of_what_was_done_at_once(kill, source, tmp_path):
    killed(kill, 6, source, tmp_path / TARGET, RECIPES["plain"])
    kill(None)
    events = []
    pqcli.compress(source, tmp_path / TARGET, RECIPES["plain"], progress=events.append)
    assert (events[0].stage, events[0].name) == ("resuming", "encoding, 4 of 6 tensors were done")
    first, *others = [event for event in events if event.stage == "encoding"]
    assert 0 < first.done == first.resumed < first.total == others[-1].done
    assert len({event.name for event in others}) == 2


def test_an_interrupt_says_how_much_is_kept(kill, source, tmp_path):
    said = []
    killed(kill, 6, source, tmp_path / TARGET, RECIPES["plain"], progress=lambda _event: said.append(message()))
    for words in (said[-1], message()):
        assert words.startswith("interrupted; ")
        assert words.endswith("; the same command goes on from here: encoding, 4 of 6 tensors")
    assert "goes on" not in said[0]
    pqcli.compress(source, tmp_path / TARGET, RECIPES["plain"])
    assert "goes on" not in message()


CUT = """
import sys
import pqcli.jobs.journal.journal as journals
from pqcli.cli.commands import app
journals.AFTER_SECONDS = 0
app(sys.argv[1:])
"""


@pytest.mark.slow
def test_an_interrupted_command_says_that_it_can_go_on_and_does(tmp_path):
    generator = torch.Generator().manual_seed(0)
    save_file({f"w{i}": torch.randn(256, 512, generator=generator) for i in range(24)}, tmp_path / "m.safetensors")
    flags = ["--n-centroids", "512", "--n-iter", "60"]

    command = [sys.executable, "-c", CUT, "compress", "m.safetensors", *flags]
    options = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(REPOSITORY)}, "text": True}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    while journal_in(tmp_path) is None or journal_in(tmp_path).stat().st_size < 50_000:
        assert process.poll() is None
        threading.Event().wait(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    words = "error: interrupted; no output was written; the same command goes on from here: encoding, "
    assert err.startswith(words)
    done = subprocess.run(command, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert "resumed: encoding, " in done.stderr
    assert "(resumed)" in done.stdout
    assert journal_in(tmp_path) is None


KILLS = """
import os, random, signal, sys, time
import torch, pqcli, pqcli.jobs.compress, pqcli.jobs.journal.journal as journals
from pqcli.recipe.recipe import Recipe

torch.set_num_threads(1)  # no threads before a fork
source, target, n, recipe_of, longest = *sys.argv[1:3], int(sys.argv[3]), *map(eval, sys.argv[4:6])


def forked(**options):
    child = os.fork()
    if not child:
        pqcli.compress(source, target, recipe, force=True, **options)
        os._exit(0)
    return child


takes, effort = 0.0, 1
while takes < 60:
    effort *= 2
    recipe, started = recipe_of(effort), time.monotonic()
    assert not os.waitpid(forked(journal=False), 0)[1]
    takes = time.monotonic() - started
with open(target, "rb") as file:
    whole = file.read()
os.unlink(target)

journals.AFTER_SECONDS = 1.0
draw, lives, chains, killed, resumed = random.Random(0), 0, [], 0, 0
while killed < n or lives:
    resumed += any("journal" in name for name in os.listdir("."))
    child, lives = forked(), lives + 1
    if killed < n:
        time.sleep(draw.uniform(0, takes * longest))
        os.kill(child, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        killed += 1
        continue
    with open(target, "rb") as file:
        assert file.read() == whole, f"other bytes after {lives} lives"
    assert os.listdir(".") == [target], os.listdir(".")
    os.unlink(target)
    chains.append(lives)
    lives = 0
print(f"undisturbed {takes:.0f} s; {killed} kills; {resumed} lives that found a journal; "
      f"{len(chains)} chains, of {chains} lives, all with the bytes of the undisturbed run")
"""
LONG = {
    "plain": ("lambda effort: Recipe(block_size=4, n_centroids=2048, n_iter=20 * effort)", "1 / 8"),
    "trellis": ("lambda effort: Recipe(codec='trellis', target_bits=2, effort=256 * effort)", "1 / 2"),
}
"""Recipes by effort, and the longest life before a kill, as a part of what the run takes undisturbed. Until the trellis
codec encodes it learns rotations and drafts, which a journal does not hold: shorter lives would never get beyond."""


@pytest.mark.exhaustive
@pytest.mark.parametrize("codec", LONG)
def test_chains_of_kills_at_random_moments_of_a_long_run_end_with_its_bytes(tmp_path, capsys, codec):
    """25 each: of a run of a minute or more, and of those that go on from it."""
    generator = torch.Generator().manual_seed(0)
    state = {f"layer.{i}.weight": torch.randn(768, 512, generator=generator) for i in range(40)}
    save_file(state, tmp_path / "long.safetensors")
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLS, tmp_path / "long.safetensors", "x.pq.safetensors", "25", *LONG[codec]],
        cwd=tmp_path / "out", env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True,
        check=False, timeout=7200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{codec}: {done.stdout}", end="")
