"""How each parameter's gradient arrives in one backward pass: one explicit state a slot, and a table of transitions.

Two hooks are on a parameter. The *tensor hook* gets this pass's own gradient g before it is accumulated, and is the only one
that says whether g is undefined. The *post hook* says that `.grad` was written. What they see is an `Arrival`, and

    state      NONE        FRESH      ONTO           NOW     NOW_NESTED  ACCUMULATED  TAKEN
    WAITING    UNDEFINED   WAITING    HELD (hold)    READ!   SUMMED (+)  FRESH        WAITING
    HELD       UNDEFINED   HELD       HELD (hold)    READ!   SUMMED (+)  PENDING      HELD
    FRESH      FRESH       FRESH      FRESH          FRESH   FRESH       FRESH        READ!
    PENDING    PENDING     PENDING    PENDING (+)    READ!   SUMMED (+)  PENDING      PENDING
    SUMMED     SUMMED      SUMMED     SUMMED (+)     SUMMED  SUMMED (+)  SUMMED       SUMMED
    READ       READ        READ       READ           READ    READ        READ         READ
    UNDEFINED  UNDEFINED   WAITING    HELD (hold)    READ!   SUMMED (+)  UNDEFINED    UNDEFINED

where `(hold)` keeps g, `(+)` adds a copy of g to what was kept, and `READ!` says that the gradient has to be read at once.

- `WAITING`: nothing came yet.
- `HELD`: `.grad` had something before, so the sum will hide g: it is held until it is read.
- `FRESH`: `.grad` was None before, so at the end of the pass it *is* this pass's gradient.
- `PENDING`: held and accumulated: to be read, in batches of bounded size.
- `SUMMED`: a parameter in two nested passes: only the sum of both is its gradient.
- `READ`: it has been read inside a hook.
- `UNDEFINED`: its backward returned None.

A pass in which every slot is waiting with an empty `.grad`, and nobody else listens, is *plain*: its hooks note that the
gradient came and nothing else, in a list. In one that goes by the book onto the gradients of those before it they also hold
g; and over ranks, where it will be averaged, what is in `.grad` by then. `settle` turns that into states.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

from torch import Tensor

from gradlens.capture.attachment import Slot

#: Gradients held for reading at once: enough to hide the cost of a call, and little beside a model's gradients.
HELD_BYTES = 32 << 20


class State(enum.Enum):
    """Where a slot's gradient stands in a pass."""

    WAITING = enum.auto()
    HELD = enum.auto()
    FRESH = enum.auto()
    PENDING = enum.auto()
    SUMMED = enum.auto()
    READ = enum.auto()
    UNDEFINED = enum.auto()


class Arrival(enum.Enum):
    """What a hook saw."""

    NONE = enum.auto()  #: g is undefined
    FRESH = enum.auto()  #: g, and `.grad` is None
    ONTO = enum.auto()  #: g, and `.grad` is there: g will be added to it
    NOW = enum.auto()  #: g, which must be read now: it will not be there at the end of the pass
    NOW_NESTED = enum.auto()  #: the same in a pass with others nested in it, which may bring more
    ACCUMULATED = enum.auto()  #: `.grad` was written
    TAKEN = enum.auto()  #: an optimizer inside the pass is about to use, and may free, what is in `.grad`


class Act(enum.Enum):
    """What is to be done with g."""

    NOTHING = enum.auto()
    HOLD = enum.auto()
    ADD = enum.auto()
    READ = enum.auto()


def _table() -> dict[tuple[State, Arrival], tuple[State, Act]]:
    s, a = State, Arrival
    table = {(state, arrival): (state, Act.NOTHING) for state in s for arrival in a}
    for state in (s.WAITING, s.HELD, s.UNDEFINED):
        table[state, a.NONE] = s.UNDEFINED, Act.NOTHING
        table[state, a.ONTO] = s.HELD, Act.HOLD
    for state in (s.WAITING, s.HELD, s.UNDEFINED, s.PENDING):
        table[state, a.NOW] = s.READ, Act.READ
        table[state, a.NOW_NESTED] = s.SUMMED, Act.ADD
    table[s.WAITING, a.ACCUMULATED] = s.FRESH, Act.NOTHING
    table[s.HELD, a.ACCUMULATED] = s.PENDING, Act.NOTHING
    table[s.FRESH, a.TAKEN] = s.READ, Act.READ
    table[s.PENDING, a.ONTO] = s.PENDING, Act.ADD
    table[s.SUMMED, a.ONTO] = table[s.SUMMED, a.NOW_NESTED] = s.SUMMED, Act.ADD
    table[s.UNDEFINED, a.FRESH] = s.WAITING, Act.NOTHING
    return table


