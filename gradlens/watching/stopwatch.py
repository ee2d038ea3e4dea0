"""How long gradlens takes: a stopwatch for threads that train, and a clock of its own threads.

stopwatch(call)       seconds of ours on the training thread, also of waiting for Python's lock there
stopwatch.at(now)     these so far, and of pauses: no hook fired for far longer than a step takes, as in an evaluation
ThreadClock           processor seconds of the threads of gradlens, read from any thread
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

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


class ThreadClock:
    """Processor seconds of some threads. Where the system does not say them (macOS, Windows), 0.

    A thread is added while it lives; its clock is read as long as it does, and stands still after that.
    """

    def __init__(self) -> None:
        self._clocks: dict[int, float] = {}

    def add(self, threads: Iterable[threading.Thread]) -> None:
        """Count threads that have started."""
        clock = getattr(time, "pthread_getcpuclockid", None)
        for thread in threads:
            if clock is not None and thread.ident is not None and thread.is_alive():
                self._clocks[clock(thread.ident)] = 0.0

    def __call__(self) -> float:
        for clock in self._clocks:
            try:
                self._clocks[clock] = time.clock_gettime(clock)
            except OSError:  # the thread has ended
                continue
        return sum(self._clocks.values())
