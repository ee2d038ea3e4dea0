"""The steps of one lens: the one that is open, the one that lingers, and what happens as one gives way to the next.

The sole owner of the open `Step`: passes and optimizers say here that it begins, moves, or is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import attrgetter, is_not
from typing import Any, NamedTuple

from gradlens import findings
from gradlens.capture.arrivals import HELD_BYTES
from gradlens.capture.engine import running
from gradlens.capture.events import StepClosed
from gradlens.capture.marks import Marks
from gradlens.capture.optimizers import PATIENCE, WatchedOptimizer
from gradlens.capture.scaling import Scaling
from gradlens.capture.step import Phase, Step
from gradlens.capture.workings import Workings
from gradlens.records import Stage

#: Steps between full scans of the module tree. What registers a parameter in the usual way is seen at once; this finds
#: writes past torch's own registration, and costs about 2 us a parameter when it happens.
SCAN_EVERY = 16


_STEP = attrgetter("step")


class Due(NamedTuple):
    """The update of an optimizer that stepped inside another object's `step`."""

    step: Step
    optimizer: WatchedOptimizer
    skipped: Any
    around: int  #: that object's id


class Steps:
    """Opens, closes and lets go of steps."""

    def __init__(self, workings: Workings, schedule: Callable[[int], bool], scaler: Any, first: int) -> None:
        self._attachment, self._engine, self._optimizers = workings.attachment, workings.engine, workings.optimizers
        self._hooks, self._step_reader, self._steady = workings.hooks, workings.step_reader, workings.steady
        self._activations = workings.activations
        self._sink, self._guard, self._tell, self._schedule = workings.sink, workings.guard, workings.tell, schedule
        self._stages, self._used, self._local = workings.stages, workings.used, workings.local
        self.scaling = Scaling(scaler)
        self.explicit = False  #: `lens.step()` says where a step ends
        self.current = Step(first, observed=self._ask(first))
        self.lingering: Step | None = None  #: closed, and an optimizer that has not stepped may still belong to it
        self._without_backward: list[Step] = []  # that closed while it lingers: an optimizer stepped again on its gradients
        self.due: list[Due] = []  #: updates whose wrapper may still move weights
        self.dirty = False  #: something was registered since the model was last scanned
        self._scan_at = _next_scan(first)  # the step before which the model is scanned next

    @property
    def within_a_call(self) -> bool:
        """Whether the step of an optimizer is under way, as while it calls its closure."""
        return any(map(is_not, map(_STEP, self._optimizers.watched), repeat(None)))

    @property
    def watches(self) -> bool:
        """Whether this step has hooks on the parameters. Without an optimizer a backward counts steps, so they stay."""
        return self.current.observed or not self._optimizers.watched

    def follow_schedule(self) -> None:
        """Hooks are on the parameters of a step that is observed, and off those of any other."""
        if self.watches:
            self._attachment.hook_all(self._hooks.of)
        else:
            self._attachment.unhook_all()

    def _ask(self, number: int) -> bool:
        try:
            return bool(self._schedule(number))
        except Exception as error:  # noqa: BLE001 - a user's schedule must not break a training step
            self._guard.fault("schedule", error)
            return True

    def rescan(self) -> None:
        """Scan the model, which may have changed."""
        sure = self.dirty or self._attachment.lost
        if self.dirty:
            self._activations.look_again()
        self.dirty, self._scan_at = False, _next_scan(self.current.number)
        if self._attachment.rescan(sure=sure):
            self._attachment.refresh()

    def finish_passes(self) -> None:
        """Finish the passes whose end nobody called; outside a backward."""
        if not self._engine.passes and not self.dirty:
            return
        self._engine.finish_ended_passes()
        if self.dirty and not running():
            with self._engine.lock:
                self.rescan()  # no hook may have fired at all, as where everything that trains is new

    # --- from one step to the next ----------------------------------------------------------------------------------

    def close(self) -> None:
        """The step ended: hand it over, look at the model again, and get ready for the next."""
        if self._guard.forked():
            return  # whose parent may have held the lock
        step = self.current
        if self._rests(step):
            self._safely("end of a step", self._read_rest, step)
        if self._activations.heard:
            self._safely("a step's activations", self._activations.step_ended, step.number, step.passes)
        self._open_next(step, observed=self._ask(step.number + 1))
        if self.lingering is None and not self.due and len(step.stepped) == len(self._optimizers.watched):
            self._sink(StepClosed(step.number, step.scalars))
        else:
            self._let_go_of(step)
        quiet = self._optimizers.quiet
        quiet.watched = {} if self.current.observed or not self._quiet() else self._optimizers.by_id
        quiet.step = self.current

    def _rests(self, step: Step) -> bool:
        """Whether more is to be read or said at the end of this step."""
        attachment = self._attachment
        if Stage.REDUCED in self._stages and step.observed and (not step.averaged or attachment.ignored):
            return True
        if not self._optimizers.watched or self.scaling.scaler is not None:
            return True
        return self._step_reader.notes.read_at_step or attachment.flat

    def _open_next(self, step: Step, *, observed: bool) -> None:
        self.current = Step(step.number + 1, observed=observed)
        self._safely("start of a step", self._prepare, step)

    def _let_go_of(self, step: Step) -> None:
        """Hand the step over, now or when nothing can belong to it any more."""
        if self.lingering is not None:
            if not step.passes and self.awaited(self.lingering) and len(self._without_backward) < PATIENCE:
                self._without_backward.append(step)
                return
            self.let_go()
        self.lingering = step
        if not self.awaited(step):
            self.let_go()

    def _quiet(self) -> bool:
        """Whether the open step is quiet."""
        return not self.watches and self.lingering is None and not self.due

    def stepped_quietly(self, watched: WatchedOptimizer) -> bool:
        """An optimizer has stepped in a quiet step, and closes it if it ends it; False where more is to be done."""
        step, ender = self.current, self._optimizers.ender
        if self.dirty or step.passes or self._engine.passes or self._attachment.lost:
            return False
        if watched in step.stepped or step.phase in (Phase.OPEN, Phase.DUE):
            return False
        if watched is ender.listed:
            if len(step.stepped) + 1 < len(self._optimizers.watched):
                return False
            if step.stepped:
                ender.ends(watched)
            return self._close_quiet()
        if ender.current is not ender.listed or ender.stands_in(watched):
            return False
        ender.ends(watched)
        step.stepped[watched] = 0
        step.moves()
        return True

    def _close_quiet(self) -> bool:
        step, engine = self.current, self._engine
        with engine.lock:
            observed, closed = self._ask(step.number + 1), StepClosed(step.number, step.scalars)
            if observed:
                self._optimizers.quiet.watched = {}
                self._open_next(step, observed=True)
            else:
                step.number, step.scalars, step.stepped, step.phase = step.number + 1, {}, {}, Phase.IDLE
        self._sink(closed)
        return True

    def close_repeated(self, watched: WatchedOptimizer) -> None:
        """Close the step if this optimizer, which is about to step, did so and there was no backward since.

        Each call is a step of its own: two would write over one row.
        """
        step = self.current
        if step.open and step.stepped.get(watched) == step.passes and not self._engine.passes:
            self.close()

    def backward_comes(self) -> None:
        """A backward begins, or a closure is called that has one: what optimizers did without one is over."""
        step = self.current
        if step.stepped and not step.passes and not self._engine.passes and not self.within_a_call:
            self.close()
        if self.lingering is not None:
            self.let_go()

    def _safely(self, where: str, call: Callable[..., Any], *args: Any) -> None:
        try:
            with self._engine.lock:
                call(*args)
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
            self._guard.fault(where, error)

    def _prepare(self, closed: Step) -> None:
        if self.dirty or self._attachment.lost or self.current.number >= self._scan_at:
            self.rescan()
        observed = self.current.observed
        opening = self._steady.opening(closed) if observed and not self._step_reader.notes.written else None
        if opening is not None:
            self.current.opening = opening
            self._steady.follow(closed, plain=not self.explicit, next_observed=True)
            return
        with self._attachment.cache:
            watches = self.watches
            if watches:
                self.open_marks()
                self.follow_schedule()
            self._steady.follow(closed, plain=not self.explicit, next_observed=observed)
            if not watches:
                self.follow_schedule()

    def open_marks(self) -> None:
        """Remember what `.grad` is now, which matters only if the step has hooks."""
        if self.watches:
            slots = self._attachment.slots
            there = [(s, t.grad) for s, t in zip(slots, self._attachment.tensors(), strict=True) if t is not None]
            self.current.opening = Marks()
            self.current.opening.update([s for s, _ in there], [g for _, g in there])
            written = self._step_reader.notes.written
            if written:
                self.current.opening.hold((g for s, g in there if g is not None and s in written), HELD_BYTES)

    def awaited(self, step: Step) -> bool:
        """Whether an optimizer that has not stepped may still belong to the step that was closed."""
        if self.due and any(due.step is step for due in self.due):
            return True
        if not self._used or len(step.stepped) >= len(self._optimizers.watched):
            return False  # each of them has stepped
        return any(w not in step.stepped and w.ref() is not None for w in self._optimizers.watched)

    def let_go(self) -> None:
        """Nothing more comes of the step that was closed last."""
        step, self.lingering = self.lingering, None
        if self.due:
            self._read_due(self.due)  # the weights before their steps are dropped now
        if step is not None:
            if self.scaling.scaler is not None:
                with self._attachment.cache:
                    self._safely("end of a step", self._read_skipped, step)
            self._sink(StepClosed(step.number, step.scalars))
        for closed in self._without_backward:
            self._sink(StepClosed(closed.number, closed.scalars))
        self._without_backward.clear()

    def finish_due(self, begins: WatchedOptimizer | None = None, within: Sequence[int] = ()) -> None:
        """Read the updates of optimizers that were inside another object's step, which is over now.

        Where an optimizer `begins` within such steps, of objects whose ids are `within`, those of the other optimizers that
        these hold are not over.
        """
        due = [each for each in self.due if each.around not in within or each.optimizer is begins]
        self._finish(due)

    def finish_due_within(self, wrapper: Any) -> None:
        """The step of this object is over: read the updates of the optimizers that stepped inside it."""
        self._finish([each for each in self.due if each.around == id(wrapper)])

    def _finish(self, due: Sequence[Due]) -> None:
        self._read_due(due)
        if due and self.lingering is not None and not self.awaited(self.lingering) and not self.within_a_call:
            self.let_go()

    def _read_due(self, due: Sequence[Due]) -> None:
        self.due = [each for each in self.due if each not in due]
        for step, watched, skipped, _ in due:
            optimizer = watched.ref()
            if optimizer is not None:
                with self._engine.lock, self._attachment.cache:
                    self._step_reader.read_update(step, watched, optimizer, skipped)

    # --- the end of a step ------------------------------------------------------------------------------------------

    def close_skipped(self) -> None:
        """Close the step whose optimizer the scaler let do nothing."""
        if self.current.open:
            skipped = self._read_skipped(self.current)
            if sum(self._optimizers.ender.ends(watched) for watched in skipped):  # each is asked
                self.close()

    def _read_skipped(self, step: Step) -> list[WatchedOptimizer]:
        """The optimizers that the scaler let do nothing in this step; what it kept from them is read."""
        if self.scaling.scaler is None:
            return []
        skipped = [
            watched
            for watched in self._optimizers.watched
            if watched not in step.stepped and (o := watched.ref()) is not None and self.scaling.stepped(o)
        ]
        for watched in skipped:
            step.stepped[watched] = step.passes
            if step.observed:
                self._step_reader.read_used(step, watched, skipped=True)  # scaler.step() has unscaled what it then skipped
        return skipped

    def _read_rest(self, step: Step) -> None:
        """What is read, and told, once the step is over."""
        with self._attachment.cache:
            self._read_skipped(step)
            if not self._optimizers.watched and step.observed and step.passes:
                self._step_reader.read_by_hand(step)
                if self._step_reader.updates:
                    self._step_reader.read_update(step, self._step_reader.by_hand, None, skipped=False)
                self._step_reader.by_hand.read, self._step_reader.left = False, []
            self._tell_rest(step)

    def _tell_rest(self, step: Step) -> None:
        attachment = self._attachment
        if self._step_reader.notes.read_at_step:
            self._tell(findings.read_at_step(step.number))
        if attachment.flat:
            self._tell(findings.flat_parameters(step.number))
        if Stage.REDUCED in self._stages and step.observed and step.passes:
            if not step.averaged:
                self._tell(findings.not_averaged(step.number))
            elif self._local and attachment.ignored:
                ignored = [slot.name for slot in attachment.slots if slot in attachment.ignored]
                self._tell(findings.not_sharded(step.number, ignored))


def _next_scan(step: int) -> int:
    """The step before which the model is scanned, after it was before this one."""
    return (step // SCAN_EVERY + 1) * SCAN_EVERY
