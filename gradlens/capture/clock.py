"""Where a step opens and closes, and whether it is looked at.

A step is one call of the optimizer. It opens at its first backward and closes at the post hook of the clock, the optimizer
that was listed last. Without an optimizer each backward is a step, until `lens.step()` is called for the first time: from
then on that is the boundary. The schedule is asked once for each step, before its first backward, since hooks must be on the
parameters by then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gradlens.schedules import Schedule


class Clock:
    """The number of the step and of the backward within it; both start at 0."""

    def __init__(self, schedule: Schedule, first_step: int = 0, *, fault: Callable[[str, Exception], None]) -> None:
        self._schedule = schedule
        self._fault = fault
        self.step = first_step
        self.backward = 0  #: backward passes of this step that ended
        self._taken, self._free = 0, list[int]()  # numbers of backward passes, and those of passes that failed
        self.open = False
        self.moving = False  #: the weights may move between this step's backwards: a closure, or another optimizer's step
        self.explicit = False  #: `lens.step()` says where a step ends
        self.scalars: dict[str, Any] = {}  #: what `observe()` attached to this step, or to the next where none is open
        self.observed = self._ask()

    def _ask(self) -> bool:
        try:
            return bool(self._schedule(self.step))
        except Exception as error:  # noqa: BLE001 - a user's schedule must not break a training step
            self._fault("schedule", error)
            return True

    def begin(self) -> None:
        """A backward pass starts."""
        self.open = True

    def take(self) -> int:
        """The next backward pass's number: the lowest that none has."""
        if self._free:
            number = min(self._free)
            self._free.remove(number)
            return number
        self._taken += 1
        return self._taken - 1

    def give_back(self, step: int, number: int) -> None:
        """The pass with this number failed: the next one has it."""
        if step == self.step:
            self._free.append(number)

    def end(self) -> None:
        """A backward pass ended."""
        self.backward += 1

    @property
    def last(self) -> int:
        """The number of the step's last backward, 0 when there was none."""
        return max(self.backward - 1, 0)

    def observe(self, scalars: Mapping[str, Any]) -> None:
        """Attach values to this step, or the next where none is open."""
        self.scalars.update(scalars)

    def close(self) -> None:
        """The step ended; the next one is asked for."""
        self.step += 1
        self.backward = 0
        self._taken, self._free = 0, []
        self.open = self.moving = False
        self.scalars = {}
        self.observed = self._ask()
