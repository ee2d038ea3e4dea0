"""Device numbers to the host: one copy for many small tensors, and nothing that the training stream waits for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class Transfer:
    """A copy under way. `wait()`, on another thread, gives the tensors as numpy arrays, in the order given."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._shapes = [tuple(tensor.shape) for tensor in tensors]
        self._done: list[np.ndarray | None] = [None] * len(tensors)
        self._moving: list[tuple[list[int], Tensor, torch.cuda.Event]] = []
        devices: dict[torch.device, list[int]] = {}
        for i, tensor in enumerate(tensors):
            if tensor.device.type == "cpu":
                self._done[i] = tensor.detach().numpy()
            else:
                devices.setdefault(tensor.device, []).append(i)
        for members in devices.values():
            self._moving.append((members, *_start([tensors[i] for i in members])))

    def wait(self) -> list[np.ndarray]:
        """The numbers, once they have arrived."""
        for members, buffer, event in self._moving:
            event.synchronize()
            pieces = np.split(buffer.numpy(), np.cumsum([_size(self._shapes[i]) for i in members])[:-1])
            for i, piece in zip(members, pieces, strict=True):
                self._done[i] = piece.reshape(self._shapes[i])
        self._moving = []
        return [array for array in self._done if array is not None]


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _start(tensors: Sequence[Tensor]) -> tuple[Tensor, torch.cuda.Event]:
    packed = torch.cat([tensor.detach().reshape(-1).to(torch.float64) for tensor in tensors])
    buffer = torch.empty(packed.shape, dtype=torch.float64, pin_memory=True)
    buffer.copy_(packed, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(packed.device))
    return buffer, event
