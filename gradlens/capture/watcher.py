"""A watched model: the one owner of the open step. Engine and optimizers report here, and events go from here to a sink.

    engine: a pass begins, a hook fires, the pass ends   ->  Watcher  ->  Reading, PassEnded, PassFailed
    optimizers: a step begins, it has ended              ->           ->  WeightsBefore, Reading, Update, StepClosed

Hooks only note. What to read of a pass is decided in `readings`, whose numbers may stand for whose in `provenance`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.optim import Optimizer
from torch.utils.hooks import unserializable_hook

from gradlens import _torch, findings
from gradlens.capture import provenance
from gradlens.capture.arrivals import HELD_BYTES, Arrival, PlainPass, State
from gradlens.capture.attachment import Attachment, Slot
from gradlens.capture.auditor import Auditor
from gradlens.capture.engine import Engine, Pass, Run, TrainingThreads, running
from gradlens.capture.events import (
    GradientFacts,
    LossSeen,
    Noted,
    PassFailed,
    Reading,
    ScaleFound,
    Sink,
    StepClosed,
    TableDone,
    Update,
    WeightsBefore,
)
from gradlens.capture.guards import Guard, eagerly, guarded
from gradlens.capture.losses import Roots, loss_of, roots_elsewhere
from gradlens.capture.marks import Marks, version
from gradlens.capture.optimizers import CallStack, Optimizers, WatchedOptimizer, found_inf, positive_rates
from gradlens.capture.readings import PassReader, UsedNotes, changed, gradients_at
from gradlens.capture.scaling import Scaling
from gradlens.capture.step import READ_PASSES, Phase, Step
from gradlens.records import Finding, Note, Stage

#: Steps between full scans of the module tree. What registers a parameter in the usual way is seen at once; this finds
#: writes past torch's own registration, and costs about 2 us a parameter when it happens.
SCAN_EVERY = 16


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


class Hooks:
    """The hooks of parameters: what they see goes to the arrivals of the pass that they belong to."""

    def __init__(self, engine: Engine, reader: PassReader, stages: frozenset[str], guard: Guard) -> None:
        self._engine, self._reader, self.guard = engine, reader, guard
        self._backward = Stage.BACKWARD in stages
        self.plain = PlainPass()

    def of(self, slot: Slot) -> tuple[Callable[[Tensor | None], None], Callable[[Tensor], None]]:
        """The two hooks of a slot. They hold the slot and this object weakly, never the parameter, and never raise."""
        plain, task, came, accumulated = self.plain, _torch.current_task, self.came, self.accumulated

        @unserializable_hook  # type: ignore[untyped-decorator]
        def on_gradient(g: Tensor | None) -> None:
            if g is None or task() != plain.task or slot in plain.special:
                came(slot, g)

        @unserializable_hook  # type: ignore[untyped-decorator]
        def on_accumulated(parameter: Tensor) -> None:
            if task() == plain.task and slot not in plain.special:
                plain.noted.append(slot)
            else:
                accumulated(slot, parameter)

        for hook in (on_gradient, on_accumulated):
            hook.gradlens = True  # so that another lens on this parameter knows them
            hook._torchdynamo_disable = True  # a compiled training step calls them, and does not trace them
        return on_gradient, on_accumulated

    @guarded("gradient hook", eager=False)
    def came(self, slot: Slot, g: Tensor | None) -> None:
        """The tensor hook, where more is to be done than to note."""
        current = self._engine.current(slot.tensor)
        if current is None:
            return
        arrivals = current.arrivals
        arrivals.settle()
        parameter = None if g is None else slot.tensor()
        if g is None or parameter is None:
            if g is None:
                arrivals.arrive(slot, Arrival.NONE)
            return
        shared = slot.shared(parameter)
        current.step.own = current.step.own and not shared
        onto = parameter.grad is not None
        if not (slot.read_in_hook or shared or (self._reader.local and self._backward)) or not current.read:
            arrivals.arrive(slot, Arrival.ONTO if onto else Arrival.FRESH, g)
            return
        current.step.fresh = current.step.fresh and not onto
        nested = current.nested and self._backward
        if arrivals.arrive(slot, Arrival.NOW_NESTED if nested else Arrival.NOW, g):
            self._read_now(current, slot, g)

    @guarded("accumulation hook", eager=False)
    def accumulated(self, slot: Slot, parameter: Tensor) -> None:
        """The post hook, where more is to be done than to note."""
        current = self._engine.current(slot.tensor)
        if current is None:
            return
        arrivals = current.arrivals
        arrivals.settle()
        if self._reader.local and parameter.grad is not None:
            current.last = slot, id(parameter.grad), version(parameter.grad)
        arrivals.arrive(slot, Arrival.ACCUMULATED)
        if arrivals.bytes > HELD_BYTES and not current.nested:
            self._read_pending(current)

    @eagerly
    def _read_now(self, current: Pass, slot: Slot, g: Tensor) -> None:
        self._reader.read_now(current, slot, g)

    @eagerly
    def _read_pending(self, current: Pass) -> None:
        self._reader.read_pending(current)

    def taken(self, parameters: set[int]) -> None:
        """An optimizer is about to use these, by id, inside a backward, and may free them: they are read now."""
        current = self._engine.by_task.get(_torch.current_task())
        if current is None or not self._backward or not current.read:
            return
        with self._engine.lock:
            current.arrivals.settle()
            for slot in [slot for slot in current.arrivals.of(State.FRESH) if slot.hooked in parameters]:
                parameter = slot.tensor()
                if parameter is not None and parameter.grad is not None:
                    current.arrivals.arrive(slot, Arrival.TAKEN)
                    self._reader.read_now(current, slot, parameter.grad)


class Watcher:
    """Hooks on a model and its optimizers, and what they see, for one lens."""

    def __init__(self, watched: Watched, sink: Sink, guard: Guard, *, may_raise: Callable[[], None] = lambda: None) -> None:
        self.attachment, self._sink, self.guard, self.may_raise = watched.attachment, sink, guard, may_raise
        self._schedule, self._stages = watched.schedule, watched.stages
        self._used = Stage.USED in watched.stages
        self._weights = watched.updates and self._used
        self.scaling = Scaling(watched.scaler)
        self.threads = TrainingThreads()
        self.engine = Engine(self, guard)
        self.reader = PassReader(self.attachment, self.engine, sink, watched.stages, local=watched.local)
        self.hooks = Hooks(self.engine, self.reader, watched.stages, guard)
        self.optimizers = Optimizers(watched.optimizers, watched.wrapped, self.attachment, self, guard)
        self.auditor = Auditor(self.attachment, self._alive, lambda fact: sink(Noted(fact)), guard.fault)
        self.roots = Roots()
        self._notes = UsedNotes(self.attachment, self._reached)
        self._by_hand = WatchedOptimizer()  # stands in where the user moves the weights
        self.explicit = False  # `lens.step()` says where a step ends
        self.step = Step(watched.first_step, observed=self._ask(watched.first_step))
        self._lingering: Step | None = None  # closed, and an optimizer that has not stepped may still belong to it
        self._due: list[tuple[Step, WatchedOptimizer, Any]] = []  # updates whose wrapper may still move weights
        self._handles: list[Any] = []
        self._dirty = False
        self._told = set[str]()
        self._all_written = 0  # steps in a row in which every gradient was written by hand
        self._left: list[tuple[Slot, Tensor]] = []  # without an optimizer: what the last backward left in `.grad`

    # --- life -------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Start watching."""
        _torch.leave_to_python()
        self.optimizers.attach()
        self._handles = [
            register_module_parameter_registration_hook(self.registered),
            register_module_module_registration_hook(self.registered),
        ]
        self._follow_schedule()
        self._open_marks()

    def detach(self) -> None:
        """Leave the model as it was."""
        self.optimizers.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.attachment.unhook_all()

    @guarded("a parameter's replacement", eager=False)
    def registered(self, module: nn.Module, name: str, registered: Any) -> None:
        """A parameter or module is registered somewhere: the slots are scanned again.

        What replaces a parameter is watched at once: were all of them replaced, no hook would notice the next backward.
        """
        self._dirty = True
        if isinstance(registered, Tensor) and self.watches:
            with self.engine.lock:
                self.attachment.registered(module, name, registered, self.hooks.of)

    @property
    def watches(self) -> bool:
        """Whether this step has hooks on the parameters. Without an optimizer a backward counts steps, so they stay."""
        return self.step.observed or not self.optimizers.watched

    def _alive(self) -> list[Optimizer]:
        return [optimizer for watched in self.optimizers.watched if (optimizer := watched.ref()) is not None]

    def _follow_schedule(self) -> None:
        if self.watches:
            self.attachment.hook_all(self.hooks.of)
        else:
            self.attachment.unhook_all()

    def _ask(self, number: int) -> bool:
        try:
            return bool(self._schedule(number))
        except Exception as error:  # noqa: BLE001 - a user's schedule must not break a training step
            self.guard.fault("schedule", error)
            return True

    def _rescan(self) -> None:
        if self._dirty or self.attachment.lost or self.step.number % SCAN_EVERY == 0:
            self._dirty = False
            if self.attachment.rescan():
                self.attachment.refresh()

    def _tell(self, finding: Finding, *, about: str = "") -> None:
        """Say it once."""
        key = finding.rule + about
        if key not in self._told:
            self._told.add(key)
            self._sink(finding)

    # --- passes -----------------------------------------------------------------------------------------------------

    def pass_begins(self, run: Run, entered: Pass) -> None:
        """An outermost backward starts, and has so far reached its first hook."""
        if run.depth == 1 and not run.nested:
            self.threads.note(self.step.number)
        self._finish_due()
        self._let_go()
        self._close_skipped()
        if not self.optimizers.watched and self.step.open and not self.explicit:
            self.close_step()
        step = self.step
        with self.attachment.cache:
            if step.open and step.stepped and self._used:
                self._sink(TableDone(step.used_key))
            entered.step, entered.read = step, not step.full
            if entered.read:
                self.attachment.refresh()
                if self._dirty or self.attachment.lost:
                    self._rescan()
                # What was unfrozen or added since the last step may be reached later in this very pass.
                entered.late.update(self.attachment.slots[i] for i in self.attachment.hook_all(self.hooks.of))
            self.scaling.look(anew=not step.open)
            entered.scale = self.scaling.scale()
            step.begin()
            if entered.read:
                self._look_at_roots(run, entered)
            self._start_plain(entered)

    def _look_at_roots(self, run: Run, entered: Pass) -> None:
        """What backward was called on: the loss, and its graph."""
        roots = roots_elsewhere() if run.depth == 0 and not run.roots else run.roots
        entered.loss = loss_of(roots, entered.scale)
        entered.root = roots[0] if len(roots) == 1 else None
        self.auditor.pass_begins(roots, self.step.number, entered.loss)

    def _start_plain(self, entered: Pass) -> None:
        """Let the hooks of this pass only note, as far as nothing else needs to be done in them."""
        plain, attachment = self.hooks.plain, self.attachment
        plain.stop()  # gradients may come from two sides
        if self.reader.local or self.engine.passes or len(self.engine.threads) > 1:
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

    def pass_ended(self, entered: Pass) -> None:
        """The pass is over: read what lived to its end."""
        entered.arrivals.settle()
        if not entered.arrivals.any:
            return  # only tensor hooks: torch.autograd.grad
        if entered.number is None and entered.step is not self.step:
            entered.step = self.step  # another thread has closed the one that it began in
            self.step.begin()
        step = entered.step
        with self.engine.lock, self.attachment.cache:
            if entered.read:
                key = self.reader.key(Stage.BACKWARD, entered)  # the pass has its number, whatever is read of it
                if entered.loss is not None:
                    self.roots.add(entered.root, key.step, entered.loss)
                    self._sink(LossSeen(key.step, key.backward, entered.loss))
                entered.root = None
                self.reader.read_pass(entered)
                step.scale = entered.scale
                step.passes += 1
                self.reader.mark_end(entered)
                if step.full and self.optimizers.watched:
                    self._thin(entered)
            else:
                step.passes += 1
            self._after_pass(step)

    def pass_failed(self, entered: Pass) -> None:
        """What was read of the pass counts for nothing."""
        if entered.number is not None:
            self._sink(PassFailed(self.reader.key(Stage.BACKWARD, entered)))
            entered.step.give_back(entered.number)

    def _after_pass(self, step: Step) -> None:
        if self.optimizers.watched:
            if step.phase is Phase.DUE and step is self.step:
                self.close_step()
            elif self._weights and step.observed and any(w.wrapped for w in self.optimizers.watched):
                self._keep_wrapped(step)
        elif step.observed:
            if self._weights:
                self._sink(self._before(self.optimizers.held(self._by_hand)))
            self._by_hand.read = False
            if self._used:
                self._hold_gradients()

    def _hold_gradients(self) -> None:
        """Hold what is in `.grad`, if that is little: the user's loop consumes it before we are called again."""
        self._left, size = [], 0
        for slot, tensor in zip(self.attachment.slots, self.attachment.tensors(), strict=True):
            gradient = None if tensor is None else tensor.grad
            if gradient is not None:
                self._left.append((slot, gradient))
                size += gradient.numel() * gradient.element_size()
        if size > HELD_BYTES:
            self._left = []

    def _thin(self, entered: Pass) -> None:
        """So many backwards were read that the next ones of this step are only counted, by one hook that stays."""
        self._tell(findings.many_backwards(self.step.number, READ_PASSES))
        step = self.step
        step.ending, step.fresh = Marks(), False
        first = next(iter(entered.arrivals.arrived()), None)
        for slot in self.attachment.slots:
            if slot is not first and slot.hooked:
                slot.detach()

    def finish_passes(self) -> None:
        """Finish the passes whose end nobody called; outside a backward."""
        self.engine.finish_ended_passes()
        if self._dirty and not running():
            with self.engine.lock:
                self._rescan()  # no hook may have fired at all, as where everything that trains is new

    def _reached(self, step: Step, slot: Slot) -> bool:
        """Whether a pass of this step reached the slot: one that is over, or one that is still going on."""
        return slot in step.reached or any(p.step is step and p.arrivals.has(slot) for p in self.engine.passes)

    # --- optimizers -------------------------------------------------------------------------------------------------

    def used_within(self, parameters: set[int]) -> None:
        """An optimizer uses gradients up inside a backward that are still to be read."""
        self.hooks.taken(parameters)

    def step_begins(self, watched: WatchedOptimizer, optimizer: Optimizer, stack: CallStack, closure: Any) -> Any:
        """A watched optimizer is about to step; returns a closure to call in place of its own, or None."""
        if not running():
            self.threads.note(self.step.number)
            if closure is None:
                self.finish_passes()
        self._finish_due()
        with self.engine.lock, self.attachment.cache:
            step = watched.step = self._step_of(watched)
            watched.read, watched.closure_key = False, None
            if closure is not None:
                step.moves()
            if stack.scaler is not None:
                self._adopt(stack.scaler, step)
            if not step.observed:
                return None
            self.auditor.optimizer_steps(self.optimizers.watched.index(watched), optimizer, step.number)
            held = self.optimizers.held(watched)
            if self._weights:
                self._keep(step, watched, held)
            if closure is None and getattr(optimizer, "grad_scale", None) is None:
                self._read_used(step, watched, held=held)
        return None if closure is None or not self._used else self._listening(watched, closure)

    def _step_of(self, watched: WatchedOptimizer) -> Step:
        """The step that an optimizer belongs to which steps now: the one whose backward it consumes."""
        last = self._lingering
        waits = last is not None and watched not in last.stepped and not self.step.open and not self.engine.passes
        return last if last is not None and waits else self.step

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
            self.engine.finish_ended_passes()
        step = watched.step
        if step is None or not step.observed:
            return
        with self.engine.lock, self.attachment.cache:
            self._read_used(step, watched, replaces=watched.closure_key)
            watched.closure_key = step.used_key

    def step_ended(self, watched: WatchedOptimizer, optimizer: Optimizer, stack: CallStack, closure: Any) -> None:
        """A watched optimizer has stepped."""
        step = self.step if watched.step is None else watched.step
        watched.step = None
        try:
            if closure is not None and not running():
                self.finish_passes()
            if step.observed:
                with self.engine.lock, self.attachment.cache:
                    self._read_after(step, watched, optimizer, stack)
        finally:  # the step is over, whatever of ours failed
            step.stepped[watched] = step.passes
            step.moves()
            self._after_step(step, watched)

    def _after_step(self, step: Step, watched: WatchedOptimizer) -> None:
        if step is self._lingering:
            held = self.optimizers.held(watched)
            self.step.opening.update(held, gradients_at(held.values()))
            if not self._awaited(step):
                self._let_go()
            return
        idle = self.optimizers.ender.current
        if not self.optimizers.ender.ends(watched):
            return
        if idle is not self.optimizers.ender.current is not self.optimizers.ender.listed:
            self._tell_idle(step)
        if running():
            step.phase = Phase.DUE
        else:
            self.close_step()

    def _read_after(self, step: Step, watched: WatchedOptimizer, optimizer: Optimizer, stack: CallStack) -> None:
        skipped = found_inf(optimizer)
        if not watched.read:
            self._read_used(step, watched, skipped=skipped, late=True)
        if not self._weights:
            return
        if stack.within is not None:
            watched.wrapped = True
            self._due.append((step, watched, skipped))
        else:
            self._read_update(step, watched, optimizer, skipped)

    def foreign_step_ended(self, optimizer: Optimizer, moved: Sequence[Slot], *, reported: bool) -> None:
        """An optimizer that is none of the lens' has stepped."""
        if reported:
            names = [slot.name for slot in moved]
            self._tell(findings.unknown_optimizer(self.step.number, type(optimizer).__name__, names))
        elif self._due:
            self._finish_due()
        elif not self.optimizers.watched:
            self._look_again()

    def _look_again(self) -> None:
        """Where an optimizer's parameters replaced all of ours no hook would ever fire."""
        silent = not self.engine.threads
        if not running() and (silent or self.attachment.unhooked()):
            with self.engine.lock:
                self.attachment.rescan()
                self.attachment.refresh()
                self._follow_schedule()
            if silent and any(slot.flat_slice is not None for slot in self.attachment.slots):
                self._tell(findings.read_at_step(self.step.number))

    def _tell_idle(self, step: Step) -> None:
        listed, current = (w and w.ref() for w in (self.optimizers.ender.listed, self.optimizers.ender.current))
        steps = self.optimizers.ender.waited
        self._tell(findings.idle_optimizer(step.number, type(listed).__name__, steps, type(current).__name__))

    def _adopt(self, scaler: Any, step: Step) -> None:
        """A scaler that the lens was not given calls an optimizer's step."""
        if self.scaling.scaler is None and scaler.is_enabled():
            self.scaling = Scaling(scaler)
            self.scaling.look(anew=True)
            scale = self.scaling.scale()
            step.scale = scale
            self._sink(ScaleFound(step.number, scale))
            self._tell(findings.scaler_found(step.number, scale))

    # --- readings of an optimizer's step ----------------------------------------------------------------------------

    def _before(self, held: Mapping[Slot, Tensor]) -> WeightsBefore:
        return WeightsBefore(self.attachment.parameters, self._rows(held), list(held.values()))

    def _keep(self, step: Step, watched: WatchedOptimizer, held: Mapping[Slot, Tensor]) -> None:
        """Keep the weights before the step; of what several optimizers move one after another, those before the first."""
        if len(self.optimizers.watched) > 1 or watched.wrapped:
            key = step.used_key
            held = {slot: w for slot, w in held.items() if step.kept.get(slot) != key}
            step.kept.update(dict.fromkeys(held, key))
        self._sink(self._before(held))

    def _keep_wrapped(self, step: Step) -> None:
        """Something around an optimizer may move weights before its step begins: they are kept when backward ends."""
        with self.attachment.cache:
            for watched in self.optimizers.watched:
                if watched.wrapped:
                    held = self.optimizers.held(watched)
                    step.kept.update(dict.fromkeys(held, step.used_key))
                    self._sink(self._before(held))

    def _rows(self, slots: Mapping[Slot, Any]) -> list[int]:
        return list(map(self.attachment.rows.__getitem__, slots))

    def _facts(self, step: Step, watched: WatchedOptimizer) -> GradientFacts:
        single = step.passes == 1 and step.fresh and not self.reader.local
        return GradientFacts(single=single, own=step.own, untouched=watched.untouched)

    def _read_used(
        self,
        step: Step,
        watched: WatchedOptimizer,
        *,
        skipped: bool | Tensor = False,
        late: bool = False,
        held: Mapping[Slot, Tensor] | None = None,
        replaces: Any = None,
        gradients: Sequence[Tensor | None] | None = None,
        unknown: bool = False,
    ) -> None:
        """Read the gradients that this optimizer consumes. `held` is what it moves, where that is known."""
        watched.read = True
        held = self.optimizers.held(watched) if held is None else held
        now = gradients_at(held.values()) if gradients is None else gradients
        present = [(slot, g, w) for (slot, w), g in zip(held.items(), now, strict=True) if g is not None and w.requires_grad]
        watched.given = Marks([slot for slot, _, _ in present], [g for _, g, _ in present])
        watched.untouched = step.ending.all_same(list(held), now)
        if not self._used:
            return
        self._sink(
            Reading(
                key=step.used_key,
                parameters=self.attachment.parameters,
                rows=[self.attachment.rows[slot] for slot, _, _ in present],
                tensors=[g for _, g, _ in present],
                weights=[w for _, _, w in present],
                scale=step.scale,
                notes=self._used_notes(step, held, now, len(present), unknown=unknown),
                copies_backward=provenance.may_copy(self._facts(step, watched), step.scale),
                skipped=skipped,
                late=late,
                gone=not present and bool(step.reached) and not unknown,
                replaces=replaces,
            )
        )

    def _used_notes(
        self, step: Step, held: Mapping[Slot, Tensor], now: Sequence[Tensor | None], present: int, *, unknown: bool
    ) -> Sequence[Note | None]:
        if unknown:
            return [Note.GONE if slot in step.reached else Note.ABSENT for slot in self.attachment.slots]
        notes = self._notes.of(step, held, now, present)
        written = bool(notes) and Note.UNCAPTURED in notes and set(notes) <= {Note.UNCAPTURED, Note.FROZEN, Note.ELSEWHERE}
        self._all_written = self._all_written + 1 if written else 0
        if self._all_written == 2:  # once may be a parameter that lost its hooks: they were set again
            names = [slot.name for slot in held if slot in self._notes.written]
            self._tell(findings.written_by_hand(step.number, names))
        return notes

    def _read_update(
        self, step: Step, watched: WatchedOptimizer, optimizer: Optimizer | None, skipped: bool | Tensor
    ) -> None:
        held = self.optimizers.held(watched)
        if optimizer is None:
            positive = [True] * len(held)
        else:
            rates = positive_rates(optimizer)
            held = {slot: w for slot, w in held.items() if id(w) in rates}
            positive = [rates[id(w)] for w in held.values()]
        used = [
            g if g is not None and watched.given.same(slot, g) else None
            for slot, g in zip(held, gradients_at(held.values()), strict=True)
        ]
        self._sink(
            Update(
                key=step.used_key,
                rows=self._rows(held),
                used=used,
                weights=list(held.values()),
                lr_positive=positive,
                facts=self._facts(step, watched),
                scale=step.scale,
                skipped=skipped,
            )
        )

    def _finish_due(self) -> None:
        """Read the updates of optimizers that were inside another object's step, which is over now."""
        due, self._due = self._due, []
        for step, watched, skipped in due:
            optimizer = watched.ref()
            if optimizer is not None:
                with self.engine.lock, self.attachment.cache:
                    self._read_update(step, watched, optimizer, skipped)
        if due and self._lingering is not None and not self._awaited(self._lingering):
            self._let_go()

    # --- steps ------------------------------------------------------------------------------------------------------

    def close_skipped_step(self) -> None:
        """Close the step that the scaler skipped, since no hook says so, and finish what waits for the next sign."""
        if not running() and not self.elsewhere():
            self._finish_due()
            if self._lingering is not None:
                self._sink(StepClosed(self._lingering.number, self._lingering.scalars))  # what there is of it by now
            if self.step.open:
                self.finish_passes()
                self._close_skipped()

    def elsewhere(self) -> bool:
        """Whether another thread trains: what it has open is then left alone."""
        return self.threads.elsewhere(self.step.number)

    def _close_skipped(self) -> None:
        if self.step.open:
            skipped = self._read_skipped(self.step)
            if sum(self.optimizers.ender.ends(watched) for watched in skipped):  # each is asked
                self.close_step()

    def _read_skipped(self, step: Step) -> list[WatchedOptimizer]:
        """The optimizers that the scaler let do nothing in this step; what it kept from them is read."""
        if self.scaling.scaler is None:
            return []
        skipped = [
            watched
            for watched in self.optimizers.watched
            if watched not in step.stepped and (o := watched.ref()) is not None and self.scaling.stepped(o)
        ]
        for watched in skipped:
            step.stepped[watched] = step.passes
            if step.observed:
                self._read_used(step, watched, skipped=True)  # scaler.step() has unscaled what it then skipped
        return skipped

    def close_step(self) -> None:
        """The step ended: hand it over, look at the model again, and get ready for the next."""
        if self.guard.forked():
            return  # whose parent may have held the lock
        step = self.step
        self._safely("end of a step", self._read_rest, step)
        self.step = Step(step.number + 1, observed=self._ask(step.number + 1))
        self._safely("start of a step", self._prepare)
        self._let_go()
        self._lingering = step
        if not self._awaited(step):
            self._let_go()

    def _safely(self, where: str, call: Callable[..., Any], *args: Any) -> None:
        try:
            with self.engine.lock, self.attachment.cache:
                call(*args)
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
            self.guard.fault(where, error)

    def _prepare(self) -> None:
        self._rescan()
        self._open_marks()
        self._follow_schedule()

    def _open_marks(self) -> None:
        """Remember what `.grad` is now, which matters only if the step has hooks."""
        if self.watches:
            slots = self.attachment.slots
            there = [(s, t.grad) for s, t in zip(slots, self.attachment.tensors(), strict=True) if t is not None]
            self.step.opening = Marks()
            self.step.opening.update([s for s, _ in there], [g for _, g in there])
            written = self._notes.written
            if written:
                self.step.opening.hold((g for s, g in there if g is not None and s in written), HELD_BYTES)

    def _awaited(self, step: Step) -> bool:
        """Whether an optimizer that has not stepped may still belong to the step that was closed."""
        if any(due is step for due, _, _ in self._due):
            return True
        return self._used and any(w not in step.stepped and w.ref() is not None for w in self.optimizers.watched)

    def _let_go(self) -> None:
        """Nothing more comes of the step that was closed last."""
        step, self._lingering = self._lingering, None
        if step is not None:
            self._safely("end of a step", self._read_skipped, step)
            self._sink(StepClosed(step.number, step.scalars))

    def _read_rest(self, step: Step) -> None:
        """What is read, and told, once the step is over."""
        self._read_skipped(step)
        if not self.optimizers.watched and step.observed and step.passes:
            self._read_by_hand(step)
            if self._weights:
                self._read_update(step, self._by_hand, None, skipped=False)
            self._by_hand.read, self._left = False, []
        self._tell_rest(step)

    def _read_by_hand(self, step: Step) -> None:
        """Without an optimizer: read what the user's loop has consumed, as far as that is still there."""
        held, left = self.optimizers.held(self._by_hand), dict(self._left)
        given = [_consumed(step, slot, w.grad, left.get(slot)) for slot, w in held.items()]
        if any(g is None and slot in step.reached for slot, g in zip(held, given, strict=True)):
            self._tell(findings.used_unknown(step.number))
            self._read_used(step, self._by_hand, gradients=[None] * len(held), unknown=True)
        else:
            self._read_used(step, self._by_hand, gradients=given)

    def _tell_rest(self, step: Step) -> None:
        attachment = self.attachment
        if self._notes.read_at_step:
            self._tell(findings.read_at_step(step.number))
        if attachment.flat:
            self._tell(findings.flat_parameters(step.number))
        if Stage.REDUCED in self._stages and step.observed and step.passes:
            if not step.averaged:
                self._tell(findings.not_averaged(step.number))
            elif self.reader.local and attachment.ignored:
                ignored = [slot.name for slot in attachment.slots if slot in attachment.ignored]
                self._tell(findings.not_sharded(step.number, ignored))

    def explicit_step(self) -> None:
        """`lens.step()`."""
        self.explicit = True
        self.finish_passes()
        self.close_step()

    def release(self) -> None:
        """The lens is closed: what there is of the open step is handed over."""
        if self.step.open and not self.optimizers.watched:
            self.close_step()
        self._let_go()
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
        if self.scaling.scaler is None or not self.step.open:
            return 1.0
        for watched in self.optimizers.watched:
            if slot in self.optimizers.held(watched):
                done = watched in self.step.stepped or self.scaling.unscaled(watched.ref())
                return 1.0 if done else self.step.scale
        return self.step.scale


def _consumed(step: Step, slot: Slot, now: Tensor | None, left: Tensor | None) -> Tensor | None:
    """What is in `.grad`, or else what the last backward left there; not what has been zeroed since."""
    for gradient in (now, left):
        if gradient is not None and (step.ending.same(slot, gradient) or not _zeroed(gradient)):
            return gradient
    return None


def _zeroed(gradient: Tensor) -> bool:
    """Whether nothing is left of a gradient. On a device the host would have to wait, and it is taken to be there."""
    return gradient.device.type == "cpu" and gradient.layout is torch.strided and not bool(gradient.count_nonzero())
