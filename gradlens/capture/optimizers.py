"""Who steps: from the hook that torch calls for every optimizer to a report of which watched one it was.

Global hooks before and after each optimizer's step, filtered by the optimizers of this lens. An optimizer that the lens was
not given stands in for one that is gone, or whose inner one it is; any other is reported. Three things only the stack shows:

- a subclass whose `step` calls `super().step()` fires the hooks twice: the outermost call is the step;
- an object that holds the optimizer and is in a `step` of its own may move weights when the inner one is done: `callers`;
- a `GradScaler` that the lens was not given.

A step ends with the optimizer that was listed last. While that one is idle and another keeps stepping, the other ends steps.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from gradlens import _torch
from gradlens.capture.attachment import Attachment, Slot
from gradlens.capture.callers import STEP, Key, owner_of
from gradlens.capture.engine import running
from gradlens.capture.guards import Guard, guarded, untraced
from gradlens.capture.marks import Marks
from gradlens.capture.quiet import Quiet

#: Steps of another optimizer, since the one that ends steps did so, before that one is taken to be idle: critics take some.
PATIENCE = 8

#: Packages whose wrappers call the optimizer's step and move nothing themselves.
_STEP_ONLY = ("accelerate.", "lightning.", "pytorch_lightning.", "lightning_fabric.", "torch.", "ignite.")


class WatchedOptimizer:
    """One optimizer of the lens, and where its step stands."""

    def __init__(self, optimizer: Optimizer | None = None, *, wrapped: bool = False) -> None:
        self.ref: Callable[[], Optimizer | None] = (lambda: None) if optimizer is None else weakref.ref(optimizer)
        self.wrapped = wrapped  # something around it may move weights before its step begins and after it ended
        self.read = False  # this step's `used` gradients were read
        self.given = Marks()  # the gradients that were read
        self.untouched = False  # `.grad` was what the last backward left
        self.steady = False  # they went by the book
        self.share: Any = None  # what it moves then, what was in `.grad` there, and what was known of that
        self.left: Any = None
        self.facts: Any = None
        self.key: Any = None
        self.closure_key: Any = None  # of what was read when its closure returned
        self.step: Any = None  # that its call, which is under way, belongs to
        self.stack: CallStack | None = None  # of that call

    def parameters(self) -> set[int]:
        """The ids of what it moves; none for a stand-in where the user moves weights by hand."""
        optimizer = self.ref()
        return set() if optimizer is None else parameter_ids(optimizer)


class CallStack(NamedTuple):
    """What the stack says about an optimizer's step that is under way."""

    calls: int  #: of this optimizer's step: a subclass that calls `super().step()` makes two
    methods: Sequence[Key] = ()  #: named `step`, of objects that hold the optimizer; the innermost first
    scaler: GradScaler | None = None
    call: int = 0  #: the id of the frame that called the hook, while it lasts


def call_stack(optimizer: Optimizer, before: CallStack | None = None) -> CallStack:
    """The stack of the hook that asks; or what it was `before` this very step, as the hook then saw it."""
    calls, call, scaler, frame = 0, 0, None, sys._getframe(1)
    methods: list[Key] = []
    while frame is not None:
        code = frame.f_code
        if code is _torch.OPTIMIZER_STEP:
            if not call:
                call = id(frame)
                if before is not None and before.call == call:
                    return before
            calls += frame.f_locals.get("self") is optimizer
        elif code is _torch.SCALER_STEP:
            scaler = frame.f_locals["self"]
        elif code.co_name == STEP and code.co_argcount:
            holder = owner_of(frame)
            if holder is not optimizer and may_move(holder) and holds(holder, optimizer):
                methods.append((id(holder), code))
        frame = frame.f_back  # type: ignore[assignment]
    return CallStack(calls, methods, scaler, call)


def may_move(wrapper: Any) -> bool:
    """Whether an object around an optimizer may move weights itself."""
    return not type(wrapper).__module__.startswith(_STEP_ONLY)


def holds(wrapper: Any, optimizer: Optimizer) -> bool:
    """Whether an attribute of the object is this optimizer. One that has a list of them is taken to be a loop's."""
    return any(value is optimizer for value in attributes(wrapper))


def attributes(owner: Any) -> Iterator[Any]:
    """What an object keeps, in slots too."""
    yield from list(getattr(owner, "__dict__", {}).values())
    for kind in type(owner).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            if hasattr(kind.__dict__.get(name), "__get__") and hasattr(owner, name):
                yield getattr(owner, name)


def is_active(optimizer: Optimizer) -> bool:
    """Whether a call of this optimizer's step is on the stack."""
    return call_stack(optimizer).calls > 0


