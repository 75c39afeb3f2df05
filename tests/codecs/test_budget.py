"""The search for a level, on curves made up for it: what it hits, what it says, how often it tries."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pqcli.codecs.rate import budget
from pqcli.codecs.rate.budget import BudgetError, Goal, Trial, search
from pqcli.recipe.recipe import Recipe

UNIT = 0.05


class Curve:
    """A made-up codec: bytes that fall with the level, or an error that rises with it. Counts what is asked of it."""

    def __init__(self, measure, *, draft_excess=0.001):
        self.measure = measure
        self.draft_excess = draft_excess
        self.drafts, self.finals = [], []

    def draft(self, level):
        self.drafts.append(level)
        return self.measure(level) * (1 + self.draft_excess)

    def attempt(self, level):
        self.finals.append(level)
        return Trial(level, self.measure(level), level)


def find(goal, curve, start):
    return search(goal, curve.draft, curve.attempt, start, UNIT)


def gaussian_bytes(n_weights=1_000_000, fixed=5_000, rms=UNIT):
    """Bytes as an entropy-coded quantizer of Gaussian weights takes them, beside a fixed part."""
    return lambda level: int(fixed + n_weights / 8 * 0.5 * math.log2(1 + 12 / 4 * (rms / level) ** 2))


def mixed_bytes(spread):
    """Bytes of many tensors whose scales differ widely: some die out early, others late."""
    return lambda level: sum(gaussian_bytes(10_000, 0, UNIT * spread**i)(level) for i in range(-6, 7))


def uniform_error(level):
    """Relative MSE: step^2 / 12 of the variance, saturating at one."""
    return 1 / (1 + 12 * (UNIT / level) ** 2)


@settings(deadline=None, max_examples=80)
@given(bits=st.floats(0.15, 8.0), spread=st.floats(1.0, 3.0), start=st.floats(1e-4, 10.0))
def test_a_size_is_hit_within_its_tolerance_and_never_exceeded(bits, spread, start):
    curve = Curve(mixed_bytes(spread))
    goal = Goal("bytes", int(bits * 130_000 / 8), budget.TOLERANCE)
    found = find(goal, curve, start)
    assert goal.value * (1 - goal.tolerance) <= found.measured <= goal.value
    assert found.result == found.level


@settings(deadline=None, max_examples=40)
@given(error=st.floats(1e-6, 0.9), start=st.floats(1e-3, 1.0))
def test_an_error_is_hit_within_its_tolerance_and_never_exceeded(error, start):
    goal = Goal("relative_mse", error, budget.ERROR_TOLERANCE)
    found = find(goal, Curve(uniform_error), start)
    assert goal.is_met(found.measured)


def test_a_good_start_needs_one_draft_and_one_trial():
    curve = Curve(gaussian_bytes())
    goal = Goal("bytes", 250_000, budget.FINE_TOLERANCE)
    first = find(goal, curve, UNIT)
    again = Curve(gaussian_bytes())
    find(goal, again, first.level)
    assert (len(again.drafts), len(again.finals)) == (1, 1)


def test_a_start_far_off_needs_few_trials():
    curve = Curve(gaussian_bytes())
    find(Goal("bytes", 250_000, budget.TOLERANCE), curve, 30 * UNIT)
    assert len(curve.drafts) <= budget.MOST_DRAFTS
    assert len(curve.finals) <= 3


@pytest.mark.parametrize("excess", [-0.05, 0.05, 0.2])
def test_drafts_may_be_wrong_about_the_size(excess):
    goal = Goal("bytes", 250_000, budget.TOLERANCE)
    found = find(goal, Curve(gaussian_bytes(), draft_excess=excess), UNIT)
    assert goal.is_met(found.measured)


def test_noise_between_trials_does_not_exceed_the_target():
    """Size is not quite monotone in the level: a finer step can happen to cost less."""
    smooth = gaussian_bytes()
    goal = Goal("bytes", 250_000, budget.TOLERANCE)
    curve = Curve(lambda level: int(smooth(level) * (1 + 0.002 * math.sin(1e5 * level))))
    assert goal.is_met(find(goal, curve, 3 * UNIT).measured)


def test_a_size_below_what_is_kept_exactly_is_an_error_that_says_how_small_it_gets():
    with pytest.raises(
        BudgetError,
        match=r"a file of 4.00 kB \(4,000 bytes\) or less cannot be reached.* file of 5.00 kB \(5,000 bytes\); what is",
    ):
        find(Goal("bytes", 4_000, budget.TOLERANCE), Curve(gaussian_bytes(fixed=5_000)), UNIT)


def test_an_error_below_what_the_codec_can_do_is_an_error():
    floor = Curve(lambda level: 1e-3 + uniform_error(level))
    with pytest.raises(BudgetError, match=r"a relative MSE of 0\.0001 or less cannot be reached"):
        find(Goal("relative_mse", 1e-4, budget.ERROR_TOLERANCE), floor, UNIT)


def test_a_size_larger_than_the_finest_level_takes_is_met_from_below():
    """A tiny checkpoint cannot be made to fill a large file; the finest that was tried is the answer."""
    goal = Goal("bytes", 10_000_000, budget.TOLERANCE)
    found = find(goal, Curve(lambda _: 5_000), UNIT)
    assert found.measured == 5_000


def test_a_staircase_without_a_step_inside_the_tolerance_is_met_from_below():
    def stairs(level):
        return 10_000 * 2 ** -math.floor(math.log2(level / UNIT))

    found = find(Goal("bytes", 15_000, budget.TOLERANCE), Curve(stairs), UNIT)
    assert found.measured == 10_000


def test_targets_above_five_megabytes_are_met_more_closely():
    assert Goal.of(Recipe(target_bytes=5_000_001), 1).tolerance == 0.003
    assert Goal.of(Recipe(target_bytes=4_999_999), 1).tolerance == 0.01


@pytest.mark.parametrize(
    ("setting", "quantity", "value"),
    [
        ({"target_bytes": 1234}, "bytes", 1234),
        ({"target_ratio": 16.0}, "bytes", 1000),
        ({"target_bits": 2.5}, "bits", 2.5),
        ({"max_relative_mse": 0.02}, "relative_mse", 0.02),
        ({"min_sqnr": 20.0}, "relative_mse", 0.01),
    ],
)
def test_every_budget_is_a_goal(setting, quantity, value):
    goal = Goal.of(Recipe(**setting), 16_000)
    assert (goal.quantity, goal.value) == (quantity, pytest.approx(value))


def test_a_quality_is_a_level_and_no_goal():
    assert Goal.of(Recipe(quality="balanced"), 16_000) is None


def test_the_named_qualities_are_in_order():
    steps = list(budget.QUALITY_STEPS.values())
    assert steps == sorted(steps, reverse=True)
