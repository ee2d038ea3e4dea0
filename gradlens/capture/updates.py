"""The optimizer's step, from hook to reading.

Global pre and post hooks, filtered by the optimizers of this lens. What the optimizer consumes is read before its step;
where it computes gradients itself (a closure) or unscales them in its kernel (fused, with a scaler), after it. Weights are
kept before and compared after. Without an optimizer the same is read at the boundaries of a step.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradlens.capture.attachment import Attachment, Slot
from gradlens.capture.clock import Clock
from gradlens.capture.compiling import eagerly
from gradlens.capture.gradients import Gradients, running, versions
from gradlens.capture.readings import Key, Reading, Sink, Update
from gradlens.records import Finding, Severity, Stage, Status

_STEP_WRAPPER = Optimizer.profile_hook_step(lambda self: None).__code__


def _active(optimizer: Optimizer) -> int:
    """How many calls of this optimizer's step are on the stack: a subclass that calls `super().step()` makes two."""
    count, frame = 0, sys._getframe(1)
    while frame is not None:
        if frame.f_code is _STEP_WRAPPER and frame.f_locals.get("self") is optimizer:
            count += 1
        frame = frame.f_back  # type: ignore[assignment]
    return count


class Role:
    """One optimizer of the lens, and where its step stands."""

    def __init__(self, optimizer: Optimizer | None, clock: bool) -> None:
        self.ref: Callable[[], Optimizer | None] = (lambda: None) if optimizer is None else weakref.ref(optimizer)
        self.clock = clock
        self.read = False  # this step's `used` gradients were read
        self.versions: dict[Slot, int] = {}  # of the gradients that were read
        self.unchanged = False  # `.grad` was what the last backward left
        self.stepped = False  # in the open step of the clock
        self.closes = False  # it stepped inside a backward: the step closes at its end