def parameter_ids(optimizer: Optimizer) -> set[int]:
    """The ids of the parameters that it moves."""
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The closure that a step was called with, or None; `args` begin with the optimizer."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None)


def found_inf(optimizer: Optimizer) -> bool | Tensor:
    """Whether a fused kernel found inf and did nothing: a number on the CPU, a device tensor elsewhere."""
    found = getattr(optimizer, "found_inf", None)
    if not isinstance(found, Tensor):
        return False
    return bool(found) if found.device.type == "cpu" else found.detach().clone()


def positive_rates(optimizer: Optimizer) -> dict[int, bool]:
    """Whether each parameter's learning rate is above 0, by the parameter's id; one on a device is taken to be."""
    result = {}
    for group in optimizer.param_groups:
        rate = group.get("lr", 1.0)
        if isinstance(rate, Tensor):
            rate = 1.0 if rate.device.type != "cpu" else float(rate)
        for p in group["params"]:
            result[id(p)] = rate > 0
    return result


class StepEnder:
    """Which optimizer's step ends a step: the one that was listed last, or who stands in for it while it is idle."""

    def __init__(self, watched: Sequence[WatchedOptimizer]) -> None:
        self.listed = self.current = watched[-1] if watched else None
        self._since_current: dict[WatchedOptimizer, int] = {}
        self._since_listed: dict[WatchedOptimizer, int] = {}
        self._most = 0  # steps of another between two of the listed one
        self.waited = 0  # steps of another until it stood in

    def ends(self, stepped: WatchedOptimizer) -> bool:
        """Whether this optimizer's step, which is over, ends a step."""
        if stepped is self.listed:
            self._most = max(self._most, *self._since_listed.values(), 0)
            self._since_listed.clear()
            self._since_current.clear()
            self.current = self.listed
            return True
        self._since_listed[stepped] = self._since_listed.get(stepped, 0) + 1
        if stepped is self.current:
            self._since_current.clear()
            return True
        stands_in = self.stands_in(stepped)
        self._since_current[stepped] = self._since_current.get(stepped, 0) + 1
        if not stands_in:
            return False
        self.current, self.waited = stepped, self._since_current[stepped]
        self._since_current.clear()
        return True

    def stands_in(self, stepped: WatchedOptimizer) -> bool:
        """Whether one that does not end steps would do so with another step, since the one that does is idle."""
        return self._since_current.get(stepped, 0) + 1 > max(PATIENCE, 2 * self._most)


class StepListener(Protocol):
    """Who is told of optimizers' steps."""

    def used_within(self, parameters: set[int]) -> None:
        """An optimizer, of the lens or not, is about to use these gradients inside a backward."""

    def step_begins(self, watched: WatchedOptimizer, optimizer: Optimizer, stack: CallStack, closure: Any) -> Any:
        """A watched optimizer is about to step; returns a closure to call in place of its own, or None."""

    def step_ended(self, watched: WatchedOptimizer, optimizer: Optimizer, stack: CallStack, closure: Any) -> None:
        """A watched optimizer has stepped."""

    def foreign_step_ended(self, optimizer: Optimizer, moved: Sequence[Slot], *, reported: bool) -> None:
        """An optimizer that is none of the lens' has stepped; `reported`: that it moves watched weights is news."""

    def quiet_step_ended(self, watched: WatchedOptimizer, scaler: GradScaler | None) -> bool:
        """An optimizer has stepped in a quiet step; False where more is to be done than to count it."""

    def may_raise(self) -> None:
        """An update is over, and the training thread may be interrupted: the one call that may raise."""


