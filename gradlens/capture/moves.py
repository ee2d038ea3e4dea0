"""Optimizers' steps as they come: which step each belongs to, what it is given, and what is over once weights have moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer

from gradlens import _torch, findings
from gradlens.capture.attachment import Slot
from gradlens.capture.callers import NOBODY, wrapper
from gradlens.capture.engine import running
from gradlens.capture.events import ScaleFound
from gradlens.capture.guards import guarded
from gradlens.capture.optimizers import CallStack, WatchedOptimizer, found_inf
from gradlens.capture.readings import gradients_at
from gradlens.capture.scaling import Scaling
from gradlens.capture.step import Phase, Step
from gradlens.capture.steps import Due, Steps
from gradlens.capture.workings import Workings


class Moves:
    """Is told of steps by the optimizers."""

    def __init__(self, workings: Workings, steps: Steps, may_raise: Callable[[], None]) -> None:
        self._attachment, self._engine, self._optimizers = workings.attachment, workings.engine, workings.optimizers
        self._hooks, self._step_reader, self._steady = workings.hooks, workings.step_reader, workings.steady
        self._auditor, self._threads, self._used = workings.auditor, workings.threads, workings.used
        self._sink, self._tell, self.guard = workings.sink, workings.tell, workings.guard
        self._steps, self.may_raise = steps, may_raise

    def used_within(self, parameters: set[int]) -> None:
        """An optimizer uses gradients up inside a backward that are still to be read."""
        self._hooks.taken(parameters)

    def step_begins(self, watched: WatchedOptimizer, optimizer: Optimizer, stack: CallStack, closure: Any) -> Any:
        """A watched optimizer is about to step; returns a closure to call in place of its own, or None."""
        outside = not running()
        if outside:
            self._threads.note(self._steps.current.number)
            if closure is None:
                self._steps.finish_passes()
        if self._steps.due:
            self._steps.finish_due(watched, [owner for owner, _ in stack.methods])
        if outside and closure is not None:
            self._steps.backward_comes()
        elif outside and self._steps.current.stepped:
            self._steps.close_repeated(watched)
        with self._engine.lock:
            step = watched.step = self._steps.current if self._steps.lingering is None else self._step_of(watched)
            watched.read, watched.closure_key, watched.steady = False, None, False
            if closure is not None:
                step.moves()
            if stack.scaler is not None:
                self._adopt(stack.scaler, step)
            if not step.observed:
                return None
            self._auditor.optimizer_steps(self._optimizers.watched.index(watched), optimizer, step.number)
            if closure is None and outside and self._begins_steadily(step, watched, optimizer):
                return None
        with self._engine.lock, self._attachment.cache:
            held = self._optimizers.held(watched)
            if self._step_reader.updates:
                self._step_reader.keep(step, watched, held, backward=step.passes if closure is not None else None)
            if closure is None and getattr(optimizer, "grad_scale", None) is None:
                self._step_reader.read_used(step, watched, held=held)
        return None if closure is None or not self._used else self._listening(watched, closure)

    def _begins_steadily(self, step: Step, watched: WatchedOptimizer, optimizer: Optimizer) -> bool:
        if step is not self._steps.current or self._step_reader.notes.written:
            return False
        if getattr(optimizer, "grad_scale", None) is not None:
            return False
        if not self._steady.step_begins(step, watched, optimizer):
            return False
        self._step_reader.all_written = 0
        return True

    def _step_of(self, watched: WatchedOptimizer) -> Step:
        """The step that an optimizer belongs to which steps now: the one whose backward it consumes."""
        last, current = self._steps.lingering, self._steps.current
        waits = last is not None and watched not in last.stepped and not current.passes and not self._engine.passes
        return last if last is not None and waits else current

    def _listening(self, watched: WatchedOptimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        """The closure, which tells us when it returns: the optimizer may write over what it left."""
        returned = self.closure_returned

        def call(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            returned(watched)
            return result

        return call

    @guarded("a closure's return")
    def closure_returned(self, watched: WatchedOptimizer) -> None:
        """What the closure left in `.grad` is what the optimizer consumes, if it does not call it again."""
        if not running():
            self._engine.finish_ended_passes()
        step = watched.step
        if step is None or not step.observed:
            return
        with self._engine.lock, self._attachment.cache:
            self._step_reader.read_used(step, watched, replaces=watched.closure_key)
            watched.closure_key = step.used_key

    def step_ended(self, watched: WatchedOptimizer, optimizer: Optimizer, stack: CallStack, closure: Any) -> None:
        """A watched optimizer has stepped."""
        step = self._steps.current if watched.step is None else watched.step
        watched.step = None
        try:
            if closure is not None and not running():
                self._steps.finish_passes()
            if step.observed:
                with self._engine.lock:
                    self._read_after(step, watched, optimizer, stack)
        finally:  # the step is over, whatever of ours failed
            watched.share = None  # it refers to parameters
            step.stepped[watched] = step.passes
            step.moves()
            self._after_step(step, watched)

    def quiet_step_ended(self, watched: WatchedOptimizer, scaler: Any) -> bool:
        """An optimizer has stepped in a quiet step; False where more is to be done than to count it."""
        if running() or (scaler is not None and self._steps.scaling.scaler is None and scaler.is_enabled()):
            return False
        self._threads.note(self._steps.current.number)
        return self._steps.stepped_quietly(watched)

    def _after_step(self, step: Step, watched: WatchedOptimizer) -> None:
        if step is self._steps.lingering:
            held = self._optimizers.held(watched)
            self._steps.current.opening.update(held, gradients_at(held.values()))
            if not self._steps.awaited(step):
                self._steps.let_go()
            return
        idle = self._optimizers.ender.current
        if not self._optimizers.ender.ends(watched):
            return
        if idle is not self._optimizers.ender.current is not self._optimizers.ender.listed:
            self._tell_idle(step)
        if not running():
            self._steps.close()
            return
        step.phase = Phase.DUE
        if not self._engine.passes:  # no hook is on any parameter
            _torch.queue_callback(self.backward_ended)

    @guarded("end of a backward that is not observed")
    def backward_ended(self) -> None:
        """A backward is over in which an optimizer ended the step, and none of whose hooks is ours."""
        if self._steps.current.phase is Phase.DUE:
            self._steps.close()

    def _read_after(self, step: Step, watched: WatchedOptimizer, optimizer: Optimizer, stack: CallStack) -> None:
        skipped = found_inf(optimizer)
        around = wrapper(stack.methods, step.loops or NOBODY) if stack.methods else None
        by_the_book = watched.steady and skipped is False and around is None
        if by_the_book and self._steady.step_ended(step, watched, optimizer):
            return
        with self._attachment.cache:
            if not watched.read:
                self._step_reader.read_used(step, watched, skipped=skipped, late=True)
            if not self._step_reader.updates:
                return
            if around is not None:
                watched.wrapped = True
                self._steps.due.append(Due(step, watched, skipped, around))
            else:
                self._step_reader.read_update(step, watched, optimizer, skipped)

    def foreign_step_ended(self, optimizer: Optimizer, moved: Sequence[Slot], *, reported: bool) -> None:
        """An optimizer that is none of the lens' has stepped."""
        if reported:
            names = [slot.name for slot in moved]
            self._tell(findings.unknown_optimizer(self._steps.current.number, type(optimizer).__name__, names))
        elif self._steps.due:
            self._steps.finish_due_within(optimizer)
        elif not self._optimizers.watched:
            self._look_again()

    def _look_again(self) -> None:
        """Where an optimizer's parameters replaced all of ours no hook would ever fire."""
        silent = not self._engine.threads
        if not running() and (silent or self._attachment.unhooked()):
            with self._engine.lock:
                self._attachment.rescan()
                self._attachment.refresh()
                self._steps.follow_schedule()
            if silent and any(slot.flat_slice is not None for slot in self._attachment.slots):
                self._tell(findings.read_at_step(self._steps.current.number))

    def _tell_idle(self, step: Step) -> None:
        listed, current = (w and w.ref() for w in (self._optimizers.ender.listed, self._optimizers.ender.current))
        steps = self._optimizers.ender.waited
        self._tell(findings.idle_optimizer(step.number, type(listed).__name__, steps, type(current).__name__))

    def _adopt(self, scaler: Any, step: Step) -> None:
        """A scaler that the lens was not given calls an optimizer's step."""
        if self._steps.scaling.scaler is None and scaler.is_enabled():
            self._steps.scaling = Scaling(scaler)
            self._steps.scaling.look(opens=True)
            scale = self._steps.scaling.scale()
            step.scale = scale
            self._sink(ScaleFound(step.number, scale))
            self._tell(findings.scaler_found(step.number, scale))
