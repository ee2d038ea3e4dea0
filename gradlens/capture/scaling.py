"""The gradient scaler, asked without a device sync.

Hooks see gradients times the loss scale. The scale is read at backward time (after `scaler.update()` it is another), as a
number where it lives on the CPU and as a device tensor elsewhere. A step that the scaler skipped calls no optimizer hook, so
it is noticed by the scaler's own bookkeeping, all of it on the host: the optimizer's stage becomes `STEPPED`, and `update()`
replaces the dictionary of stages.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import OptState


class Scaling:
    """What the scaler did to the gradients of the open step; neutral without a scaler."""

    def __init__(self, scaler: Any | None) -> None:
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._books: list[Any] = []  # of the open step: update() begins a new one, and leaves the old as it was

    def scale(self) -> float | Tensor:
        """The scale of a backward that runs now."""
        tensor = None if self.scaler is None else self.scaler._scale
        if tensor is None:
            return 1.0
        return float(tensor) if tensor.device.type == "cpu" else tensor.detach().clone()

    def look(self, *, opens: bool) -> None:
        """A backward pass starts, and may open a step."""
        if self.scaler is not None:
            if opens:
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
