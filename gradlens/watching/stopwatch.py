"""How long gradlens takes: a stopwatch for threads that train, and a clock of its own threads.

stopwatch(call)       seconds of ours on the training thread, also of waiting for Python's lock there
stopwatch.at(now)     these so far, and of pauses: no hook fired for far longer than a step takes, as in an evaluation
ThreadClock           processor seconds of the threads of gradlens, read from any thread: Worked
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

Now = Callable[[], float]
Result = TypeVar("Result")


class _Here(threading.local):
    timed = False
    start = 0.0


class Stopwatch:
    """Seconds of what is called through it, on all threads. What is timed within something timed counts once."""

    def __init__(self, now: Now = time.perf_counter) -> None:
        self._now = now
        self._total = 0.0
        self._here = _Here()
        self._last = now()  # when something timed ended
        self.longest = math.inf  #: seconds between two timed things that are not a pause
        self._paused = 0.0  # seconds beyond that

    def __call__(self, call: Callable[..., Result], *args: object) -> Result:
        """Call it, timed."""
        here = self._here
        if here.timed:
            return call(*args)
        here.start = now = self._now()
        gap = now - self._last
        if gap > self.longest:
            self._paused += gap - self.longest
        here.timed = True
        try:
            return call(*args)
        finally:
            here.timed = False
            self._last = now = self._now()
            self._total += now - here.start

    def at(self, now: float) -> tuple[float, float]:
        """Seconds of ours so far, with what this thread is in the middle of; and of pauses, with one that may go on."""
        here = self._here
        if here.timed:
            return self._total + now - here.start, self._paused
        return self._total, self._paused + max(now - self._last - self.longest, 0.0)


class Worked(NamedTuple):
    """Processor seconds of our own threads."""

    lock: float  #: of those that are mostly Python, and hold its lock
    native: float  #: of those that are not

    def __add__(self, other: Worked) -> Worked:  # type: ignore[override]
        return Worked(self.lock + other.lock, self.native + other.native)

    def __sub__(self, other: Worked) -> Worked:
        return Worked(self.lock - other.lock, self.native - other.native)


class _Clock:
    """Of one thread."""

    def __init__(self, thread: threading.Thread, clock: int) -> None:
        self.thread, self.number = thread, clock
        self.native, self.turns = getattr(thread, "native", False), -1
        self.seconds = 0.0


class ThreadClock:
    """Processor seconds of some threads. Where the system does not say them (macOS, Windows), 0.

    A thread is added while it lives; its clock is read as long as it does, and stands still after that. A clock takes a
    call of the system: that of a `Worker` is not read while the thread rests. The answer is the same object then.
    """

    def __init__(self) -> None:
        self._clocks: list[_Clock] = []
        self._worked = Worked(0.0, 0.0)

    def add(self, threads: Iterable[threading.Thread]) -> None:
        """Count threads that have started."""
        clock = getattr(time, "pthread_getcpuclockid", None)
        for thread in threads:
            if clock is not None and thread.ident is not None and thread.is_alive():
                self._clocks.append(_Clock(thread, clock(thread.ident)))

    def __call__(self) -> Worked:
        changed = False
        for each in self._clocks:
            turns = getattr(each.thread, "turns", 1)
            if turns != each.turns:
                each.turns = -1 if turns % 2 else turns  # before the clock: what it works from now on is for the next call
                changed = True
                with contextlib.suppress(OSError):  # the thread has ended
                    each.seconds = time.clock_gettime(each.number)
        if changed:
            native = sum(each.seconds for each in self._clocks if each.native)
            self._worked = Worked(sum(each.seconds for each in self._clocks) - native, native)
        return self._worked
