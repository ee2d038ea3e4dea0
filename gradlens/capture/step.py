"""One step: what is known of it while it lasts, dropped when it is over.

A step is one call of the optimizer. It opens at its first backward and closes after the optimizer that ends it:

    IDLE  --backward-->  OPEN  --an optimizer moved some weights-->  MOVING
                          |  an optimizer that ends the step stepped inside a backward
                          +-->  DUE: closes when that backward has ended

The step that was closed last lingers until the next backward begins: an optimizer that steps without a backward of its own
belongs to it, in whatever order optimizers are listed or called. One that steps a second time on the same gradients opens a
step without a backward, which closes before the next backward or call; one with a closure brings a backward of its own.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable
from typing import Any

from torch import Tensor

from gradlens.capture.attachment import Slot
from gradlens.capture.callers import Key
from gradlens.capture.marks import Marks
from gradlens.records import Stage, TableKey

#: Backward passes of one step that are read. Accumulation has fewer; a thousand without a step, as when the Fisher
#: information of single examples is summed, would cost each of them what a step costs, and push all else out of memory.
READ_PASSES = 256


class Phase(enum.Enum):
    """How far a step is."""

    IDLE = enum.auto()
    OPEN = enum.auto()
    MOVING = enum.auto()
    DUE = enum.auto()


class Step:
    """What happened since the last step closed."""

    def __init__(self, number: int, *, observed: bool) -> None:
        self.number = number
        self.observed = observed  #: the schedule wants it
        self.phase = Phase.IDLE
        self.passes = 0  #: backward passes that ended
        self.scalars: dict[str, Any] = {}  #: what `observe()` attached
        self.reached: set[Slot] = set()  #: by a backward pass
        self.undefined: set[Slot] = set()  #: their backward returned None
        self.excluded: set[Slot] = set()  #: `backward(inputs=...)` left them out
        self.filled_by_peers: set[Slot] = set()  #: over ranks: this one gave nothing to their `.grad`
        self.fresh = True  #: every pass so far wrote fresh gradients
        self.own = True  #: nobody else hooked what was reached: what was read is what `.grad` got
        self.averaged = False  #: over ranks: `.grad` is of all of them, as far as is known
        self.reduced: int | None = None  #: the backward of the last `reduced` table
        self.scale: float | Tensor = 1.0  #: at the last backward
        self.opening = Marks()  #: `.grad` when the step opened
        self.ending = Marks()  #: `.grad` when its last pass ended
        self.stepped: dict[Hashable, int] = {}  #: optimizers that stepped, and after how many passes they did last
        self.kept: dict[Slot, TableKey] = {}  #: the table whose move began with the weights that are kept
        self.weights: Any = None  #: those that were copied as its first backward was read by the book, and their versions
        self.given: Any = None  #: what its only optimizer was given and left in `.grad`, if that went so too
        self.loops: frozenset[Key] | None = None  #: methods named `step` that ran every backward of it themselves
        self._taken, self._free = 0, list[int]()

    @property
    def open(self) -> bool:
        """Whether it has begun."""
        return self.phase is not Phase.IDLE

    @property
    def moving(self) -> bool:
        """Whether the weights may have moved since its first backward."""
        return self.phase in (Phase.MOVING, Phase.DUE)

    def begin(self) -> None:
        """A backward pass starts."""
        if self.phase is Phase.IDLE:
            self.phase = Phase.OPEN

    def moves(self) -> None:
        """Weights move, or may move between this step's backwards, as in a closure."""
        if self.phase is not Phase.DUE:
            self.phase = Phase.MOVING

    @property
    def next_number(self) -> int:
        """What `take_number` gives next."""
        return min(self._free) if self._free else self._taken

    def take_number(self) -> int:
        """The next backward pass's number: the lowest that none has."""
        if self._free:
            number = min(self._free)
            self._free.remove(number)
            return number
        self._taken += 1
        return self._taken - 1

    def give_back(self, number: int) -> None:
        """The pass with this number failed: the next one has it."""
        self._free.append(number)

    @property
    def full(self) -> bool:
        """Whether so many passes were read that the next ones are only counted."""
        return self.passes >= READ_PASSES

    @property
    def used_key(self) -> TableKey:
        """Of the `used` table: its backward is the step's last."""
        return TableKey(self.number, max(self.passes - 1, 0), Stage.USED)
