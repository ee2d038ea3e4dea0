"""What gradlens costs, measured while it works, and the schedule that keeps a budget.

Two measurements. *Directly*: the seconds that the training thread spends in statistics and copies; it leaves out the
hooks that only note. *By comparison*: observed steps take longer than unobserved ones, and the difference of the
medians is the whole cost of looking, hooks and slower caches included. The comparison needs both kinds of step, as a
schedule or a budget makes them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gradlens.schedules import Schedule

RECENT = 200  #: steps of each kind that the comparison rests on
ENOUGH = 5  #: of each kind, before the comparison is believed
WARM_UP = 2  #: first steps that are left out: they allocate


@dataclass(frozen=True)
class Overhead:
    """What gradlens cost the training thread."""

    seconds: float  #: measured directly
    steps: int  #: since watch()
    observed: int  #: of these
    elapsed: float  #: wall seconds from watch() to the end of the last step
    compared: float | None = None  #: seconds that an observed step takes longer than another, where both kinds were seen
    uncertainty: float | None = None  #: one standard error of that

    @property
    def share(self) -> float:
        """Of the wall time: by comparison where possible, else directly. NaN before the first step ends."""
        if self.elapsed <= 0 or not self.steps:
            return math.nan
        cost = self.seconds if self.compared is None else self.compared * self.observed
        return max(cost, 0.0) / self.elapsed

    def __str__(self) -> str:
        if not self.steps:
            return "no step yet"
        each = 1e3 * self.seconds / max(self.observed, 1)
        text = f"{self.share:.1%} of the time of {self.steps} steps; {each:.2f} ms an observed step, measured directly"
        if self.compared is not None and self.uncertainty is not None:
            text += f", {1e3 * self.compared:.2f} +- {1e3 * self.uncertainty:.2f} ms against unobserved ones"
        return text


class Meter:
    """Durations of steps, observed and not."""

    def __init__(self, spent: Callable[[], float]) -> None:
        self._spent = spent  # seconds of ours on the training thread so far
        self._start = self._last = time.perf_counter()
        self._durations: dict[bool, deque[float]] = {True: deque(maxlen=RECENT), False: deque(maxlen=RECENT)}
        self.steps = self.observed = 0

    def step_ended(self, observed: bool) -> None:
        """A step ended now."""
        now = time.perf_counter()
        if self.steps >= WARM_UP:
            self._durations[observed].append(now - self._last)
        self._last = now
        self.steps += 1
        self.observed += observed

    def overhead(self) -> Overhead:
        """The cost so far."""
        compared, uncertainty = self._compare()
        return Overhead(self._spent(), self.steps, self.observed, self._last - self._start, compared, uncertainty)

    def _compare(self) -> tuple[float | None, float | None]:
        with_us, without = self._durations[True], self._durations[False]
        if min(len(with_us), len(without)) < ENOUGH:
            return None, None
        difference = statistics.median(with_us) - statistics.median(without)
        return difference, math.hypot(_error_of_median(with_us), _error_of_median(without))

    def cost(self) -> float:
        """Seconds that one observed step costs: the larger of the two measurements, 0 before the first."""
        compared, _ = self._compare()
        direct = self._spent() / self.observed if self.observed else 0.0
        return max(compared or 0.0, direct)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start


def _error_of_median(values: deque[float]) -> float:
    """Its standard error, from the median absolute deviation: steps have outliers."""
    middle = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return 1.2533 * deviation / math.sqrt(len(values))


class Pace:
    """A schedule, stretched so that the measured cost stays under a share of the time.

    A due step is observed when what all observed steps cost, this one included, stays under `budget` times the time so
    far. The first `WARM_UP + 1` due steps are observed in any case: there is no cost known before.
    """

    def __init__(self, schedule: Schedule, budget: float | None, meter: Meter) -> None:
        self._schedule, self._budget, self._meter = schedule, budget, meter

    def __call__(self, step: int) -> bool:
        due = bool(self._schedule(step))
        meter = self._meter
        if self._budget is None or not due or meter.observed <= WARM_UP:
            return due
        return meter.cost() * (meter.observed + 1) <= self._budget * meter.elapsed()
