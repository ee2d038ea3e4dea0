"""The backward pass, from hook to reading.

On each parameter there are two hooks. The *tensor hook* gets this backward's own gradient g before it is accumulated, and is
the only one that says whether g is undefined. The *post hook* runs after accumulation and says that `.grad` was written. So:

- `.grad is None` before: `.grad` becomes this backward's gradient, and is read at the end of the pass.
- `.grad` exists: g is held until it is read, in batches of bounded size, since the sum hides it and a difference of two sums
  is not exact.
- Somebody else hooked the parameter too, or another rank's gradient is about to be mixed in: g is read inside the hook.
- An optimizer steps inside the pass: what it is about to use, and may free, is read before it does.

The end of a pass is a callback that the engine runs, queued from a callback, since a plain one runs before DDP's own. A
reentrant checkpoint runs a pass within the pass; they are one. `torch.autograd.grad` runs the tensor hooks too and leaves no
record. The engine lets go of its callbacks when a run ends in any way, so a weak reference to one tells whether the run
is still going on: a pass that failed is known by that, and what was read of it is taken back.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward
from torch.utils.hooks import unserializable_hook

from gradlens.capture.attachment import Attachment, Slot
from gradlens.capture.clock import Clock
from gradlens.capture.compiling import eagerly
from gradlens.capture.losses import Roots, loss_of, roots_elsewhere
from gradlens.capture.readings import GONE, Reading, Sink
from gradlens.capture.scaling import Scaling
from gradlens.records import Stage, Status

#: Gradients held for reading at once: enough to hide the cost of a call, and little beside a model's gradients.
HELD_BYTES = 32 << 20

_ENGINE = _engine_run_backward.__code__
_APPLY = BackwardCFunction.apply.__code__
_current_task = torch._C._current_graph_task_id
_VERSION = attrgetter("_version")


def _queue_callback(callback: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def running() -> bool:
    """Whether this thread is inside a backward pass."""
    return _current_task() != -1


@dataclass(frozen=True)
class _Run:
    """One engine run, as the stack of the thread that its hooks run on shows it."""

    depth: int  # engine runs on this stack; 0 on a thread of the engine's own, such as a device's
    nested: bool
    accumulates: bool | None  # None: not to be seen
    inputs: Sequence[Any]
    root: Any  # the outermost run's first output, which tells one run from another; None: not to be seen
    roots: Sequence[Any] = ()  # all of them


def _engine_run() -> _Run:
    """The run that the hook which asks is called by."""
    depth, within, accumulates, inputs, roots = 0, False, None, (), (None,)
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _ENGINE:
            depth += 1
            within = False
            given = frame.f_locals
            roots = given["t_outputs"]
            if depth == 1:
                accumulates = bool(given["kwargs"].get("accumulate_grad", False))
                inputs = given["args"][3] if len(given["args"]) > 3 else ()
        elif frame.f_code is _APPLY and depth:
            within = True  # an autograd function called this run: on the engine's own threads the stack ends here
        frame = frame.f_back  # type: ignore[assignment]
    return _Run(depth, depth > 1 or within, accumulates, inputs, None if within else roots[0], () if within else roots)


def _accumulates(parameter: Tensor) -> bool:
    """Whether the run under way writes `.grad`, where no stack shows it: only `autograd.grad` captures at a leaf."""
    with torch.enable_grad():
        node = torch.autograd.graph.get_gradient_edge(parameter).node
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:
        return False


def version(tensor: Tensor) -> int:
    """Rises when the tensor is written; of one that was made in inference mode nobody knows."""
    try:
        return tensor._version
    except RuntimeError:
        return -1


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """The same of many: a call for each would take as long again."""
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:
        return list(map(version, tensors))


def _states(gradients: Sequence[Tensor]) -> list[tuple[int, int]]:
    """The states of many."""
    return list(zip(map(id, gradients), versions(gradients), strict=True))


def _state(gradient: Tensor) -> tuple[int, int]:
    """Changes when the gradient is written."""
    return id(gradient), version(gradient)


class Pass:
    """One backward pass of one thread: an outermost engine run and those nested in it."""

    def __init__(self, thread: int, scale: float | Tensor, root: Any = None) -> None:
        self.thread = thread
        self._root = weakref.ref(root) if isinstance(root, Tensor) else None  # of the outermost run
        self.tasks: list[int] = []
        self.ends: list[weakref.ref[Any]] = []  # the engine's callbacks: gone when its runs are over
        self.outer = -1  # the outermost task, -1 while only nested ones were seen
        self.entered = False
        self.nested = False
        self.compiled = False  # by compiled autograd, which drops callbacks
        self.place: tuple[int, int] | None = None  # its step and number, once something was read
        self.inputs: Sequence[Any] = ()
        self.held: dict[Slot, Tensor] = {}  # seen by the tensor hook, not yet accumulated
        self.fresh: dict[Slot, Tensor | None] = {}  # `.grad` is this pass's gradient
        self.read: dict[Slot, Tensor] = {}  # accumulated onto an older `.grad`, to be read
        self.summed: dict[Slot, Tensor] = {}  # likewise, and copied: somebody else hooked the parameter
        self.undefined: set[Slot] = set()
        self.plain: set[Slot] = set()  # had no gradient at the start, and need nothing done before the end
        self.silent: set[Slot] = set()  # already read inside a hook
        self.late: set[Slot] = set()  # got their hooks when this pass had begun
        self.last: tuple[Slot, tuple[int, int]] | None = None  # what was accumulated last, over ranks
        self.bytes = 0
        self.scale = scale
        self.loss: float | Tensor | None = None  # the root, where that is one number, unscaled
        self.root: Any = None  # while the pass lasts

    def alive(self) -> bool:
        """Whether one of its engine runs goes on."""
        return any(end() is not None for end in self.ends)

    def has_root(self, root: Any) -> bool:
        """Whether this is the run from that root; a root that cannot be told from others is taken to be the same."""
        return self._root is None or root is None or self._root() is root

    def within(self, task: int) -> bool:
        """Whether what was seen so far was nested in this task. Task numbers rise, so the outer one's is the lowest."""
        return self.outer == -1 and all(task < nested for nested in self.tasks)

    @property
    def fired(self) -> bool:
        return bool(self.fresh or self.read or self.summed or self.silent or self.undefined)

    def reached(self, slot: Slot) -> bool:
        """Whether the slot's parameter got a gradient in this pass."""
        return slot in self.fresh or slot in self.read or slot in self.summed or slot in self.silent

    def reached_slots(self) -> Iterator[Slot]:
        """All of those."""
        return itertools.chain(self.fresh, self.read, self.summed, self.silent)


