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

from torch.optim import Optimizer

from gradlens.capture.arrivals import State
from gradlens.capture.attachment import PLAIN, Attachment
from gradlens.capture.engine import Engine, Pass, Run, running
from gradlens.capture.events import GradientFacts, Sink, SteadyReading, SteadyStart, SteadyUpdate, SteadyUsed
from gradlens.capture.marks import Marks, versions
from gradlens.capture.optimizers import Optimizers, WatchedOptimizer
from gradlens.capture.provenance import may_copy
from gradlens.capture.readings import gradients_at
from gradlens.capture.routes import Layout, Route, Share, share_of
from gradlens.capture.step import READ_PASSES, Phase, Step
from gradlens.records import Stage, TableKey

#: The stages that are read in one process by default; with others the general way is taken.
STAGES = frozenset({Stage.BACKWARD, Stage.USED})

_WRAPPED, _READ_IN_HOOK = attrgetter("wrapped"), attrgetter("read_in_hook")
_UNTOUCHED = GradientFacts(single=True, own=True, untouched=True)


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
        self.allowed = stages == STAGES and not local  #: tests take the general way throughout
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
        if rows and not (set(map(type, gradients)) <= PLAIN and layout.may_hold(rows, step.passes)):
            return False
        entered.layout, entered.onto, entered.phase = layout, frozenset(slots), step.phase
        return True

    def pass_ended(self, entered: Pass, step: Step) -> bool:
        """Whether it ended by the book, and is read."""
        layout, arrivals = self.layout, entered.arrivals
        if layout is None or entered.layout is not layout or len(self._engine.threads) > 1:
            return False
        if arrivals.states and any(state is not State.WAITING for state in arrivals.states.values()):
            return False
        if step.phase is not (Phase.OPEN if entered.phase is Phase.IDLE else entered.phase):
            return False  # an optimizer has stepped inside
        if entered.nested or entered.compiled or not layout.there():
            return False
        route = layout.reached_by(arrivals.noted, step.passes)
        gradients = None if route is None else route.gradients()
        if route is None or gradients is None or (entered.inputs and not route.whole):
            return False
        added = entered.onto & route.reached
        if arrivals.onto.keys() != added:
            return False
        own = list(map(arrivals.onto.get, route.slots, gradients)) if added else gradients
        if added and not set(map(type, own)) <= PLAIN:
            return False
        self._read_pass(layout, route, entered, step, own)
        return True

    def _read_pass(self, layout: Layout, route: Route, entered: Pass, step: Step, own: list[Any]) -> None:
        """The pass's own gradients are read, and what is in `.grad` is remembered."""
        arrivals = entered.arrivals
        rows, slots, filled = layout.filled() if arrivals.onto or not route.whole else (route.rows, route.slots, own)
        step.reached |= route.reached
        step.undefined -= route.reached
        step.excluded -= route.reached
        step.averaged, step.fresh = True, step.fresh and not arrivals.onto
        step.ending = Marks(listed=(slots, list(map(id, filled)), versions(filled)))
        copied = self._updates and not step.passes  # the weights: else they are as an optimizer begins
        if copied:
            step.weights = route, versions(route.weights)
        self._sink(
            SteadyReading(
                route=route,
                key=TableKey(step.number, step.take_number(), Stage.BACKWARD),
                gradients=own,
                updates=copied,
                notes=() if route.whole else route.notes(layout.wanted()),
                loss=entered.loss,
                ended=(rows, filled) if arrivals.onto or len(rows) > len(route.rows) else None,
                scale=entered.scale,
                moving=step.phase is Phase.MOVING,
            )
        )
        self._doubted = False
        self.parts += 1

    def step_begins(self, step: Step, watched: WatchedOptimizer, optimizer: Optimizer) -> bool:
        """Whether the optimizer is given a gradient of all that it moves, which this step has reached, and they are read."""
        layout = self.layout
        if layout is None or not step.passes or step.phase not in (Phase.OPEN, Phase.MOVING) or watched.wrapped:
            return False
        if self._engine.passes or running() or not layout.there():
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
        facts = _UNTOUCHED
        if not (untouched and step.passes == 1 and step.fresh and step.own):
            facts = GradientFacts(single=step.passes == 1 and step.fresh, own=step.own, untouched=untouched)
        watched.read = watched.steady = True
        watched.untouched, watched.given = untouched, Marks(listed=left)
        watched.share, watched.left, watched.facts, watched.key = share, left, facts, key
        kept = not self._updates or step.weights == (route, versions(route.weights)) or _stayed(step.weights, route)
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
        watched.share = None  # it refers to parameters
        self.parts += 1
        return True

    # --- between steps ----------------------------------------------------------------------------------------------

    def opening(self, closed: Step) -> Marks | None:
        """What is in `.grad` as the next step opens, and every hook in its place; None where that has to be looked at."""
        layout, given = self.layout, closed.given
        if layout is None or not layout.hooked():
            return None
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

    def _fits(self, step: Step) -> bool:
        attachment = self._attachment
        if not (step.own and step.passes and self._optimizers.watched) or len(self._engine.threads) > 1:
            return False
        return attachment.plain and True not in map(_READ_IN_HOOK, attachment.slots)

    def _compiled(self, step: Step) -> Layout | None:
        weights: list[Any] = self._attachment.tensors()
        if not self._fits(step) or not set(map(type, weights)) <= PLAIN:
            return None
        layout = Layout(self._attachment, weights)
        return layout if layout.hooked_again() else None


def _stayed(weights: tuple[Route, list[int]] | None, route: Route) -> bool:
    """Whether these are some of the weights whose versions are known, and have stayed as they were."""
    known = {} if weights is None or weights[0] is route else dict(zip(weights[0].slots, weights[1], strict=True))
    return bool(known) and list(map(known.get, route.slots)) == versions(route.weights)
