"""A schedule that is stretched so that what is felt of gradlens stays within a budget."""

from __future__ import annotations

from collections.abc import Callable

from gradlens.schedules import Schedule
from gradlens.watching.overhead import Meter

START = 3  #: first due steps, observed in any case: the very first allocates, and its cost is not typical
RUSH = 2  #: times the budget, that no stretch between two observed steps exceeds
LEAST = 0.1  #: of the budget, that is there for looking even where more than the budget was spent


class BudgetedSchedule:
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
        self._observed = bool(self._schedule(step))
        if self.budget is not None:
            self._observed = self._observed and self._affordable(self.budget)
            if not self._told and self._meter.settled and self._meter.floor_share > self.budget:
                self._told = True
                self._tell(self._meter.floor_share)
        return self._observed

    def _affordable(self, budget: float) -> bool:
        meter = self._meter
        if meter.observed < START:
            return True
        cost, since = meter.cost, meter.since + meter.typical
        if cost > RUSH * budget * since:
            return False
        return meter.spent + cost <= budget * (meter.elapsed + meter.typical) or cost <= LEAST * budget * since
