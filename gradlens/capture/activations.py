"""What leaf modules make of each batch, read by forward hooks, only where a lens was asked for it (feature `activations`).

    a module was called with a gradient recorded -> sums of its output -> a call, kept by the node that made the output
    a backward pass begins -> the calls whose nodes its roots reach -> it ends: one fact, in the order of the forward pass

An output is read when its module returns, since what follows may overwrite it. Nothing of it is kept but sums, and those
lie in the metadata of its node in the graph: a forward pass that no backward follows, as of a metric, is forgotten with its
graph, and one whose backward comes later waits for it. An output without a node, as of a frozen layer or of data, goes with
the next call that has one. Where the roots of a pass cannot be seen, it takes all calls that are there.

A checkpoint calls modules again inside the backward pass. A reentrant one ran them without a gradient first: they count when
they run again, at the place that they had in the forward pass. Of any other the first call has counted.
"""

from __future__ import annotations

import itertools
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradlens import findings
from gradlens._torch import CHECKPOINT_BACKWARD, current_task, is_transformed, local_part, unseen
from gradlens.activations import Activations
from gradlens.capture.attachment import PLAIN, Attachment, parts
from gradlens.capture.engine import Pass
from gradlens.capture.forward_hooks import ForwardHook, Handle, compiled_elsewhere, leaves
from gradlens.capture.guards import Guard, guarded
from gradlens.records import Finding

MOST = 16  #: tensors of one output that are read
FAR = 200_000  #: nodes of a graph that are looked at; of a larger one every call counts
LOOSE = 1000  #: calls without a node that wait for one that has
SWEEP = 1000  #: calls at least, after which those whose graph is gone are forgotten

_keys = itertools.count()


class Read(Protocol):
    """Takes the sums of one output, in the order of `activations.SUMS`; None of one that has no such numbers."""

    def __call__(self, made: Tensor, axis: int, low: float, high: float) -> list[float] | Tensor | None: ...


class Call:
    """One call of a module: the sums of what it made, by output."""

    __slots__ = ("__weakref__", "before", "claimed", "hook", "order", "sums")

    def __init__(self, hook: ForwardHook, order: int, sums: list[tuple[str, Any]]) -> None:
        self.hook, self.order, self.sums = hook, order, sums
        self.before: list[Call] = []  # calls without a node, that came since the last call with one
        self.claimed = False  # by a backward pass


