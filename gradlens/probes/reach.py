"""What a loss function can reach besides the model that it is given: its closure, defaults, globals, and their attributes.

A criterion with a moving average, a discriminator, a teacher: what is found is protected as the model is. The search is
bounded, and sees Python objects only; what it does not find (files, C extensions, other processes) a probe cannot undo.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradlens.probes.untouched import GENERATORS

DEPTH, MOST = 5, 4_000  #: how far and how much is looked at
ITEMS = 256  #: of a list or a dict; longer ones are data
_FOREIGN = ("torch", "numpy", "builtins", "pandas", "gradlens", "threading", "logging", "collections")


@dataclass
class Reach:
    """By the name under which each was found."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    generators: dict[str, Any] = field(default_factory=dict)


def reach(function: Callable[..., Any]) -> Reach:
    """The modules, tensors and generators that a function can get at without being given them."""
    found, seen = Reach(), set[int]()
    queue: list[tuple[str, Any, int]] = [("loss_fn", function, 0)]
    while queue and len(seen) < MOST:
        name, value, depth = queue.pop(0)
        if id(value) in seen or value is None or isinstance(value, str | bytes | int | float):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Module):
            found.modules[name] = value
        elif isinstance(value, Tensor):
            found.tensors[name] = value
        elif isinstance(value, GENERATORS):
            found.generators[name] = value
        elif depth < DEPTH:
            queue += [(inner, held, depth + 1) for inner, held in _within(name, value)]
    return found


def _within(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, FunctionType):
        yield from _of_function(value)
    elif isinstance(value, MethodType):
        yield "self", value.__self__
        yield from _of_function(value.__func__) if isinstance(value.__func__, FunctionType) else ()
    elif isinstance(value, functools.partial):
        yield "func", value.func
        yield from ((f"argument {i}", item) for i, item in enumerate(value.args))
        yield from value.keywords.items()
    elif isinstance(value, Optimizer):
        return
    elif isinstance(value, Mapping | list | tuple | set | frozenset):
        yield from _items(name, value)
    elif not isinstance(value, type) and not inspect.ismodule(value):
        if not _foreign(type(value)):
            yield from ((f"{name}.{key}", item) for key, item in getattr(value, "__dict__", {}).items())
            yield from _methods(type(value))
        if hasattr(value, "__wrapped__"):
            yield name, value.__wrapped__


def _foreign(kind: type) -> bool:
    return (kind.__module__ or "").split(".")[0] in _FOREIGN


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    """The functions of a user's class: a loss may call any of them."""
    for base in kind.__mro__:
        if not _foreign(base):
            yield from (
                (f"{base.__name__}.{key}", item) for key, item in vars(base).items() if isinstance(item, FunctionType)
            )


def _items(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if len(value) <= ITEMS:
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        yield from ((f"{name}[{key!r}]", item) for key, item in pairs)


def _of_function(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    yield from ((f"default {i}", item) for i, item in enumerate(function.__defaults__ or ()))
    yield from (function.__kwdefaults__ or {}).items()
    for name in _global_names(function.__code__):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    if hasattr(function, "__wrapped__"):
        yield "wrapped", function.__wrapped__


def _global_names(code: CodeType) -> set[str]:
    inner = (_global_names(const) for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*inner)
