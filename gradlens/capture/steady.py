"""The steady route: what is asked of a step that goes by the book, in place of looking at each parameter.

Nearly every step is like the one before: one process and thread, the same parameters, nobody else's hooks, no closure. After
a step like that a `Layout` of all parameters is compiled. A part of the next step has a `Route`, the parameters that it is
about, and is held against facts that are asked of all of them in one call: identities, versions, `.grad`. A part for which
all facts hold is one `Steady...` event; one for which any differs goes the general way, whose state the steady one leaves
behind just as well: each is judged alone.

    part                    its route       facts
    a backward begins                       parameters, shapes, hooks as compiled; what it may add to in `.grad` is not much
    it has ended            whose hooks     each has noted once, and has a gradient
                            have noted
    the same over ranks     the same        nobody else has a gradient; what was there as the last hook noted was written
                                            since, which is how ranks average it, or was not
    an optimizer begins     what it moves   the same as before; all of it was reached in this step, has a gradient, and was
                                            moved by no other since; the gradient is what the backward left, or is not
    it has ended            the same        the gradients are those, by identity and version; rates are above 0

So a step has any number of backwards and optimizers: of two nets, where one is trained to tell what the other makes, one
backward reaches the first, and the next one reaches both and adds to what that has left. An optimizer that calls a closure
moves weights between its backwards: its steps go the general way.

What lies in memory (addresses, types, fixed samples) is asked by whoever takes the events: see `watching.prepared`.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradlens.capture.arrivals import State
from gradlens.capture.attachment import PLAIN, Attachment, Slot
from gradlens.capture.engine import Engine, Pass, Run
from gradlens.capture.events import (
    UNTOUCHED,
    GradientFacts,
    LossSeen,
    PassEnded,
    Sink,
    SteadyReading,
    SteadyStart,
    SteadyUpdate,
    SteadyUsed,
)
from gradlens.capture.marks import Marks, version, versions
from gradlens.capture.optimizers import Optimizers, WatchedOptimizer
from gradlens.capture.provenance import may_copy
from gradlens.capture.readings import gradients_at
from gradlens.capture.routes import Layout, Route, Share, share_of
from gradlens.capture.step import READ_PASSES, Phase, Step
from gradlens.records import Stage, TableKey

#: The stages of which steps go by the book: those of one process by default, those over ranks, and the local ones with them.
STAGES = tuple(map(frozenset, ({"backward", "used"}, {"reduced", "used"}, {"backward", "reduced", "used"})))

_WRAPPED, _READ_IN_HOOK = attrgetter("wrapped"), attrgetter("read_in_hook")
_NOTHING: tuple[None, list[Tensor]] = None, []


class SteadyRoute:
    """Holds each part of a step against its facts. A method that says True has done what the general way would have done."""

    def __init__(
        self,
        attachment: Attachment,
        engine: Engine,
        optimizers: Optimizers,
        sink: Sink,
        stages: frozenset[str],
        *,
        updates: bool,
        local: bool,
    ) -> None:
        self._attachment, self._engine, self._optimizers = attachment, engine, optimizers
        self._sink, self._updates = sink, updates
        self._reduced, self._local = Stage.REDUCED in stages, local
        self.own = Stage.BACKWARD in stages  #: each backward's own gradients are read
        self.early = self.own and local  #: and that before ranks average them
        self.allowed = stages in STAGES and (self._reduced or not local)  #: tests take the general way throughout
        engine.tells_accumulated = self.early
        self.layout: Layout | None = None
        self.parts = 0  #: of steps that went by the book
        self._alone = not updates or len(optimizers.watched) < 2  # nobody else moves weights, as far as they are kept
        self._doubted = False  # some backward of this step did not

    # --- parts of a step --------------------------------------------------------------------------------------------

    def pass_begins(self, run: Run, entered: Pass, step: Step, *, within_a_call: bool) -> bool:
        """Whether a backward begins by the book. `within_a_call`: of an optimizer's step."""
        layout, self._doubted = self.layout, True
        if layout is None or not step.observed or step.passes >= READ_PASSES - 1:
            return False
        if step.phase is Phase.DUE or within_a_call:
            return False
        if run.depth != 1 or run.nested or self._engine.passes or len(self._engine.threads) > 1:
            return False
        if not (layout.there() and layout.same() and layout.hooked_alone()):
            self.layout = None
            return False
        rows, slots, gradients = layout.filled()
        if rows and not set(map(type, gradients)) <= PLAIN:
            return False
        held = layout.rows if self._local else rows
        if self.own and held and not layout.may_hold(held, step.passes):
            return False
        entered.layout, entered.onto, entered.phase = layout, frozenset(slots), step.phase
        return True

    def _reached(self, entered: Pass, step: Step) -> tuple[Route | None, list[Tensor]]:
        """What a backward by the book has reached, and what is in `.grad` there; None where it did not go so."""
        layout, arrivals = self.layout, entered.arrivals
        if layout is None or entered.layout is not layout or len(self._engine.threads) > 1:
            return _NOTHING
        if arrivals.states and any(state is not State.WAITING for state in arrivals.states.values()):
            return _NOTHING
        if step.phase is not (Phase.OPEN if entered.phase is Phase.IDLE else entered.phase):
            return _NOTHING  # an optimizer has stepped inside
        if entered.nested or entered.compiled or not layout.there():
            return _NOTHING
        route = layout.reached_by(arrivals.noted, step.passes)
        gradients = None if route is None else route.gradients()
        if route is None or gradients is None or (entered.inputs and not route.whole):
            return _NOTHING
        return route, gradients

    def pass_accumulated(self, entered: Pass, step: Step) -> bool:
        """Over ranks: whether a backward went by the book so far; its own gradients are read before they are averaged."""
        (route, gradients), arrivals = self._reached(entered, step), entered.arrivals
        if route is None:
            return False
        held, left = dict(zip(arrivals.noted, arrivals.left, strict=True)), arrivals.onto
        fresh = [pair for slot, pair in held.items() if slot not in left]
        if versions([gradient for gradient, _ in fresh]) != [seen for _, seen in fresh]:
            return False
        own = [left[slot] if slot in left else held[slot][0] for slot in route.slots]
        if left.keys() != entered.onto & route.reached or not set(map(type, own)) <= PLAIN:
            return False
        arrivals.left.clear()
        entered.left, entered.number = (list(map(id, gradients)), versions(gradients)), step.take_number()
        self._read(route, Stage.BACKWARD, own, entered, step, ended=([], []) if entered.onto else None)
        return True

    def pass_ended(self, entered: Pass, step: Step) -> bool:
        """Whether it ended by the book, and is read."""
        route, gradients = self._reached(entered, step)
        if route is None:
            return False
        layout, added, owns = entered.layout, entered.onto & route.reached, self.own and not self.early
        own: list[Any] = gradients
        if owns and added:
            own = list(map(entered.arrivals.onto.get, route.slots, gradients))
        if owns and not (entered.arrivals.onto.keys() == added and set(map(type, own)) <= PLAIN):
            return False
        rows, slots, filled = layout.filled() if added or not route.whole else (route.rows, route.slots, gradients)
        if self._reduced and (len(rows) > len(route.rows) or not step.reached <= route.reached):
            return False
        averaged = not self._local or self._written(entered, layout)
        if averaged is None or (self.early and entered.left is None):
            return False
        step.reached |= route.reached
        step.undefined -= route.reached
        step.excluded -= route.reached
        step.averaged, step.fresh = step.averaged or averaged, step.fresh and not added
        ended = list(map(id, filled)), versions(filled)
        step.ending = Marks(listed=(slots, *ended))
        if entered.number is None:
            entered.number = step.take_number()
        if owns:
            alone = len(rows) == len(route.rows) and not added
            self._read(route, Stage.BACKWARD, own, entered, step, None if alone else (rows, filled))
        if self._reduced and averaged:
            self._read(route, Stage.REDUCED, gradients, entered, step)
            step.reduced = entered.number
        elif self._local and (added or entered.left != ended):
            self._pass(entered, step, rows, filled)
        entered.arrivals.onto.clear()  # what was held is not to live on
        self._doubted = False
        return True

    def _pass(self, entered: Pass, step: Step, rows: list[int], gradients: list[Tensor]) -> None:
        """Over ranks: nothing is read of a backward that was not averaged, but for samples of what it left."""
        if entered.loss is not None and entered.number is not None:
            self._sink(LossSeen(step.number, entered.number, entered.loss))
        self._sink(PassEnded(rows, gradients))
        self.parts += 1

    def _written(self, entered: Pass, layout: Layout) -> bool | None:
        """Whether `.grad` was written after the last hook, which is how ranks leave their mean; None if not known."""
        if entered.last is None:
            return None
        slot, gradient, seen = entered.last
        now = layout.weights[self._attachment.rows[slot]].grad
        return now is not None and (id(now), version(now)) != (gradient, seen)

    def _read(
        self,
        route: Route,
        stage: Stage,
        gradients: list[Tensor],
        entered: Pass,
        step: Step,
        ended: tuple[list[int], list[Tensor]] | None = None,
    ) -> None:
        """These gradients are read; and the weights, where the optimizer may be given just these."""
        copied = self._updates and (stage is Stage.REDUCED or not (self._reduced or step.passes))
        if copied:
            step.weights = route.slots, versions(route.weights)
        self._sink(
            SteadyReading(
                route=route,
                key=TableKey(step.number, entered.number, stage),  # type: ignore[arg-type]
                gradients=gradients,
                updates=copied,
                notes=() if route.whole else route.notes(entered.layout.wanted()),
                loss=entered.loss,
                ended=ended,
                scale=entered.scale,
                moving=step.phase is Phase.MOVING,
            )
        )
        self.parts += 1

    def general_pass_ended(self) -> None:
        """A backward went the general way, which may have found gradients that have to be read inside hooks from now on."""
        if self.layout is not None and True in map(_READ_IN_HOOK, self.layout.slots):
            self.layout = None

    def step_begins(self, step: Step, watched: WatchedOptimizer, optimizer: Optimizer) -> bool:
        """Whether the optimizer is given a gradient of all that it moves, which this step has reached, and they are read.

        Asked outside any backward.
        """
        layout = self.layout
        if layout is None or not step.passes or step.phase not in (Phase.OPEN, Phase.MOVING) or watched.wrapped:
            return False
        if self._engine.passes or not layout.there():
            return False
        share = self._share(layout, watched, optimizer)
        route = share.route
        if route is None or not route.reached <= step.reached:
            return False
        gradients, key = route.gradients(), step.used_key
        if gradients is None or not (self._alone or self._keep(step, share, key)):
            return False
        left = route.slots, list(map(id, gradients)), versions(gradients)
        untouched = step.ending.are(*left)
        if share.frozen and untouched:
            untouched = step.ending.all_same(share.frozen, gradients_at(self._attachment.at(share.frozen)))
        facts = UNTOUCHED
        single, reduced = step.passes == 1 and step.fresh and not self._local, step.reduced == step.passes - 1
        if reduced or not (untouched and single and step.own):
            facts = GradientFacts(single, step.own, untouched, reduced=reduced)
        watched.read = watched.steady = True
        watched.untouched, watched.given = untouched, Marks(listed=left)
        watched.share, watched.left, watched.facts, watched.key = share, left, facts, key
        kept = not self._updates or step.weights == (route.slots, versions(route.weights)) or _stayed(step.weights, route)
        if may_copy(facts, step.scale):
            self._sink(SteadyStart(route, key, gradients, self._updates, kept, share.notes))
        else:
            self._sink(SteadyUsed(route, key, gradients, self._updates, kept, share.notes, facts, step.scale))
        self.parts += 1
        return True

    def _share(self, layout: Layout, watched: WatchedOptimizer, optimizer: Optimizer) -> Share:
        everyone, others = self._optimizers.watched, None
        if len(everyone) > 1 and watched is self._optimizers.ender.current:
            others = [other.ref() for other in everyone if other is not watched]
        share = layout.shares.get(watched)
        if share is None or not share.holds(optimizer, others, layout.wanted()):
            share = share_of(layout, list(self._optimizers.held(watched)), optimizer, others)
            layout.shares[watched] = share
        return share

    @staticmethod
    def _keep(step: Step, share: Share, key: TableKey) -> bool:
        """Whether no optimizer has moved any of these since the last backward; they are noted, as by `StepReader.keep`."""
        if step.kept and key in map(step.kept.get, share.held):
            return False
        step.kept.update(dict.fromkeys(share.held, key))
        return True

    def step_ended(self, step: Step, watched: WatchedOptimizer, optimizer: Optimizer) -> bool:
        """Whether the optimizer left the gradients as they were, and its update is read."""
        layout, share = self.layout, watched.share
        route = None if share is None else share.route
        if layout is None or route is None or not layout.there() or (self._updates and not share.moved_on(optimizer)):
            return False
        gradients = route.gradients()
        if gradients is None:
            return False
        left = route.slots, list(map(id, gradients)), versions(gradients)
        if left != watched.left:
            return False
        if self._updates:
            self._sink(SteadyUpdate(route, watched.key, gradients, watched.facts, step.scale))
        step.given = left if route.whole and len(self._optimizers.watched) == 1 else None
        self.parts += 1
        return True

    # --- between steps ----------------------------------------------------------------------------------------------

    def opening(self, closed: Step) -> Marks | None:
        """What is in `.grad` as the next step opens, and every hook in its place; None where that has to be looked at."""
        layout, given = self.layout, closed.given
        if layout is None or self._attachment.slots is not layout.slots or not layout.hooked():
            return None  # a slot that was just found has no hook yet
        if given is None:
            if not layout.there():
                return None
            _, slots, gradients = layout.filled()
            given = slots, list(map(id, gradients)), versions(gradients)
        return Marks(listed=given)

    def follow(self, closed: Step, *, plain: bool, next_observed: bool) -> None:
        """A step is over: the layout stays, is compiled, or is dropped. It waits while steps are not observed."""
        layout = self.layout
        if not (plain and self.allowed) or True in map(_WRAPPED, self._optimizers.watched):
            self.layout = None
        elif not closed.observed:
            if next_observed and layout is not None and not layout.hooked_again():
                self.layout = None
        elif layout is None:
            self.layout = self._compiled(closed)
        elif self._doubted and not self._fits(closed):
            self.layout = None
        self._doubted = False

    def _fits(self, step: Step) -> bool:
        attachment = self._attachment
        if not (step.own and self._optimizers.watched) or len(self._engine.threads) > 1:
            return False
        return attachment.plain and True not in map(_READ_IN_HOOK, attachment.slots)

    def _compiled(self, step: Step) -> Layout | None:
        weights: list[Any] = self._attachment.tensors()
        if not step.passes or not self._fits(step) or not set(map(type, weights)) <= PLAIN:
            return None
        layout = Layout(self._attachment, weights)
        if not layout.hooked_again():
            return None
        layout.watch_lives([watched.ref() for watched in self._optimizers.watched], self.forget)
        return layout

    def forget(self) -> None:
        """Refer to no parameter."""
        self.layout = None
        for watched in self._optimizers.watched:
            watched.share = None  # of a step that raised


def _stayed(weights: tuple[list[Slot], list[int]] | None, route: Route) -> bool:
    """Whether these are some of the weights whose versions are known, and have stayed as they were."""
    known = {} if weights is None or weights[0] is route.slots else dict(zip(*weights, strict=True))
    return bool(known) and list(map(known.get, route.slots)) == versions(route.weights)
