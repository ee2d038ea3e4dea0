"""What leaf modules make of each batch, read by forward hooks, only where a lens was asked for it (feature `activations`).

    a module was called -> is this a forward pass of training? -> sums of its output -> at the backward's end, one fact

An output is read when its module returns, since what follows may overwrite it. It counts where a gradient is being recorded,
on an observed step. A checkpoint calls modules again inside the backward pass: that counts for those that had no gradient
recorded the first time (reentrant checkpoints), and for no other. Nothing of the output is kept but sums.

Modules that are compiled are left alone, hooks there would be traced. A model that is compiled later traces the hooks to
nothing, and no longer calls them. A copy's hooks, and those of a module that was pickled, do nothing.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradlens import findings
from gradlens._torch import current_task, is_transformed, local_part
from gradlens.activations import Activations
from gradlens.capture.attachment import PLAIN, Attachment, parts
from gradlens.capture.guards import Guard, guarded
from gradlens.records import Finding
from gradlens.unwrapping import is_wrapper

MOST = 16  #: tensors of one output that are read
END = 0.01  #: of a range, that lies at its ends

#: The ranges of modules that have ends.
_RANGES: dict[type, Callable[[Any], tuple[float, float]]] = {
    nn.Sigmoid: lambda module: (0.0, 1.0),
    nn.Hardsigmoid: lambda module: (0.0, 1.0),
    nn.Tanh: lambda module: (-1.0, 1.0),
    nn.Softsign: lambda module: (-1.0, 1.0),
    nn.Hardtanh: lambda module: (module.min_val, module.max_val),
}


class Read(Protocol):
    """Takes the sums of one output, in the order of `activations.SUMS`; None of one that has no such numbers."""

    def __call__(self, made: Tensor, axis: int, low: float, high: float) -> list[float] | Tensor | None: ...


class ForwardHook:
    """The hook on one module. It belongs to that module alone: what a copy of the module got does nothing."""

    def __init__(self, forwarded: Callable[..., None], module: nn.Module, name: str) -> None:
        self.forwarded, self.module, self.name = forwarded, weakref.ref(module), name
        self.type = type(module).__name__
        ends = _RANGES.get(type(module))
        low, high = (-math.inf, math.inf) if ends is None else ends(module)
        self.low, self.high = (low, high) if ends is None else (low + END * (high - low), high - END * (high - low))
        self.first = bool(getattr(module, "batch_first", True))

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not _is_compiling():
            self.forwarded(self, module, output)

    def __deepcopy__(self, memo: Any) -> Any:
        return _NOTHING

    def __reduce__(self) -> Any:
        """A callable that takes three arguments and does nothing, from the standard library."""
        return getattr, (contextlib.nullcontext(), "__exit__")


_NOTHING = contextlib.nullcontext().__exit__
_is_compiling = torch.compiler.is_compiling

# Dynamo passes over this package's files, at the price of a break in the graph. The one call that it meets in a compiled
# model's graph is to be traced, to nothing.
ForwardHook.__call__.__code__ = ForwardHook.__call__.__code__.replace(co_filename="<gradlens forward hook>")


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
        self._handles: dict[weakref.ref[nn.Module], Any] = {}
        self._compiled: set[int] | None = None
        self._skipped: list[str] = []
        self._rows: dict[str, tuple[str, int, Any]] = {}  # by output: the module's type, calls, sums
        self._before: dict[int, frozenset[str]] = {}  # by engine run: the modules that had been called when it began
        self._called: set[str] = set()
        self._came = False

    # --- life -------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Hook the modules that are not hooked yet. May be called again: modules may have been added."""
        if self._read is None:
            return
        if self._compiled is None:
            self._compiled = _compiled_elsewhere()
        skipped: list[str] = []
        known = {module for ref in self._handles if (module := ref()) is not None}
        for prefix, part in parts(self._attachment.target()).items():
            if isinstance(part, nn.Module):
                for name, module in leaves(part, prefix, self._compiled, skipped):
                    if module not in known:
                        hook = ForwardHook(self.forwarded, module, name or type(module).__name__)
                        self._handles[weakref.ref(module)] = module.register_forward_hook(hook)
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
        if hook.module() is not module or not torch.is_grad_enabled() or not self._observed() or torch._C._is_tracing():
            return
        task = current_task()
        if task != -1 and hook.name in self._before.setdefault(task, frozenset(self._called)):
            return  # a checkpoint calls it again
        self._called.add(hook.name)
        for suffix, made in _outputs(output):
            self._add(hook, hook.name + suffix, made, _axis(module, suffix, made, first=hook.first))

    def _add(self, hook: ForwardHook, name: str, made: Tensor, axis: int) -> None:
        assert self._read is not None
        sums = self._read(made, axis, hook.low, hook.high)
        if sums is None:
            return
        known = self._rows.get(name)
        if known is not None:
            _, calls, before = known
            self._rows[name] = hook.type, calls + 1, _sum(before, sums)
        else:
            self._rows[name] = hook.type, 1, sums

    # --- the backward pass ------------------------------------------------------------------------------------------

    def pass_ended(self, step: int, backward: int) -> Activations | None:
        """What the modules made that this pass went through; None of none."""
        if self._read is None:
            return None
        if not self._rows:
            if not self._came and self._observed():
                self._came = True
                self._tell(findings.activations_unavailable(step, self._skipped))
            return None
        rows, self._rows, self._before = self._rows, {}, {}
        self._called.clear()
        if not self._came and self._skipped:
            self._tell(findings.activations_unavailable(step, self._skipped))
        self._came = True
        types, calls, sums = zip(*rows.values(), strict=True)
        return Activations(step, backward, time.time(), tuple(rows), types, calls, sums)


def _sum(a: Any, b: Any) -> Any:
    """Two rows of sums added, wherever they are."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        given = a if isinstance(a, Tensor) else b
        with torch.no_grad():  # neither the user's default dtype nor device counts
            first, second = (torch.as_tensor(each, dtype=torch.float64, device=given.device) for each in (a, b))
            return first + second
    return [x + y for x, y in zip(a, b, strict=True)]


# --- modules and what they give -------------------------------------------------------------------------------------


def leaves(part: nn.Module, prefix: str, compiled: set[int], skipped: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have no other within, each once, by name. Of compiled ones the names go to `skipped`."""
    seen: set[int] = set()

    def visit(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if _is_compiled(module) or id(module) in compiled:
            skipped.append(name or type(module).__name__)
            return
        inner = [(child, m) for child, m in module._modules.items() if m is not None and child != "parametrizations"]
        if not inner or isinstance(module, nn.MultiheadAttention):  # which calls none of its own
            yield name, module
            return
        for child, m in inner:
            yield from visit(m, name if is_wrapper(module, child) else f"{name}.{child}" if name else child)

    yield from visit(part, prefix)


def _is_compiled(module: nn.Module) -> bool:
    inplace = getattr(module, "_compiled_call_impl", None) is not None
    return inplace or isinstance(module, torch._dynamo.eval_frame.OptimizedModule | torch.jit.ScriptModule)


def _compiled_elsewhere() -> set[int]:
    """The modules that somebody compiled under another name: `fast = torch.compile(model)`. Looks at all objects."""
    kind = torch._dynamo.eval_frame.OptimizedModule
    return {id(each._orig_mod) for each in gc.get_objects() if issubclass(type(each), kind)}


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
