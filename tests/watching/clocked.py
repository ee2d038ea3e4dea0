"""A training on a fake clock: the arithmetic is tested, not the machine."""

from gradlens.schedules import every
from gradlens.watching.budget import BudgetedSchedule
from gradlens.watching.overhead import Meter
from gradlens.watching.stopwatch import Stopwatch, Worked

always = every(1)


class Training:
    """A training whose time passes as it is told: what a step takes, and what looking at it costs."""

    def __init__(self, schedule=always, budget=None, hidden=0.0):
        self.clock, self.idle = 100.0, 0.0
        self.worked = Worked(0.0, 0.0)
        self.told, self.seen, self.costs, self.starts = [], [], [], []
        self.stopwatch = Stopwatch(lambda: self.clock)
        self.meter = Meter(
            self.stopwatch,
            lambda: self.worked,
            now=lambda: self.clock,
            hidden=hidden,
            processor=lambda: self.clock - self.idle,
        )
        self.pace = BudgetedSchedule(schedule, budget, self.meter, tell=self.told.append)
        self.observed = self.pace(0)

    def ours(self, seconds):
        self.stopwatch(self.passes, seconds)

    def passes(self, seconds):
        self.clock += seconds

    @property
    def background(self):
        return sum(self.worked)

    def wait(self, seconds):
        self.clock += seconds
        self.idle += seconds

    def step(self, base=1.0, cost=0.1, hidden=0.0, floor=0.0, background=0.0, felt=0.0, native=0.0, slowed=0.0, idle=0.0):
        """`cost` is measured directly, `hidden` is not; `floor` is what a step costs that is not observed.

        `background` and `native`: seconds that our own threads worked meanwhile, for which training waited `felt`, and by
        which its own work took `slowed` longer. `idle`: what it waits for otherwise.
        """
        if background or native:
            self.worked += Worked(background, native)
        self.wait(felt + idle)
        self.clock += slowed
        self.seen.append(self.observed)
        self.costs.append(cost + hidden if self.observed else 0.0)
        self.starts.append(self.clock)
        self.clock += base
        if self.observed:
            self.clock += hidden
            self.ours(cost)
        self.ours(floor)
        self.observed = self.pace(len(self.seen))

    def run(self, n, **costs):
        for _ in range(n):
            self.step(**costs)
        return self

    @property
    def overhead(self):
        return self.meter.overhead(self.pace.budget)
