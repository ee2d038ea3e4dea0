"""What the loss did over the run: it falls, it does not, or that cannot be said.

    begin   the first point
    start   the median of the first twentieth of the points
    now     the mean of the last fifth
    fell    (start - now) / |start|

A loss is flat that has fallen by less than a tenth, and has risen by less than a tenth and four times its own noise. Losses
of several optimizers (a GAN's) and losses that change their sign (a critic's, a policy's) are no measure of progress: of
those nothing is said. Few points say nothing either.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import numpy as np

from gradlens.analysis.course import Course
from gradlens.facts import Fact, Settings

YOUNG = 20  #: points below which nothing is said
LEAST = 0.1  #: a fall or a rise that counts
LEAP = 2.0  #: times the first point
POINTS = 2000  #: of a loss that is smoothed; of a longer one neighbours are averaged first


class State(enum.StrEnum):
    """What can be said of a loss."""

    UNKNOWN = "unknown"  #: no loss was seen
    YOUNG = "young"
    SEVERAL = "several"  #: several optimizers, with a loss each
    SIGNED = "signed"  #: above and below 0
    NONFINITE = "nonfinite"
    FALLS = "falls"
    FLAT = "flat"
    RISES = "rises"


@dataclass(frozen=True)
class Trend:
    """The loss of a run in five numbers."""

    state: State
    points: int = 0
    first: int = 0  #: the step of the first point
    last: int = 0
    start: float = float("nan")
    now: float = float("nan")
    lowest: float = float("nan")
    noise: float = float("nan")  #: standard deviation of the last fifth
    flat_since: float = 0.0  #: of the points, the share since which it has not fallen by a fiftieth of what it fell
    begin: float = float("nan")

    @property
    def fell(self) -> float:
        """By how much of itself it fell."""
        return (self.start - self.now) / abs(self.start) if self.start else float("nan")

    @property
    def leapt(self) -> bool:
        """Whether what it fell since is what it had risen at first."""
        return self.start > LEAP * self.begin > 0 and self.now > (1 - LEAST) * self.begin

    @property
    def ill(self) -> bool:
        """Whether it is known not to fall."""
        return self.state in (State.FLAT, State.RISES, State.NONFINITE)


def trend(course: Course, facts: list[Fact] | None = None) -> Trend:
    """What the loss did."""
    steps, values = course.series("loss")
    if not len(values):
        return Trend(State.UNKNOWN)
    several = len({fact.index for fact in facts or () if isinstance(fact, Settings)}) > 1
    return judged(steps, values, several=several)


def judged(steps: np.ndarray, values: np.ndarray, *, several: bool = False) -> Trend:
    """The same of points."""
    n, finite = len(values), np.isfinite(values)
    first, last = int(steps[0]), int(steps[-1])
    if not finite.all() and not finite[-max(1, min(3, n)) :].any():
        return Trend(State.NONFINITE, n, first, last, start=float(values[finite][0]) if finite.any() else float("nan"))
    values = values[finite]
    early, late = max(3, n // 20), max(5, n // 5)
    start, tail = float(np.median(values[:early])), values[-late:]
    now, noise = float(tail.mean()), float(tail.std())
    found = Trend(State.FLAT, n, first, last, start, now, float(values.min()), noise, _flat_since(values), float(values[0]))
    if several:
        return _as(found, State.SEVERAL)
    if n < YOUNG:
        return _as(found, State.YOUNG)
    if (values > 0).any() and (values < 0).any():
        return _as(found, State.SIGNED)
    error = noise / np.sqrt(len(tail)) + float(values[:early].std()) / np.sqrt(early)
    fell = start - now > LEAST * abs(start)
    if fell and (start - now > 2 * error or now < abs(start) / 2):
        return _as(found, State.FALLS)
    if now - start > LEAST * abs(start) and now - start > 4 * error:
        return _as(found, State.RISES)
    return found


def _as(found: Trend, state: State) -> Trend:
    return replace(found, state=state)


def _flat_since(values: np.ndarray) -> float:
    """The share of the points after which a smoothed loss stays within a fiftieth of its whole fall of where it ends."""
    together = max(len(values) // POINTS, 1)
    values = values[len(values) % together :].reshape(-1, together).mean(axis=1)  # smoothing takes points times width
    n = len(values)
    width = max(3, n // 20)
    if n < 2 * width:
        return 1.0
    smooth = np.convolve(values, np.full(width, 1 / width), "valid")
    fall = float(smooth[0] - smooth[-1])
    above = np.flatnonzero(smooth - smooth[-1] > 0.05 * abs(fall))
    return 1.0 if not len(above) else float(above[-1] + 1) / len(smooth)
