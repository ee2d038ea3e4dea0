"""What it costs, and keeping to a budget. Time is a fake clock here: the arithmetic is tested, not the machine."""

import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.schedules import every
from gradlens.watching.overhead import (
    ENOUGH,
    LEAST,
    PAUSE,
    RUSH,
    SETTLED,
    START,
    Comparison,
    Meter,
    Overhead,
    Pace,
    Stopwatch,
)

always = every(1)


class Training:
    """A training whose time passes as it is told: what a step takes, and what looking at it costs."""

    def __init__(self, schedule=always, budget=None):
        self.clock, self.working = 100.0, False
        self.told, self.seen, self.costs, self.starts = [], [], [], []
        self.stopwatch = Stopwatch(lambda: self.clock)
        self.meter = Meter(self.stopwatch, lambda: self.working, now=lambda: self.clock)
        self.pace = Pace(schedule, budget, self.meter, tell=self.told.append)
        self.observed = self.pace(0)

    def ours(self, seconds):
        with self.stopwatch:
            self.clock += seconds

    def step(self, base=1.0, cost=0.1, hidden=0.0, floor=0.0):
        """`cost` is measured directly, `hidden` is not; `floor` is what a step costs that is not observed."""
        self.seen.append(self.observed)
        self.costs.append(cost + hidden if self.observed else 0.0)
        self.starts.append(self.clock)
        self.clock += base
        if self.observed:
            self.clock += hidden
            self.ours(cost)
        self.ours(floor)
        self.observed = self.pace(len(self.seen))

    def run(self, n, **costs):
        for _ in range(n):
            self.step(**costs)
        return self

    @property
    def overhead(self):
        return self.meter.overhead(self.pace.budget)


# --- the stopwatch ----------------------------------------------------------------------------------------------------


def test_what_is_timed_within_something_timed_counts_once():
    """Nested uses add up to the outer one's time, which can be read in the middle of it."""
    training = Training()
    with training.stopwatch:
        training.clock += 1
        with training.stopwatch:
            training.clock += 2
            assert training.stopwatch.seconds == 3
        training.clock += 4
    training.clock += 8
    assert training.stopwatch.seconds == 7


def test_an_error_stops_the_stopwatch():
    """What raises was timed as well, and nothing after it is."""
    training = Training()
    with pytest.raises(ZeroDivisionError), training.stopwatch:
        training.clock += 1
        1 / 0  # noqa: B018
    training.clock += 1
    assert training.stopwatch.seconds == 1


def test_threads_are_timed_apart():
    """A thread inside the stopwatch does not hide that another one enters it, too."""
    training = Training()
    with training.stopwatch:
        thread = threading.Thread(target=training.ours, args=(1.0,))
        thread.start()
        thread.join()
        assert training.stopwatch.seconds == 2.0  # one second of each
    assert training.stopwatch.seconds == 2.0


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_directly_measured():
    """With every step observed the share is what was spent over the step time, and there is nothing to compare with."""
    overhead = Training().run(10).overhead
    assert overhead.share == pytest.approx(0.1 / 1.1)
    assert (overhead.steps, overhead.observed) == (10, 10)
    assert (overhead.compared, overhead.uncertainty, overhead.floor, overhead.share_uncertainty) == (None,) * 4
    assert "100.00 ms each, measured directly" in str(overhead)
    assert "against" not in str(overhead)


def test_compared_with_the_steps_around():
    """The comparison also finds what was not measured directly, and the share rests on it."""
    overhead = Training(every(5)).run(100, hidden=0.05).overhead
    assert overhead.seconds == pytest.approx(20 * 0.1)
    assert overhead.compared == pytest.approx(0.15)
    assert overhead.uncertainty == pytest.approx(0.0, abs=1e-9)
    assert overhead.share == pytest.approx(20 * 0.15 / (100 + 20 * 0.15))
    assert "150.00 +- 0.00 ms against the steps around them" in str(overhead)


