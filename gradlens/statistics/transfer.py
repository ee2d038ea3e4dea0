"""Device numbers to the host: one copy for many small tensors, and nothing that the training stream waits for.

On CUDA they are packed on the device and copied to pinned memory; an event tells the other thread when they have arrived.
Tensors on the CPU are taken as they are, and must not change any more. A device that is neither is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

HERE = "cpu"  #: the kind of device whose numbers need no copy


class Transfer:
    """A copy under way. `wait()`, on another thread, gives the tensors as numpy arrays, in the order given."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._shapes = [tuple(tensor.shape) for tensor in tensors]
        self._done: list[np.ndarray | None] = [None] * len(tensors)
        self._moving: list[tuple[list[int], Tensor, torch.cuda.Event | None]] = []
        devices: dict[torch.device, list[int]] = {}
        for i, tensor in enumerate(tensors):
            if tensor.device.type == HERE:
                self._done[i] = known(tensor.detach()).numpy()
            else:
                devices.setdefault(tensor.device, []).append(i)
        for members in devices.values():
            self._moving.append((members, *_start([tensors[i] for i in members])))

    def arrived(self) -> bool:
        """Whether `wait()` need not wait."""
        return all(event is None or event.query() for _, _, event in self._moving)

    def wait(self) -> list[np.ndarray]:
        """The numbers, once they have arrived."""
        for members, buffer, event in self._moving:
            if event is not None:
                event.synchronize()
            pieces = np.split(buffer.numpy(), np.cumsum([_size(self._shapes[i]) for i in members])[:-1])
            for i, piece in zip(members, pieces, strict=True):
                self._done[i] = piece.reshape(self._shapes[i])
        self._moving = []
        return [array for array in self._done if array is not None]


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def known(tensor: Tensor) -> Tensor:
    """The tensor, converted if numpy has no such type."""
    return tensor if tensor.dtype in (torch.float64, torch.float32, torch.bool) else tensor.to(torch.float64)


def _start(tensors: Sequence[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
    device = tensors[0].device
    packed = torch.cat([tensor.detach().reshape(-1).to(torch.float64) for tensor in tensors])
    if device.type != "cuda":
        return packed.cpu(), None
    stream = torch.cuda.current_stream(device)
    for tensor in tensors:  # made on another stream, perhaps: its memory is not to be used again before it is packed
        tensor.record_stream(stream)
    buffer = torch.empty(packed.shape, dtype=torch.float64, pin_memory=True)
    buffer.copy_(packed, non_blocking=True)
    event = torch.cuda.Event()
    event.record(stream)
    return buffer, event
