"""Quiet steps: the schedule leaves them out, so nothing of them is seen but that they end.

    quiet  =  not observed, no hook on any parameter, and nothing that waits for a sign of life

In a stretch of them two hooks of each optimizer are all that torch calls of ours. The one before its step returns at once,
unless it has stepped in this step already: then its call closes the step, and the next one may be observed.
The one after it notes who has stepped, or, where that ends the step and every other optimizer has stepped once, counts the
step and asks the schedule about the next. Whatever else comes up (an optimizer steps a second time or stands in for another,
something is registered, a scaler that is news calls the step, a backward fires a hook after all) takes the general way, as
every other step does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gradlens.capture.optimizers import WatchedOptimizer
    from gradlens.capture.step import Step


class Quiet:
    """Whose steps are quiet: shared by who decides that and the hooks that ask."""

    __slots__ = ("step", "watched")

    step: Step  #: the open one, where it is quiet

    def __init__(self) -> None:
        self.watched: Mapping[int, WatchedOptimizer] = {}  #: by the optimizer's id; empty where the step is not quiet
