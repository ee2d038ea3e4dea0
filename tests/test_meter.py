"""What it costs, and keeping to a budget. Time is a fake clock here: the arithmetic is tested, not the machine."""

import math

import pytest

from gradlens import meter as module
from gradlens.meter import Meter, Pace
from gradlens.schedules import every


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def loop(clock, observe, n, base=1.0, cost=0.1, hidden=0.0):
    """n steps of `base` seconds; an observed one takes `cost` more that we know of, and `hidden` that we do not."""
    spent = 0.0
    meter = Meter(lambda: spent)
    pace = observe(meter)
    for step in range(n):
        seen = pace(step)
        clock.now += base + (cost + hidden if seen else 0.0)
        spent += cost if seen else 0.0
        meter.step_ended(seen)
    return meter


def test_directly_measured(clock):
    """With every step observed the share is what was spent over the wall time."""
    overhead = loop(clock, lambda meter: every(1), 10).overhead()
    assert overhead.share == pytest.approx(0.1 / 1.1)
    assert (overhead.steps, overhead.observed, overhead.compared) == (10, 10, None)
    assert "100.00 ms an observed step" in str(overhead)


def test_compared_with_unobserved_steps(clock):
    """Where both kinds were seen, the difference counts what was not measured directly, too."""
    overhead = loop(clock, lambda meter: every(2), 40, hidden=0.05).overhead()
    assert overhead.compared == pytest.approx(0.15)
    assert overhead.uncertainty == pytest.approx(0.0, abs=1e-9)
    assert overhead.share == pytest.approx(20 * 0.15 / (40 + 20 * 0.15))


def test_a_budget_is_kept(clock):
    """The share stays under the budget once the first steps are amortised, and uses most of it."""
    meter = loop(clock, lambda meter: Pace(every(1), 0.01, meter), 2000, hidden=0.05)
    share = meter.overhead().share
    assert 0.008 < share <= 0.0101
    assert meter.observed == pytest.approx(2000 * 0.01 / 0.15, rel=0.1)


def test_without_a_budget_the_schedule_is_itself(clock):
    """No budget: every due step is observed."""
    assert loop(clock, lambda meter: Pace(every(3), None, meter), 9).observed == 3


def test_no_step_yet(clock):
    """Before the first step there is no share, and the text says so."""
    overhead = Meter(lambda: 0.0).overhead()
    assert math.isnan(overhead.share)
    assert str(overhead) == "no step yet"
