"""Whose `step` is it: a training loop's, or that of a wrapper around the optimizer?

An object that holds the optimizer and has a `step` of its own may be either. A wrapper (Lookahead, SAM) moves weights around
the inner step, and the move is the whole one. A loop (`Trainer.step(self, batch)`) does there what others write in a
function, so what it moves after `optimizer.step()` is no part of the step. They are told apart by who runs backward:

    loop      the object is no optimizer, and every backward of the step was run by its method itself
    wrapper   backward ran before its method was called, or in a callable that it was given: a closure
    wrapper   it has `param_groups`, whatever it runs: a SAM that is told the model and the loss runs backward too

A callable that the object keeps, as of `set_closure`, counts as given, unless it is a method of that same object. Where no
stack shows who ran backward, the object is taken to be a wrapper.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from types import CodeType, FrameType, FunctionType, MethodType
from typing import Any

#: The name of the methods in question.
STEP = "step"


Key = tuple[int, CodeType]  #: tells methods of objects apart, and keeps no object alive
NOBODY = frozenset[Key]()


def owner_of(frame: FrameType) -> Any:
    """The object whose method this frame is a call of, where it is one's."""
    return frame.f_locals.get(frame.f_code.co_varnames[0])


def loops(caller: FrameType | None) -> frozenset[Key]:
    """The keys of the methods that run the backward which `caller` has called, and run it themselves."""
    found, within = set[Key](), set[CodeType | None]()
    while caller is not None:
        code = caller.f_code
        if code.co_name == STEP and code.co_argcount:
            owner = owner_of(caller)
            if not _is_optimizer(owner) and within.isdisjoint(_codes([*_arguments(caller), *_kept(owner)])):
                found.add((id(owner), code))
        within.add(code)
        caller = caller.f_back
    return frozenset(found)


def wrapper(methods: Sequence[Key], loops: frozenset[Key]) -> int | None:
    """The id of the owner of the outermost of these methods that is no loop's; they come innermost first."""
    owners = [key[0] for key in methods if key not in loops]
    return owners[-1] if owners else None


def _arguments(frame: FrameType) -> Iterator[Any]:
    """What a method was given, beside its object."""
    code, seen = frame.f_code, frame.f_locals
    named = code.co_argcount + code.co_kwonlyargcount
    rest = [name for name, flag in (("*", inspect.CO_VARARGS), ("**", inspect.CO_VARKEYWORDS)) if code.co_flags & flag]
    for name in code.co_varnames[1:named]:
        yield seen.get(name)
    for kind, name in zip(rest, code.co_varnames[named:], strict=False):
        packed = seen.get(name, ())
        yield from packed if kind == "*" else packed.values()


def _kept(owner: Any) -> list[Any]:
    """What an object keeps, but for methods of its own."""
    values = getattr(owner, "__dict__", {}).values()
    return [value for value in values if type(value) is not MethodType or value.__self__ is not owner]


def _codes(values: Sequence[Any]) -> list[CodeType | None]:
    """The code of those that can be called: most of what an object keeps cannot, and is not looked at further."""
    return [code_of(value) for value in values if callable(value)]


def _is_optimizer(owner: Any) -> bool:
    try:
        return hasattr(owner, "param_groups")
    except Exception:  # noqa: BLE001 - a property of the user's
        return True


def code_of(called: Any) -> CodeType | None:
    """The code that runs when this is called; None where that is not Python's, or it cannot be called."""
    while type(called) is functools.partial:
        called = called.func
    if type(called) is MethodType:
        called = called.__func__
    if type(called) is not FunctionType and callable(called):
        called = type(called).__call__
    return called.__code__ if type(called) is FunctionType else None
