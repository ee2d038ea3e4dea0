"""The gradient scaler, asked without a device sync.

Hooks see gradients times the loss scale. The scale is read at backward time (after `scaler.update()` it is another), as a
number where it lives on the CPU and as a device tensor elsewhere. A step that the scaler skipped calls no optimizer hook, so
it is noticed by the scaler's own bookkeeping, all of it on the host: the optimizer's stage becomes `STEPPED`, and `update()`
replaces the dictionary of stages.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState

LOOKS = 8  #: steps of optimizers at which a scaler that nobody gave is looked for
DEPTH = 40  #: frames that are looked at
_STEP: CodeType = GradScaler.step.__code__


class Scaling:
    """What the scaler did to the gradients of the open step; neutral without a scaler."""

    def __init__(self, scaler: Any | None) -> None:
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._looked = 0
        self._books: list[Any] = []  # of the open step: update() begins a new one, and leaves the old as it was

    def find(self) -> bool:
        """Look on the stack for a scaler whose `step()` this optimizer's hook runs in; whether one was found just now."""
        if self.scaler is not None or self._looked >= LOOKS:
            return False
        self._looked += 1
        frame: FrameType | None = sys._getframe(1)
        for _ in range(DEPTH):
            if frame is None:
                break
            if (
                frame.f_code is _STEP
                and isinstance(scaler := frame.f_locals.get("self"), GradScaler)
                and scaler.is_enabled()
            ):
                self.scaler = scaler
                return True
            frame = frame.f_back
        return False

    def scale(self) -> float | Tensor:
        """The scale of a backward that runs now."""
        tensor = None if self.scaler is None else self.scaler._scale
        if tensor is None:
            return 1.0
        return float(tensor) if tensor.device.type == "cpu" else tensor.detach().clone()

    def look(self, *, anew: bool) -> None:
        """A backward pass starts; with `anew` it opens a step."""
        if self.scaler is not None:
            if anew:
                self._books = []
            if not self._books or self._books[-1] is not self.scaler._per_optimizer_states:
                self._books.append(self.scaler._per_optimizer_states)

    def unscaled(self, optimizer: Any) -> bool:
        """Whether `.grad` of this optimizer's parameters has been unscaled in this step."""
        if self.scaler is None:
            return True
        state = self.scaler._per_optimizer_states.get(id(optimizer))
        return state is not None and state["stage"] is not OptState.READY

    def stepped(self, optimizer: Any) -> bool:
        """Whether `scaler.step(optimizer)` has been called in this step, skipped or not."""
        states = [book[id(optimizer)] for book in self._books if id(optimizer) in book]
        return any(state["stage"] is OptState.STEPPED for state in states)
