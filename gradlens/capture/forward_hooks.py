"""Hooks on the forward passes of modules: on which modules, and how they leave no trace in anything made of the model.

A module's hooks are in its `_forward_hooks`, which every copy and pickle of the module has a copy of. Ours stay out of it:
the dictionary itself, the same object as ever, is told how to be copied (`conceal`), as `copy` and `pickle` ask the object
before its type. `torch.jit.script`, which would compile each hook, asks the same object for its values.

Modules that are compiled are left alone, hooks there would be traced. A model that is compiled later traces the hooks to
nothing, and no longer calls them.
"""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from gradlens.unwrapping import is_wrapper

END = 0.01  #: of a range, that lies at its ends

#: The ranges of modules that have ends.
_RANGES: dict[type, Callable[[Any], tuple[float, float]]] = {
    nn.Sigmoid: lambda module: (0.0, 1.0),
    nn.Hardsigmoid: lambda module: (0.0, 1.0),
    nn.Tanh: lambda module: (-1.0, 1.0),
    nn.Softsign: lambda module: (-1.0, 1.0),
    nn.Hardtanh: lambda module: (module.min_val, module.max_val),
}


class ForwardHook:
    """The hook on one module. It belongs to that module alone: called for any other, it does nothing."""

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


_is_compiling = torch.compiler.is_compiling

# Dynamo passes over this package's files, at the price of a break in the graph. The one call that it meets in a compiled
# model's graph is to be traced, to nothing.
ForwardHook.__call__.__code__ = ForwardHook.__call__.__code__.replace(co_filename="<gradlens forward hook>")


class Handle:
    """A hook that is on a module."""

    def __init__(self, hook: ForwardHook, module: nn.Module) -> None:
        self._hooks: weakref.ref[Any] = weakref.ref(module._forward_hooks)
        self._handle = module.register_forward_hook(hook)
        conceal(module._forward_hooks)

    def remove(self) -> None:
        """Leave the module as it was."""
        self._handle.remove()
        hooks = self._hooks()
        if hooks is not None and not any(isinstance(hook, ForwardHook) for _, hook in hooks.items()):  # of another lens
            reveal(hooks)


def conceal(hooks: Any) -> None:
    """Copies and pickles of this dictionary, and who asks for its values, get the hooks of others alone."""
    ref = weakref.ref(hooks)
    hooks.values = lambda: _foreign(ref()).values()
    hooks.__deepcopy__ = lambda memo: copy.deepcopy(_foreign(ref()), memo)
    hooks.__reduce_ex__ = lambda protocol: _foreign(ref()).__reduce_ex__(protocol)


def reveal(hooks: Any) -> None:
    """Undo `conceal`."""
    for name in ("values", "__deepcopy__", "__reduce_ex__"):
        vars(hooks).pop(name, None)


def _foreign(hooks: Any) -> OrderedDict[int, Any]:
    """The dictionary as it is without us."""
    return OrderedDict((key, hook) for key, hook in hooks.items() if not isinstance(hook, ForwardHook))


# --- modules --------------------------------------------------------------------------------------------------------


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


def compiled_elsewhere() -> set[int]:
    """The modules that somebody compiled under another name: `fast = torch.compile(model)`. Looks at all objects."""
    kind = torch._dynamo.eval_frame.OptimizedModule
    return {id(each._orig_mod) for each in gc.get_objects() if issubclass(type(each), kind)}
