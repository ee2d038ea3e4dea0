"""Keeping to a budget, on a fake clock."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.schedules import every
from gradlens.watching.budget import LEAST, RUSH, START
from gradlens.watching.overhead import PAUSE, SETTLED
from tests.watching.clocked import Training


def test_a_budget_is_kept_and_used():
    """The share is at the budget, with what was not measured directly."""
    training = Training(budget=0.01).run(5000, hidden=0.05)
    assert 0.009 < training.overhead.share <= 0.0101
    assert training.meter.observed == pytest.approx(5000 * 0.01 / 0.15, rel=0.05)
    assert str(training.overhead).endswith("The budget is 1.0%")


def test_without_a_budget_the_schedule_is_itself():
    """No budget: every due step is observed."""
    assert Training(every(3)).run(9).meter.observed == 3


def test_a_budget_that_is_no_limit():
    """Looking costs less than the budget: every due step is observed."""
    assert Training(budget=0.2).run(100).meter.observed == 100


def test_the_floor_counts_for_the_budget():
    """A floor of 0.6 % leaves 0.4 % for looking."""
    training = Training(budget=0.01).run(5000, floor=0.006)
    assert training.overhead.share == pytest.approx(0.01, rel=0.03)
    assert not training.told
    assert training.meter.observed == pytest.approx(5000 * 0.004 / 0.1, rel=0.05)


def test_a_floor_above_the_budget_is_told_once():
    """Then the budget cannot be kept: that is said once, with the share, and by the text; a little is looked at anyhow."""
    training = Training(budget=0.01)
    training.run(START + 1 + SETTLED - 1, floor=0.02)
    assert training.told == []
    training.run(3000, floor=0.02)
    assert training.told == [pytest.approx(0.02 / 1.02)]
    assert "The budget of 1.0% cannot be kept" in str(training.overhead)
    assert training.meter.observed == pytest.approx(START + 3000 * LEAST * 0.01 / 0.1, abs=2)


def test_a_dear_start_is_made_up_for():
    """The first step allocated for a long time: that counts, and what is left of the budget is not nothing."""
    training = Training(budget=0.01)
    training.step(cost=50.0)
    training.run(2000)
    assert "what the first steps cost is still being made up for" in str(training.overhead)
    assert START < training.meter.observed == pytest.approx(START + 2000 * LEAST * 0.01 / 0.1, abs=2)
    training.run(20_000)
    assert training.overhead.seconds <= 0.0101 * training.overhead.elapsed
    assert str(training.overhead).endswith("The budget is 1.0%")


def test_a_pause_makes_no_burst():
    """After a night in which nothing was trained, looking goes on at the pace that it had."""
    training = Training(budget=0.01).run(2000)
    before = training.meter.observed
    training.clock += 50_000
    training.run(100)
    assert training.meter.observed - before <= 1 + RUSH * 100 * 0.01 / 0.1


def test_a_schedule_that_raises_is_observed():
    """The clock reports what a user's schedule raised and looks at the step: the meter counts it so, too."""

    def schedule(step):
        if step == 1:
            raise RuntimeError
        return step == 0

    training = Training(schedule)
    with pytest.raises(RuntimeError):
        training.step()
    training.step()
    assert training.meter.observed == 2


seconds = st.floats(1e-4, 10.0)


@settings(deadline=None)
@given(
    budget=st.floats(0.001, 0.5),
    base=seconds,
    cost=st.floats(1e-5, 3.0),
    gap=st.integers(1, 40),
    noise=st.lists(st.floats(0.5, 2.0), min_size=1, max_size=30),
    pauses=st.sets(st.integers(0, 600), max_size=5),
)
def test_the_promise(budget, base, cost, gap, noise, pauses):
    """Whatever steps take: after the start, what was spent stays within the budget and the least that is always there, no
    stretch exceeds twice the budget, and some step is observed again before long."""
    training = Training(every(gap), budget)
    for step in range(600):
        factor = noise[step % len(noise)]
        training.clock += 1e4 * base if step in pauses else 0.0
        training.step(base=base * factor, cost=cost)
    meter, n = training.meter, training.meter.observed
    start = min(START, n) * cost
    assert n * cost <= start + (budget * (1 + LEAST) * (meter.elapsed + 2 * base)) * (1 + 1e-9)
    times = [at for at, seen in zip(range(600), training.seen, strict=True) if seen]
    longest = 2 * base * PAUSE + cost
    for first, second in zip(times[START - 1 :], times[START:], strict=False):
        stretch = sum(min(training.starts[i + 1] - training.starts[i], longest) for i in range(first, second))
        assert cost <= RUSH * budget * (stretch + 2 * base) * (1 + 1e-9)
    believed = cost + 3 * base  # at most: two busy steps of twice the base, and quiet ones of half of it
    patience = believed / (LEAST * budget) / (base * 0.5) + gap + 1  # in steps
    for first, second in zip(times, [*times[1:], 600], strict=True):
        assert second - first <= max(patience, 3 * gap)


def test_the_budget_is_one_of_what_is_felt():
    """What training waits for our own threads counts: with them the same budget is fewer looks."""
    alone, training = Training(budget=0.01).run(4000), Training(budget=0.01)
    for _ in range(4000):
        training.step(background=0.4 * training.observed, felt=0.32 * training.observed)
    assert 0.008 < training.overhead.share <= 0.0105
    assert training.meter.observed < 0.4 * alone.meter.observed
    felt = sum(training.costs) + 0.32 * training.meter.observed
    assert felt <= 0.0105 * training.overhead.elapsed
