"""Put things back whatever happens: Ctrl-C at any moment, a second one, an error in the midst.

Two rules make that hold without locks. What is put back is *idempotent*: `put_back()` compares with what was and may run any
number of times. And it is asked for *twice*, by two blocks that enclose each other: an interrupt that falls into the one is
followed by the other. While things are put back SIGINT is held, and raised afterwards.
"""

from __future__ import annotations

import functools
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar

import torch

from gradlens._torch import asks_torch_functions, set_asks_torch_functions

P = ParamSpec("P")
R = TypeVar("R")


class Closable(Protocol):
    """An open block: `close()` puts back what it changed, and may be called again."""

    def close(self) -> None:
        """Put everything back."""


class _Open(threading.local):
    def __init__(self) -> None:
        self.blocks: list[Closable] = []


OPEN = _Open()  #: the blocks of this thread that have yet to put things back; each adds itself before it changes anything


def leaves_no_trace(probe: Callable[P, R]) -> Callable[P, R]:
    """The outer of the two blocks: whatever is open when the probe ends, in whatever way, is closed."""

    @functools.wraps(probe)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        before, modes = len(OPEN.blocks), torch._C._len_torch_function_stack()
        asked = asks_torch_functions()
        try:
            return probe(*args, **kwargs)
        except KeyboardInterrupt as interrupt:
            _end_suspended(interrupt)
            raise
        finally:
            uninterrupted(functools.partial(_close, before, modes, asked))

    return guarded


def _close(before: int, modes: int, asked: Any) -> None:
    while len(OPEN.blocks) > before:
        OPEN.blocks[-1].close()
        del OPEN.blocks[-1:]
    while torch._C._len_torch_function_stack() > modes:
        torch._C._pop_torch_function_stack()
    set_asks_torch_functions(asked)


def _end_suspended(error: BaseException | None) -> None:
    """End the context managers that the interrupt left suspended.

    Torch takes a function mode off the stack for the time of a call by one, which would put it on again whenever the
    traceback is freed.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def uninterrupted(put_back: Callable[[], None]) -> None:
    """Run it to its end: an interrupt that comes meanwhile is raised afterwards."""
    interrupt, pending, handler = None, list[int](), _handler()
    while True:
        try:
            _held(put_back, handler, pending)
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt
    if pending:
        signal.raise_signal(signal.SIGINT)


def _handler() -> Any:
    """The handler of SIGINT where it can be exchanged: in the main thread, if it is one of Python's."""
    return signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None


def _held(put_back: Callable[[], None], handler: Any, pending: list[int]) -> None:
    """With SIGINT kept back, where that can be."""
    if handler is None:
        put_back()
        return
    try:
        signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
        put_back()
    finally:
        signal.signal(signal.SIGINT, handler)
