"""The steady route: what is asked of a step that goes by the book, in place of looking at each parameter.

Nearly every step is like the one before: one process and thread, a backward onto empty `.grad`s that reaches every
parameter, nobody else's hooks, no closure. After a step like that a `Route` is compiled: the parameters, their
hooks, what the optimizer moves. The next step is held against it, part by part, by questions that are asked of all
parameters in one call: identities, versions, `.grad`. A part for which all facts hold is one `Steady...` event; one for
which any differs goes the general way, whose state the steady one leaves behind just as well: each is judged alone.

    part                        facts
    a backward begins           parameters, shapes, hooks as compiled; every `.grad` empty, or none in a later one
    it has ended                each hook has noted, once; every parameter is there, and has a gradient
    the only optimizer begins   every parameter has a gradient, as that backward left it or not: clipped, unscaled, added to
    it has ended                the gradients are those, by identity and version; it moves all parameters, at rates above 0

What lies in memory (addresses, types, fixed samples) is asked by whoever takes the events: see `watching.prepared`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, call, getitem, is_
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from gradlens.capture.arrivals import HELD_BYTES, State
from gradlens.capture.attachment import FACTS, PLAIN, Attachment, Slot
from gradlens.capture.engine import Engine, Pass, Run, running
from gradlens.capture.events import GradientFacts, Sink, SteadyReading, SteadyStart, SteadyUpdate, SteadyUsed
from gradlens.capture.marks import Marks, versions
from gradlens.capture.optimizers import WatchedOptimizer
from gradlens.capture.provenance import may_copy
from gradlens.capture.step import READ_PASSES, Phase, Step
from gradlens.records import Stage, TableKey

#: The stages that are read in one process by default; with others the general way is taken.
STAGES = frozenset({Stage.BACKWARD, Stage.USED})

_GRAD, _REQUIRES = attrgetter("grad"), attrgetter("requires_grad")
_OWN, _ACCUMULATED = attrgetter("_backward_hooks"), attrgetter("_post_accumulate_grad_hooks")
_PARAMETERS, _HOOKED = attrgetter("_parameters"), attrgetter("hooked")
_SHAPE, _TYPE, _DEVICE = FACTS
_NUMBERS = {float, int}
_POSITIVE = (0.0).__lt__
_UNTOUCHED = GradientFacts(single=True, own=True, untouched=True)


class Left(NamedTuple):
    """What was there at a moment: identities and versions of gradients, versions of weights."""

    ids: list[int]
    versions: list[int]
    weights: list[int]

    def marks(self, slots: list[Slot]) -> Marks:
        """The gradients of these slots, marked as they were."""
        return Marks(listed=(slots, self.ids, self.versions))


class Route:
    """What does not change from one step by the book to the next. It refers to the parameters: it goes with the model."""

    def __init__(self, attachment: Attachment, weights: list[Tensor], optimized: list[Tensor] | None) -> None:
        self.slots, self.parameters, self.weights = attachment.slots, attachment.parameters, weights
        self._attachment, self._columns, self._owners = attachment, attachment.columns, attachment.owners
        self.rows = list(range(len(weights)))
        self.optimized = optimized  #: what the optimizer moves, in its own order; None where there are several
        self.order = list(self.slots)  #: in which hooks were last called
        self.reached = set(self.slots)
        self.lr_positive = [True] * len(weights)
        self.nbytes = sum(w.numel() * w.element_size() for w in weights)
        self.calls: Any = None  #: what the sink has prepared for these parameters; it goes with the route
        self._accumulated, self._own = list[int](), list[int]()

    def there(self) -> bool:
        """Whether the parameters are where they were."""
        attachment, owners = self._attachment, self._owners
        if attachment.slots is not self.slots or attachment.parameters is not self.parameters or owners is None:
            return False
        try:
            found = map(getitem, map(_PARAMETERS, map(call, owners[0])), owners[1])
            return not attachment.lost and all(map(is_, found, self.weights))
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
        """Whether our hooks, and no others, are on every parameter, now that they were put on."""
        weights = self.weights
        if not self.there() or list(map(_HOOKED, self.slots)) != list(map(id, weights)):
            return False
        self._accumulated, self._own = list(map(id, map(_ACCUMULATED, weights))), list(map(id, map(_OWN, weights)))
        return self.hooked_alone()

    def hooked_alone(self) -> bool:
        """Whether our hooks, and no others, are on every parameter."""
        weights = self.weights
        own, accumulated = list(map(_OWN, weights)), list(map(_ACCUMULATED, weights))
        if list(map(id, own)) != self._own or list(map(id, accumulated)) != self._accumulated:
            return False
        try:
            return sum(map(len, own)) == len(weights) == sum(map(len, accumulated))
        except TypeError:  # None is where a dictionary should be
            return False

    def hooked(self) -> bool:
        """Whether our hooks are on every parameter."""
        return list(map(id, map(_ACCUMULATED, self.weights))) == self._accumulated

    def trained(self) -> bool:
        """Whether every parameter wants a gradient."""
        return all(map(_REQUIRES, self.weights))

    def empty(self) -> bool:
        """Whether every `.grad` is empty."""
        return all(map(is_, map(_GRAD, self.weights), repeat(None)))

    def gradients(self) -> list[Tensor] | None:
        """Every gradient; None where one is missing, or of another type than torch's own."""
        found = list(map(_GRAD, self.weights))
        return found if set(map(type, found)) <= PLAIN else None

    def noted(self, noted: list[Slot]) -> bool:
        """Whether these are all slots, each once."""
        if noted == self.order:
            return True
        if len(noted) != len(self.slots) or set(noted) != self.reached:
            return False
        self.order = list(noted)
        return True

    def moved_by(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer moves what it did, all of it at a rate above 0."""
        groups = optimizer.param_groups
        if len(groups) == 1:
            given, rates = groups[0]["params"], [groups[0].get("lr", 1.0)]
        else:
            given = [p for group in groups for p in group["params"]]
            rates = [group.get("lr", 1.0) for group in groups]
        if self.optimized is None or len(given) != len(self.optimized) or not all(map(is_, given, self.optimized)):
            return False
        return set(map(type, rates)) <= _NUMBERS and all(map(_POSITIVE, rates))


class SteadyRoute:
    """Holds each part of a step against the route. A method that says True has done what the general way would have done."""

    def __init__(
        self, attachment: Attachment, engine: Engine, sink: Sink, stages: frozenset[str], *, updates: bool, local: bool
    ) -> None:
        self._attachment, self._engine, self._sink, self._updates = attachment, engine, sink, updates
        self.allowed = stages == STAGES and not local  #: tests take the general way throughout
        self.route: Route | None = None
        self.parts = 0  #: of steps that went by the book

    # --- parts of a step --------------------------------------------------------------------------------------------

    def pass_begins(self, run: Run, entered: Pass, step: Step) -> bool:
        """Whether a backward begins by the book."""
        route = self.route
        if route is None or not step.observed:
            return False
        onto = step.phase is Phase.OPEN and step.left is not None and not step.stepped and step.passes < READ_PASSES - 1
        if not (step.phase is Phase.IDLE or (onto and route.nbytes <= HELD_BYTES)):
            return False
        if run.depth != 1 or run.nested or self._engine.passes or len(self._engine.threads) > 1:
            return False
        if not (route.there() and route.same()):
            self.route = None
            return False
        if not ((route.gradients() is not None if onto else route.empty()) and route.hooked_alone()):
            return False
        entered.route, entered.onto = route, onto
        return True

    def pass_ended(self, entered: Pass, step: Step) -> bool:
        """Whether it ended by the book, and is read."""
        route, arrivals = self.route, entered.arrivals
        if route is None or entered.route is not route or not route.noted(arrivals.noted):
            return False
        if len(self._engine.threads) > 1:
            return False
        if arrivals.states and any(state is not State.WAITING for state in arrivals.states.values()):
            return False
        if step.phase is not Phase.OPEN or bool(step.passes) is not entered.onto or entered.nested or entered.compiled:
            return False
        gradients = route.gradients() if route.there() else None
        if gradients is None:
            return False
        if entered.onto:
            return self._added(route, entered, step, gradients)
        step.reached, step.averaged = route.reached.copy(), True
        step.left = Left(list(map(id, gradients)), versions(gradients), versions(route.weights))
        step.ending = step.left.marks(route.slots)
        key = TableKey(step.number, step.take_number(), Stage.BACKWARD)
        kept = self._updates and route.optimized is not None  # else each optimizer's are kept as it begins
        self._sink(SteadyReading(route, key, gradients, kept, entered.loss, None, entered.scale))
        self.parts += 1
        return True

    def _added(self, route: Route, entered: Pass, step: Step, gradients: list[Tensor]) -> bool:
        """A pass ended whose gradients were added to those of the passes before it."""
        own = list(map(entered.arrivals.onto.get, route.slots))
        if not set(map(type, own)) <= PLAIN:
            return False
        step.fresh = False
        step.ending = Left(list(map(id, gradients)), versions(gradients), []).marks(route.slots)
        key = TableKey(step.number, step.take_number(), Stage.BACKWARD)
        self._sink(SteadyReading(route, key, own, False, entered.loss, gradients, entered.scale))  # type: ignore[arg-type]
        self.parts += 1
        return True

    def step_begins(self, step: Step, watched: WatchedOptimizer) -> bool:
        """Whether the optimizer is given a gradient of every parameter, all that its backwards reached, and that is read."""
        route, left = self.route, step.left
        if route is None or left is None or step.phase is not Phase.OPEN or watched.wrapped:
            return False
        if route.optimized is None or len(step.reached) != len(route.slots) or self._engine.passes or running():
            return False
        gradients = route.gradients() if route.there() else None
        if gradients is None or not route.trained():
            return False
        given = Left(list(map(id, gradients)), versions(gradients), versions(route.weights))
        if step.passes == 1:
            untouched = given.ids == left.ids and given.versions == left.versions
        else:
            untouched = step.ending.all_same(route.slots, gradients)
        facts = _UNTOUCHED
        if not (untouched and step.passes == 1 and step.fresh and step.own):
            facts = GradientFacts(single=step.passes == 1 and step.fresh, own=step.own, untouched=untouched)
        watched.read = watched.steady = True
        watched.untouched, watched.left, watched.facts, watched.given = untouched, given, facts, given.marks(route.slots)
        kept = not self._updates or given.weights == left.weights
        if may_copy(facts, step.scale):
            self._sink(SteadyStart(route, step.used_key, gradients, self._updates, kept))
        else:
            self._sink(SteadyUsed(route, step.used_key, gradients, self._updates, kept, facts, step.scale))
        self.parts += 1
        return True

    def step_ended(self, step: Step, watched: WatchedOptimizer, optimizer: Optimizer) -> bool:
        """Whether the optimizer left the gradients as they were, and its update is read."""
        route, left = self.route, watched.left
        if route is None or left is None or not (route.moved_by(optimizer) or not self._updates):
            return False
        gradients = route.gradients() if route.there() else None
        if gradients is None or list(map(id, gradients)) != left.ids or versions(gradients) != left.versions:
            return False
        if self._updates:
            self._sink(SteadyUpdate(route, step.used_key, gradients, watched.facts, step.scale))
        step.given = left
        self.parts += 1
        return True

    # --- between steps ----------------------------------------------------------------------------------------------

    def opening(self, closed: Step) -> Marks | None:
        """What is in `.grad` as the next step opens, and every hook in its place; None where that has to be looked at."""
        route, given = self.route, closed.given
        if route is None or given is None or self._attachment.slots is not route.slots:
            return None
        return given.marks(route.slots) if route.hooked() else None

    def follow(self, closed: Step, optimizers: Sequence[WatchedOptimizer], *, plain: bool, next_observed: bool) -> None:
        """A step is over: the route stays, is compiled, or is dropped. It waits while steps are not observed."""
        if not (plain and self.allowed):
            self.route = None
        elif not closed.observed:
            if next_observed and self.route is not None and not self.route.hooked_again():
                self.route = None
        elif closed.left is None or self.route is None:
            self.route = self._compiled(closed, optimizers)

    def _compiled(self, step: Step, optimizers: Sequence[WatchedOptimizer]) -> Route | None:
        attachment, n = self._attachment, len(self._attachment.slots)
        if not (step.began_fresh and step.own) or len(step.reached) != n or len(self._engine.threads) > 1:
            return None
        if not optimizers or any(watched.wrapped for watched in optimizers):
            return None
        if not attachment.plain or any(slot.read_in_hook for slot in attachment.slots):
            return None
        weights: list[Any] = attachment.tensors()
        optimized: list[Tensor] | None = None
        if len(optimizers) == 1:
            optimizer = optimizers[0].ref()
            optimized = [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
            if not set(map(id, weights)) <= set(map(id, optimized)):
                return None
        if not set(map(type, weights)) <= PLAIN:
            return None
        route = Route(attachment, weights, optimized)
        return route if route.hooked_again() and route.trained() else None
