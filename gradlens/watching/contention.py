"""What training waits for our own threads: processor seconds of theirs, times the share of these that is felt.

    felt  =  lock share * seconds of threads that are mostly Python  +  native share * seconds of those that are not
    each share  =  what training waits  +  what it is slowed down by

The recording threads hold Python's lock most of the time that they work; the thread that makes Parquet of full files does
so for a tenth of it. How much of that training feels depends on how often it wants the lock itself: a training of small
operations always does, in a matrix product of some milliseconds it does not.

Both shares are measured, from runs of steps in which our threads worked against the quiet steps around them (as in
`comparison`). Two things of a run are compared, each by itself since they scatter differently:

    waits   step time - the training thread's processor time: it waited, for the lock or a core. Nearly 0 in a quiet step
            of a processor's training, so a few runs tell it; the mean of quiet steps is taken, as waits have no middle
    slows   the rest: caches and memory that are shared. It scatters as steps do, and is small

What waits fell into the seconds that a stopwatch sees (`ours` above what is usual) is counted there already, and left out.
The two shares of each come out of one regression over the runs, of what training lost on the seconds of either kind, a
run's variance being proportional to its seconds. Before there are `ENOUGH` runs they are what is expected; then both are
put together by how sure each is. So a run without Parquet leaves that share as expected, and takes nothing from the other.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gradlens.watching.comparison import NEAR
from gradlens.watching.stopwatch import Worked

RUNS = 200  #: of busy steps that the shares rest on
ENOUGH = 5  #: of them, before they are believed
WORKED = 0.01  #: of a typical step, from which our own threads worked during it

#: What a second of our threads' work takes from training, of those that are mostly Python and of the others, and how sure
#: that is: waits, then the rest.
WAITS, WAITS_SPREAD = (0.6, 0.1), (0.3, 0.1)
SLOWS, SLOWS_SPREAD = (0.1, 0.1), (0.1, 0.1)
LEAST_SHARE, MOST_SHARE = -1.0, 3.0  #: of one run: what is beyond has another reason
SUREST = 1e-3  #: no share is surer than that


class Shares(NamedTuple):
    """Of the seconds of our threads, what training feels; with one standard error."""

    lock: float  #: of threads that are mostly Python
    native: float  #: of the others
    lock_uncertainty: float
    native_uncertainty: float


#: Of one step, seconds: that the training thread waited; its processor time less ours, below 0 where ours waited; and ours.
_Step = tuple[float, float, float]


class _Lost(NamedTuple):
    """Seconds that training lost in a run of busy steps, and those that our threads worked meanwhile."""

    waits: float
    slows: float
    worked: Worked


class Contention:
    """The seconds of our threads, and what training feels of them."""

    def __init__(self, clock: Callable[[], Worked], processor: Callable[[], float] = time.thread_time) -> None:
        self._clock, self._processor = clock, processor
        self._read, self._cpu, self._thread = clock(), processor(), threading.get_native_id()
        self.within = Worked(0.0, 0.0)  #: seconds of our threads within the steps that are over
        self._before: deque[_Step] = deque(maxlen=NEAR)
        self._after: list[_Step] = []
        self._begin()
        self._runs: deque[_Lost] = deque(maxlen=RUNS)
        self._shares: Shares | None = None  # None where they have to be computed

    def _begin(self) -> None:
        self._busy: list[_Step] = []
        self._worked, self._unknown = Worked(0.0, 0.0), False

    def step_ended(self, duration: float, ours: float, typical: float, *, paused: bool = False) -> bool:
        """A step ended on this thread. Whether our own threads worked during it."""
        cpu, thread, read = self._processor(), threading.get_native_id(), self._clock()
        own, self._cpu = cpu - self._cpu, cpu
        if thread != self._thread:  # the clock of another one; Python's own ids are used again
            self._thread, paused = thread, True
        step = duration - own, own - ours, ours
        if read is self._read:  # as mostly: told in a few calls
            return self._add(step, paused)
        worked, self._read = read - self._read, read
        self.within += worked
        if sum(worked) <= WORKED * typical:
            return self._add(step, paused)
        if self._after:
            self._compare()
        self._busy.append(step)
        self._worked, self._unknown = self._worked + worked, self._unknown or paused
        return True

    def _add(self, step: _Step, paused: bool) -> bool:
        """A quiet step."""
        if not paused:
            (self._after if self._busy else self._before).append(step)
            if len(self._after) == NEAR:
                self._compare()
        return False

    def open(self) -> Worked:
        """Seconds of our threads in the step that is open."""
        return self._clock() - self._read

    def _compare(self) -> None:
        if self._before and not self._unknown:
            self._runs.append(_lost(self._busy, [*self._before, *self._after], self._worked))
            self._shares = None
        self._before, self._after = deque(self._after, maxlen=NEAR), []
        self._begin()

    @property
    def shares(self) -> Shares:
        """As known so far."""
        if self._shares is None:
            self._shares = shares(self._runs)
        return self._shares

    def felt(self, worked: Worked) -> float:
        """Seconds that training waits where our threads worked as long."""
        known = self.shares
        return known.lock * worked.lock + known.native * worked.native


def _lost(busy: Sequence[_Step], quiet: Sequence[_Step], worked: Worked) -> _Lost:
    n, total = len(busy), sum(worked)
    (waited, own, ours), around = map(sum, zip(*busy, strict=True)), list(zip(*quiet, strict=True))
    waits, later = waited - n * _mean(around[0]), ours - n * statistics.median(around[2])
    seen = min(max(later, 0.0), max(waits, 0.0))  # by the stopwatch
    slows = own - n * statistics.median(around[1])
    least, most = LEAST_SHARE * total, MOST_SHARE * total
    return _Lost(min(max(waits - seen, least), most), min(max(slows + seen, least), most), worked)


def _mean(values: Sequence[float]) -> float:
    """Without the largest, if there are many: a file that was written, say."""
    kept = sorted(values)[: -1 if len(values) > NEAR else None]
    return statistics.fmean(kept)


def shares(runs: Sequence[_Lost]) -> Shares:
    """What runs say of both shares, put together with what is expected."""
    worked = np.array([run.worked for run in runs], np.float64).reshape(-1, 2)
    waits, waits_error = _fitted(worked, np.array([run.waits for run in runs]), WAITS, WAITS_SPREAD)
    slows, slows_error = _fitted(worked, np.array([run.slows for run in runs]), SLOWS, SLOWS_SPREAD)
    lock, native = np.maximum(waits + slows, 0.0).tolist()
    return Shares(lock, native, *np.hypot(waits_error, slows_error).tolist())


def _fitted(
    worked: np.ndarray, lost: np.ndarray, expected: tuple[float, float], spread: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """`[2]` lost = worked @ shares, and the standard errors: least squares, with what is expected as two more equations."""
    prior, mean = np.diag(1 / np.square(spread)), np.array(expected)
    if len(lost) < ENOUGH:
        return mean, np.array(spread)
    total = worked.sum(axis=1)
    root = np.sqrt(total)
    mean = np.linalg.lstsq(worked / root[:, None], lost / root, rcond=None)[0]
    squares, products = worked.T @ (worked / total[:, None]), worked.T @ (lost / total)
    for _ in range(2):  # how the runs scatter depends on the shares
        scatter = np.sum((lost - worked @ mean) ** 2 / total) / (len(lost) - 1)
        variance = max(scatter, SUREST**2 * total.sum())
        known = squares / variance + prior
        mean = np.linalg.solve(known, products / variance + prior @ np.array(expected))
    return mean, np.sqrt(np.diag(np.linalg.inv(known)))
