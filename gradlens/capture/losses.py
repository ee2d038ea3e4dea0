"""The loss of a backward pass, from its root: what `backward()` was called on, when that is one number.

    loss = root / scale

Nothing waits for a device: on the CPU the root is read, elsewhere a detached copy is kept until the host has it. A root of
several entries, or several roots, are no loss that one number could stand for.

`Roots` remembers of which backward a tensor was the root, so that a loss that is observed after the optimizer's step still
belongs to the step that it was computed in.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from gradlens import _torch

#: The passes whose roots are remembered.
REMEMBERED = 64


def loss_of(roots: Sequence[Any], scale: float | Tensor = 1.0) -> float | Tensor | None:
    """The loss that these roots are, unscaled; None where they are not one real number."""
    if len(roots) != 1 or type(roots[0]) is not Tensor:
        return None
    root = roots[0]
    if root.numel() != 1 or not root.is_floating_point() or root.is_meta:
        return None
    if root.is_cpu and not isinstance(scale, Tensor):
        return float(root.item()) / scale
    with torch.no_grad():
        return root.detach().reshape(()).to(torch.float64) / scale


def run_elsewhere() -> FrameType | None:
    """The outermost engine run of another thread, where there is just one.

    Hooks on a device's parameters run on a thread of the engine's own, whose stack does not show who called it; the thread
    that did waits inside the call.
    """
    found = [run for frame in sys._current_frames().values() if (run := _outermost(frame)) is not None]
    return found[0] if len(found) == 1 else None


def _outermost(frame: FrameType | None) -> FrameType | None:
    run = None
    while frame is not None:
        if frame.f_code is _torch.ENGINE_RUN:
            run = frame
        frame = frame.f_back
    return run


class Roots:
    """Which tensor was the root of which of the last backward passes. Roots are referred to weakly."""

    def __init__(self) -> None:
        self._last: deque[tuple[weakref.ref[Tensor], int, float | None]] = deque(maxlen=REMEMBERED)

    def add(self, root: weakref.ref[Tensor] | None, step: int, loss: float | Tensor | None) -> None:
        """A backward pass of this step had this root."""
        if root is not None:
            self._last.append((root, step, loss if isinstance(loss, float) else None))

    def step_of(self, value: Any) -> int | None:
        """The step of the last backward whose root, or whose loss, this is; None if it is none's."""
        for root, step, loss in reversed(self._last):
            if root() is value if isinstance(value, Tensor) else loss is not None and loss == value:
                return step
        return None
