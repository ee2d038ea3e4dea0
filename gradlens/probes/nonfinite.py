"""Where NaN or infinity is born: the first operation that makes it of numbers that are finite, forward or backward.

    print(gradlens.trace_nonfinite(model, loss_fn, batch))

The forward pass runs under a dispatch mode that looks at what goes into each operation and what comes out; the backward pass
with a hook on each operation of the graph. So the operation is exact, and with it come the module it ran in, the line of the
user's code, its inputs and the row of the batch. Every number is looked at, which makes a probe some ten times as slow as a
step. Constants of infinity that are filled in on purpose (a mask of -inf) are no birth.

The model, its buffers, gradients and random state are left as they were.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradlens import markup
from gradlens.capture.graph import plain_name
from gradlens.probes.isolated_loss import IsolatedLoss

if TYPE_CHECKING:
    import pandas as pd

#: Operations that put constants in, or make memory that is written later.
_FILLS = ("fill", "full", "empty", "new_", "scalar_tensor", "lift_fresh", "where", "constant", "arange", "zeros")
#: Of the frames of a stack, those of torch and of this package are no user's.
_OURS = ("/torch/", "/gradlens/probes/", "<frozen", "<string>", "contextlib.py")


@dataclass(frozen=True)
class Birth:
    """An operation that made NaN or infinity of finite numbers."""

    phase: str  #: `forward` or `backward`
    operation: str
    module: str  #: the qualified name, "" outside of all modules
    line: str  #: `file:line: code`, of the user's code
    what: str  #: `NaN` or `infinity`
    count: int  #: entries
    of: int
    row: int  #: the first row of the batch that has one, -1 of a single number
    inputs: tuple[str, ...]  #: shape and range of each

    def __str__(self) -> str:
        where = f" in module {self.module!r}" if self.module else ""
        row = f", the first in row {self.row}" if self.row >= 0 else ""
        lines = [
            f"{self.what} is born in the {self.phase} pass, in {self.operation}{where}: "
            f"{self.count} of {self.of} entries{row}"
        ]
        lines += [f"  at {self.line}"] if self.line else []
        lines += [f"  input {i}: {text}" for i, text in enumerate(self.inputs)]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False, repr=False)
class NonFiniteTrace(markup.Shown):
    """What was found: the births in the order in which they happened."""

    births: tuple[Birth, ...]
    loss: float
    given: tuple[str, ...] = ()  #: parameters and inputs that were not finite to begin with

    @property
    def ok(self) -> bool:
        """Whether all of it is finite: weights and data, forward and backward."""
        return not self.births and not self.given

    @property
    def origin(self) -> Birth | None:
        """The first birth."""
        return self.births[0] if self.births else None

    @property
    def frame(self) -> pd.DataFrame:
        """One row a birth."""
        import pandas as pd

        names = ("phase", "operation", "module", "line", "what", "count", "of", "row")
        return pd.DataFrame([[getattr(birth, name) for name in names] for birth in self.births], columns=list(names))

    def __str__(self) -> str:
        lines = [f"the loss is {self.loss:.6g}"]
        lines += [f"not finite to begin with: {name}" for name in self.given]
        lines += [str(birth) for birth in self.births[:3]]
        if self.ok:
            lines.append("every number is finite, forward and backward")
        return "\n".join(lines)


def trace_nonfinite(model: nn.Module, loss_fn: Callable[..., Tensor], batch: Any) -> NonFiniteTrace:
    """Find the operation in which NaN or infinity is born, for one batch.

    Args:
        model: In the mode in which it failed.
        loss_fn: `loss_fn(model, batch) -> loss`.
        batch: The batch of the step that failed.

    Raises:
        gradlens.errors.GradlensError: A loss function that the probes cannot call; says what to give.
    """
    forward = _Forward(model)

    @functools.wraps(loss_fn)
    def traced(*args: Any) -> Tensor:
        with forward.watching():
            return loss_fn(*args)

    with IsolatedLoss(model, traced, batched=True) as isolated:
        found = isolated.evaluate(lambda loss: (float(loss.detach()), _backward(loss, isolated.weights, forward)), batch)
    given = [name for name, p in model.named_parameters() if not _finite(p)]
    leaves = list(enumerate(tree_leaves(batch)))
    given += [f"input {i} of the batch" for i, leaf in leaves if isinstance(leaf, Tensor) and not _finite(leaf)]
    loss, backward = found
    births = () if given else (*forward.births, *backward)  # what is not finite to begin with explains all that follows
    return NonFiniteTrace(births, loss, tuple(given))


class _Forward(TorchDispatchMode):
    """Looks at each operation of the forward pass, and knows the module that runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {id(module): name for name, module in model.named_modules()}
        self._stack: list[str] = []
        self.births: list[Birth] = []
        self.places: dict[Any, tuple[str, str]] = {}  # by node of the graph: module and line

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While the forward pass runs."""
        before = torch.nn.modules.module.register_module_forward_pre_hook(self._enter)
        after = torch.nn.modules.module.register_module_forward_hook(self._leave, always_call=True)
        self.births, self._stack = [], []
        try:
            with torch.autograd.set_detect_anomaly(True, check_nan=False), self:
                yield
        finally:
            before.remove()
            after.remove()

    def _enter(self, module: nn.Module, _args: Any) -> None:
        self._stack.append(self._names.get(id(module), type(module).__name__))

    def _leave(self, module: nn.Module, _args: Any, output: Any) -> None:
        name = self._stack.pop() if self._stack else ""
        waiting: list[Any] = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in self.places:
                self.places[node] = (name, "")
                waiting += [other for other, _ in node.next_functions]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__ if hasattr(func, "overloadpacket") else str(func)
        if not any(word in name for word in _FILLS):
            taken = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor) and not _finite(tensor) and all(map(_finite_or_masked, taken)):
                    module = self._stack[-1] if self._stack else ""
                    self.births.append(_birth("forward", name, module, _line(), tensor, taken))
                    break
        return made


def _backward(loss: Tensor, weights: list[Tensor], forward: _Forward) -> list[Birth]:
    """The births of the backward pass, from hooks on each operation of the graph."""
    births: list[Birth] = []
    if loss.grad_fn is None:
        return births
    start: Any = loss.grad_fn
    handles, seen = [], {start}
    waiting: list[Any] = [start]
    for node in waiting:
        handles.append(node.register_hook(_looking(node, births, forward)))
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)
    try:
        torch.autograd.grad(loss, [w for w in weights if w.requires_grad], allow_unused=True, retain_graph=False)
    finally:
        for handle in handles:
            handle.remove()
    return births


def _looking(node: Any, births: list[Birth], forward: _Forward) -> Callable[[Any, Any], None]:
    def look(made: Any, got: Any) -> None:
        given = [g for g in got if isinstance(g, Tensor)]
        bad = next((g for g in made if isinstance(g, Tensor) and not _finite(g)), None)
        if bad is not None and all(map(_finite, given)):
            module = forward.places.get(node, ("", ""))[0]
            births.append(_birth("backward", plain_name(node), module, _traced(node), bad, given))

    return look


def _birth(phase: str, operation: str, module: str, line: str, tensor: Tensor, inputs: list[Tensor]) -> Birth:
    with torch.no_grad():
        nan = torch.isnan(tensor)
        bad = nan if bool(nan.any()) else torch.isinf(tensor)
        row = -1 if tensor.dim() == 0 else int(bad.reshape(len(tensor), -1).any(1).nonzero()[0])
        texts = tuple(_described(t) for t in inputs[:4])
        what = "NaN" if bool(nan.any()) else "infinity"
        return Birth(phase, operation, module, line, what, int(bad.sum()), tensor.numel(), row, texts)


def _described(tensor: Tensor) -> str:
    text = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.dtype in (torch.int64, torch.int32)):
        return text
    finite = tensor[torch.isfinite(tensor)]
    return f"{text}, from {float(finite.min()):.4g} to {float(finite.max()):.4g}" if finite.numel() else text


def _finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta or not tensor.numel():
        return True
    with torch.no_grad():
        return bool(torch.isfinite(tensor).all())


def _finite_or_masked(tensor: Tensor) -> bool:
    """Whether it has no NaN and no +inf: -inf is what masks are made of."""
    if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
        return True
    with torch.no_grad():
        return not bool((torch.isnan(tensor) | torch.isposinf(tensor)).any())


def _line() -> str:
    """The innermost line of the user's code on the stack."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if not any(word in frame.filename for word in _OURS):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return ""


def _traced(node: Any) -> str:
    """The line at which the forward of this node ran, as anomaly detection has noted it."""
    lines = node.metadata.get("traceback_", [])
    for text in reversed(lines):
        head, _, code = text.strip().partition("\n")
        if head.startswith('File "') and not any(word in head for word in _OURS):
            path, number = head.split('"')[1], head.partition(", line ")[2].partition(",")[0]
            return f"{path}:{number}: {code.strip().splitlines()[0] if code.strip() else ''}"
    return ""
