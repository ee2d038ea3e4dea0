"""Run any loss in float64, whatever its weights, inputs and constants are stored in.

A central difference divides the rounding error of the loss by a small step: in float32 that leaves two digits, in
float64 nine. Casting the weights is not enough, since inputs, targets and constants that the loss holds on to stay narrow
and operations refuse to mix. So a `TorchFunctionMode` widens what each operation is given. What an operation still gives
back narrow is noted by name: there the loss is less exact than it looks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

_WIDE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
#: These name no dtype in their arguments that could be widened.
_CASTS: dict[Callable, Callable] = {
    **dict.fromkeys((Tensor.float, Tensor.half, Tensor.bfloat16), Tensor.double),
    Tensor.chalf: lambda x: x.to(torch.complex128),
}


def is_narrow(x: object) -> bool:
    """Whether x is a real or complex floating tensor of less than float64."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) and x.dtype not in _WIDE.values()


def widen(x: Any) -> Any:
    """A narrow tensor in float64, a narrow dtype as the wide one, anything else as it is."""
    if isinstance(x, torch.dtype):
        return _WIDE.get(x, x)
    return x.to(torch.complex128 if x.is_complex() else torch.float64) if is_narrow(x) else x


def grad(output: Tensor, inputs: Sequence[Tensor], seed: Tensor, create: bool, retain: bool) -> list[Tensor | None]:
    """`torch.autograd.grad`, by the engine itself: the public function leaves the mode while backward runs.

    Checkpointed blocks compute their forward again during backward, and need the mode there too.
    """
    engine = torch.autograd.Variable._execution_engine
    return list(engine.run_backward((output,), (seed,), retain, create, tuple(inputs), True, False))


class Float64(TorchFunctionMode):
    """Within it, operations see float64; `narrow` names those whose results were not."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow: set[str] = set()

    def __torch_function__(self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if func in _CASTS:
            return _CASTS[func](args[0])
        if name == "__get__":  # x.dtype, x.shape, x.T: nothing is computed, so nothing need be copied
            return widen_dtype(func(*args, **kwargs))
        kept = args[:1] if _in_place(name) else ()  # an in-place operation must reach the tensor itself
        result = func(*kept, *self._wide(args[len(kept) :]), **self._wide(kwargs))
        if not kept and any(map(is_narrow, result if isinstance(result, tuple | list) else [result])):
            self.narrow.add(name)
        return result

    def _wide(self, tree: Any) -> Any:
        return tree_map_only((Tensor, torch.dtype), self._given, tree)

    def _given(self, x: Any) -> Any:
        if is_narrow(x) and isinstance(x.grad_fn, torch.autograd.function.BackwardCFunction):
            # The result of a custom autograd.Function: applying one does not pass through the mode.
            self.narrow.add(type(x.grad_fn).__name__)
        return widen(x)


def widen_dtype(x: Any) -> Any:
    """Only a dtype is widened: code compares those of inputs and weights."""
    return widen(x) if isinstance(x, torch.dtype) else x


def _in_place(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")
