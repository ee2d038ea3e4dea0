"""What gradlens costs: what is felt, measured while it works, with how sure that is.

    felt  =  seconds on the training thread  +  hidden * observed steps  +  shares * seconds of our own threads

*Seconds* are those of a stopwatch around all that torch calls of ours. What it cannot see is estimated by comparison: a run
of steps that have something to them with the steps right before and after it that have not, so a machine that gets slower in
the meantime does not matter.

    hidden   an observed step (and the one after it, which tidies up) against steps that are not: torch's calls of the hooks
             on each parameter, which are too short to be timed, and gradients that it copies for them; caches
    shares   steps during which our own threads worked against steps during which they rested: what training waits for a
             second of theirs, since Python's lock is theirs meanwhile (`contention`)

`hidden` needs steps that are not observed, as a schedule or a budget makes them; where every step is observed it is taken
to be `HIDDEN` of the seconds that are seen. A step that is not observed costs a little too, the `floor`. Time is step time:
of a pause, such as an evaluation between two steps, only the length of some steps is counted.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from gradlens.watching.comparison import NEAR, Comparison
from gradlens.watching.contention import Contention
from gradlens.watching.stopwatch import Now, Stopwatch, Worked

RECENT = 200  #: comparisons and looks that the typical cost rests on
ENOUGH = 5  #: comparisons, before they are believed
PAUSE = 10  #: typical steps without a hook, from which it is a pause
SETTLED = 20  #: quiet steps, before the floor is believed

#: What looks take beside what the stopwatch says, as a share of that, before it was measured. By processor time of the
#: training thread against bare copies, models of 8, 42, 98, 202 and 1,000 parameters had 0.32, 0.32, 0.28, 0.22 and 0.50
#: with all features, and the first four 0.26, 0.22, 0.14 and 0.53 without; on another day 8, 42, 202 and 1,000 had 0.35,
#: 0.20, 0.31 and 0.37. It is a share of all looks, not of a typical one: where other programs take the core now and then,
#: they take it in what is hidden as often.
HIDDEN, HIDDEN_SPREAD = 0.3, 0.13
LEAST = 0.1  #: of the budget, beyond which it is said to be exceeded


@dataclass(frozen=True)
class Overhead:
    """What gradlens cost the training."""

    seconds: float  #: on threads that train, measured directly
    steps: int  #: since watch()
    observed: int  #: of these
    elapsed: float  #: seconds of step time
    look: float  #: seconds of ours for a typical observed step, measured directly
    compared: float | None = None  #: what observing a step costs by comparison, in seconds; None without quiet steps
    uncertainty: float | None = None  #: one standard error of that
    floor: float | None = None  #: seconds of ours in a quiet step, measured directly; None where none was quiet
    budget: float | None = None  #: the share that was asked for
    background: float = 0.0  #: processor seconds of our own threads
    native: float = 0.0  #: of these, of the thread that makes Parquet, which holds Python's lock a tenth of them
    contention: float = 0.0  #: seconds that training waited for each of the others
    contention_uncertainty: float = 0.0  #: one standard error of that
    native_contention: float = 0.0  #: the same for each of the native ones
    native_contention_uncertainty: float = 0.0
    hidden: float = 0.0  #: seconds that an observed step is expected to take beside `look`, where nothing is compared
    hidden_uncertainty: float = 0.0  #: one standard error of that

    @property
    def share(self) -> float:
        """Of the step time, what is felt. NaN before anything was seen."""
        if self.elapsed <= 0:
            return math.nan
        hidden = self.hidden if self.compared is None else self.compared - self.look
        felt = self.seconds + hidden * self.observed + self.waited
        return min(max(felt, 0.0) / self.elapsed, 1.0)

    @property
    def share_uncertainty(self) -> float:
        """One standard error of the share."""
        if self.elapsed <= 0:
            return math.nan
        look = (self.hidden_uncertainty if self.compared is None else self.uncertainty or 0.0) * self.observed
        return math.hypot(look, self.waited_uncertainty) / self.elapsed

    @property
    def waited(self) -> float:
        """Seconds that training waited for our own threads."""
        return self.contention * (self.background - self.native) + self.native_contention * self.native

    @property
    def waited_uncertainty(self) -> float:
        """One standard error of that."""
        python = self.contention_uncertainty * (self.background - self.native)
        return math.hypot(python, self.native_contention_uncertainty * self.native)

    def __str__(self) -> str:
        if self.elapsed <= 0:
            return "no step yet"
        of = f"{self.steps:,} steps, {self.observed:,} of them observed" if self.steps else "a step that is still open"
        text = f"{self.share:.1%} +- {self.share_uncertainty:.1%} of the time of {of}"
        if self.observed:
            text += f"; {1e3 * self.look:.2f} ms each on the training thread"
            if self.compared is None and self.hidden:
                text += f", and some {1e3 * self.hidden:.2f} ms that cannot be timed"
        if self.compared is not None and self.uncertainty is not None:
            text += f", {1e3 * self.compared:.2f} +- {1e3 * self.uncertainty:.2f} ms against the steps around them"
        if self.floor is not None:
            text += f"; {1e3 * self.floor:.3f} ms a step that is not observed"
        if self.background > 0:
            delay, sure = self.waited / self.background, self.waited_uncertainty / self.background
            text += f"; {self.background / self.elapsed:.1%} of a core on threads of its own, "
            text += f"and each second of their work delays training by {delay:.2f} +- {sure:.2f} s"
        return text + self._verdict()

    def _verdict(self) -> str:
        if self.budget is None:
            return ""
        if self.floor is not None and self.floor * self.steps > self.budget * self.elapsed:
            return f". The budget of {self.budget:.1%} cannot be kept: steps that are not observed cost more than that alone"
        if self.share - self.share_uncertainty > self.budget * (1 + LEAST):
            return f". The budget is {self.budget:.1%}: what the first steps cost is still being made up for"
        return f". The budget is {self.budget:.1%}"


class LookCost:
    """What observing one step costs by comparison, in seconds: the median over comparisons, as steps have outliers."""

    def __init__(self) -> None:
        self.cost: float | None = None
        self.uncertainty: float | None = None
        self._costs: deque[float] = deque(maxlen=RECENT)
        self.comparison = Comparison(self._take)

    def _take(self, extra: float, observed: float) -> None:
        self._costs.append(extra / observed)
        if len(self._costs) >= ENOUGH:
            self.cost = statistics.median(self._costs)
            deviation = 1.4826 * statistics.median(abs(value - self.cost) for value in self._costs)
            self.uncertainty = 1.2533 * deviation / math.sqrt(len(self._costs))


class Meter:
    """The steps of a lens: how many, how long, and how much of that is ours.

    `step_ended` is called as soon as a step is over, so what then tidies up is in the next one's time. `background` gives
    the processor seconds of our own threads so far, `processor` those of the thread that asks; `hidden` is what is expected
    beside a look's seconds, for each of them.
    """

    def __init__(
        self,
        stopwatch: Stopwatch,
        background: Callable[[], Worked] = lambda: Worked(0.0, 0.0),
        now: Now = time.perf_counter,
        hidden: float = HIDDEN,
        processor: Now = time.thread_time,
    ) -> None:
        self._stopwatch, self._now = stopwatch, now
        self._last = now()
        self._spent, self._paused = stopwatch.at(self._last)
        self._expected = hidden
        self._observed = False  # the step before
        self._recent: deque[float] = deque(maxlen=4 * NEAR)
        self._looks: deque[float] = deque(maxlen=RECENT)  # seconds of ours for each observed step
        self._looked = 0.0  # the sum over all of them
        self._look, self._contention = LookCost(), Contention(background, processor)
        self._quiet, self._quiet_ours, self._quiet_elapsed = 0, 0.0, 0.0
        self.steps = self.observed = 0
        self.elapsed = 0.0  #: step time
        self.since = 0.0  #: of step time, after the last observed step
        self.typical = 0.0  #: seconds of a step

    def step_ended(self, observed: bool) -> None:
        """A step ended now."""
        duration, ours, pause = self._open()
        self._last, self._spent, self._paused = self._last + duration + pause, self._spent + ours, self._paused + pause
        self._recent.append(duration)
        if self.steps % NEAR == 0 or self.steps < NEAR:
            self.typical = statistics.median(self._recent)
            self._stopwatch.longest = PAUSE * self.typical
        self.steps += 1
        self.observed += observed
        self.elapsed += duration
        self.since = 0.0 if observed else self.since + duration
        self._account(duration, ours, observed=observed, paused=pause > 0)
        self._observed = observed

    def _open(self) -> tuple[float, float, float]:
        """Of the open step so far: seconds without its pauses, ours, and the pauses."""
        now = self._now()
        spent, paused = self._stopwatch.at(now)
        pause = paused - self._paused
        return now - self._last - pause, spent - self._spent, pause

    def _account(self, duration: float, ours: float, *, observed: bool, paused: bool) -> None:
        contended = self._contention.step_ended(duration, ours, self.typical, paused=paused)
        looked = observed or self._observed
        if looked:
            self._add_look(ours - self.floor, first=observed)
            self._look.comparison.busy(duration, observed, paused=paused or contended)
            return
        self._quiet += 1
        self._quiet_ours += ours
        self._quiet_elapsed += duration
        if not (paused or contended):
            self._look.comparison.quiet(duration)

    @property
    def _direct(self) -> float:
        """Seconds of ours for a typical look, measured directly."""
        return statistics.median(self._looks) if self._looks else 0.0

    @property
    def _beside(self) -> float:
        """Seconds that an observed step is expected to take beside what is measured directly: a share of the mean look."""
        return self._expected * self._looked / self.observed if self.observed else 0.0

    def _add_look(self, cost: float, *, first: bool) -> None:
        """What an observed step, or the one after it, which tidies up, costs beyond the floor."""
        self._looked += cost
        if first:
            self._looks.append(cost)
        else:
            self._looks[-1] += cost

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
        """What observing a step costs beyond what is measured directly, as far as the comparison is sure of it, or as is
        expected before there is one."""
        compared, direct = self._look.cost, self._direct
        if compared is None:
            return self._beside
        return max(compared - (self._look.uncertainty or 0.0) - direct, 0.0)

    @property
    def _waited(self) -> float:
        """Seconds that training waited for our own threads."""
        return self._contention.felt(self._contention.within)

    @property
    def cost(self) -> float:
        """Seconds for a typical observed step."""
        return self._direct + self._hidden + self._waited / max(self.observed, 1)

    @property
    def spent(self) -> float:
        """Seconds for everything so far, the first steps and the floor included."""
        return self._spent + self._hidden * self.observed + self._waited

    def overhead(self, budget: float | None = None) -> Overhead:
        """The cost so far, with the step that is open."""
        duration, ours, _ = self._open()
        worked, shares = self._contention.within + self._contention.open(), self._contention.shares
        return Overhead(
            seconds=self._spent + ours,
            steps=self.steps,
            observed=self.observed,
            elapsed=self.elapsed + (duration if self.steps or ours else 0.0),
            look=self._direct,
            compared=self._look.cost,
            uncertainty=self._look.uncertainty,
            floor=self.floor if self._quiet else None,
            budget=budget,
            background=sum(worked),
            native=worked.native,
            contention=shares.lock,
            contention_uncertainty=shares.lock_uncertainty,
            native_contention=shares.native,
            native_contention_uncertainty=shares.native_uncertainty,
            hidden=self._beside,
            hidden_uncertainty=HIDDEN_SPREAD / HIDDEN * self._beside,
        )
