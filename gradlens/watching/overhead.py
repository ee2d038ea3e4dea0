"""What gradlens costs, measured while it works, and the schedule that keeps a budget.

Two measurements. *Directly*: the seconds that training threads spend in gradlens. It leaves out the short hook of each
parameter, and what the background thread takes away from training. *By comparison*: a step is `busy` when it is observed,
when it follows one that was (which tidies up), or when the background thread still works on what was seen; any other is
`quiet`. A run of busy steps is compared with the quiet steps right before and after it, so a machine that gets slower in the
meantime does not matter, and

    cost of an observed step = (seconds of the busy steps - as many typical quiet ones) / observed among them

The comparison needs quiet steps, as a schedule or a budget makes them. A step that is not observed costs a little too, the
`floor`. Time is step time: of a pause, such as an evaluation between two steps, only the length of some steps is counted.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from gradlens.schedules import Schedule

Now = Callable[[], float]

RECENT = 200  #: comparisons and looks that the typical cost rests on
NEAR = 8  #: quiet steps on either side that busy ones are compared with
ENOUGH = 5  #: comparisons, before they are believed
PAUSE = 10  #: typical steps from which a step is taken to have a pause in it
SETTLED = 20  #: quiet steps, before the floor is believed

START = 3  #: first due steps, observed in any case: the very first allocates, and its cost is not typical
RUSH = 2  #: times the budget, that no stretch between two observed steps exceeds
LEAST = 0.1  #: of the budget, that is there for looking even where more than the budget was spent


class _Here(threading.local):
    depth = 0
    start = 0.0


class Stopwatch:
    """Seconds inside `with stopwatch:`, on all threads. What is timed within something timed counts once."""

    def __init__(self, now: Now = time.perf_counter) -> None:
        self._now = now
        self._total = 0.0
        self._here = _Here()

    def __enter__(self) -> None:
        here = self._here
        if not here.depth:
            here.start = self._now()
        here.depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        here = self._here
        here.depth -= 1
        if not here.depth:
            self._total += self._now() - here.start

    @property
    def seconds(self) -> float:
        """So far, with what this thread is in the middle of."""
        here = self._here
        return self._total + (self._now() - here.start if here.depth else 0.0)


@dataclass(frozen=True)
class Overhead:
    """What gradlens cost the training."""

    seconds: float  #: measured directly
    steps: int  #: since watch()
    observed: int  #: of these
    elapsed: float  #: seconds of step time
    look: float  #: seconds of ours for a typical observed step, measured directly
    compared: float | None = None  #: what observing a step costs by comparison, in seconds; None without quiet steps
    uncertainty: float | None = None  #: one standard error of that
    floor: float | None = None  #: seconds of ours in a quiet step, measured directly; None where none was quiet
    budget: float | None = None  #: the share that was asked for

    @property
    def share(self) -> float:
        """Of the step time: what was measured directly, corrected by the comparison. NaN before the first step ends."""
        if self.elapsed <= 0 or not self.steps:
            return math.nan
        hidden = 0.0 if self.compared is None else self.compared - self.look
        return max(self.seconds + hidden * self.observed, 0.0) / self.elapsed

    @property
    def share_uncertainty(self) -> float | None:
        """One standard error of the share; None where it was measured directly."""
        if self.uncertainty is None or self.elapsed <= 0:
            return None
        return self.uncertainty * self.observed / self.elapsed

    def __str__(self) -> str:
        if not self.steps:
            return "no step yet"
        error = self.share_uncertainty
        share = f"{self.share:.1%}" + ("" if error is None else f" +- {error:.1%}")
        text = f"{share} of the time of {self.steps:,} steps, {self.observed:,} of them observed"
        if self.observed:
            text += f"; {1e3 * self.look:.2f} ms each, measured directly"
        if self.compared is not None and self.uncertainty is not None:
            text += f", {1e3 * self.compared:.2f} +- {1e3 * self.uncertainty:.2f} ms against the steps around them"
        if self.floor is not None:
            text += f"; {1e3 * self.floor:.3f} ms a step that is not observed"
        return text + self._verdict()

    def _verdict(self) -> str:
        if self.budget is None:
            return ""
        if self.floor is not None and self.floor * self.steps > self.budget * self.elapsed:
            return f". The budget of {self.budget:.1%} cannot be kept: steps that are not observed cost more than that alone"
        if self.share - (self.share_uncertainty or 0.0) > self.budget * (1 + LEAST):
            return f". The budget is {self.budget:.1%}: what the first steps cost is still being made up for"
        return f". The budget is {self.budget:.1%}"


class Comparison:
    """Busy steps against the quiet ones around them: what observing one step costs, in seconds, and how sure that is."""

    def __init__(self) -> None:
        self.cost: float | None = None
        self.uncertainty: float | None = None
        self._costs: deque[float] = deque(maxlen=RECENT)
        self._before: deque[float] = deque(maxlen=NEAR)
        self._after: list[float] = []
        self._begin()

    def _begin(self) -> None:
        self._seconds, self._steps, self._observed, self._paused = 0.0, 0, 0, False

    def busy(self, duration: float, *, observed: bool, paused: bool) -> None:
        """A busy step. With a pause in it, nothing can be said of the run that it is part of."""
        if self._after:
            self._compare()
        self._seconds += duration
        self._steps += 1
        self._observed += observed
        self._paused |= paused

    def quiet(self, duration: float) -> None:
        """A quiet step."""
        (self._after if self._steps else self._before).append(duration)
        if len(self._after) == NEAR:
            self._compare()

    def _compare(self) -> None:
        if self._before and self._observed and not self._paused:
            typical = statistics.median([*self._before, *self._after])
            self._costs.append((self._seconds - self._steps * typical) / self._observed)
            if len(self._costs) >= ENOUGH:
                self.cost = statistics.median(self._costs)
                self.uncertainty = _error_of_median(self._costs, self.cost)
        self._before, self._after = deque(self._after, maxlen=NEAR), []
        self._begin()


def _error_of_median(values: deque[float], middle: float) -> float:
    """Its standard error, from the median absolute deviation: steps have outliers."""
    deviation = 1.4826 * statistics.median(abs(value - middle) for value in values)
    return 1.2533 * deviation / math.sqrt(len(values))


class Meter:
    """The steps of a lens: how many, how long, and how much of that is ours.

    `step_ended` is called as soon as a step is over, so what then tidies up is in the next one's time. `busy` says whether
    the background thread has something to do.
    """

    def __init__(self, stopwatch: Stopwatch, busy: Callable[[], bool] = lambda: False, now: Now = time.perf_counter) -> None:
        self._stopwatch, self._busy, self._now = stopwatch, busy, now
        self._last, self._spent = now(), stopwatch.seconds
        self._observed = self._wake = False  # of the step before: was observed, left work behind
        self._recent: deque[float] = deque(maxlen=4 * NEAR)
        self._looks: deque[float] = deque(maxlen=RECENT)  # seconds of ours for each observed step
        self._direct = 0.0  # for a typical one
        self._comparison = Comparison()
        self._quiet, self._quiet_ours, self._quiet_elapsed = 0, 0.0, 0.0
        self.steps = self.observed = 0
        self.elapsed = 0.0  #: step time
        self.since = 0.0  #: of that, after the last observed step
        self.typical = 0.0  #: seconds of a step

    def step_ended(self, observed: bool) -> None:
        """A step ended now."""
        now, spent = self._now(), self._stopwatch.seconds
        duration, ours = now - self._last, spent - self._spent
        self._last, self._spent = now, spent
        longest = PAUSE * self.typical + ours if self._recent else math.inf
        paused, counted = duration > longest, min(duration, longest)
        self._recent.append(counted)
        if self.steps % NEAR == 0 or self.steps < NEAR:
            self.typical = statistics.median(self._recent)
        self.steps += 1
        self.observed += observed
        self.elapsed += counted
        self.since = 0.0 if observed else self.since + counted
        self._account(duration, ours, counted, observed=observed, paused=paused)
        self._observed, self._wake = observed, observed or self._busy()

    def _account(self, duration: float, ours: float, counted: float, *, observed: bool, paused: bool) -> None:
        if observed or self._observed:
            self._look(ours, first=observed)
        if observed or self._wake:
            self._comparison.busy(duration, observed=observed, paused=paused)
            return
        self._quiet += 1
        self._quiet_ours += ours
        self._quiet_elapsed += counted
        if not paused:
            self._comparison.quiet(duration)

    def _look(self, ours: float, *, first: bool) -> None:
        """An observed step, or the one after it, which tidies up: what they cost beyond the floor."""
        if first:
            self._looks.append(0.0)
        self._looks[-1] += ours - self.floor
        self._direct = statistics.median(self._looks)

    @property
    def settled(self) -> bool:
        """Whether enough steps were quiet to believe the floor."""
        return self._quiet >= SETTLED

    @property
    def floor(self) -> float:
        """Seconds of ours in a quiet step; 0 where none was."""
        return self._quiet_ours / self._quiet if self._quiet else 0.0

    @property
    def floor_share(self) -> float:
        """Of a quiet step's time."""
        return self._quiet_ours / self._quiet_elapsed if self._quiet_elapsed else 0.0

    @property
    def _hidden(self) -> float:
        """What observing a step costs beyond what is measured directly, as far as the comparison is sure of it."""
        compared, direct = self._comparison.cost, self._direct
        return 0.0 if compared is None else max(compared - (self._comparison.uncertainty or 0.0) - direct, 0.0)

    @property
    def cost(self) -> float:
        """Seconds for a typical observed step."""
        return self._direct + self._hidden

    @property
    def spent(self) -> float:
        """Seconds for everything so far, the first steps and the floor included."""
        return self._spent + self._hidden * self.observed

    def overhead(self, budget: float | None = None) -> Overhead:
        """The cost so far."""
        return Overhead(
            seconds=self._spent,
            steps=self.steps,
            observed=self.observed,
            elapsed=self.elapsed,
            look=self._direct,
            compared=self._comparison.cost,
            uncertainty=self._comparison.uncertainty,
            floor=self.floor if self._quiet else None,
            budget=budget,
        )


