"""A watched model: what a lens has of capture. It puts the parts together, starts and stops them, and answers questions.

    engine: a pass begins, a hook fires, the pass ends   ->  Passes  ->  Reading, PassEnded, PassFailed
    optimizers: a step begins, it has ended              ->  Moves   ->  WeightsBefore, Reading, Update
    Steps: the open step, and what closes it                         ->  StepClosed

Hooks only note. What to read of a pass is decided in `readings`, of an optimizer's step in `step_reader`, whose numbers may
stand for whose in `provenance`. A part of a step that goes by the book is read by `steady` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer

from gradlens import _torch
from gradlens.capture.activations import ForwardWatch, Read
from gradlens.capture.attachment import Attachment, Slot
from gradlens.capture.auditor import Auditor
from gradlens.capture.engine import Engine, TrainingThreads, running
from gradlens.capture.events import Noted, Sink, StepClosed
from gradlens.capture.guards import Guard, guarded
from gradlens.capture.hooks import Hooks
from gradlens.capture.losses import Roots
from gradlens.capture.moves import Moves
from gradlens.capture.optimizers import Optimizers
from gradlens.capture.passes import Passes
from gradlens.capture.readings import PassReader, changed
from gradlens.capture.scaling import Scaling
from gradlens.capture.steady import SteadyRoute
from gradlens.capture.step import Step
from gradlens.capture.step_reader import StepReader
from gradlens.capture.steps import Steps
from gradlens.capture.workings import Workings
from gradlens.records import Finding, Stage


@dataclass(frozen=True)
class Watched:
    """What is watched, and how."""

    attachment: Attachment
    optimizers: Sequence[Optimizer]
    wrapped: Sequence[bool]  #: of each, whether something around it may move weights too
    schedule: Callable[[int], bool]
    scaler: Any
    stages: frozenset[str]
    updates: bool  #: whether the weights' moves are measured
    local: bool  #: gradients are mixed with other ranks' before a pass ends
    first_step: int = 0
    read_output: Read | None = None  #: takes sums of what modules make; None: they are not looked at


class Watcher:
    """Hooks on a model and its optimizers, and what they see, for one lens."""

    def __init__(self, watched: Watched, sink: Sink, guard: Guard, *, may_raise: Callable[[], None] = lambda: None) -> None:
        self.attachment, self._sink, self.guard = watched.attachment, sink, guard
        attachment, stages, local, used = watched.attachment, watched.stages, watched.local, Stage.USED in watched.stages
        updates = watched.updates and used
        self._told = set[str]()
        self.threads, self.roots = TrainingThreads(), Roots()
        self.auditor = Auditor(attachment, self._alive, lambda fact: sink(Noted(fact)), guard.fault)
        self.activations = ForwardWatch(attachment, guard, watched.read_output, self._reads, self._tell)
        self.engine = engine = Engine(guard)
        self.optimizers = optimizers = Optimizers(watched.optimizers, watched.wrapped, attachment, guard)
        self._reader = PassReader(attachment, engine, sink, stages, local=local)
        self._hooks = Hooks(engine, self._reader, stages, guard)
        step_reader = StepReader(attachment, engine, optimizers, sink, self._tell, used=used, updates=updates, local=local)
        self.steady = SteadyRoute(attachment, engine, optimizers, sink, stages, updates=updates, local=local)
        workings = Workings(
            *(attachment, stages, local, sink, guard, self._tell, self.threads, self.roots, self.auditor, self.activations),
            *(engine, optimizers, self._reader, self._hooks, step_reader, self.steady),
        )
        self._steps = Steps(workings, watched.schedule, watched.scaler, watched.first_step)
        engine.listener = Passes(workings, self._steps)
        optimizers.listener = Moves(workings, self._steps, may_raise)
        self._handles: list[Any] = []

    @property
    def step(self) -> Step:
        """The step that is open, or opens next."""
        return self._steps.current

    @property
    def scaling(self) -> Scaling:
        """What the scaler did to the gradients of the open step."""
        return self._steps.scaling

    def _tell(self, finding: Finding, *, about: str = "") -> None:
        """Say it once."""
        key = finding.rule + about
        if key not in self._told:
            self._told.add(key)
            self._sink(finding)

    # --- life -------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Start watching."""
        _torch.leave_to_python()
        self.optimizers.attach()
        self._handles = [
            register_module_parameter_registration_hook(self.registered),
            register_module_module_registration_hook(self.registered),
        ]
        self._steps.follow_schedule()
        self._steps.open_marks()
        self.activations.attach()

    def detach(self) -> None:
        """Leave the model as it was."""
        self.optimizers.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.activations.detach()
        self.attachment.unhook_all()
        self._forget()

    def _forget(self) -> None:
        """What a backward or an optimizer's step that is not over, or that raised, has left here is not to live on."""
        self.engine.forget_all()
        self._hooks.plain.stop()
        self.steady.forget()

    @guarded("a parameter's replacement", eager=False)
    def registered(self, module: nn.Module, name: str, registered: Any) -> None:
        """A parameter or module is registered somewhere: the slots are scanned again.

        What replaces a parameter is watched at once: were all of them replaced, no hook would notice the next backward.
        """
        self._steps.dirty = True
        if isinstance(registered, Tensor) and self._steps.watches:
            with self.engine.lock:
                self.attachment.registered(module, name, registered, self._hooks.of)

    def _reads(self) -> bool:
        """Whether what comes now is of an observed step."""
        return self.step.observed and not self.step.full

    def _alive(self) -> list[Optimizer]:
        return [optimizer for watched in self.optimizers.watched if (optimizer := watched.ref()) is not None]

    # --- the end of steps, as the user says it ----------------------------------------------------------------------

    def close_skipped_step(self) -> None:
        """Close the step that the scaler skipped, since no hook says so, and finish what waits for the next sign."""
        if not running() and not self.elsewhere():
            self._steps.finish_due()
            if self._steps.lingering is not None:
                self._sink(
                    StepClosed(self._steps.lingering.number, self._steps.lingering.scalars)
                )  # what there is of it by now
            if self.step.open:
                self._steps.finish_passes()
                self._steps.close_skipped()

    def elsewhere(self) -> bool:
        """Whether another thread trains: what it has open is then left alone."""
        return self.threads.elsewhere(self.step.number)

    def explicit_step(self) -> None:
        """`lens.step()`, which no hook times."""
        self.guard.timed(self._end_explicitly)

    def _end_explicitly(self) -> None:
        self._steps.explicit = True
        self._steps.finish_passes()
        self._steps.close()

    def release(self) -> None:
        """The lens is closed: what there is of the open step is handed over."""
        if self.step.open and not self.optimizers.watched:
            self._steps.close()
        if self.activations.heard:
            self.activations.step_ended(self.step.number, self.step.passes)
        self._steps.let_go()
        if self.step.open:
            self._sink(StepClosed(self.step.number, self.step.scalars))

    # --- questions --------------------------------------------------------------------------------------------------

    def observe(self, scalars: Mapping[str, Any]) -> None:
        """Attach values to this step, or the next where none is open."""
        self.step.scalars.update(scalars)

    def gradients_unheard(self) -> bool:
        """Whether gradients came since the last step whose hooks FSDP1 suppresses."""
        return any(
            slot.flat_slice is not None and (t := slot.tensor()) is not None and changed(self.step, slot, t)
            for slot in self.attachment.slots
        )

    def averaged(self) -> bool:
        """Over ranks: whether `.grad` is of all of them, as far as is known."""
        slices = [slot.flat_slice for slot in self.attachment.slots if slot.flat_slice is not None]
        return all(each.averaged() for each in slices) if slices else self.step.averaged

    def scale_now(self, slot: Slot) -> float | Tensor:
        """What this parameter's `.grad` still has to be divided by."""
        if self._steps.scaling.scaler is None or not self.step.open:
            return 1.0
        for watched in self.optimizers.watched:
            if slot in self.optimizers.held(watched):
                done = watched in self.step.stepped or self._steps.scaling.unscaled(watched.ref())
                return 1.0 if done else self.step.scale
        return self.step.scale