class ForwardWatch:
    """The forward hooks of one lens. Without `read` there are none."""

    def __init__(
        self,
        attachment: Attachment,
        guard: Guard,
        read: Read | None,
        observed: Callable[[], bool],
        tell: Callable[[Finding], None],
    ) -> None:
        self.guard = guard
        self._attachment, self._read, self._observed, self._tell = attachment, read, observed, tell
        self._handles: dict[weakref.ref[nn.Module], Handle] = {}
        self._compiled: set[int] | None = None
        self._skipped: list[str] = []
        self._key, self._clock = f"gradlens.{next(_keys)}", itertools.count()
        self._waiting: list[weakref.ref[Call]] = []  # for their backward pass; their nodes keep them
        self._sweep = SWEEP
        self._loose: list[Call] = []  # without a node
        self._again: list[Call] = []  # by a checkpoint, inside the backward pass
        self._claims: weakref.WeakKeyDictionary[Pass, list[Call]] = weakref.WeakKeyDictionary()
        self._places: dict[str, int] = {}  # of modules that were called without a gradient: when, the last time
        self._called: set[str] = set()  # with one, since the last pass ended
        self._came = False  # a backward pass
        self.heard = False  #: a call since the last one, or the last step
        self.listens = read is not None  #: whether modules are looked at

    # --- life -------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hook the modules that are not hooked yet. May be called again: modules may have been added."""
        if self._read is None:
            return
        if self._compiled is None:
            self._compiled = compiled_elsewhere()
        skipped: list[str] = []
        known = {module for ref in self._handles if (module := ref()) is not None}
        for prefix, part in parts(self._attachment.target()).items():
            if isinstance(part, nn.Module):
                for name, module in leaves(part, prefix, self._compiled, skipped):
                    if module not in known:
                        hook = ForwardHook(self.forwarded, module, name or type(module).__name__)
                        self._handles[weakref.ref(module)] = Handle(hook, module)
        self._skipped = skipped

    def look_again(self) -> None:
        """Hook the modules that were added, in the middle of a training: a fault costs their rows alone."""
        try:
            self.attach()
        except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
            self.guard.fault("forward hooks", error)

    def detach(self) -> None:
        """Leave the modules as they were."""
        for handle in self._handles.values():
            handle.remove()
        self._handles = {}

    # --- a forward pass ---------------------------------------------------------------------------------------------

    @guarded("a module's output", eager=False)
    def forwarded(self, hook: ForwardHook, module: nn.Module, output: Any) -> None:
        """A module was called."""
        if hook.module() is module and self._observed():
            unseen(self._forwarded, hook, module, output)

    def _forwarded(self, hook: ForwardHook, module: nn.Module, output: Any) -> None:
        if torch._C._is_tracing():
            return
        inside = current_task() != -1
        if not torch.is_grad_enabled():
            if not inside:
                self._places[hook.name] = next(self._clock)
            return
        if inside and not self._runs_first(hook.name):
            return
        outputs = _outputs(output)
        sums = [(suffix, self._sums(hook, made, _axis(module, suffix, made, first=hook.first))) for suffix, made in outputs]
        self.heard = True
        if inside:
            self._again.append(Call(hook, self._places.get(hook.name, next(self._clock)), sums))
        else:
            self._called.add(hook.name)
            self._keep(Call(hook, next(self._clock), sums), [node for _, made in outputs for node in _nodes(made)])

    def _sums(self, hook: ForwardHook, made: Tensor, axis: int) -> Any:
        assert self._read is not None
        return self._read(made, axis, hook.low, hook.high)

    def _runs_first(self, name: str) -> bool:
        """Whether a module that is called inside a backward pass was not called with a gradient before."""
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code is CHECKPOINT_BACKWARD:
                return True
            if code.co_filename == CHECKPOINT_BACKWARD.co_filename and code.co_name == "recompute_fn":
                return False
            frame = frame.f_back  # type: ignore[assignment]
        return name not in self._called  # somebody else's checkpoint

    def _keep(self, call: Call, nodes: Sequence[Any]) -> None:
        """The call lives as long as the nodes do."""
        if not nodes:
            self._loose.append(call)
            del self._loose[:-LOOSE]
            return
        call.before, self._loose = self._loose, []
        for node in nodes:
            node.metadata.setdefault(self._key, []).append(call)
        self._waiting.append(weakref.ref(call))
        if len(self._waiting) > self._sweep:
            self._waiting = [ref for ref in self._waiting if ref() is not None]
            self._sweep = max(SWEEP, 2 * len(self._waiting))

    # --- the backward pass ------------------------------------------------------------------------------------------

    def pass_begins(self, entered: Pass, roots: Sequence[Any]) -> None:
        """A backward pass from these roots has reached its first hook: the calls that they reach are its own."""
        waiting = [call for ref in self._waiting if (call := ref()) is not None and not call.claimed]
        found = unseen(_reached, roots, self._key, len(waiting)) if roots and waiting else None
        claimed = waiting if found is None else found
        for call in claimed:
            call.claimed = True
        self._waiting = [weakref.ref(call) for call in waiting if not call.claimed]
        loose, self._loose = self._loose, []
        self._claims[entered] = [each for call in claimed for each in (*call.before, call)] + loose

    def pass_failed(self, entered: Pass) -> None:
        """It broke off: what its modules made counts for nothing."""
        self._claims.pop(entered, None)
        self._again = []

    def pass_ended(self, entered: Pass, step: int, backward: int) -> Activations | None:
        """What the modules made that this pass went through; None of none."""
        calls = [*self._claims.pop(entered, []), *self._again]
        self._again, self.heard = [], False
        self._called.clear()
        rows = _rows(calls)
        if not rows:
            if not self._came and self._observed():
                self._came = True
                self._tell(findings.activations_unavailable(step, self._skipped))
            return None
        if not self._came and self._skipped:
            self._tell(findings.activations_unavailable(step, self._skipped))
        self._came = True
        kinds, sums = zip(*rows.values(), strict=True)
        return Activations(step, backward, time.time(), tuple(rows), kinds, tuple(map(len, sums)), sums)

    def step_ended(self, step: int, passes: int) -> None:
        """A step ended: say so if modules were called in it and no backward pass came, as then there is no row of them."""
        if self.heard and not passes and not self._came:
            self._tell(findings.activations_without_backward(step))
        self.heard = False


