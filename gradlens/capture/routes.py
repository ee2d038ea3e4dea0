"""What does not change from one step by the book to the next: the parameters, their hooks, and who reaches or moves which.

    Layout    all parameters: where they are, our hooks on them, what they have in `.grad`
    Route     some of them, in model order: those that a backward reaches, or that an optimizer moves
    Share     an optimizer's route, and the facts that it rests on

Each question is asked of all parameters, or of all of a route, in one call. All of this refers to the parameters: it goes
with the first module that owns one, or optimizer that moves some. What is only taken out of a module that lives on, and of
its optimizer, lives until the next backward that is observed, or until the lens is closed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import chain, compress, repeat
from operator import attrgetter, call, getitem, is_, is_not
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from gradlens.capture.arrivals import HELD_BYTES
from gradlens.capture.attachment import FACTS, PLAIN, Attachment, Slot
from gradlens.records import Note

#: Routes that are known at once: where backwards reach other parameters each time, more would be of no use.
MOST = 16

_GRAD, _REQUIRES = attrgetter("grad"), attrgetter("requires_grad")
_OWN, _ACCUMULATED = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")
_HOOKED, _PARAMETERS = attrgetter("hooked"), attrgetter("_parameters")
_SHAPE, _TYPE, _DEVICE = FACTS
_NUMBERS = {float, int}
_POSITIVE = (0.0).__lt__


class Route:
    """Some parameters of a layout, in model order, and what the sink has prepared for them."""

    def __init__(self, layout: Layout, rows: list[int]) -> None:
        self.parameters, self.rows, self.whole = layout.parameters, rows, len(rows) == len(layout.slots)
        self.slots = layout.slots if self.whole else [layout.slots[row] for row in rows]
        self.weights = layout.weights if self.whole else [layout.weights[row] for row in rows]
        self.ids = list(map(id, self.weights))
        self.reached = frozenset(self.slots)
        self.order = list(self.slots)  #: in which their hooks were last called
        self.lr_positive = [True] * len(rows)
        self.calls: Any = None  #: the sink's own
        self._wanted: list[bool] = []
        self._notes: list[Note | None] = []

    def gradients(self) -> list[Tensor] | None:
        """Every gradient; None where one is missing, or of another type than torch's own."""
        found = list(map(_GRAD, self.weights))
        return found if set(map(type, found)) <= PLAIN else None

    def notes(self, wanted: list[bool]) -> list[Note | None]:
        """Why the other rows of a backward that reached these have no gradient; empty where there is no other."""
        if not self.whole and wanted != self._wanted:
            here, self._wanted = set(self.rows), wanted
            self._notes = [
                None if row in here else Note.ABSENT if wants else Note.FROZEN for row, wants in enumerate(wanted)
            ]
        return self._notes


class Layout:
    """All parameters, and the hooks on them: one that has none of ours wants no gradient."""

    def __init__(self, attachment: Attachment, weights: list[Tensor]) -> None:
        self.slots, self.parameters, self.weights = attachment.slots, attachment.parameters, weights
        self._attachment, self._columns = attachment, attachment.columns
        owners, self._names = attachment.owners or ([], [])
        self._owned: list[Any] = list(map(_PARAMETERS, map(call, owners)))  # by parameter, the dictionary that it is in
        by_module = dict(zip(owners, self._owned, strict=True))
        self._modules, self._dictionaries = list(by_module), list(by_module.values())
        self._ids = [id(w) if slot.hooked else 0 for slot, w in zip(self.slots, weights, strict=True)]
        self._bare = [not hooked for hooked in self._ids] if 0 in self._ids else []
        self._hooks = len(weights) - sum(self._bare)
        self._accumulated, self._own = list[int](), list[int]()
        self._sizes = [w.numel() * w.element_size() for w in weights]
        self._nbytes, self.rows = sum(self._sizes), list(range(len(weights)))
        self._routes: dict[frozenset[Slot], Route] = {}
        self._last: dict[int, Route] = {}  # what a step's backwards reached last, by their place in it
        self.shares: dict[Any, Share] = {}  #: by optimizer
        self._lives: list[weakref.ref[Any]] = []

    def watch_lives(self, optimizers: Sequence[Optimizer | None], drop: Callable[[], None]) -> None:
        """As soon as a module that owns a parameter has died, or one of these, the layout is to be dropped.

        Else what somebody deletes to have its memory back would stay, as long as nothing is trained.
        """
        alive = [each for each in (*map(call, self._modules), *optimizers) if each is not None]
        self._lives = [weakref.ref(each, lambda _: drop()) for each in alive]

    # --- facts ------------------------------------------------------------------------------------------------------

    def there(self) -> bool:
        """Whether the parameters are where they were: by module the dictionary, by parameter what is in that."""
        attachment = self._attachment
        if attachment.slots is not self.slots or attachment.parameters is not self.parameters or attachment.lost:
            return False
        try:
            if not (self._names and all(map(is_, map(_PARAMETERS, map(call, self._modules)), self._dictionaries))):
                return False
            return all(map(is_, map(getitem, self._owned, self._names), self.weights))
        except (AttributeError, KeyError):  # a module or a parameter is gone
            return False

    def same(self) -> bool:
        """Whether they are what they were: as `Attachment.refresh` would say."""
        weights: Any = self.weights
        if self._attachment.columns is not self._columns or not self._columns:
            return False
        shapes, types, devices = self._columns
        return (
            list(map(_SHAPE, weights)) == shapes
            and list(map(_TYPE, weights)) == types
            and list(map(_DEVICE, weights)) == devices
        )

    def hooked_again(self) -> bool:
        """Whether our hooks, and no others, are on the parameters that had them, now that they were put on."""
        weights = self.weights
        if not self.there() or list(map(_HOOKED, self.slots)) != self._ids:
            return False
        self._accumulated, self._own = list(map(id, map(_ACCUMULATED, weights))), list(map(id, map(_OWN, weights)))
        return self.hooked_alone()

    def hooked_alone(self) -> bool:
        """Whether our hooks, and no others, are where they were, and on all that want a gradient."""
        weights = self.weights
        own, accumulated = list(map(_OWN, weights)), list(map(_ACCUMULATED, weights))
        if list(map(id, own)) != self._own or list(map(id, accumulated)) != self._accumulated:
            return False
        if self._bare and any(compress(map(_REQUIRES, weights), self._bare)):
            return False
        return sum(map(len, filter(None, own))) == self._hooks == sum(map(len, filter(None, accumulated)))

    def hooked(self) -> bool:
        """Whether our hooks are where they were, and on all that want a gradient."""
        if list(map(id, map(_ACCUMULATED, self.weights))) != self._accumulated:
            return False
        return not (self._bare and any(compress(map(_REQUIRES, self.weights), self._bare)))

    def wanted(self) -> list[bool]:
        """Which parameters want a gradient."""
        return list(map(_REQUIRES, self.weights))

    # --- gradients --------------------------------------------------------------------------------------------------

    def filled(self) -> tuple[list[int], list[Slot], list[Tensor]]:
        """The rows and slots of the parameters that have a gradient, and these gradients."""
        found = list(map(_GRAD, self.weights))
        there = list(map(is_not, found, repeat(None)))
        if all(there):
            return self.rows, self.slots, found
        return list(compress(self.rows, there)), list(compress(self.slots, there)), list(compress(found, there))

    def may_hold(self, rows: list[int], place: int) -> bool:
        """Whether hooks may hold what comes for these until the backward ends: of those that one in this place reaches."""
        if self._nbytes <= HELD_BYTES:
            return True
        last = self._last.get(place)
        held = rows if last is None else set(rows).intersection(last.rows)
        return sum(map(self._sizes.__getitem__, held)) <= HELD_BYTES

    # --- routes -----------------------------------------------------------------------------------------------------

    def reached_by(self, noted: list[Slot], place: int) -> Route | None:
        """The route of the slots whose hooks have noted, each once, in the backward in this place; else None."""
        for route in self._routes.values():
            if route.order == noted:
                break
        else:
            here = frozenset(noted)
            if not here or len(here) != len(noted) or not here <= self._attachment.rows.keys():
                return None
            route = self.of(here)
            route.order = list(noted)
        self._last[place] = route
        return route

    def of(self, slots: frozenset[Slot]) -> Route:
        """The route of these slots."""
        route = self._routes.get(slots)
        if route is None:
            if len(self._routes) == MOST:
                self._routes, self._last, self.shares = {}, {}, {}
            route = self._routes[slots] = Route(self, sorted(map(self._attachment.rows.__getitem__, slots)))
        return route