class Pace:
    """A schedule, stretched so that the measured cost stays under a share of the time: `budget`.

    The first `START` due steps are observed in any case: there is no cost known before. After that, a due step is when all
    that was spent, this step's cost included, is within the budget; but never so soon after the last that the stretch
    between them cost more than `RUSH` times the budget: what a pause or a cheaper model leaves over is used up slowly. For a
    lens that cannot keep its budget, since the first steps were dear or the floor alone is above it, `LEAST` of the budget
    is there all the same, so that it is never blind for good. `tell` is called once, with the share, if the floor is above.
    """

    def __init__(
        self, schedule: Schedule, budget: float | None, meter: Meter, tell: Callable[[float], None] = lambda share: None
    ) -> None:
        self._schedule, self.budget, self._meter, self._tell = schedule, budget, meter, tell
        self._begun = self._told = False
        self._observed = True

    def __call__(self, step: int) -> bool:
        """Whether to observe this step; the one before has just ended."""
        if self._begun:
            self._meter.step_ended(self._observed)
        self._begun = self._observed = True  # should the schedule raise, the step is observed
        self._observed = bool(self._schedule(step)) and self._affordable()
        if self.budget is not None and not self._told and self._meter.settled and self._meter.floor_share > self.budget:
            self._told = True
            self._tell(self._meter.floor_share)
        return self._observed

    def _affordable(self) -> bool:
        budget, meter = self.budget, self._meter
        if budget is None or meter.observed < START:
            return True
        cost, since = meter.cost, meter.since + meter.typical
        if cost > RUSH * budget * since:
            return False
        return meter.spent + cost <= budget * (meter.elapsed + meter.typical) or cost <= LEAST * budget * since