class Optimizers:
    """The optimizers of one lens."""

    listener: StepListener  #: set before any step

    def __init__(
        self,
        given: Sequence[Optimizer],
        wrapped: Sequence[bool],
        attachment: Attachment,
        guard: Guard,
    ) -> None:
        self._attachment, self.guard = attachment, guard
        self.watched = [WatchedOptimizer(o, wrapped=w) for o, w in zip(given, wrapped, strict=True)]
        self.by_id = {id(optimizer): w for optimizer, w in zip(given, self.watched, strict=True)}
        self.ender, self.quiet = StepEnder(self.watched), Quiet()
        self._foreign: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # that were looked at, and are none of ours
        self._handles: list[Any] = []
        self._index: tuple[int, dict[int, Slot]] = (-1, {})

    def attach(self) -> None:
        """Listen to every optimizer's step; those that are not ours pass by."""
        before, after, listener, quiet = self.before, self.after, weakref.ref(self.listener), self.quiet

        def pre(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            watched = quiet.watched.get(id(optimizer))
            if watched is None or watched.ref() is not optimizer or watched.step is not None:
                return before(optimizer, args, kwargs)
            return before(optimizer, args, kwargs) if watched in quiet.step.stepped else None

        def post(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if after(optimizer, args, kwargs):
                told = listener()
                if told is not None:
                    told.may_raise()

        untraced(pre)
        self._handles = [register_optimizer_step_pre_hook(pre), register_optimizer_step_post_hook(post)]

    def detach(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @guarded("before the optimizer's step")
    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The hook before a step; it may exchange the closure."""
        if running():
            self.listener.used_within(parameter_ids(optimizer))
        watched = self.find(optimizer)
        if watched is None:
            return None
        stack = call_stack(optimizer)
        if stack.calls > 1:
            return None
        watched.stack = stack
        closure = closure_of(args, kwargs) if kwargs or len(args) > 1 else None
        instead = self.listener.step_begins(watched, optimizer, stack, closure)
        if instead is None:
            return None
        if "closure" in kwargs:
            return args, {**kwargs, "closure": instead}
        return (args[0], instead, *args[2:]), kwargs

    @guarded("after the optimizer's step")
    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """The hook after a step; True where the user may be interrupted."""
        watched = self.quiet.watched.get(id(optimizer))
        quiet = watched is not None and watched.ref() is optimizer and watched.step is None
        watched = watched if quiet else self.find(optimizer)
        if watched is None:
            if optimizer in self._foreign or not self.watched:
                self.listener.foreign_step_ended(optimizer, (), reported=False)
            return False
        stack, watched.stack = call_stack(optimizer, None if quiet else watched.stack), None
        if stack.calls > 1:
            return False
        if quiet:
            if self.listener.quiet_step_ended(watched, stack.scaler):
                return True
            self.listener.step_begins(watched, optimizer, stack, None)  # late is early enough: no step closes before it
        closure = closure_of(args, kwargs) if kwargs or len(args) > 1 else None
        self.listener.step_ended(watched, optimizer, stack, closure)
        return True

    def find(self, optimizer: Optimizer) -> WatchedOptimizer | None:
        """Which of the lens' it is."""
        watched = self.by_id.get(id(optimizer))
        if watched is not None and watched.ref() is optimizer:
            return watched
        known = optimizer in self._foreign and all(w.ref() is not None for w in self.watched)
        return None if known or not self.watched else self._adopt(optimizer)

    def _adopt(self, optimizer: Optimizer) -> WatchedOptimizer | None:
        """An optimizer that the lens was not given may move what it watches.

        It stands in for one that was given and is gone, or that it is the inner one of, as SAM has one, whose own step is
        never called.
        """
        slots, ids = self.slots_by_id(), parameter_ids(optimizer)
        moved = [slot for i, slot in slots.items() if i in ids]
        inner = [w for w in self.watched if (given := w.ref()) is not None and holds(optimizer, given)]
        for watched in inner:
            watched.wrapped = True  # its own hooks fire too, and are those of the step's end
        if moved and not inner:
            for watched in self.watched:
                given = watched.ref()
                if given is None or (holds(given, optimizer) and not is_active(given)):
                    watched.ref = weakref.ref(optimizer)
                    self.by_id[id(optimizer)] = watched
                    return watched
            if not any(is_active(given) for w in self.watched if (given := w.ref()) is not None):
                self.listener.foreign_step_ended(optimizer, moved, reported=True)
        self._foreign.add(optimizer)
        return None

    def slots_by_id(self) -> dict[int, Slot]:
        """The slots by their parameter's id, looked up once a pass: one optimizer a parameter may step inside it."""
        task = _torch.current_task()
        if task == -1 or task != self._index[0]:
            everyone = zip(self._attachment.slots, self._attachment.tensors(), strict=True)
            self._index = (task, {id(t): slot for slot, t in everyone if t is not None})
        return self._index[1]

    def held(self, watched: WatchedOptimizer) -> dict[Slot, Tensor]:
        """The slots that this optimizer moves, with what is there now.

        The one that ends steps also answers for those that no optimizer has.
        """
        attachment, ends = self._attachment, watched is self.ender.current or watched not in self.watched
        if ends and len(self.watched) < 2:
            everyone = zip(attachment.slots, attachment.tensors(), strict=True)
            return {slot: t for slot, t in everyone if t is not None}
        slots, mine = self.slots_by_id(), watched.parameters()
        if ends:
            others = set().union(*(other.parameters() for other in self.watched if other is not watched)) - mine
            chosen = [slot for i, slot in slots.items() if i not in others]
        else:
            chosen = sorted((slots[i] for i in mine if i in slots), key=attachment.rows.__getitem__)
        return {slot: t for slot in chosen if (t := slot.tensor()) is not None}