def test_a_machine_that_slows_down_does_not_look_like_a_cost():
    """Steps that get longer all the time: each observed one is compared with its neighbours, not with the whole run."""
    training = Training(every(20))
    for step in range(400):
        training.step(base=1 + step / 100, cost=0.1)
    assert training.overhead.compared == pytest.approx(0.1, abs=0.011)


def test_what_the_background_thread_takes_away_counts():
    """While it still works on what was seen, steps take longer: that is the price of the step that was observed."""
    training = Training(every(10))
    for step in range(200):
        since = step % 10
        training.working = since < 3  # when this step ends
        training.step(base=1.0 + (0.2 if since in (1, 2, 3) else 0.0), cost=0.1)
    assert training.overhead.compared == pytest.approx(0.1 + 3 * 0.2)


def test_no_quiet_step_no_comparison():
    """Every other step observed: each of the rest has something to tidy up, and none can be compared with."""
    overhead = Training(every(2)).run(100, hidden=0.05).overhead
    assert overhead.compared is None
    assert overhead.floor is None
    assert overhead.share == pytest.approx(50 * 0.1 / (100 + 50 * 0.15))


def test_the_uncertainty_is_that_of_a_median():
    """Comparisons that scatter: the standard error of their median falls with their number."""
    comparison = Comparison()
    for i in range(100):
        comparison.quiet(1.0)
        comparison.busy(1.0 + 0.1 * (i % 11), observed=True, paused=False)
    assert comparison.cost == pytest.approx(0.5)
    deviation = 1.4826 * 0.3
    assert comparison.uncertainty == pytest.approx(1.2533 * deviation / math.sqrt(99))


def test_few_comparisons_are_not_believed():
    """Fewer than ENOUGH say nothing yet."""
    comparison = Comparison()
    for expected in [None] * (ENOUGH + 1) + [0.5]:
        assert comparison.cost == expected
        comparison.quiet(1.0)
        comparison.busy(1.5, observed=True, paused=False)


def test_a_pause_is_no_step_time():
    """An evaluation between two steps counts as some steps, and never as our cost, not even right after an observed one."""
    training = Training(every(10))
    for step in range(200):
        if step % 10 == 1:
            training.clock += 1000 if step % 20 == 1 else 0  # each other time
        training.step()
    overhead = training.overhead
    assert overhead.elapsed == pytest.approx(200 + 20 * 0.1 + 10 * (PAUSE - 1), rel=0.01)
    assert overhead.compared == pytest.approx(0.1)


def test_a_dear_look_is_no_pause():
    """Time of ours is never taken for a pause of the user's."""
    overhead = Training(every(10)).run(100, base=0.01, cost=5.0).overhead
    assert overhead.elapsed == pytest.approx(100 * 0.01 + 10 * 5.0)


def test_the_floor():
    """What a step costs that is not observed is measured, and counts for every step."""
    overhead = Training(every(10)).run(100, floor=0.002).overhead
    assert overhead.floor == pytest.approx(0.002)
    assert overhead.compared == pytest.approx(0.1)
    assert overhead.share == pytest.approx((10 * 0.1 + 100 * 0.002) / (100 * 1.002 + 1))
    assert "2.000 ms a step that is not observed" in str(overhead)


def test_no_step_yet():
    """Before the first step there is no share, and the text says so."""
    overhead = Training().overhead
    assert math.isnan(overhead.share)
    assert str(overhead) == "no step yet"


# --- the budget -------------------------------------------------------------------------------------------------------


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


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(0, 10**6), st.floats(0, 1e3), st.floats(1e-3, 1e6), st.floats(0, 1e-3))
def test_a_share_is_never_negative(steps, observed, took, elapsed, floor):
    """Comparisons scatter about 0 where looking costs nothing: the share is then 0."""
    overhead = Overhead(took, steps, min(observed, steps), elapsed, 0.0, compared=-1e-3, uncertainty=1e-3, floor=floor)
    assert overhead.share >= 0
    assert str(overhead)
