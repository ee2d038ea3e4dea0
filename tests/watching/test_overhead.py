"""What it costs. Time is a fake clock here: the arithmetic is tested, not the machine."""

import math
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens.schedules import every
from gradlens.watching.contention import SLOWS, SLOWS_SPREAD, WAITS, WAITS_SPREAD
from gradlens.watching.overhead import ENOUGH, HIDDEN, HIDDEN_SPREAD, PAUSE, LookCost, Overhead
from gradlens.watching.stopwatch import Worked
from tests.watching.clocked import Training


def test_directly_measured():
    """With every step observed the share is what was spent over the step time, and there is nothing to compare with."""
    overhead = Training().run(10).overhead
    assert overhead.share == pytest.approx(0.1 / 1.1)
    assert (overhead.steps, overhead.observed) == (10, 10)
    assert (overhead.compared, overhead.uncertainty, overhead.floor) == (None,) * 3
    assert overhead.share_uncertainty == 0.0
    assert "100.00 ms each on the training thread" in str(overhead)
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


def bursts(training, felt, steps=600, noise=0.0, seed=0, native=0.0, slowed=0.0, every=30):
    """Every step is observed; our own threads work for some steps and rest for many, and training waits for a share.

    Each third burst has the thread that makes Parquet work as well, of which training feels `native`.
    """
    random = np.random.default_rng(seed)
    for step in range(steps):
        worked = 0.3 if step % every < 3 else 0.0
        parquet = 0.4 if worked and step % (3 * every) < 3 else 0.0
        base = 1.0 + noise * random.standard_normal()
        waits = felt * worked + native * parquet
        training.step(base=base, background=worked, native=parquet, felt=waits, slowed=slowed * (worked + parquet))
    return training


