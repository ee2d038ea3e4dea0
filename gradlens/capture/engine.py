"""Which backward pass a hook belongs to. It knows tasks, nesting, threads and callbacks, and no gradient.

A pass is one outermost run of torch's engine with those nested in it: a reentrant checkpoint runs a pass within the pass.
`torch.autograd.grad` runs tensor hooks too and is no pass. The end of a pass is a callback that the engine runs, queued from
a callback, since a plain one runs before DDP's own.

The engine lets go of its callbacks when a run ends in any way, so a weak reference to one tells whether the run still goes
on: a pass that failed is known by that.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from gradlens import _torch
from gradlens.capture.arrivals import Arrivals
from gradlens.capture.callers import STEP
from gradlens.capture.guards import Guard, eagerly, guarded


def running() -> bool:
    """Whether this thread is inside a backward pass."""
    return _torch.current_task() != -1


class Run(NamedTuple):
    """One engine run, as the stack of the thread that its hooks run on shows it."""

    depth: int  #: engine runs on this stack; 0 on a thread of the engine's own, such as a device's
    nested: bool
    accumulates: bool | None  #: None: the stack does not show it
    inputs: Sequence[Any]  #: what `backward(inputs=...)` was given
    roots: Sequence[Any]  #: the outermost run's outputs; empty where the stack does not show them
    caller: FrameType | None = None  #: who called the outermost run, where a method named `step` is among those who did

    @property
    def root(self) -> Any:
        """What tells one run from another, None where the stack does not show it."""
        return self.roots[0] if self.roots else None


def current_run() -> Run:
    """The run that the hook which asks is called by."""
    depth, within, accumulates, inputs, roots, outermost, caller = 0, False, None, (), (), None, None
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code is _torch.ENGINE_RUN:
            depth += 1
            within, outermost, caller = False, frame, None
            arguments = frame.f_locals
            roots = arguments["t_outputs"]
            if depth == 1:
                accumulates = bool(arguments["kwargs"].get("accumulate_grad", False))
                inputs = arguments["args"][3] if len(arguments["args"]) > 3 else ()
        elif code is _torch.FUNCTION_APPLY and depth:
            within = True  # an autograd function called this run: on the engine's own threads the stack ends here
        elif depth and code.co_name == STEP and code.co_argcount:
            caller = outermost
        frame = frame.f_back  # type: ignore[assignment]
    return Run(depth, depth > 1 or within, accumulates, inputs, () if within else roots, caller)


class Pass:
    """One backward pass of one thread: an outermost engine run and those nested in it."""

    def __init__(self, thread: int, root: Any = None) -> None:
        self.thread = thread
        self._root = weakref.ref(root) if isinstance(root, Tensor) else None  # of the outermost run
        self.tasks: list[int] = []
        self.ends: list[weakref.ref[Any]] = []  # the engine's callbacks: gone when its runs are over
        self.outer = -1  # the outermost task, -1 while only nested ones were seen
        self.nested = False
        self.nested_ended = False  # should the outer run have no hook of ours, that was its last sign
        self.compiled = False  # by compiled autograd, which drops callbacks
        self.inputs = frozenset[int]()  # ids of what `backward(inputs=...)` was given
        self.arrivals = Arrivals()
        self.scale: float | Tensor = 1.0  # the loss scale when it began
        self.number: int | None = None  # within its step, once something was read
        self.step: Any = None  # that it is part of
        self.late: set[Any] = set()  # slots that got their hooks when it had begun
        self.last: Any = None  # over ranks: what was accumulated last
        self.lost: set[Any] = set()  # over ranks: slots whose own gradient was written over before it was read
        self.read = True  # else it is only counted
        self.layout: Any = None  # that it began by, where it began by the book
        self.onto: frozenset[Any] = frozenset()  # slots that then had a gradient, which it adds to
        self.phase: Any = None  # of its step then
        self.left: Any = None  # over ranks: what was in `.grad` as its own gradients were read
        self.loss: float | Tensor | None = None  # its root, where that is one number, unscaled
        self.root: weakref.ref[Tensor] | None = None  # a pass that failed stays known, and its graph is not to

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
    def ended_unseen(self) -> bool:
        """Whether it is over, though no callback said so: all of it was in reentrant checkpoints, or compiled."""
        return self.compiled or (self.nested_ended and self.outer == -1)


class PassListener(Protocol):
    """Who is told of passes."""

    def pass_begins(self, run: Run, entered: Pass) -> None:
        """An outermost backward starts, and has so far reached its first hook."""

    def pass_pauses(self, entered: Pass) -> None:
        """A run nested in the pass ended; it may have been the last."""

    def pass_accumulated(self, entered: Pass) -> None:
        """All gradients have come; what others queued in the pass, as DDP its averaging, is yet to run."""

    def pass_ended(self, entered: Pass) -> None:
        """The pass is over."""

    def pass_failed(self, entered: Pass) -> None:
        """The pass broke off."""


class Engine:
    """The passes that are not over."""

    listener: PassListener  #: set before any hook is put on

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.tells_accumulated = False  #: the listener wants to hear of it
        self.passes: list[Pass] = []  # one a thread, but for what failed
        self.threads: set[int] = set()  # that ran passes
        self.by_task: dict[int, Pass | None] = {}  # None: an autograd.grad, which is no pass
        self.lock = threading.RLock()  # passes may run on several threads

    def current(self, leaf: Callable[[], Tensor | None]) -> Pass | None:
        """The pass that this hook belongs to; None for `torch.autograd.grad`."""
        task = _torch.current_task()
        try:
            return self.by_task[task]  # task numbers are the process's own: no two threads share one
        except KeyError:
            with self.lock:
                return self.by_task[task] if task in self.by_task else self._enter(task, leaf)

    @eagerly
    def _enter(self, task: int, leaf: Callable[[], Tensor | None]) -> Pass | None:
        run, thread = current_run(), threading.get_ident()
        accumulates = run.accumulates
        if accumulates is None:
            tensor = leaf()
            accumulates = tensor is not None and _torch.executes(tensor)
        current = None
        if self.passes:
            current = self._parent(run, task, thread)
            self._leave_others(current, thread)
        if not accumulates:
            self._forget_others()
            self.by_task[task] = None
            return None
        if current is None:
            current = Pass(thread, run.root)
            self.threads.add(thread)
            self.listener.pass_begins(run, current)
            self.passes.append(current)
        current.tasks.append(task)
        self.by_task[task] = current
        if run.nested or (run.depth == 0 and current.thread != thread):
            current.nested = True
        else:
            current.outer, current.inputs = task, frozenset(map(id, run.inputs))
        current.compiled |= _torch.in_compiled_autograd()
        self._queue_end(current, task)
        return current

    def _parent(self, run: Run, task: int, thread: int) -> Pass | None:
        """The pass that this run is part of, if it was seen before.

        Runs that are nested deeper than 60 go on in threads of the engine's own, and their stacks begin there.
        """
        for current in reversed([p for p in self.passes if p.thread == thread]):
            if (run.nested and current.has_root(run.root)) or (not run.nested and current.within(task)):
                return current
        if run.nested or run.depth == 0:
            elsewhere = [p for p in self.passes if p.thread != thread and p.nested and p.alive()]
            if len(elsewhere) == 1 and elsewhere[0].has_root(run.root):
                return elsewhere[0]
        return None

    def _leave_others(self, current: Pass | None, thread: int) -> None:
        """Another outermost pass starts: those of this thread that are not alive are over, or failed."""
        for other in [p for p in self.passes if p is not current and p.thread == thread and not p.alive()]:
            self.forget(other)
            if other.ended_unseen:
                self.listener.pass_ended(other)
            else:
                self.listener.pass_failed(other)

    def _forget_others(self) -> None:
        """Drop what was noted of earlier `autograd.grad`s; one that still runs is recognised again."""
        if len(self.by_task) > 100:
            self.by_task = {task: current for task, current in self.by_task.items() if current is not None}

    def _queue_end(self, current: Pass, task: int) -> None:
        task_ended, accumulated = self.task_ended, self.accumulated if self.tells_accumulated else None

        def last() -> None:
            task_ended(current, task)

        def first() -> None:
            current.ends.append(weakref.ref(last))
            _torch.queue_callback(last)  # after everything queued so far, DDP's all-reduce among it
            if accumulated is not None:
                accumulated(current, task)

        current.ends.append(weakref.ref(first))
        _torch.queue_callback(first)

    @guarded("gradients before they are averaged")
    def accumulated(self, current: Pass, task: int) -> None:
        """An engine run of this pass has accumulated its last gradient."""
        if current in self.passes and task == current.outer:
            self.listener.pass_accumulated(current)

    @guarded("end of backward")
    def task_ended(self, current: Pass, task: int) -> None:
        """An engine run of this pass is over."""
        if current not in self.passes:
            return
        if task == current.outer:
            self.forget(current)
            self.listener.pass_ended(current)
        elif current.outer == -1:
            current.nested_ended = True
            self.listener.pass_pauses(current)

    def forget(self, current: Pass) -> None:
        """The pass is over."""
        with self.lock:
            self.passes.remove(current)
            for task in current.tasks:
                self.by_task.pop(task, None)

    def forget_all(self) -> None:
        """Nobody listens any more: what runs now is no pass, should a hook of it still be called."""
        self.passes, self.by_task = [], dict.fromkeys(self.by_task)

    def finish_ended_passes(self) -> None:
        """Finish the passes whose end nobody called, as under compiled autograd; outside a backward only."""
        if self.passes and not running():
            with self.lock:
                mine = threading.get_ident()
                for current in [p for p in self.passes if p.thread == mine or not p.alive()]:
                    self.forget(current)
                    self.listener.pass_ended(current)


class TrainingThreads:
    """The threads that the user trains on; devices have threads of their own for backward."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}  # the step in which each trained last

    def note(self, step: int) -> None:
        """The user's loop runs on this thread."""
        self._seen[threading.get_ident()] = step

    def elsewhere(self, step: int) -> bool:
        """Whether another thread trains, in this step or the last.

        To read `.grad` while its loop has it crashes, even between its passes (torch 2.13).
        """
        if not self._seen.keys() - {threading.get_ident()}:
            return False
        me, alive = threading.get_ident(), sys._current_frames()
        return any(thread != me and last >= step - 1 and thread in alive for thread, last in list(self._seen.items()))
