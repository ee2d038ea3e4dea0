"""Whatever torch calls of ours is guarded here, and listed.

A guarded method does not keep its object alive, does nothing in a forked child, is timed, raises nothing into the training
step, and is neither traced nor compiled by torch.compile. `GUARDED` lists them all, so that a test can make each one fail.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from gradlens import _torch

Call = TypeVar("Call", bound=Callable[..., Any])


def eagerly(call: Call) -> Call:
    """The call, hidden from Dynamo with all that it calls. That takes 2 us, so it is asked first whether Dynamo is there."""
    hidden, traced = torch.compiler.disable(call), _torch.traced

    @functools.wraps(call)
    def eager(*args: Any) -> Any:
        return call(*args) if traced() is None else hidden(*args)

    untraced(eager)
    return eager  # type: ignore[return-value]


def untraced(hook: Callable[..., Any]) -> None:
    """A compiled training step calls the hook and does not trace it. Costs nothing; what the hook calls is not covered."""
    hook._torchdynamo_disable = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Guard:
    """What guards need to know of one lens."""

    fault: Callable[[str, Exception], None]
    timed: Callable[..., Any]  #: calls what it is given, with the rest of its arguments, and takes the time
    pid: int = field(default_factory=os.getpid)

    def forked(self) -> bool:
        """Whether this is a child of the process that the lens was made in."""
        return os.getpid() != self.pid


class HasGuard(Protocol):
    """An object with guarded methods."""

    guard: Guard


@dataclass
class Guarded:
    """One guarded method."""

    where: str  #: how a fault of it is named
    call: Callable[..., Any]  #: what it does; the one thing that a test may replace

    @property
    def name(self) -> str:
        """Class and method."""
        return self.call.__qualname__


GUARDED: dict[str, Guarded] = {}  #: every guarded method of this package, by where it is


def guarded(where: str, *, eager: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Make a method something to hand to torch: `self.method` is a function that holds `self` weakly.

    `eager=False` saves a microsecond in what runs once a parameter; nothing that it calls may then be without a file, as
    what dataclasses generate is.
    """

    def decorate(method: Callable[..., Any]) -> Any:
        entry = GUARDED[where] = Guarded(where, method)

        def bind(self: HasGuard) -> Callable[..., Any]:
            this, pid, timed, fault = weakref.ref(self), self.guard.pid, self.guard.timed, self.guard.fault
            traced = _torch.traced

            def call_of(hidden: Callable[..., Any] | None) -> Callable[..., Any]:
                def call(*args: Any) -> Any:
                    if hidden is not None and traced() is not None:
                        return hidden(*args)
                    tool = this()
                    if tool is None or os.getpid() != pid:
                        return None
                    try:
                        return timed(entry.call, tool, *args)
                    except Exception as error:  # noqa: BLE001 - nothing of ours is raised in a training step
                        fault(where, error)
                    return None

                untraced(call)
                return call

            shown = call_of(None)
            return call_of(torch.compiler.disable(shown)) if eager else shown  # as `eagerly`, a call less

        return functools.cached_property(bind)

    return decorate