@pytest.mark.parametrize("felt", [0.0, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("native", [0.0, 0.3])
@pytest.mark.parametrize("slowed", [0.0, 0.2])
def test_what_our_own_threads_take_away_is_measured(felt, native, slowed):
    """Steps in which they work against those around them: with nothing but that in the way, each share is the true one,
    whether training waits or is slowed down."""
    training = bursts(Training(), felt, native=native, slowed=slowed)
    overhead = training.overhead
    lock, parquet = training.worked
    true = sum(training.costs) + felt * lock + native * parquet + slowed * (lock + parquet)
    assert overhead.contention == pytest.approx(felt + slowed, abs=0.01)
    assert overhead.native_contention == pytest.approx(native + slowed, abs=0.01)
    assert (overhead.background, overhead.native) == pytest.approx((training.background, parquet))
    assert overhead.share == pytest.approx(true / overhead.elapsed, rel=0.01)
    assert overhead.share_uncertainty < 0.001


@settings(deadline=None, max_examples=30)
@given(felt=st.floats(0.0, 1.2), native=st.floats(0.0, 0.8), slowed=st.floats(0.0, 0.2), seed=st.integers(0, 10**6))
def test_each_share_is_within_what_is_said_of_it(felt, native, slowed, seed):
    """Two kinds of threads, steps that scatter by a tenth: neither share is off by more than four of its errors."""
    overhead = bursts(Training(), felt, noise=0.1, seed=seed, native=native, slowed=slowed, steps=900).overhead
    assert abs(overhead.contention - felt - slowed) < 4 * overhead.contention_uncertainty
    assert abs(overhead.native_contention - native - slowed) < 4 * overhead.native_contention_uncertainty
    assert overhead.contention_uncertainty < 0.1
    assert overhead.native_contention_uncertainty < 0.15


def test_the_truth_is_within_what_is_said_of_it():
    """Steps that scatter by a tenth: what is said is off by about its error, and the error is of some use."""
    off = []
    for seed in range(30):
        training = bursts(Training(), 0.5, noise=0.1, seed=seed, slowed=0.1)
        overhead = training.overhead
        lock, parquet = training.worked
        true = (sum(training.costs) + 0.6 * lock + 0.1 * parquet) / overhead.elapsed
        off.append((overhead.share - true) / overhead.share_uncertainty)
        assert overhead.share_uncertainty < 0.05 * true
    assert np.std(off) < 1.5
    assert abs(np.mean(off)) < 0.6
    assert np.abs(off).max() < 4


def test_few_runs_tell_what_training_waits():
    """Steps whose work scatters by a third, so that no wall clock would say it: what is waited for is known after a few."""
    overhead = bursts(Training(), 0.2, steps=180, noise=0.3).overhead
    assert overhead.contention == pytest.approx(0.2 + SLOWS[0], abs=0.12)
    assert overhead.contention_uncertainty < 0.12


def test_waits_that_the_stopwatch_sees_count_once():
    """Where our own code on the training thread waits for the lock, its seconds are longer, and the share is no larger."""
    training = Training()
    for step in range(300):
        worked = 0.3 if step % 30 < 3 else 0.0
        training.worked += Worked(worked, 0.0)
        training.stopwatch(training.wait, 0.5 * worked)
        training.step()
    overhead = training.overhead
    assert overhead.contention == pytest.approx(0.0, abs=0.01)
    assert overhead.share == pytest.approx((0.1 * 300 + 0.5 * 9) / overhead.elapsed, rel=0.01)


def test_what_training_waits_for_anyhow_is_not_ours():
    """Batches that it waits for in each step, now longer and now less, while our threads work or not."""
    random, training = np.random.default_rng(0), Training()
    for step in range(900):
        worked = 0.3 if step % 30 < 3 else 0.0
        training.step(background=worked, felt=0.4 * worked, idle=0.5 + 0.1 * random.random())
    overhead = training.overhead
    assert abs(overhead.contention - 0.4) < 3 * overhead.contention_uncertainty
    assert overhead.contention_uncertainty < 0.1


def test_steps_that_end_on_another_thread_are_not_compared():
    """A thread's clock says nothing of another's: the share is the expected one then."""
    training = Training()
    for step in range(200):
        worked = 0.3 if step % 20 < 3 else 0.0
        thread = threading.Thread(target=training.step, kwargs={"background": worked, "felt": worked})
        thread.start()
        thread.join()
    assert training.overhead.contention == pytest.approx(WAITS[0] + SLOWS[0])


def test_before_it_is_measured_the_share_is_the_expected_one():
    """With an error to match, which the text says; threads that hold no lock have one of their own."""
    training = Training()
    for _ in range(40):
        training.step(background=0.5, native=0.5)
    overhead = training.overhead
    (lock, native), spread = np.add(WAITS, SLOWS), np.hypot(WAITS_SPREAD, SLOWS_SPREAD)
    assert (overhead.contention, overhead.native_contention) == pytest.approx((lock, native))
    assert overhead.share_uncertainty == pytest.approx(math.hypot(*(0.5 * spread)) / 1.1)
    mean, error = (lock + native) / 2, math.hypot(*spread) / 2
    assert f"each second of their work delays training by {mean:.2f} +- {error:.2f} s" in str(overhead)


def test_a_step_of_a_thousand_backwards_is_no_pause():
    """Where hooks fire all the time training goes on, however long the step takes: all of it is step time."""
    training = Training().run(20)
    for _ in range(1000):
        training.clock += 1.0
        training.ours(0.1)
    training.step()
    assert training.overhead.elapsed == pytest.approx(20 * 1.1 + 1100 + 1.1)
    assert training.overhead.share == pytest.approx(0.1 / 1.1)


def test_a_step_that_is_open_counts():
    """Backwards and no step yet: what they cost is known all the same."""
    training = Training()
    for _ in range(100):
        training.clock += 1.0
        training.ours(0.1)
    assert training.overhead.share == pytest.approx(0.1 / 1.1)
    assert "of the time of a step that is still open" in str(training.overhead)


def test_no_quiet_step_no_comparison():
    """Every other step observed: each of the rest has something to tidy up, and none can be compared with."""
    overhead = Training(every(2)).run(100, hidden=0.05).overhead
    assert overhead.compared is None
    assert overhead.floor is None
    assert overhead.share == pytest.approx(50 * 0.1 / (100 + 50 * 0.15))


def test_what_is_hidden_is_a_share_of_all_looks():
    """Now and then another program takes the core: as often in what is hidden, and the typical look does not show it."""
    training = Training(hidden=HIDDEN)
    for step in range(20):
        training.step(cost=1.0 if step % 10 == 9 else 0.1)
    seconds = 18 * 0.1 + 2 * 1.0
    assert training.overhead.hidden * 20 == pytest.approx(HIDDEN * seconds)
    assert training.overhead.share == pytest.approx((1 + HIDDEN) * seconds / (20 + seconds))


def test_what_no_stopwatch_sees_is_expected_until_it_is_measured():
    """Where every step is observed it is an estimate, which is said, and how unsure it is; else it is compared."""
    hidden = 0.1 * HIDDEN
    overhead = Training(hidden=HIDDEN).run(10, hidden=hidden).overhead
    assert overhead.share == pytest.approx((0.1 + hidden) / (1.1 + hidden))
    assert overhead.share_uncertainty == pytest.approx(0.1 * HIDDEN_SPREAD / (1.1 + hidden))
    assert "30.00 ms that cannot be timed" in str(overhead)
    compared = Training(every(5), hidden=HIDDEN).run(100, hidden=0.05).overhead
    assert compared.share == pytest.approx(20 * 0.15 / (100 + 20 * 0.15))
    assert "cannot be timed" not in str(compared)


def test_the_uncertainty_is_that_of_a_median():
    """Comparisons that scatter: the standard error of their median falls with their number."""
    looks = LookCost()
    for i in range(100):
        looks.comparison.quiet(1.0)
        looks.comparison.busy(1.0 + 0.1 * (i % 11), 1)
    assert looks.cost == pytest.approx(0.5)
    deviation = 1.4826 * 0.3
    assert looks.uncertainty == pytest.approx(1.2533 * deviation / math.sqrt(99))


def test_few_comparisons_are_not_believed():
    """Fewer than ENOUGH say nothing yet."""
    looks = LookCost()
    for expected in [None] * (ENOUGH + 1) + [0.5]:
        assert looks.cost == expected
        looks.comparison.quiet(1.0)
        looks.comparison.busy(1.5, 1)


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


@settings(deadline=None)
@given(st.integers(1, 10**6), st.integers(0, 10**6), st.floats(0, 1e3), st.floats(1e-3, 1e6), st.floats(0, 1e-3))
def test_a_share_is_never_negative(steps, observed, took, elapsed, floor):
    """Comparisons scatter about 0 where looking costs nothing: the share is then 0."""
    overhead = Overhead(took, steps, min(observed, steps), elapsed, 0.0, compared=-1e-3, uncertainty=1e-3, floor=floor)
    assert overhead.share >= 0
    assert str(overhead)
