"""Busy steps against the quiet ones right before and after them, so that a machine that gets slower does not matter.

run     =  neighbouring busy steps between quiet ones, NEAR of these on either side at most
extra   =  what the run took  -  its number of steps * what is typical of the quiet ones
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable

NEAR = 8  #: quiet steps on either side that busy ones are compared with


class Comparison:
    """The extra seconds of each run of busy steps, a unit of what made them so."""

    def __init__(self, keep: Callable[[float, float], None]) -> None:
        self._keep = keep  # extra seconds, and how much they are for
        self._before: deque[float] = deque(maxlen=NEAR)
        self._after: list[float] = []
        self._begin()

    def _begin(self) -> None:
        self._seconds, self._steps, self._amount, self._paused = 0.0, 0, 0.0, False

    def busy(self, duration: float, amount: float, *, paused: bool = False) -> None:
        """A busy step. With a pause in it, nothing can be said of the run that it is part of."""
        if self._after:
            self._compare()
        self._seconds += duration
        self._steps += 1
        self._amount += amount
        self._paused |= paused

    def quiet(self, duration: float) -> None:
        """A quiet step."""
        (self._after if self._steps else self._before).append(duration)
        if len(self._after) == NEAR:
            self._compare()

    def _compare(self) -> None:
        if self._before and self._amount and not self._paused:
            typical = statistics.median([*self._before, *self._after])
            self._keep(self._seconds - self._steps * typical, self._amount)
        self._before, self._after = deque(self._after, maxlen=NEAR), []
        self._begin()