def _rows(calls: Iterable[Call]) -> dict[str, tuple[str, list[Any]]]:
    """By output, in the order of the forward pass: the module's type, and the sums of each call."""
    rows: dict[str, tuple[str, list[Any]]] = {}
    for call in sorted(calls, key=lambda call: call.order):
        for suffix, sums in call.sums:
            if sums is not None:
                rows.setdefault(call.hook.name + suffix, (call.hook.type, []))[1].append(sums)
    return rows


# --- the graph ------------------------------------------------------------------------------------------------------


def _nodes(made: Tensor) -> list[Any]:
    """The nodes that made an output. To overwrite a view takes its own node out of the graph, not its base's."""
    base = made._base if made._is_view() else None
    return [node for each in (made, base) if each is not None and (node := each.grad_fn) is not None]


def _reached(roots: Sequence[Any], key: str, most: int) -> list[Call] | None:
    """The calls, at most so many, whose nodes lie behind these roots; None where there are too many nodes to know."""
    start = [getattr(root, "grad_fn", None) or getattr(root, "node", None) for root in roots]  # of tensors, of edges
    nodes = [node for node in dict.fromkeys(start) if node is not None]
    seen, found = set(nodes), dict[Call, None]()
    for node in nodes:
        for call in node.metadata.get(key, ()):
            if not call.claimed:
                found[call] = None
        if len(found) == most:
            break
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                nodes.append(other)
        if len(nodes) > FAR:
            return None
    return list(found)


# --- what modules give ----------------------------------------------------------------------------------------------


def _outputs(output: Any, name: str = "") -> list[tuple[str, Tensor]]:
    """The tensors of an output, with what each is called in it."""
    found: list[tuple[str, Tensor]] = []
    waiting = [(name, output)]
    while waiting and len(found) < MOST:
        at, value = waiting.pop(0)
        if isinstance(value, Tensor):
            if (type(value) in PLAIN or local_part(value) is not value) and not is_transformed(value):
                found.append((at, value))
        elif isinstance(value, tuple) and hasattr(value, "_fields"):
            waiting[:0] = [(f"{at}.{field}", each) for field, each in zip(value._fields, value, strict=True)]
        elif isinstance(value, tuple | list):
            waiting[:0] = [(f"{at}[{i}]", each) for i, each in enumerate(value[:MOST])]
        elif isinstance(value, Mapping):
            waiting[:0] = [(f"{at}[{key}]", each) for key, each in list(value.items())[:MOST]]
    return found


def _axis(module: nn.Module, suffix: str, made: Tensor, *, first: bool) -> int:
    """Which axis of an output is the batch, where the module says so: else the first."""
    if made.is_nested or made.dim() != 3:
        return 0
    if isinstance(module, nn.RNNBase):
        return 0 if first and suffix == "[0]" else 1
    return 0 if first or suffix != "[0]" else 1 if isinstance(module, nn.MultiheadAttention) else 0