TRANSITIONS = _table()

#: The gradient came.
ARRIVED = frozenset({State.FRESH, State.PENDING, State.SUMMED, State.READ})


class Arrivals:
    """What one backward pass brought."""

    def __init__(self) -> None:
        self.noted: list[Slot] = []  #: while the pass is plain: whose gradient came
        self.onto: dict[Slot, Tensor] = {}  #: and what will be, or was, added to what was there
        self.left: list[
            tuple[Tensor, int]
        ] = []  #: over ranks: `.grad` of those noted, before it is averaged, and its version
        self.states: dict[Slot, State] = {}
        self.tensors: dict[Slot, Tensor] = {}  #: of slots that are held, pending or summed
        self.bytes = 0  #: that are pending

    def settle(self) -> None:
        """Turn what a plain pass noted into states."""
        for slot, g in self.onto.items():
            self.arrive(slot, Arrival.ONTO, g)
        self.onto.clear()
        if self.noted:
            for slot in self.noted:
                self.arrive(slot, Arrival.ACCUMULATED)
            del self.noted[:]
        self.left.clear()

    def all_read(self) -> None:
        """Whatever came has been read."""
        self.settle()
        self.states.update(dict.fromkeys(self.of(State.FRESH, State.PENDING), State.READ))
        self.tensors.clear()
        self.bytes = 0

    def state(self, slot: Slot) -> State:
        """Where the slot stands."""
        return self.states.get(slot, State.WAITING)

    def arrive(self, slot: Slot, arrival: Arrival, g: Tensor | None = None) -> bool:
        """Enter what a hook saw; True when the gradient has to be read now."""
        before = self.states.get(slot, State.WAITING)
        after, act = TRANSITIONS[before, arrival]
        self.states[slot] = after
        if act is Act.HOLD and g is not None:
            self.tensors[slot] = g
        elif act is Act.ADD and g is not None:
            kept = self.tensors.get(slot)
            self.tensors[slot] = g.detach().clone() if kept is None else kept + g.detach()
        elif after in (State.UNDEFINED, State.READ):
            self.tensors.pop(slot, None)
        if after is State.PENDING and before is State.HELD:
            held = self.tensors[slot]
            self.bytes += held.numel() * held.element_size()
        return act is Act.READ

    def take_pending(self) -> dict[Slot, Tensor]:
        """What is pending, to be read now."""
        pending = {slot: self.tensors.pop(slot) for slot in self.of(State.PENDING)}
        self.states.update(dict.fromkeys(pending, State.READ))
        self.bytes = 0
        return pending

    def of(self, *states: State) -> list[Slot]:
        """The slots in one of these states."""
        return [slot for slot, state in self.states.items() if state in states]

    def arrived(self) -> Iterator[Slot]:
        """The slots whose gradient came."""
        yield from self.noted
        for slot, state in self.states.items():
            if state in ARRIVED:
                yield slot

    def has(self, slot: Slot) -> bool:
        """Whether the slot's gradient came."""
        return self.states.get(slot) in ARRIVED or slot in self.noted

    @property
    def any(self) -> bool:
        """Whether any hook said that `.grad` was written, or will be without a gradient."""
        return bool(self.noted) or any(s in ARRIVED or s is State.UNDEFINED for s in self.states.values())


class PlainPass:
    """The engine run whose hooks only note: hooks hold this one object, so that they need not look anything up."""

    __slots__ = ("added", "last", "left", "noted", "onto", "special", "task")

    def __init__(self) -> None:
        self.task: int | None = None
        self.noted: list[Slot] = []
        self.added: dict[Slot, Tensor] = {}
        self.last: tuple[Tensor, int] | None = (
            None  # over ranks: what was in `.grad` when a hook noted last, and its version
        )
        self.left: list[tuple[Tensor, int]] | None = None
        self.onto: frozenset[Slot] = frozenset()
        self.special: set[Slot] = set()

    def start(
        self,
        task: int,
        arrivals: Arrivals,
        special: set[Slot],
        onto: frozenset[Slot] = frozenset(),
        *,
        left: bool = False,
    ) -> None:
        """From here on the hooks of this run note, but for those of `special` slots; those of `onto` also hold g.

        left: Over ranks they hold what is in `.grad` then, too.
        """
        self.noted, self.added, self.special, self.onto, self.task = arrivals.noted, arrivals.onto, special, onto, task
        self.last, self.left = None, arrivals.left if left else None

    def stop(self) -> None:
        """No run is plain."""
        self.noted, self.added, self.special, self.onto, self.task = [], {}, set(), frozenset(), None
        self.last = self.left = None
