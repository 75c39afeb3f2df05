"""Progress: one fraction of the whole job that never falls, a time left that follows it, and a bar of both."""

import io
import json
import sys

import pytest
import torch
from safetensors.torch import save_file

import pqcli
from pqcli.core import progress
from pqcli.core.pq import blocks, em
from pqcli.jobs.bars import speed
from pqcli.jobs.course import Course, at_the_end, parts
from pqcli.jobs.events import Event, Stage
from pqcli.jobs.pace import Pace


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": normal(64, 64), "b.weight": normal(96, 64, seed=1), "c.bias": normal(9)}, path)
    return path


def course(costs, repeats=None):
    events = []
    return Course(events.append, costs, repeats or {}), events


# --- where in the whole a stage lies ---


def test_stages_follow_each_other_by_their_costs():
    hook, events = course({"reading": 1.0, "encoding": 3.0})
    for stage in ("reading", "encoding"):
        done = Stage(hook, stage, 10)
        done(5, "a")
        done(5, "b")
    assert [event.fraction for event in events] == [0, 0.125, 0.25, 0.25, 0.625, 1.0]


@pytest.mark.parametrize("times", [1, 2, 3, 5])
def test_a_stage_that_is_gone_through_more_or_less_often_than_expected_never_goes_back_nor_beyond_its_share(times):
    hook, events = course({"encoding": 8.0, "measuring": 2.0}, {"encoding": 2})
    for _ in range(times):
        Stage(hook, "encoding", 4)(4, "a")
        Stage(hook, "checking", 4)(4, "a")
    Stage(hook, "measuring", 4)(4, "a")
    found = [event.fraction for event in events]
    assert found == sorted(found)
    assert max(event.fraction for event in events if event.stage == "encoding") <= 0.8
    assert found[-1] == pytest.approx(1)


def test_a_stage_that_nobody_expected_takes_no_share():
    hook, events = course({"encoding": 1.0})
    Stage(hook, "matching", 4)(2, "a")
    Stage(hook, "encoding", 4)(2, "a")
    Stage(hook, "copying", 4)(4, "a")
    assert [event.fraction for event in events] == [0, 0, 0, 0.5, 0.5, 0.5]


def test_jobs_that_make_up_a_larger_one_share_it_by_their_sizes():
    events = []
    hooks = parts(events.append, {"text": 30, "vision": 10})
    for name in hooks:
        Stage(hooks[name], "encoding", 2)(2, name)
    Stage(at_the_end(events.append), "copying", 7)(7, "config.json")
    assert [event.fraction for event in events] == [0, 0.75, 0.75, 1, 1, 1]


# --- how long it will still take ---


def seen(*events):
    """A pace that saw each event at its second."""
    pace = Pace()
    for now, event in events:
        pace.see(event, now)
    return pace


def test_the_time_left_counts_what_comes_after_this_stage():
    pace = seen((100, Event("reading", 0, 4, before=0.0, share=0.25)), (110, Event("reading", 2, 4, "a", 0, 0.0, 0.25)))
    assert pace.left(110) == pytest.approx(10 + 60)  # as much again of this stage, and three times the whole of it
    assert pace.left(115) == pytest.approx(65)
    assert speed(pace, 110) == "0 weights/s, 1:10 left"


def test_a_stage_that_is_slower_than_expected_is_judged_by_itself():
    slow = seen(
        (0, Event("reading", 0, 4, share=0.5)), (10, Event("reading", 4, 4, share=0.5)),
        (10, Event("encoding", 0, 4, "", 0, 0.5, 0.5)), (40, Event("encoding", 1, 4, "", 0, 0.5, 0.5)),
    )  # fmt: skip
    assert slow.left(40) == pytest.approx(90)


def test_nothing_is_promised_at_the_very_start_nor_when_the_next_event_is_overdue():
    start = (0, Event("encoding", 0, 1000))
    assert seen().left(5) is None
    assert speed(seen(start), 5) == ""
    assert seen(start, (1, Event("encoding", 10, 1000))).left(1) is None
    pace = seen(start, (10, Event("encoding", 500, 1000)))
    assert speed(pace, 14) == "50 weights/s, 6.0 s left"
    assert speed(pace, 30) == "50 weights/s, ? left"
    assert speed(seen(start, (10, Event("encoding", 1000, 1000))), 11) == "100 weights/s, finishing"


def test_what_an_earlier_run_did_is_no_work_of_this_one():
    pace = seen((0, Event("encoding", 900, 1000, resumed=900)), (10, Event("encoding", 950, 1000, resumed=900)))
    assert pace.rate() == 5
    assert pace.left(10) == pytest.approx(10)


# --- long work in one piece ---


def test_pieces_of_work_are_heard_as_fractions_of_what_they_are_part_of():
    told = []
    progress.tell(0.3)  # nobody listens
    with progress.heard(told.append):
        with progress.within(0.0, 0.5), progress.within(0.5, 1.0):
            progress.tell(0.5)
        progress.tell(0.75)
    assert told == [0.375, 0.5, 0.5, 0.75]


@pytest.mark.parametrize("asked", [{}, {"sample": 400}, {"stages": ((300, 2), (600, 2))}, {"restarts": 3}])
def test_em_tells_how_far_it_is_from_nothing_to_all(asked):
    told = []
    cut = blocks.cut(normal(100, 80), 8)
    with progress.heard(told.append):
        em.fit(cut, em.Options(n_centroids=16, n_iter=8, **asked))
    assert told == sorted(told)
    assert told[0] <= 0.3
    assert told[-1] == pytest.approx(1)
    assert len(told) >= 8


# --- the verbs ---


@pytest.mark.parametrize(
    "wish", [{}, {"codec": "trellis"}, {"codec": "pq", "target_ratio": 12}, {"codec": "auto", "max_relative_mse": 0.1}]
)
def test_every_codec_goes_from_nothing_to_all_and_never_back(checkpoint, wish):
    events = []
    pqcli.compress(checkpoint, recipe=pqcli.Recipe(**wish), progress=events.append)
    found = [event.fraction for event in events]
    assert found[0] == 0
    assert found == sorted(found)
    assert found[-1] == pytest.approx(1)


def test_a_folder_goes_from_nothing_to_all_and_never_back(tmp_path):
    for place in ("text", "vision"):
        (tmp_path / "m" / place).mkdir(parents=True)
        save_file({"a.weight": normal(64, 64)}, tmp_path / "m" / place / "model.safetensors")
        (tmp_path / "m" / place / "config.json").write_text("{}")
    (tmp_path / "m" / "model_index.json").write_text(json.dumps({"text": ["a", "B"], "vision": ["a", "B"]}))
    for verb, file in ((pqcli.compress, "m"), (pqcli.verify, "m.pq"), (pqcli.decode, "m.pq")):
        events = []
        verb(tmp_path / file, progress=events.append)
        found = [event.fraction for event in events]
        assert found == sorted(found), verb
        assert (found[0], found[-1]) == (0, pytest.approx(1)), verb


def test_true_draws_a_bar_on_a_terminal_and_nothing_elsewhere(checkpoint, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, is_drawn in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm-256color")
        pqcli.compress(checkpoint, recipe=pqcli.Recipe(n_iter=1), force=True, progress=True)
        assert ("model.safetensors" in stream.getvalue()) is is_drawn
        assert bool(stream.getvalue()) is is_drawn