class Gradients:
    """The hooks of one lens, and the passes they see."""

    def __init__(
        self,
        attachment: Attachment,
        clock: Clock,
        scaling: Scaling,
        sink: Sink,
        stages: frozenset[str],
        *,
        local: bool,
        before_pass: Callable[[], list[int]],
        after_pass: Callable[[], None],
        look: Callable[[Sequence[Any], int], None],
        fault: Callable[[str, Exception], None],
        timed: AbstractContextManager[None],
    ) -> None:
        self._attachment, self._clock, self._scaling, self._sink = attachment, clock, scaling, sink
        self._stages = stages
        self.local = local  # gradients are mixed with other ranks' before the pass ends: read them inside the hook
        self._before_pass, self._after_pass, self._fault, self._timed = before_pass, after_pass, fault, timed
        self._look, self.roots = look, Roots()
        self._threads: set[int] = set()  # that ran passes
        self.trainers: dict[int, int] = {}  # the threads that the user trains on, and the step in which each did last
        self._passes: list[Pass] = []  # those that are not over, one a thread but for what failed
        self._by_task: dict[int, Pass | None] = {}  # None: an autograd.grad, which is none of ours
        self.lock = threading.RLock()  # passes may run on several threads
        self._pid = os.getpid()
        #: Of the open step, by slot: whether a hook fired, gradient undefined, excluded.
        self.fired: set[Slot] = set()
        self.undefined: set[Slot] = set()
        self.excluded: set[Slot] = set()
        self.fresh = True  # every pass of the step so far wrote fresh gradients
        self.own = True  # nobody else hooked what this step reached: what was read is what `.grad` got
        self.averaged = False  # over ranks: `.grad` is of all of them, as far as is known
        self.given: set[Slot] = set()  # of these, those that this rank has given nothing to
        self._marks: dict[Slot, tuple[int, int]] = {}
        self._ends: dict[Slot, tuple[int, int]] = {}
        self.scale: float | Tensor = 1.0

    # --- hooks ------------------------------------------------------------------------------------------------------

    def hooks(self, slot: Slot) -> tuple[Callable[[Tensor | None], None], Callable[[Tensor], None]]:
        """The two hooks of a slot. They hold the slot and this object weakly, never the parameter, and never raise."""
        this = weakref.ref(self)

        @unserializable_hook  # type: ignore[untyped-decorator]
        def on_gradient(g: Tensor | None) -> None:
            tool = this()
            if tool is not None:
                try:
                    current = tool._by_task.get(_current_task())
                    if current is None or g is None or slot not in current.plain:
                        tool._on_gradient(slot, g)
                except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
                    tool._fault("gradient hook", error)

        @unserializable_hook  # type: ignore[untyped-decorator]
        def on_accumulated(parameter: Tensor) -> None:
            tool = this()
            if tool is not None:
                try:
                    current = tool._by_task.get(_current_task())
                    if current is not None and slot in current.plain:
                        current.fresh[slot] = None
                    else:
                        tool._on_accumulated(slot, parameter)
                except Exception as error:  # noqa: BLE001
                    tool._fault("accumulation hook", error)

        for hook in (on_gradient, on_accumulated):
            hook.gradlens = True  # so that another lens on this parameter knows them
            hook._torchdynamo_disable = True  # a compiled training step calls them, and does not trace them
        return on_gradient, on_accumulated

    def _on_gradient(self, slot: Slot, g: Tensor | None) -> None:
        current = self._current(slot)
        if current is None:
            return
        if g is None:
            current.undefined.add(slot)
            current.plain.discard(slot)
            return
        current.undefined.discard(slot)
        parameter = slot.tensor()
        if parameter is None:
            return
        shared = slot.shared(parameter)
        self.own = self.own and not shared
        if slot.fleeting or shared or (self.local and Stage.BACKWARD in self._stages):
            if current.nested and Stage.BACKWARD in self._stages:
                self._sum_up(current, slot, parameter, g)
            else:
                self._read_now(current, slot, parameter, g)
        elif parameter.grad is not None and slot not in current.fresh:
            current.held[slot] = g

    def _sum_up(self, current: Pass, slot: Slot, parameter: Tensor, g: Tensor) -> None:
        """Of a parameter in two nested passes only the sum is the gradient; a copy, since what follows may change g."""
        if slot in current.silent:
            return  # its first part was read before the pass was known to be nested
        if parameter.grad is not None:
            self.fresh = False
        before = current.summed.get(slot)
        current.summed[slot] = g.detach().clone() if before is None else before + g.detach()

    def _on_accumulated(self, slot: Slot, parameter: Tensor) -> None:
        current = self._current(slot)
        if current is None:
            return
        if self.local and parameter.grad is not None:
            current.last = slot, _state(parameter.grad)
        if slot in current.undefined or slot in current.silent or slot in current.summed:
            return
        held = current.held.pop(slot, None)
        if held is None:
            if slot not in current.read:
                current.fresh[slot] = None
            return
        before = current.read.get(slot)
        current.read[slot] = held if before is None else before + held  # a tied parameter, in two nested passes
        current.bytes += held.numel() * held.element_size()
        if current.bytes > HELD_BYTES and not current.nested:
            self._read_held(current, complete=False)

    def used_within(self, parameters: set[int]) -> None:
        """An optimizer is about to use these, by id, inside a backward, and may free them: they are read now."""
        current = self._by_task.get(_current_task())
        if current is None or Stage.BACKWARD not in self._stages:
            return
        with self.lock:
            for slot in [slot for slot in current.fresh if slot.armed in parameters]:
                parameter = slot.tensor()
                if parameter is not None and parameter.grad is not None:
                    del current.fresh[slot]
                    current.plain.discard(slot)
                    current.silent.add(slot)
                    self._emit(Stage.BACKWARD, [slot], [parameter.grad], current, complete=False)

    # --- passes -----------------------------------------------------------------------------------------------------

    def _current(self, slot: Slot) -> Pass | None:
        """The pass that this hook belongs to; None for `torch.autograd.grad`, or in a forked child."""
        task = _current_task()
        try:
            return self._by_task[task]  # task numbers are the process's own: no two threads share one
        except KeyError:
            if os.getpid() != self._pid:
                return None  # before the lock, which the parent may have held at the fork
            with self._timed, self.lock:
                return self._by_task[task] if task in self._by_task else self._enter(slot, task)

    @eagerly
    def _enter(self, slot: Slot, task: int) -> Pass | None:
        run, thread = _engine_run(), threading.get_ident()
        if run.depth == 1 and not run.nested:
            self.trains(thread)
        accumulates = run.accumulates
        if accumulates is None:
            parameter = slot.tensor()
            accumulates = parameter is not None and _accumulates(parameter)
        current = self._parent(run, task, thread)
        for other in [p for p in self._passes if p is not current and p.thread == thread and not p.alive()]:
            self._leave(other)
        if not accumulates:
            self._forget_others()
            self._by_task[task] = None
            return None
        if current is None:
            with self._attachment.still:
                late = self._before_pass()
                current = Pass(thread, self._scaling.scale(), run.root)
                current.late.update(self._attachment.slots[i] for i in late)
                self._threads.add(thread)
                current.plain = self._plain()
                self._note_roots(current, run)
            self._passes.append(current)
        current.tasks.append(task)
        self._by_task[task] = current
        if run.nested or (run.depth == 0 and current.thread != thread):
            current.nested = True
        else:
            current.outer, current.inputs = task, run.inputs
        current.compiled |= bool(getattr(compiled_autograd, "in_compiled_autograd_region", False))
        self._queue_end(current, task)
        return current

    def _note_roots(self, current: Pass, run: _Run) -> None:
        """What backward was called on: the loss, and its graph."""
        roots = roots_elsewhere() if run.depth == 0 and not run.roots else run.roots
        current.loss = loss_of(roots, current.scale)
        current.root = roots[0] if len(roots) == 1 else None
        self._look(roots, self._clock.step)

    def _plain(self) -> set[Slot]:
        """The slots of which the hooks of a pass that starts now need to note nothing but that the gradient came."""
        for other in self._passes:
            other.plain.clear()  # gradients may come from two sides
        if self.local or self._passes or len(self._threads) > 1:
            return set()
        return {
            slot
            for slot, t in zip(self._attachment.slots, self._attachment.tensors(), strict=True)
            if t is not None and t.grad is None and not slot.fleeting and not slot.shared(t)
        }

    def _parent(self, run: _Run, task: int, thread: int) -> Pass | None:
        """The pass that this run is part of, if it was seen before.

        Runs that are nested deeper than 60 go on in threads of the engine's own, and their stacks begin there.
        """
        for current in reversed([p for p in self._passes if p.thread == thread]):
            if (run.nested and current.has_root(run.root)) or (not run.nested and current.within(task)):
                return current
        if run.nested or run.depth == 0:
            elsewhere = [p for p in self._passes if p.thread != thread and p.nested and p.alive()]
            if len(elsewhere) == 1 and elsewhere[0].has_root(run.root):
                return elsewhere[0]
        return None

    def _forget_others(self) -> None:
        """What was noted of earlier `autograd.grad`s; one that still runs is recognised again."""
        if len(self._by_task) > 100:
            self._by_task = {task: current for task, current in self._by_task.items() if current is not None}

    def _queue_end(self, current: Pass, task: int) -> None:
        this = weakref.ref(self)

        def last() -> None:
            tool = this()
            if tool is not None:
                try:
                    with tool._timed:
                        tool._task_ended(current, task)
                except Exception as error:  # noqa: BLE001
                    tool._fault("end of backward", error)

        def first() -> None:
            current.ends.append(weakref.ref(last))
            _queue_callback(last)  # after everything queued so far, DDP's all-reduce among it

        current.ends.append(weakref.ref(first))
        _queue_callback(first)

    @eagerly
    def _task_ended(self, current: Pass, task: int) -> None:
        if current not in self._passes:
            return
        if task == current.outer:
            self._drop(current)
            self._finish(current)
        elif current.outer == -1:
            self._remember(current)  # should the outer run have no hook of ours, this was its last sign

    def _remember(self, current: Pass) -> None:
        """Keep the fresh gradients alive: the outer pass may end without a callback, and the user may drop them."""
        for slot in current.fresh:
            parameter = slot.tensor()
            current.fresh[slot] = None if parameter is None else parameter.grad
        current.entered = True

    def _leave(self, current: Pass) -> None:
        """Another outermost pass starts: this one failed, or all of it was inside reentrant checkpoints, or compiled."""
        self._drop(current)
        if current.compiled or (current.entered and current.outer == -1):
            self._finish(current)
        elif current.place is not None:
            self._sink.abandon((*current.place, Stage.BACKWARD.value))
            self._clock.give_back(*current.place)

    def _drop(self, current: Pass) -> None:
        with self.lock:
            self._passes.remove(current)
            for task in current.tasks:
                self._by_task.pop(task, None)

    def settle(self) -> None:
        """Finish the passes whose end nobody called, as under compiled autograd; outside a backward only."""
        if self._passes and not running():
            with self.lock:
                mine = threading.get_ident()
                for current in [p for p in self._passes if p.thread == mine or not p.alive()]:
                    self._drop(current)
                    self._finish(current)

    # --- readings ---------------------------------------------------------------------------------------------------

    def _key(self, stage: Stage, current: Pass) -> tuple[int, int, str]:
        if current.place is None:
            current.place = (self._clock.step, self._clock.take())
        return (*current.place, stage.value)

    def _read_now(self, current: Pass, slot: Slot, parameter: Tensor, g: Tensor) -> None:
        if parameter.grad is not None:
            self.fresh = False
        current.silent.add(slot)
        if Stage.BACKWARD in self._stages:
            self._emit(Stage.BACKWARD, [slot], [g], current, complete=False)

    def _read_held(self, current: Pass, *, complete: bool) -> None:
        slots = list(current.read)
        self.fresh = self.fresh and not slots
        if Stage.BACKWARD in self._stages:
            self._emit(Stage.BACKWARD, slots, [current.read[slot] for slot in slots], current, complete=complete)
        current.silent.update(slots)
        current.read.clear()
        current.bytes = 0

    @eagerly
    def _emit(
        self,
        stage: Stage,
        slots: Sequence[Slot],
        tensors: Sequence[Tensor],
        current: Pass,
        *,
        complete: bool,
        notes: Sequence[str | None] = (),
    ) -> None:
        with self.lock:
            rows, now = self.rows, self._attachment.at(slots)
            triples = [(rows[slot], g, w) for slot, g, w in zip(slots, tensors, now, strict=True) if w is not None]
            triples.sort(key=itemgetter(0))  # a pass goes through the model from its end
            self._sink.read(
                Reading(
                    key=self._key(stage, current),
                    parameters=self._attachment.parameters,
                    rows=[row for row, _, _ in triples],
                    tensors=[g for _, g, _ in triples],
                    weights=[w for _, _, w in triples],
                    divisor=current.scale,
                    scale=current.scale,
                    complete=complete,
                    notes=notes,
                    moving=self._clock.moving,
                )
            )

    @property
    def rows(self) -> dict[Slot, int]:
        """The row of each slot."""
        slots = self._attachment.slots
        if getattr(self, "_rows_of", None) is not slots:
            self._rows_of, self._rows = slots, {slot: i for i, slot in enumerate(slots)}
        return self._rows

    def _finish(self, current: Pass) -> None:
        """The pass is over: read what lived to its end."""
        if not current.fired:
            return  # only tensor hooks: torch.autograd.grad
        with self.lock, self._attachment.still:
            self._key(Stage.BACKWARD, current)  # the pass has its number, whatever is read of it
            if current.loss is not None and current.place is not None:
                self.roots.add(current.root, current.place[0], current.loss)
                self._sink.loss(*current.place, current.loss)
            current.root = None
            self._note(current)
            if Stage.BACKWARD in self._stages:
                self._read_backward(current)
            elif current.read:
                self.fresh = False
            if Stage.ACCUMULATED in self._stages:
                self._read_accumulated(Stage.ACCUMULATED, current)
            if self._was_averaged(current) and Stage.REDUCED in self._stages:
                self._read_accumulated(Stage.REDUCED, current)
            self.scale = current.scale
            self._clock.end()
            self._mark_end(current)
            self._after_pass()

    def _was_averaged(self, current: Pass) -> bool:
        """Whether `.grad` is now what all ranks have given to; in one process it always is.

        DDP writes it after the pass has accumulated the last gradient, and does not under `no_sync`; the gradients of
        distributed tensors come averaged. What is averaged by hand, after the pass, is seen as used.
        """
        if not self.local or any(hasattr(slot.tensor(), "placements") for slot in current.reached_slots()):
            self.averaged = True
            return True
        missed = [slot for slot in self._quiet(current) if not current.reached(slot)]
        others = [slot for slot in missed if (p := slot.tensor()) is not None and self.changed(slot, p)]
        written = bool(others)
        if current.last is not None:
            slot, state = current.last
            written = (p := slot.tensor()) is not None and p.grad is not None and _state(p.grad) != state
        if written:
            self.given.update(others)
        self.averaged |= written or current.last is None
        return written

    def _note(self, current: Pass) -> None:
        self.fired.update(current.fresh, current.read, current.summed, current.silent)
        self.undefined.update(current.undefined)
        self.undefined -= self.fired
        if current.inputs:
            inputs = {id(tensor) for tensor in current.inputs}
            self.excluded.update(s for s in self._attachment.slots if s.armed and s.armed not in inputs)
        self.excluded -= self.fired

    def _read_backward(self, current: Pass) -> None:
        slots: list[Slot] = []
        tensors: list[Tensor] = []
        now = self._attachment.at(current.fresh)
        for (slot, remembered), parameter in zip(current.fresh.items(), now, strict=True):
            gradient = remembered if remembered is not None else None if parameter is None else parameter.grad
            if gradient is not None:
                slots.append(slot)
                tensors.append(gradient)
            else:
                slot.fleeting = True
        self.fresh = self.fresh and not current.read
        for slot, g in (*current.read.items(), *current.summed.items()):
            slots.append(slot)
            tensors.append(g)
        notes = self._notes(current)
        for slot, note in zip(self._attachment.slots, notes, strict=False):
            if note == Status.UNCAPTURED and (p := slot.tensor()) is not None and p.grad is not None:
                slots.append(slot)
                tensors.append(p.grad)
        self._emit(Stage.BACKWARD, slots, tensors, current, complete=True, notes=notes)

    def _read_accumulated(self, stage: Stage, current: Pass) -> None:
        quiet = self._quiet(current)
        slots = [s for s in quiet if (p := s.tensor()) is not None and p.grad is not None and p.requires_grad]
        left = self._attachment.ignored if self.local and stage == Stage.REDUCED else ()
        if left:
            slots = [slot for slot in slots if slot not in left]
        tensors = [slot.tensor().grad for slot in slots]  # type: ignore[union-attr]
        present = set(slots)
        notes = [
            None if slot in self.fired else "stale" if slot in present else note
            for slot, note in zip(self._attachment.slots, self._notes(current), strict=False)
        ]
        if quiet is not self._attachment.slots:
            notes = [None if slot in present else "elsewhere" for slot in self._attachment.slots]
        elif left:
            notes = notes or [None] * len(quiet)
            notes = ["elsewhere" if slot in left else note for slot, note in zip(quiet, notes, strict=True)]
        self._emit(stage, slots, tensors, current, complete=True, notes=notes)  # type: ignore[arg-type]

    def _notes(self, current: Pass) -> list[str | None]:
        """Why a row of this pass has no tensor; empty where all have one."""
        slots, fresh = self._attachment.slots, current.fresh
        missing = [i for i, slot in enumerate(slots) if slot.fleeting or not (slot in fresh or current.reached(slot))]
        if not missing:
            return []
        inputs = {id(tensor) for tensor in current.inputs}
        notes: list[str | None] = [None] * len(slots)
        for i in missing:
            notes[i] = self._note_of(slots[i], current, inputs)
        return notes

    def _note_of(self, slot: Slot, current: Pass, inputs: set[int]) -> str | None:
        parameter = slot.tensor()
        if parameter is None or not parameter.requires_grad:
            return Status.FROZEN
        if current.reached(slot):
            return GONE if slot in current.fresh else None
        if (slot in current.late or not slot.arms(parameter)) and self.changed(slot, parameter):
            return Status.UNCAPTURED
        if inputs and id(parameter) not in inputs:
            return Status.EXCLUDED
        return Status.UNDEFINED if slot in current.undefined else Status.ABSENT

    def trains(self, thread: int) -> None:
        """The user's loop runs on this thread: devices have threads of their own for backward."""
        self.trainers[thread] = self._clock.step

    def elsewhere(self) -> bool:
        """Whether another thread trains, in this step or the last.

        To read `.grad` while its loop has it crashes, even between its passes (torch 2.13).
        """
        me, alive = threading.get_ident(), sys._current_frames()
        return any(
            thread != me and step >= self._clock.step - 1 and thread in alive for thread, step in list(self.trainers.items())
        )

    @property
    def heard(self) -> bool:
        """Whether any pass was ever seen."""
        return bool(self._threads)

    # --- what changed -----------------------------------------------------------------------------------------------

    def changed(self, slot: Slot, parameter: Tensor) -> bool:
        """Whether `.grad` was written since the last step closed."""
        return parameter.grad is not None and self._marks.get(slot) != _state(parameter.grad)

    def reached(self, slot: Slot) -> bool:
        """Whether a pass of this step reached the slot's parameter: one that is over, or one that is still going on."""
        return slot in self.fired or any(current.reached(slot) for current in self._passes)

    def unchanged_since_end(self, slots: Sequence[Slot], gradients: Sequence[Tensor | None]) -> bool:
        """Whether these, which are in `.grad` now, are what was there when the step's last pass ended."""
        there = {slot: g for slot, g in zip(slots, gradients, strict=True) if g is not None}
        states = dict(zip(there, _states(list(there.values())), strict=True))
        return states == {slot: end for slot in slots if (end := self._ends.get(slot)) is not None}

    def _quiet(self, current: Pass) -> list[Slot]:
        """The slots whose `.grad` may be read now: where several threads run passes, only those that this one reached.

        To read `.grad` while another thread's loop has it crashes, even under a lock and between its passes (torch 2.13).
        """
        slots = self._attachment.slots
        return slots if len(self._threads) < 2 else [slot for slot in slots if current.reached(slot)]

    def _now(self, slots: Sequence[Slot]) -> tuple[dict[Slot, tuple[int, int]], list[Tensor]]:
        """The states of the gradients that are there, and these gradients."""
        now = zip(slots, self._attachment.at(slots), strict=True)
        there = {slot: g for slot, p in now if p is not None and (g := p.grad) is not None}
        gradients = list(there.values())
        return dict(zip(there, _states(gradients), strict=True)), gradients

    def _mark_end(self, current: Pass) -> None:
        """Remember the gradients as this pass left them."""
        now, gradients = self._now(self._quiet(current))
        self._ends = now if len(self._threads) < 2 else {**self._ends, **now}
        self._sink.ended(list(map(self.rows.__getitem__, now)), gradients)

    def step_closed(self, *, watched: bool = True) -> None:
        """Forget the step. What is there now matters only if the next one is `watched`."""
        self._marks = self._now(self._attachment.slots)[0] if watched else {}
        self.fired, self.undefined, self.excluded, self.given = set(), set(), set(), set()
        self.fresh, self.own, self.averaged = True, True, False