class Share(NamedTuple):
    """What one optimizer moves, as far as it is watched."""

    route: Route | None  #: None where its steps have no part by the book
    moved: list[Any]  #: all that it moves, in its own order
    others: list[list[Any]] | None  #: what each of the others moves, if it answers for what none of them does
    wanted: list[bool]  #: which parameters of the model want a gradient
    held: list[Slot]  #: what it answers for
    frozen: list[Slot]  #: of these, those that want no gradient
    notes: list[Note | None]  #: of rows that are not on its route

    def holds(self, optimizer: Optimizer, others: Sequence[Optimizer | None] | None, wanted: list[bool]) -> bool:
        """Whether these facts are what they were."""
        groups, moved = optimizer.param_groups, self.moved
        given = groups[0]["params"] if len(groups) == 1 else moved_by(optimizer)
        if wanted != self.wanted or len(given) != len(moved) or not all(map(is_, given, moved)):
            return False
        if others is None or self.others is None:
            return others is None and self.others is None
        now = list(map(moved_by, others))
        return list(map(len, now)) == list(map(len, self.others)) and all(map(is_, chain(*now), chain(*self.others)))

    def moved_on(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has moved what it did, all of it at a rate above 0."""
        groups, moved = optimizer.param_groups, self.moved
        if len(groups) == 1:
            given, rates = groups[0]["params"], [groups[0].get("lr", 1.0)]
        else:
            given, rates = moved_by(optimizer), [group.get("lr", 1.0) for group in groups]
        if len(given) != len(moved) or not all(map(is_, given, moved)):
            return False
        return set(map(type, rates)) <= _NUMBERS and all(map(_POSITIVE, rates))


def moved_by(optimizer: Optimizer | None) -> list[Any]:
    """All that an optimizer moves, in its own order."""
    return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]


def share_of(
    layout: Layout,
    held: Sequence[Slot],
    optimizer: Optimizer,
    others: Sequence[Optimizer | None] | None,
) -> Share:
    """The share of an optimizer that answers for these slots.

    It has a route if it moves just those of them that want a gradient.
    """
    wanted, moved = layout.wanted(), moved_by(optimizer)
    wants, ids = dict(zip(layout.slots, wanted, strict=True)), set(map(id, moved))
    weights = dict(zip(layout.slots, layout.weights, strict=True))
    here = frozenset(slot for slot in held if wants[slot])
    route = layout.of(here) if here and here == {slot for slot in held if id(weights[slot]) in ids} else None
    notes: list[Note | None] = []
    if len(here) < len(layout.slots):
        answered = set(held)
        notes = [None if slot in here else Note.FROZEN if slot in answered else Note.ELSEWHERE for slot in layout.slots]
    frozen = [slot for slot in held if not wants[slot]]
    seen = None if others is None else list(map(moved_by, others))
    return Share(route, moved, seen, wanted, list(held), frozen, notes)
