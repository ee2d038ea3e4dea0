"""Threads that say when they rest."""

import threading
import time

from gradlens.workers import Worker


def test_turns_are_even_while_a_thread_rests():
    """It works until its first rest, and again when the event comes; the answer is whether it came."""
    event, seen, answers = threading.Event(), [], []

    def work():
        seen.append(worker.turns)
        answers.append(worker.rest(event))
        seen.append(worker.turns)
        event.clear()
        answers.append(worker.rest(event, 0.01))

    worker = Worker(work, "test")
    worker.start()
    while worker.turns == 1:
        time.sleep(0.001)
    assert worker.turns == 2
    event.set()
    worker.join()
    assert (seen, answers, worker.turns) == ([1, 3], [True, False], 5)
    assert worker.daemon
