"""Backward passes as they come: which step each is part of, how its hooks go about it, and what is read when it is over."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gradlens import _torch, findings
from gradlens.capture.arrivals import State
from gradlens.capture.callers import NOBODY, loops
from gradlens.capture.engine import Pass, Run
from gradlens.capture.events import LossSeen, Noted, PassFailed, TableDone
from gradlens.capture.losses import loss_of, run_elsewhere
from gradlens.capture.marks import Marks
from gradlens.capture.step import READ_PASSES, Phase, Step
from gradlens.capture.steps import Steps
from gradlens.capture.workings import Workings
from gradlens.records import Stage


class Passes:
    """Is told of passes by the engine."""

    def __init__(self, workings: Workings, steps: Steps) -> None:
        self._attachment, self._engine, self._optimizers = workings.attachment, workings.engine, workings.optimizers
        self._hooks, self._reader, self._step_reader = workings.hooks, workings.reader, workings.step_reader
        self._steady, self._auditor, self._roots = workings.steady, workings.auditor, workings.roots
        self._threads, self._sink, self._tell, self._used = workings.threads, workings.sink, workings.tell, workings.used
        self._steps, self._activations, self._guard = steps, workings.activations, workings.guard

    def pass_begins(self, run: Run, entered: Pass) -> None:
        """An outermost backward starts, and has so far reached its first hook."""
        if run.depth == 1 and not run.nested:
            self._threads.note(self._steps.current.number)
        if self._steps.due:
            self._steps.finish_due()
        if self._steps.lingering is not None or self._steps.current.stepped:
            self._steps.backward_comes()
        if self._steps.current.phase is not Phase.IDLE:
            self._steps.close_skipped()
        if not self._optimizers.watched and self._steps.current.open and not self._steps.explicit:
            self._steps.close()
        step = self._steps.current
        if not run.depth:
            run = _shown(run)
        found = NOBODY if run.caller is None else loops(run.caller)
        step.loops = found if step.loops is None else step.loops & found
        within_a_call = step.phase is not Phase.IDLE and self._steps.within_a_call
        if step.stepped and step.phase is not Phase.IDLE and self._used and not within_a_call:
            self._sink(TableDone(step.used_key))
        if not self._steps.dirty and self._steady.pass_begins(run, entered, step, within_a_call=within_a_call):
            if self._steps.scaling.scaler is not None:
                self._look_at_scale(entered, step)
            entered.step, step.phase = step, Phase.OPEN if step.phase is Phase.IDLE else step.phase
            self._look_at_roots(run, entered)
            plain, task, onto = self._hooks.plain, _torch.current_task(), entered.onto if self._steady.own else frozenset()
            plain.start(task, entered.arrivals, set(), onto, left=self._steady.early)
            return
        with self._attachment.cache:
            entered.step, entered.read = step, not step.full
            if entered.read:
                self._attachment.refresh()
                if self._steps.dirty or self._attachment.lost:
                    self._steps.rescan()
                # What was unfrozen or added since the last step may be reached later in this very pass.
                entered.late.update(self._attachment.slots[i] for i in self._attachment.hook_all(self._hooks.of))
            self._look_at_scale(entered, step)
            step.begin()
            if entered.read:
                self._look_at_roots(run, entered)
            self._start_plain(entered)

    def _look_at_scale(self, entered: Pass, step: Step) -> None:
        self._steps.scaling.look(opens=not step.open)
        entered.scale = self._steps.scaling.scale()

    def _look_at_roots(self, run: Run, entered: Pass) -> None:
        """What backward was called on: the loss, and its graph."""
        roots = run.roots
        entered.loss = loss_of(roots, entered.scale)
        entered.root = weakref.ref(roots[0]) if len(roots) == 1 and type(roots[0]) is Tensor else None
        self._auditor.pass_begins(roots, self._steps.current.number, entered.loss)
        if self._activations.listens:
            self._of_activations(self._activations.pass_begins, entered, roots)

    def _start_plain(self, entered: Pass) -> None:
        """Let the hooks of this pass only note, as far as nothing else needs to be done in them."""
        plain, attachment = self._hooks.plain, self._attachment
        plain.stop()  # gradients may come from two sides
        if self._reader.local or self._engine.passes or len(self._engine.threads) > 1:
            return
        now = zip(attachment.slots, attachment.tensors(), strict=True)
        special = {s for s, t in now if t is not None and (t.grad is not None or s.read_in_hook or s.shared(t))}
        plain.start(_torch.current_task(), entered.arrivals, special if entered.read else set())

    def pass_pauses(self, entered: Pass) -> None:
        """Keep the fresh gradients alive: the outer pass may end without a callback, and the user may drop them."""
        arrivals = entered.arrivals
        arrivals.settle()
        for slot in arrivals.of(State.FRESH):
            parameter = slot.tensor()
            if parameter is not None and parameter.grad is not None:
                arrivals.tensors[slot] = parameter.grad

    def pass_accumulated(self, entered: Pass) -> None:
        """Over ranks: this rank's own gradients are here for the last time."""
        step = self._steps.current
        if entered.layout is None:
            return
        with self._engine.lock:
            if entered.step is step and entered.number is None:
                if self._activations.listens:  # before its table is handed on
                    self._note_activations(entered, step.number, step.next_number)
                if self._steady.pass_accumulated(entered, step):
                    return
            with self._attachment.cache:
                self._hooks.leave_the_book(entered)

    def pass_ended(self, entered: Pass) -> None:
        """The pass is over: read what lived to its end."""
        if self._reader.local:
            self._hooks.look_at_last(entered)
        if entered.layout is not None and self._ended_steadily(entered):
            return
        self._hooks.leave_the_book(entered)
        entered.arrivals.settle()
        if not entered.arrivals.any:
            return  # only tensor hooks: torch.autograd.grad
        if entered.number is None and entered.step is not self._steps.current:
            entered.step = self._steps.current  # another thread has closed the one that it began in
            self._steps.current.begin()
        step = entered.step
        with self._engine.lock, self._attachment.cache:
            if entered.read:
                key = self._reader.key(Stage.BACKWARD, entered)  # the pass has its number, whatever is read of it
                if self._activations.listens:
                    self._note_activations(entered, key.step, key.backward)
                if entered.loss is not None:
                    self._roots.add(entered.root, key.step, entered.loss)
                    self._sink(LossSeen(key.step, key.backward, entered.loss))
                self._reader.read_pass(entered)
                self._steady.general_pass_ended()
                step.scale = entered.scale
                step.passes += 1
                self._reader.mark_end(entered)
                if step.full and self._optimizers.watched:
                    self._thin(entered)
            else:
                step.passes += 1
            self._after_pass(step)

    def _ended_steadily(self, entered: Pass) -> bool:
        step = self._steps.current
        if entered.step is not step or (entered.number is not None and entered.left is None):
            return False
        with self._engine.lock:
            if entered.left is None and self._activations.listens:  # before its table is handed on
                self._note_activations(entered, step.number, step.next_number)
            if not self._steady.pass_ended(entered, step):
                return False
            if entered.loss is not None:
                self._roots.add(entered.root, step.number, entered.loss)
            step.scale = entered.scale
            step.passes += 1
        return True

    def _note_activations(self, entered: Pass, step: int, backward: int) -> None:
        """What the modules made."""
        fact = self._of_activations(self._activations.pass_ended, entered, step, backward)
        if fact is not None:
            self._sink(Noted(fact))

    def _of_activations(self, call: Callable[..., Any], *args: Any) -> Any:
        """A fault there costs these rows alone."""
        try:
            return call(*args)
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
            self._guard.fault("a pass's activations", error)
            return None

    def pass_failed(self, entered: Pass) -> None:
        """What was read of the pass counts for nothing."""
        self._of_activations(self._activations.pass_failed, entered)
        if entered.number is not None:
            self._sink(PassFailed(self._reader.key(Stage.BACKWARD, entered)))
            entered.step.give_back(entered.number)

    def _after_pass(self, step: Step) -> None:
        if self._optimizers.watched:
            if step.phase is Phase.DUE and step is self._steps.current:
                self._steps.close()
            elif self._step_reader.updates and step.observed and any(w.wrapped for w in self._optimizers.watched):
                self._step_reader.keep_wrapped(step)
        elif step.observed:
            if self._step_reader.updates:
                self._sink(self._step_reader.before(self._optimizers.held(self._step_reader.by_hand)))
            self._step_reader.by_hand.read = False
            if self._used:
                self._step_reader.hold_gradients()

    def _thin(self, entered: Pass) -> None:
        """So many backwards were read that the next ones of this step are only counted, by one hook that stays."""
        self._tell(findings.many_backwards(self._steps.current.number, READ_PASSES))
        step = self._steps.current
        step.ending, step.fresh = Marks(), False
        first = next(iter(entered.arrivals.arrived()), None)
        for slot in self._attachment.slots:
            if slot is not first and slot.hooked:
                slot.detach()


def _shown(run: Run) -> Run:
    """The run with what another thread's stack shows of it, where this one's does not."""
    elsewhere = None if run.roots else run_elsewhere()
    return run if elsewhere is None else run._replace(roots=elsewhere.f_locals.get("t_outputs", ()), caller=elsewhere)
