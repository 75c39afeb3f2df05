"""Killed runs: the same call goes on where they stopped, and makes the same bytes; another one is refused.

A run is killed in the process itself: its executor raises what Ctrl-C raises after so many results.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import pqcli
from pqcli.atomic import JOURNAL_ENDING
from pqcli.jobs import executors
from pqcli.jobs.journal import journal as journals
from pqcli.recipe.recipe import Recipe

TARGET = "x.pq.safetensors"


class Killed(KeyboardInterrupt):
    pass


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """Every run is long enough for a journal."""
    monkeypatch.setattr(journals, "AFTER_SECONDS", 0)


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

    def counted(self, tasks) -> Iterator:
        for place, found in results(self, tasks):
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
    while report is None:  # every life ends two results later than the one before: where the next one goes on
        run = kill(4)
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
