"""What `plan` foretells of time and memory follows from small runs on this machine, and from nothing else."""

import json
import time

import pytest
import torch

import pqcli
from pqcli.core.threads import n_threads
from pqcli.jobs import prediction
from pqcli.jobs.prediction import COLUMNS, LARGER, SMALL, Prediction, predict
from pqcli.plan import plan as plans
from pqcli.readable import about
from pqcli.tensors.info import TensorInfo

CPU = torch.device("cpu")
PIECES = 2 * n_threads()


def planned(recipe, *shapes):
    return plans.make(recipe, [TensorInfo(f"{i}.weight", shape, "float32") for i, shape in enumerate(shapes)])


def pretend(monkeypatch, seconds):
    """Let a small run take what `seconds(weights, recipe)` says, by stage."""
    runs = []

    def run(n_each, columns, recipe, executor):
        runs.append((n_each, columns, recipe))
        return seconds(n_each * PIECES, recipe)

    monkeypatch.setattr(prediction, "_run", run)
    return runs


def test_plain_pq_is_carried_over_by_weights_and_by_iterations(monkeypatch):
    """A machine that takes 1 s to start, 10 ns a weight, and 1 ps a product of EM is found to be one."""
    recipe = pqcli.Recipe(block_size=8, n_centroids=256, n_iter=20, sample="all")

    def seconds(n, made):
        blocks = n // 8
        return {"encoding": 1 + 1e-8 * n + 1e-12 * blocks * 256 * 8 * (made.n_iter - 1)}

    pretend(monkeypatch, seconds)
    plan = planned(recipe, (4096, 4096), (1024, 4096))
    n = 4096 * 5120
    found = predict(plan, recipe, CPU)
    assert found.seconds == pytest.approx(1 + 1e-8 * n + 1e-12 * n * 256 * 20, rel=0.1)


def test_streams_are_carried_over_stage_by_stage_and_coded_by_all_threads(monkeypatch):
    recipe = pqcli.Recipe(codec="trellis", target_bits=3)
    rates = {"reading": 1e-8, "searching": 1e-7, "encoding": 1e-6, "writing": 1e-9}
    runs = pretend(monkeypatch, lambda n, _: {stage: 0.1 + rate * n for stage, rate in rates.items()})
    n = 8192 * 8192
    found = predict(planned(recipe, (8192, 8192)), recipe, CPU).seconds
    wanted = 0.4 + 1e-8 * n + 1e-9 * n + 1e-7 * prediction.DRAFTED + 1e-6 * n / n_threads()
    assert found == pytest.approx(wanted, rel=0.05)
    assert [run[0] for run in runs] == [SMALL, SMALL + COLUMNS, LARGER]
    assert {run[2].effort for run in runs} == {256}, "as many states as the real one will have"


def test_a_size_is_asked_of_the_small_checkpoint_in_bits(monkeypatch):
    runs = pretend(monkeypatch, lambda n, _: {"encoding": 1e-6 * n})
    for budget in ({"target_bytes": 3 << 20}, {"target_ratio": 16 / 1.5}):
        recipe = pqcli.Recipe(codec="trellis", **budget)
        predict(planned(recipe, (4096, 2048)), recipe, CPU)
        assert runs[-1][2].target_bits == pytest.approx(3.0)
        assert runs[-1][2].spending == ("target_bits",)


def test_with_statistics_the_small_matrices_are_as_wide_as_the_real_ones(monkeypatch):
    runs = pretend(monkeypatch, lambda n, _: {"encoding": 1e-6 * n})
    recipe = pqcli.Recipe(codec="trellis", stats="some.stats.safetensors")
    predict(planned(recipe, (1024, 768), (1024, 768)), recipe, CPU)
    assert {run[1] for run in runs} == {768}


def test_workers_start_first_and_more_of_them_than_processors_do_not_help(monkeypatch):
    pretend(monkeypatch, lambda n, _: {"encoding": 1e-6 * n})
    recipe = pqcli.Recipe(codec="trellis")
    plan = planned(recipe, (4096, 4096))
    threads, one, many = (predict(plan, recipe, CPU, workers) for workers in (None, 1, 64))
    assert one.seconds > threads.seconds
    assert many.seconds > threads.seconds
    assert many.memory_bytes > 16 * one.memory_bytes > 16 * threads.memory_bytes


def test_memory_holds_the_largest_task_and_no_more_than_may_be_in_flight(monkeypatch):
    pretend(monkeypatch, lambda n, _: {"encoding": 1e-6 * n})
    recipe = pqcli.Recipe(block_size=8)
    small = predict(planned(recipe, *[(512, 512)] * 4), recipe, CPU).memory_bytes
    many = predict(planned(recipe, *[(512, 512)] * 4000), recipe, CPU).memory_bytes
    assert many - small < (128 << 20) + (1 << 20)
    large = predict(planned(recipe, (4096, 8192)), recipe, CPU).memory_bytes
    assert large - small > 4096 * 8192 * 4


def test_a_plan_of_a_hundred_gigabytes_of_headers_is_foretold_at_once():
    recipe = pqcli.Recipe()
    plan = planned(recipe, *[(8192, 8192)] * 400)
    used = time.process_time()
    found = predict(plan, recipe, CPU)
    assert time.process_time() - used < 2 * n_threads()
    assert 10 < found.seconds < 1e6


def test_nothing_is_foretold_of_what_takes_no_longer_than_foretelling():
    recipe = pqcli.Recipe()
    assert predict(planned(recipe, (100, 100)), recipe, CPU) is None
    assert predict(planned(recipe), recipe, CPU) is None


@pytest.mark.parametrize("recipe", [pqcli.Recipe(), pqcli.Recipe(codec="trellis", effort=4)])
def test_the_command_and_python_tell_what_was_foretold(tmp_path, pqcli_command, recipe):
    torch.save({"fc.weight": torch.randn(400, 400)}, tmp_path / "model.pt")
    told = []
    seen = pqcli.preview(
        tmp_path / "model.pt", recipe=recipe, foretold=lambda found, *, is_long: told.append((found, is_long))
    )
    assert isinstance(seen.prediction, Prediction)
    assert told == [(seen.prediction, recipe.codec == "trellis")]
    flags = ["--codec", recipe.codec] + (["--effort", 4] if recipe.effort else [])
    done = pqcli_command("plan", "model.pt", *flags)
    assert " of memory, by what something small took on this machine just now" in done.stdout
    assert ("compressing takes about" in done.stderr) == (recipe.codec == "trellis")
    document = json.loads(pqcli_command("plan", "model.pt", *flags, "--json").stdout)
    assert document["predicted_seconds"] > 0
    assert document["predicted_memory_bytes"] > 1e8
    assert "of memory" in seen._repr_html_()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.0, "a second"), (1.4, "a second"), (3.4, "3 s"), (9.6, "10 s"), (14.2, "14 s"), (47, "47 s"), (233, "3:50")],
)
def test_a_time_that_is_foretold_has_two_digits(seconds, said):
    assert about(seconds) == said
