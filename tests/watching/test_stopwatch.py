"""Seconds of ours, pauses of the user's, and what threads of ours took."""

import threading
import time

import pytest

from gradlens.watching.stopwatch import ThreadClock
from gradlens.workers import Worker
from tests.watching.clocked import Training


def test_what_is_timed_within_something_timed_counts_once():
    """Nested uses add up to the outer one's time, which can be read in the middle of it."""
    training = Training()

    def outer():
        training.clock += 1
        training.ours(2)
        assert training.stopwatch.at(training.clock) == (3, 0)
        training.clock += 4

    training.stopwatch(outer)
    training.clock += 8
    assert training.stopwatch.at(training.clock) == (7, 0)


def test_what_is_called_answers_through_it():
    """Arguments go in and the answer comes out, nested or not."""
    watch = Training().stopwatch
    assert watch(divmod, 7, 3) == watch(watch, divmod, 7, 3) == (2, 1)


def test_an_error_stops_the_stopwatch():
    """What raises was timed as well, and nothing after it is."""
    training = Training()

    def failing():
        training.clock += 1
        1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError):
        training.stopwatch(failing)
    training.clock += 1
    assert training.stopwatch.at(training.clock) == (1, 0)


def test_threads_are_timed_apart():
    """A thread inside the stopwatch does not hide that another one enters it, too."""
    training = Training()

    def outer():
        thread = threading.Thread(target=training.ours, args=(1.0,))
        thread.start()
        thread.join()
        assert training.stopwatch.at(training.clock) == (2.0, 0)  # one second of each

    training.stopwatch(outer)
    assert training.stopwatch.at(training.clock) == (2.0, 0)


def test_a_gap_without_a_hook_is_a_pause_from_some_length_on():
    """What is beyond `longest` is no time of the step, and while it lasts it is known too."""
    training = Training()
    watch = training.stopwatch
    watch.longest = 2.0
    training.ours(1.0)
    training.clock += 1.5
    assert watch.at(training.clock) == (1.0, 0.0)
    training.clock += 5.5
    assert watch.at(training.clock) == (1.0, pytest.approx(5.0))
    training.ours(1.0)
    training.clock += 1.0
    assert watch.at(training.clock) == (2.0, pytest.approx(5.0))


def test_a_thread_clock_says_what_threads_worked():
    """Of the threads that it was given, while they live and after; a thread that sleeps takes nothing."""
    clock, stop, worked = ThreadClock(), threading.Event(), threading.Event()

    def work():
        while time.thread_time() < 0.2:
            pass
        worked.set()
        stop.wait()

    threads = [threading.Thread(target=work), threading.Thread(target=stop.wait)]
    for thread in threads:
        thread.start()
    clock.add(threads)
    worked.wait()
    assert 0.2 <= clock().lock < 0.4
    stop.set()
    for thread in threads:
        thread.join()
    assert 0.2 <= clock().lock < 0.4


def test_a_thread_that_rests_is_not_asked(monkeypatch):
    """Its clock is read after it has worked, and once more when it rests; what it worked meanwhile is not lost."""
    clock, wake, stop = ThreadClock(), threading.Event(), False
    asked, read = [], time.clock_gettime
    monkeypatch.setattr(time, "clock_gettime", lambda number: asked.append(number) or read(number))

    def work():
        while not stop:
            worker.rest(wake)
            wake.clear()
            began = time.thread_time()
            while not stop and time.thread_time() - began < 0.1:
                pass

    def wait_for_rest(turns):
        while worker.turns < turns:
            time.sleep(0.001)

    worker = Worker(work, "test", native=True)
    worker.start()
    clock.add([worker])
    wait_for_rest(2)
    first = clock()
    asked.clear()
    assert all(clock() is first for _ in range(5))
    assert asked == []
    wake.set()
    wait_for_rest(4)
    second = clock()
    assert 0.1 <= second.native - first.native < 0.2
    assert second.lock == 0.0
    assert clock() is second
    assert len(asked) == 1
    stop = True
    wake.set()
    worker.join()


def test_a_thread_is_asked_while_it_works():
    """Each time, since the answer is another one."""
    clock, stop = ThreadClock(), threading.Event()
    worker = Worker(lambda: [None for _ in iter(stop.is_set, True)], "test")
    worker.start()
    clock.add([worker])
    before = clock()
    time.sleep(0.2)
    assert clock().lock > before.lock
    stop.set()
    worker.join()
