"""The hooks of parameters: what they see goes to the arrivals of the pass that they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import unserializable_hook

from gradlens import _torch
from gradlens.capture.arrivals import HELD_BYTES, Arrival, PlainPass, State
from gradlens.capture.attachment import Slot
from gradlens.capture.engine import Engine, Pass
from gradlens.capture.guards import Guard, eagerly, guarded
from gradlens.capture.marks import version
from gradlens.capture.readings import PassReader
from gradlens.records import Stage


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
            elif slot in plain.onto:
                plain.added[slot] = g

        @unserializable_hook  # type: ignore[untyped-decorator]
        def on_accumulated(parameter: Tensor) -> None:
            if task() == plain.task and slot not in plain.special:
                plain.noted.append(slot)
            else:
                accumulated(slot, parameter)

        @unserializable_hook  # type: ignore[untyped-decorator]
        def local_on_accumulated(parameter: Tensor) -> None:
            if task() == plain.task and slot not in plain.special:
                try:
                    gradient: Any = parameter.grad
                    plain.last = gradient, gradient._version
                except (AttributeError, RuntimeError):  # there is none, or an inference tensor
                    accumulated(slot, parameter)
                else:
                    plain.noted.append(slot)
                    if plain.left is not None:
                        plain.left.append(plain.last)
            else:
                accumulated(slot, parameter)

        post = local_on_accumulated if self._reader.local else on_accumulated
        for hook in (on_gradient, post):
            hook.gradlens = True  # so that another lens on this parameter knows them
            hook._torchdynamo_disable = True  # a compiled training step calls them, and does not trace them
        return on_gradient, post

    @guarded("gradient hook", eager=False)
    def came(self, slot: Slot, g: Tensor | None) -> None:
        """The tensor hook, where more is to be done than to note."""
        current = self._engine.current(slot.tensor)
        if current is None:
            return
        arrivals = current.arrivals
        if g is not None and current.layout is not None and not (arrivals.noted or arrivals.states):
            if slot in self.plain.onto:
                arrivals.onto[slot] = g
            return  # it has just begun by the book
        self.leave_the_book(current)
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
        self.leave_the_book(current)
        arrivals = current.arrivals
        arrivals.settle()
        if self._reader.local and parameter.grad is not None:
            current.last = slot, id(parameter.grad), version(parameter.grad)
        arrivals.arrive(slot, Arrival.ACCUMULATED)
        if arrivals.bytes > HELD_BYTES and not current.nested:
            self._read_pending(current)

    def look_at_last(self, current: Pass) -> None:
        """Over ranks: what the last hook of a pass by the book has noted."""
        arrivals, last = current.arrivals, self.plain.last
        if arrivals.noted and arrivals.noted is self.plain.noted and last is not None:
            current.last = arrivals.noted[-1], id(last[0]), last[1]
            self.plain.last = self.plain.left = None  # what they hold is not to live on

    def leave_the_book(self, current: Pass) -> None:
        """Over ranks: a pass that began by the book goes on the general way."""
        if current.layout is None or not self._reader.local:
            return
        self.look_at_last(current)
        arrivals, current.layout = current.arrivals, None
        came, onto = list(zip(arrivals.noted, arrivals.left, strict=False)), set(arrivals.onto)
        self.plain.stop()
        if current.number is not None:
            arrivals.all_read()
            return
        arrivals.settle()
        for slot, (gradient, seen) in came:
            if slot not in onto and arrivals.state(slot) is State.FRESH:
                if version(gradient) != seen:
                    current.lost.add(slot)
                elif arrivals.arrive(slot, Arrival.TAKEN):
                    self._read_now(current, slot, gradient)

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
            self.leave_the_book(current)
            current.arrivals.settle()
            for slot in [slot for slot in current.arrivals.of(State.FRESH) if slot.hooked in parameters]:
                parameter = slot.tensor()
                if parameter is not None and parameter.grad is not None:
                    current.arrivals.arrive(slot, Arrival.TAKEN)
                    self._reader.read_now(current, slot, parameter.grad)
