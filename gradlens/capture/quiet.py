"""Quiet steps: the schedule leaves them out, so nothing of them is seen but that they end.

    quiet  =  not observed, no hook on any parameter, one optimizer, and nothing that waits for a sign of life

In a stretch of them the optimizer's own two hooks are all that torch calls of ours. The one before its step returns at once,
and the one after it counts the step and asks the schedule about the next. Whatever else comes up (something is registered, a
scaler that is news calls the step, a backward fires a hook after all) takes the general way, as every other step does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradlens.capture.optimizers import WatchedOptimizer


class Quiet:
    """Whether the open step is quiet, and which optimizer ends it: shared by who decides that and the hooks that ask."""

    __slots__ = ("watched",)

    def __init__(self) -> None:
        self.watched: WatchedOptimizer | None = None  #: None where the step is not quiet
