"""When to look: a schedule is a callable `step -> bool`, asked once for each step, before it opens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from gradlens.errors import ArgumentError, ArgumentTypeError

Schedule = Callable[[int], bool]


@dataclass(frozen=True)
class every:  # noqa: N801 - reads as the word it is: `every(10)`
    """Each n-th step, step 0 first."""

    n: int

    def __post_init__(self) -> None:
        if isinstance(self.n, bool) or not isinstance(self.n, int):
            raise ArgumentTypeError(f"a schedule's n is a whole number of steps, not {self.n!r}")
        if self.n < 1:
            raise ArgumentError(f"a schedule's n must be at least 1, not {self.n}; to watch nothing, do not call watch()")

    def __call__(self, step: int) -> bool:
        return step % self.n == 0


@dataclass(frozen=True)
class log_spaced:  # noqa: N801
    """`per_decade` steps a factor of ten, every step before the tenth or so: 0, 1, 2, 3, 4, 6, 8, 10, 13, 16, 20, ..."""

    per_decade: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.per_decade, int) or self.per_decade < 1:
            raise ArgumentError(f"per_decade must be a whole number of at least 1, not {self.per_decade!r}")

    def __call__(self, step: int) -> bool:
        if step < 2:
            return True
        # A step is due when a grid point 10**(k / per_decade) rounds to it.
        k = round(self.per_decade * math.log10(step))
        return any(round(10 ** (j / self.per_decade)) == step for j in (k - 1, k, k + 1))


def next_grown(count: int, growth: float, least: int = 1) -> int:
    """The count at which something is due again that was due at this one: when it has grown so much, and by `least`."""
    return max(count + least, math.ceil(count * growth))


class Growing:
    """What is due each time at first, then whenever its count has grown by a share of itself."""

    def __init__(self, growth: float = 1.1) -> None:
        self.growth = growth
        self.count = 0  #: how often it was asked
        self.next = 1  #: the count at which it is due again

    @property
    def next_is_due(self) -> bool:
        """Whether `due` will say yes when it is asked the next time."""
        return self.count + 1 >= self.next

    def due(self, always: bool = False) -> bool:
        """Count one more: is it due? `always`: this one is, whatever the count."""
        self.count += 1
        if not always and self.count < self.next:
            return False
        self.next = next_grown(self.count, self.growth)
        return True


def as_schedule(given: int | Schedule) -> Schedule:
    """An int n means `every(n)`; a callable is itself."""
    if isinstance(given, int) and not isinstance(given, bool):
        return every(given)
    if callable(given):
        return given
    raise ArgumentTypeError(f"schedule is an int n (each n-th step) or a callable step -> bool, not {given!r}")
