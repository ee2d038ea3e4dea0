"""A writer on a thread of its own."""

import os
import threading
import time
from dataclasses import dataclass

import pytest

from gradlens.errors import GradlensWarning
from gradlens.records import Finding
from gradlens.writers.background import Background


@dataclass
class Item:
    step: int
    part: int = 0
    nbytes: int = 0


class Slow:
    """Waits at a gate before each record."""

    def __init__(self, fail=()):
        self.gate = threading.Event()
        self.seen, self.flushes, self.closed, self.fail = [], 0, 0, set(fail)

    def write(self, record):
        self.gate.wait()
        if record.step in self.fail:
            raise OSError(28, "No space left on device")
        self.seen.append(record)

    def flush(self):
        self.flushes += 1

    def close(self):
        self.closed += 1


def steps(writer):
    return [(r.step, r.part) for r in writer.seen if isinstance(r, Item)]


def test_everything_is_written_in_order():
    """flush() returns when all is written; close() ends the thread and closes the writer once."""
    slow = Slow()
    slow.gate.set()
    background = Background(slow)
    for i in range(50):
        background.write(Item(i))
        if i % 16 == 15:
            background.flush()
    background.flush()
    assert steps(slow) == [(i, 0) for i in range(50)]
    assert slow.flushes == 4
    background.close()
    background.close()
    assert slow.closed == 1
    assert not background._thread.is_alive()


def test_a_question_asked_while_it_closes_waits():
    """flush() from another thread, while close() waits for the queue, returns when all is written."""
    slow = Slow()
    background = Background(slow)
    for i in range(3):
        background.write(Item(i))
    closing = threading.Thread(target=background.close)
    closing.start()
    while not background._closed:
        time.sleep(0.001)
    threading.Timer(0.05, slow.gate.set).start()
    background.flush()
    assert len(slow.seen) == 3
    assert slow.closed == 1
    closing.join()


def test_a_full_queue_leaves_out_whole_steps_and_says_which():
    """The caller never waits: what finds no room is left out by step, and one finding names the steps."""
    slow = Slow()
    background = Background(slow, maxsize=4)
    for step in range(10):
        for part in range(2):
            background.write(Item(step, part))
    slow.gate.set()
    background.flush()
    background.write(Item(10, 0))
    background.close()
    seen = steps(slow)
    assert seen[-1] == (10, 0)
    kept = {step for step, _ in seen}
    (gap,) = [r for r in slow.seen if isinstance(r, Finding)]
    assert gap.rule == "records-thinned"
    assert gap.value == len({step for step in range(10) if (step, 1) not in seen})
    assert f"to {max(set(range(10)) - {s for s, p in seen if p == 1})}" in gap.seen
    assert kept >= {0, 10}


def test_bytes_that_wait_are_bounded_too():
    """Large items fill the queue by their bytes; one item always has room."""
    slow = Slow()
    background = Background(slow, max_bytes=100)
    for step in range(5):
        background.write(Item(step, nbytes=60))
    slow.gate.set()
    background.close()
    assert steps(slow) == [(0, 0)]
    slow = Slow()
    slow.gate.set()
    background = Background(slow, max_bytes=100)
    background.write(Item(0, nbytes=1000))
    background.close()
    assert steps(slow) == [(0, 0)]


def test_a_gap_at_the_very_end_is_told_at_close():
    """When training ends while the queue is full, close() still says what is missing."""
    slow = Slow()
    background = Background(slow, maxsize=1)
    for step in range(5):
        background.write(Item(step))
    threading.Timer(0.2, slow.gate.set).start()
    background.close()
    assert [r.rule for r in slow.seen if isinstance(r, Finding)] == ["records-thinned"]


@pytest.mark.filterwarnings("ignore::gradlens.errors.GradlensWarning")
def test_a_failing_writer_does_not_end_the_thread():
    """A record that cannot be written is lost, is warned of once, and the next ones are written."""
    slow = Slow(fail={1, 2})
    slow.gate.set()
    background = Background(slow)
    for step in range(5):
        background.write(Item(step))
    background.close()
    assert steps(slow) == [(0, 0), (3, 0), (4, 0)]


def test_a_failure_is_named_once():
    """One warning for many failures."""
    slow = Slow(fail={0, 1, 2})
    background = Background(slow)
    with pytest.warns(GradlensWarning, match="No space left") as caught:
        for step in range(3):
            background.write(Item(step))
        slow.gate.set()
        background.close()
    assert len(caught) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_writes_nothing_and_does_not_hang():
    """A forked worker inherits the object and not the thread: its calls return at once."""
    slow = Slow()
    slow.gate.set()
    background = Background(slow)
    child = os.fork()
    if child == 0:
        background.write(Item(1))
        background.flush()
        background.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    background.close()
    assert steps(slow) == []