class Updates:
    """The optimizers of one lens."""

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        attachment: Attachment,
        clock: Clock,
        gradients: Gradients,
        sink: Sink,
        *,
        used: bool,
        weights: bool,
        settle: Callable[[], None],
        close: Callable[[], None],
        stranger: Callable[[], None],
        look: Callable[[int, Optimizer, int], None],
        fault: Callable[[str, Exception], None],
        timed: AbstractContextManager[None],
    ) -> None:
        self._look = look
        self._attachment, self._clock, self._gradients, self._sink = attachment, clock, gradients, sink
        self._used, self._weights = used, weights
        self._settle, self._close, self._fault, self._timed = settle, close, fault, timed
        self._stranger = stranger  # an optimizer stepped, and the lens was given none
        self.roles = [Role(optimizer, clock=i == len(optimizers) - 1) for i, optimizer in enumerate(optimizers)]
        self._role_of = {id(optimizer): role for optimizer, role in zip(optimizers, self.roles, strict=True)}
        self._manual = Role(None, clock=True)  # stands in where the user moves the weights by hand
        self._handles: list[Any] = []
        self._kept: dict[Slot, Key] = {}  # the table of this step whose move began with the weights that are kept
        self._index: tuple[int, dict[int, Slot]] = (-1, {})
        self._strangers: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # that were looked at, and are none of ours
        self._pid = os.getpid()
        self.unheard = False  # gradients of parameters came whose hooks FSDP1 lets never fire

    def attach(self) -> None:
        """Listen to every optimizer's step; those that are not ours pass by."""
        this = weakref.ref(self)

        @eagerly
        def pre(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            tool = this()
            if tool is not None:
                with tool._timed:
                    tool._within(optimizer)
                    tool._guarded("before the optimizer's step", tool._before, optimizer, args, kwargs)

        @eagerly
        def post(optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
            tool = this()
            if tool is not None:
                with tool._timed:
                    tool._guarded("after the optimizer's step", tool._after, optimizer, args, kwargs)
                    tool._ended(optimizer)
                    if not tool.roles:
                        tool._stranger()

        self._handles = [register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)]

    def detach(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _within(self, optimizer: Optimizer) -> None:
        """A step inside a backward, of whatever optimizer, uses gradients up that are still to be read."""
        try:
            if running() and os.getpid() == self._pid:
                self._gradients.used_within({id(p) for group in optimizer.param_groups for p in group["params"]})
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
            self._fault("an optimizer inside backward", error)

    def _guarded(self, where: str, call: Callable, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        try:
            role = self._role(optimizer)
            if role is not None and _active(optimizer) <= 1 and os.getpid() == self._pid:
                with self._gradients.lock, self._attachment.still:
                    call(role, optimizer, _closure(args, kwargs))
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
            self._fault(where, error)

    def _role(self, optimizer: Optimizer) -> Role | None:
        role = self._role_of.get(id(optimizer))
        if role is not None and role.ref() is optimizer:
            return role
        known = optimizer in self._strangers and all(role.ref() is not None for role in self.roles)
        return None if known or not self.roles else self._adopt(optimizer)

    def _adopt(self, optimizer: Optimizer) -> Role | None:
        """An optimizer that the lens was not given moves what it watches.

        It stands in for one that was given and is gone, or that it is the inner one of (as SAM has one, whose own step is
        never called). Any other moves weights unseen, and that is said.
        """
        slots, held = self._by_id(), {id(p) for group in optimizer.param_groups for p in group["params"]}
        moved = [slots[i].name for i in held if i in slots]
        if moved:
            for role in self.roles:
                given = role.ref()
                if given is None or (_holds(given, optimizer) and not _active(given)):
                    role.ref = weakref.ref(optimizer)
                    self._role_of[id(optimizer)] = role
                    return role
            if not any(_active(given) for role in self.roles if (given := role.ref()) is not None):
                self._sink.tell(_unknown(self._clock.step, optimizer, moved))
        self._strangers.add(optimizer)
        return None

    # --- one step ---------------------------------------------------------------------------------------------------

    def _before(self, role: Role, optimizer: Optimizer, closure: Any) -> None:
        if not running():
            self._gradients.trains(threading.get_ident())
            if closure is None:
                self._settle()
        role.read = False
        self._clock.moving |= closure is not None
        if not self._clock.observed:
            return
        self._look(self.roles.index(role), optimizer, self._clock.step)
        held = self._held(role)
        if self._weights:
            self._keep(held)
        if closure is None and getattr(optimizer, "grad_scale", None) is None:
            self.read_used(role, held=held)

    def _keep(self, held: Mapping[Slot, Tensor]) -> None:
        """Keep the weights before the step; of what several optimizers move one after another, those before the first."""
        if len(self.roles) > 1:
            key = self.key()
            held = {slot: w for slot, w in held.items() if self._kept.get(slot) != key}
            self._kept.update(dict.fromkeys(held, key))
        self._sink.before(self._attachment.parameters, self._rows(held), list(held.values()))

    def _after(self, role: Role, optimizer: Optimizer, closure: Any) -> None:
        try:
            if closure is not None and not running():
                self._settle()
            if self._clock.observed:
                self._read_after(role, optimizer)
        finally:
            role.stepped = self._clock.moving = True
            role.closes = role.clock  # the step is over, whatever of ours failed

    def _read_after(self, role: Role, optimizer: Optimizer) -> None:
        skipped = _skipped(optimizer)
        if not role.read:
            self.read_used(role, skipped=skipped, late=True)
        if self._weights:
            self._read_update(role, optimizer, skipped)

    def _ended(self, optimizer: Optimizer) -> None:
        """Outside the guard: closing a step is where `on_finding="raise"` raises."""
        role = self._role(optimizer)
        if role is not None and role.closes and not running() and os.getpid() == self._pid:
            role.closes = False
            self._close()
            self._sink.interrupt()

    def after_pass(self) -> None:
        """A backward pass ended; a step taken inside it closes now."""
        if any(role.closes for role in self.roles):
            for role in self.roles:
                role.closes = False
            self._close()

    def manual_pass_ended(self, *, read: bool) -> None:
        """Without an optimizer: whatever moves the weights does so from here on."""
        if self._weights:
            held = self._held(self._manual)
            self._sink.before(self._attachment.parameters, self._rows(held), list(held.values()))
        self._manual.read = False
        if read:
            self.read_used(self._manual)

    def manual_step_ends(self) -> None:
        """Without an optimizer: the step is over."""
        if not self._manual.read:
            self.read_used(self._manual)
        if self._weights:
            self._read_update(self._manual, None, skipped=False)
        self._manual.read = False

    def step_closed(self) -> None:
        """Forget the step."""
        for role in self.roles:
            role.stepped = False
        self._kept = {}

    # --- readings ---------------------------------------------------------------------------------------------------

    def slots(self, role: Role) -> list[Slot]:
        """The slots whose parameters this optimizer moves; the clock also answers for those that no optimizer has."""
        return list(self._held(role))

    def _held(self, role: Role) -> dict[Slot, Tensor]:
        """The same, with what is there now."""
        if role.clock and len(self.roles) < 2:
            everyone = zip(self._attachment.slots, self._attachment.tensors(), strict=True)
            return {slot: t for slot, t in everyone if t is not None}
        slots, mine = self._by_id(), _owned(role)
        if not role.clock:
            rows = self._gradients.rows
            chosen = sorted((slots[i] for i in mine if i in slots), key=rows.__getitem__)
        else:
            others = set().union(*(_owned(other) for other in self.roles if other is not role)) - mine
            chosen = [slot for i, slot in slots.items() if i not in others]
        return {slot: t for slot in chosen if (t := slot.tensor()) is not None}

    def _by_id(self) -> dict[int, Slot]:
        """The slots by their parameter's id, looked up once a pass: one optimizer a parameter may step inside it."""
        task = torch._C._current_graph_task_id()
        if task == -1 or task != self._index[0]:
            self._index = (task, {id(t): slot for slot in self._attachment.slots if (t := slot.tensor()) is not None})
        return self._index[1]

    def _rows(self, slots: Iterable[Slot]) -> list[int]:
        return list(map(self._gradients.rows.__getitem__, slots))

    def key(self) -> tuple[int, int, str]:
        """Of the `used` table: its backward is the step's last."""
        return (self._clock.step, self._clock.last, Stage.USED.value)

    def read_used(
        self,
        role: Role,
        *,
        skipped: bool | Tensor = False,
        late: bool = False,
        held: Mapping[Slot, Tensor] | None = None,
    ) -> None:
        """Read the gradients that this optimizer consumes. `held` is what it moves, where that is known."""
        role.read = True
        gradients, held = self._gradients, self._held(role) if held is None else held
        now = [w.grad for w in held.values()]
        present = [(slot, g, w) for (slot, w), g in zip(held.items(), now, strict=True) if g is not None and w.requires_grad]
        role.versions = dict(zip([slot for slot, _, _ in present], versions([g for _, g, _ in present]), strict=True))
        role.unchanged = gradients.own and gradients.unchanged_since_end(list(held), now)
        if not self._used:
            return
        self._sink.read(
            Reading(
                key=self.key(),
                parameters=self._attachment.parameters,
                rows=self._rows(slot for slot, _, _ in present),
                tensors=[g for _, g, _ in present],
                weights=[w for _, _, w in present],
                scale=gradients.scale,
                notes=self._notes(held, now, len(present)),
                unchanged=self._single() and role.unchanged,
                skipped=skipped,
                late=late,
                gone=not present and bool(gradients.fired),
            )
        )

    def _single(self) -> bool:
        """Whether the `backward` rows are of the gradient that the step began with: one process, one backward."""
        gradients = self._gradients
        return self._clock.backward == 1 and gradients.fresh and not gradients.local

    def _notes(self, held: Mapping[Slot, Tensor], now: Sequence[Tensor | None], present: int) -> list[str | None]:
        """By row of the model; empty where all of it is here, has a gradient, and nothing is special."""
        fired, slots = self._gradients.fired, self._attachment.slots
        special = {
            slot: self._note(slot)
            for (slot, w), g in zip(held.items(), now, strict=True)
            if slot not in fired or g is None or not w.requires_grad
        }
        for slot, note in special.items():
            if note == Status.UNCAPTURED:
                slot.suspect()
        if not special and present == len(slots):
            return []
        return [special.get(slot) if slot in held else "elsewhere" for slot in slots]

    def _note(self, slot: Slot) -> str | None:
        parameter, gradients = slot.tensor(), self._gradients
        if parameter is None or not parameter.requires_grad:
            return Status.FROZEN
        if gradients.reached(slot):
            return Status.EXCLUDED if parameter.grad is None else None
        if slot in gradients.given:
            return "stale"
        if slot in gradients.undefined:
            return Status.UNDEFINED
        if slot.stretch is not None and (not len(slot.stretch) or gradients.changed(slot, parameter)):
            self.unheard = True
            return "stale" if len(slot.stretch) else None  # other ranks have all of it
        if gradients.changed(slot, parameter):
            return Status.UNCAPTURED
        if slot in gradients.excluded:
            return Status.EXCLUDED
        return Status.ABSENT if parameter.grad is None else "stale"

    def _read_update(self, role: Role, optimizer: Optimizer | None, skipped: bool | Tensor) -> None:
        held = self._held(role)
        if optimizer is None:
            moved = [True] * len(held)
        else:
            rates = _learning_rates(optimizer)
            held = {slot: w for slot, w in held.items() if id(w) in rates}
            moved = [rates[id(w)] for w in held.values()]
        before = role.versions
        now = {slot: g for slot, w in held.items() if (g := w.grad) is not None}
        # A gradient that the optimizer wrote over is not the one that was used.
        used = {
            slot: g for (slot, g), v in zip(now.items(), versions(list(now.values())), strict=True) if v == before.get(slot)
        }
        self._sink.update(
            Update(
                key=self.key(),
                rows=self._rows(held),
                used=list(map(used.get, held)),
                weights=list(held.values()),
                moved=moved,
                single=self._single(),
                unchanged=role.unchanged,
                own=self._gradients.own,
                scale=self._gradients.scale,
                skipped=skipped,
            )
        )


def _owned(role: Role) -> set[int]:
    optimizer = role.ref()  # None stands for the user's own hands, which the clock's share covers
    return set() if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}


def _closure(args: tuple, kwargs: dict) -> Any:
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def _skipped(optimizer: Optimizer) -> bool | Tensor:
    """Whether a fused kernel found inf and did nothing: a number on the CPU, a device tensor elsewhere."""
    found = getattr(optimizer, "found_inf", None)
    if not isinstance(found, Tensor):
        return False
    return bool(found) if found.device.type == "cpu" else found.detach().clone()


def _learning_rates(optimizer: Optimizer) -> dict[int, bool]:
    """Whether each parameter's learning rate is above 0, by the parameter's id; one on a device is taken to be."""
    result = {}
    for group in optimizer.param_groups:
        rate = group.get("lr", 1.0)
        if isinstance(rate, Tensor):
            rate = 1.0 if rate.device.type != "cpu" else float(rate)
        for p in group["params"]:
            result[id(p)] = rate > 0
    return result


def _holds(wrapper: Any, optimizer: Optimizer) -> bool:
    return any(value is optimizer for value in vars(wrapper).values())


def _unknown(step: int, optimizer: Optimizer, names: Sequence[str]) -> Finding:
    kind, few = type(optimizer).__name__, ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return Finding(
        rule="unknown-optimizer",
        step=step,
        severity=Severity.WARNING,
        seen=f"{kind} stepped on {len(names)} of the watched parameters ({few}), and watch() was not given it: its steps "
        "are not counted, and what it does to the weights is not measured",
        causes=("watch() was given some of the optimizers only", "the optimizer was made anew after watch()"),
        remedy="give watch() all that move the model, last the one whose step ends a step: watch(model, [a, b])",
        parameter=names[0],
        parameters=tuple(names),
    )
