"""Calls that are prepared once, for parameters whose gradients are read step after step.

A *prepared call* knows the weights, where the last gradients are kept, and where the weights before the step go. A step then
costs two native calls and a few questions that are asked of all gradients at once:

    read        rows of `summarize`; the last gradients are replaced, the weights copied, samples taken, all in one pass
    unchanged   whether the samples are still what `read` saw
    compare     rows of `compare`, from the weights before the step to those after it, if the gradients are what `read` saw

`read` and `compare` return None, and have done nothing, where a fact is not what it was when the call was prepared: a type,
a size, a place in memory, a storage that is too small. The general calls serve then. What a prepared call returns is bit for
bit what the general calls return; `GeneralPrepared` makes it from these, for every device and kernel.

Gradients that are read one by one, inside hooks, have a `RowCall` each: a task of one row. It refers to the room alone.

Weights and rooms are referred to as long as this lives, gradients only during a call. A room belongs to gradlens alone: that
no gradient lies in one is not checked.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import count
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from gradlens import fields
from gradlens.kernels import native, reference
from gradlens.kernels.native import StableTensors

if TYPE_CHECKING:
    from gradlens.kernels import Backend

_G, _W, _PREVIOUS, _KEEP, _COPY = range(5)  # operands of a reading
_USED, _BEFORE, _AFTER, _LOSS = range(4)  # operands of a comparison

#: Numbers that are made room for at once, and steps: 256 KiB at most where a step needs less.
TOGETHER, MOST = 2**15, 64


class GradientRows(NamedTuple):
    """The result of `read`: rows as of `kernels.summarize`, and samples of gradients and weights as of `kernels.sample`."""

    rows: Tensor
    samples: Tensor  #: of a gradient and of its weight, side by side
    gradient_samples: Tensor  #: `[n, 16]`

    @property
    def weight_samples(self) -> Tensor:
        """`[n, 16]`."""
        return self.samples[:, reference.SAMPLES :]


class Room(NamedTuple):
    """Memory for the rows of one call."""

    rows: Tensor  #: `[n, width]`
    part: Tensor  #: its first columns, or all of it
    address: int


class Rooms:
    """Memory for rows of one width, made for several steps at once: a new tensor takes 10 us when the caches are cold."""

    def __init__(self, n: int, width: int, part: int | None = None) -> None:
        self._shape, self._part = (max(min(TOGETHER // max(n * width, 1), MOST), 1), n, width), part
        self._left: list[Room] = []

    def take(self) -> Room:
        """A room of ordinary tensors, in inference mode too."""
        if not self._left:
            _, n, width = self._shape
            with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.no_grad():
                made = torch.empty(self._shape, dtype=torch.float64, device="cpu")
                rows, start = made.unbind(0), made.data_ptr()
                parts = rows if self._part is None else made.narrow(2, 0, self._part).unbind(0)
            self._left = list(map(Room, rows, parts, count(start, 8 * n * width)))
        return self._left.pop()


class Prepared(Protocol):
    """The calls for one list of parameters."""

    apart: bool  #: they keep apart from the user's modes by themselves, and cost less than the general calls

    def read(self, gradients: Sequence[Tensor], detail: bool = True, copy: bool = True) -> GradientRows | None:
        """Read the gradients; None where these calls fit gradients or weights no longer. `copy`: copy the weights too."""

    def take_over(self, gradients: Sequence[Tensor], samples: Tensor) -> bool:
        """Another call has read these gradients and copied the weights, with these samples; False where they do not fit."""

    def unchanged(self, gradients: Sequence[Tensor]) -> tuple[bool, bool]:
        """Whether the samples of the gradients, and of the weights, equal those that `read` took.

        Of few weights that `read` copied, every one may be compared with its copy.

        False where nothing was read, and where the host would have to wait for a device.
        """

    def compare(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """What the step did, from the copy of the weights and the gradients that were read.

        None where they have moved, or the gradients' samples are not what was read.
        """


class GeneralPrepared:
    """The same from the general calls of a backend."""

    apart = False

    def __init__(
        self,
        backend: Backend,
        weights: Sequence[Tensor],
        previous: StableTensors | None,
        before: StableTensors | None,
        loss: StableTensors | None = None,
    ) -> None:
        self._backend, self._weights, self._previous, self._before = backend, list(weights), previous, before
        self._loss = loss
        self._read: GradientRows | None = None

    def read(self, gradients: Sequence[Tensor], detail: bool = True, copy: bool = True) -> GradientRows | None:
        """As `Prepared.read`."""
        if len(gradients) != len(self._weights):
            return None
        rows = self._backend.summarize(gradients, self._weights, self._previous, self._previous, detail)
        if copy and self._before:
            with reference.quiet():
                torch._foreach_copy_(self._before, self._weights)
        samples = torch.cat([self._backend.sample(gradients), self._backend.sample(self._weights)], 1)
        self._read = GradientRows(rows, samples, samples[:, : reference.SAMPLES])
        return self._read

    def take_over(self, gradients: Sequence[Tensor], samples: Tensor) -> bool:
        """As `Prepared.take_over`."""
        self._read = GradientRows(samples, samples, samples[:, : reference.SAMPLES])
        return len(gradients) == len(self._weights)

    def unchanged(self, gradients: Sequence[Tensor]) -> tuple[bool, bool]:
        """As `Prepared.unchanged`."""
        if self._read is None or not self._read.rows.is_cpu or len(gradients) != len(self._weights):
            return False, False
        pairs = ((self._read.gradient_samples, gradients), (self._read.weight_samples, self._weights))
        gradient, weight = (_same_bits(taken, self._backend.sample(tensors)) for taken, tensors in pairs)
        return gradient, weight

    def compare(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """As `Prepared.compare`."""
        if self._before is None or len(gradients) != len(self._weights):
            return None
        if self._read is not None and self._read.rows.is_cpu and not self.unchanged(gradients)[0]:
            return None
        return self._backend.compare(gradients, self._before, self._weights, self._loss)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int64), b.view(torch.int64))


class NativePrepared:
    """The native kernel's tasks, filled but for the gradients."""

    apart = True

    def __init__(self, kernel: native.Native, weights: Sequence[Tensor]) -> None:
        self._kernel, self._weights = kernel, list(weights)
        n = len(weights)
        self._tasks, self._moves = native.empty_tasks(n), native.empty_tasks(n)
        self._at, self._moves_at = self._tasks.buffer_info()[0], self._moves.buffer_info()[0]  # they never grow
        self._samples: Room | None = None  # of what was read last
        self._detailed, self._light = Rooms(n, reference.width(True)), Rooms(n, reference.width(False))
        self._sampled, self._moved = Rooms(n, 2 * reference.SAMPLES, reference.SAMPLES), Rooms(n, len(fields.UPDATES))
        self._rooms: list[StableTensors] = []  # referred to: their addresses are in the tasks
        self._copies = self._no_copies = array("q", bytes(8 * len(weights)))
        self._has_previous = self._has_before = False

    @classmethod
    def of(
        cls,
        kernel: native.Native,
        weights: Sequence[Tensor],
        previous: StableTensors | None,
        before: StableTensors | None,
        loss: StableTensors | None = None,
    ) -> NativePrepared | None:
        """None where a weight or a room is not plain and contiguous, or two of them share memory."""
        made = cls(kernel, weights)
        with torch._C.DisableTorchFunction():
            return made if made._fill(previous, before, loss) else None

    def _fill(self, previous: StableTensors | None, before: StableTensors | None, loss: StableTensors | None) -> bool:
        fill, tasks, moves = self._kernel.fill, self._tasks, self._moves
        if not (fill(self._weights, tasks, _W) and fill(self._weights, moves, _AFTER)):
            return False
        if previous is not None:
            if not (fill(previous, tasks, _PREVIOUS) and fill(previous, tasks, _KEEP)):
                return False
            self._rooms.append(previous)
        if before is not None:
            if not (fill(before, tasks, _COPY) and fill(before, moves, _BEFORE)):
                return False
            if native.types(tasks, _COPY) != native.types(tasks, _W):
                return False
            self._rooms.append(before)
        if loss is not None:
            if not fill(loss, moves, _LOSS):
                return False
            self._rooms.append(loss)
        self._has_previous, self._has_before = previous is not None, before is not None
        self._copies = native.addresses(tasks, _COPY)
        self._copying = True
        self._kept_types = native.types(tasks, _KEEP)
        entries = native.total(tasks)
        self._calls = self._kernel.library_for(entries)
        self._brief, self._threaded = entries < native.BRIEF, entries >= native.THREADED
        return native.own_memory([room for rooms in self._rooms for room in rooms], self._weights)

    def read(self, gradients: Sequence[Tensor], detail: bool = True, copy: bool = True) -> GradientRows | None:
        """As `Prepared.read`."""
        self._samples, tasks, n, kernel = None, self._tasks, len(self._weights), self._kernel
        with torch._C.DisableTorchFunction():
            if not kernel.refill(self._weights, gradients, tasks):
                return None
            if self._has_previous and native.types(tasks, _G) != self._kept_types:
                return None
            if copy is not self._copying:
                native.set_addresses(tasks, _COPY, self._copies if copy else self._no_copies)
                self._copying = copy
            room, sampled = self._detailed.take() if detail else self._light.take(), self._sampled.take()
            threads = torch.get_num_threads() if self._threaded else 1
            self._calls.gradlens_read(self._at, n, room.address, sampled.address, threads, kernel.variant, detail)
        self._samples = sampled
        return GradientRows(room.rows, sampled.rows, sampled.part)

    def take_over(self, gradients: Sequence[Tensor], samples: Tensor) -> bool:
        """As `Prepared.take_over`."""
        self._samples = None
        with torch._C.DisableTorchFunction():
            if not self._kernel.refill(self._weights, gradients, self._tasks):
                return False
            self._samples = Room(samples, samples, samples.data_ptr())
        return True

    def unchanged(self, gradients: Sequence[Tensor]) -> tuple[bool, bool]:
        """As `Prepared.unchanged`."""
        samples = self._samples
        if samples is None:
            return False, False
        same = self._kernel.unchanged(gradients, self._weights, self._tasks, samples.address, self._brief)
        return bool(same & 1), bool(same & 2)

    def compare(self, gradients: Sequence[Tensor]) -> Tensor | None:
        """As `Prepared.compare`."""
        samples = self._samples
        if samples is None or not self._has_before:
            return None
        if not self._kernel.unchanged(gradients, self._weights, self._tasks, samples.address, False) & 1:
            return None
        native.copy_operand(self._tasks, _G, self._moves, _USED)
        room, threads = self._moved.take(), torch.get_num_threads() if self._threaded else 1
        at, n, variant = self._moves_at, len(self._weights), self._kernel.variant
        self._calls.gradlens_compare(at, n, native.NO_LAYOUTS, room.address, threads, variant)
        return room.rows


class RowRooms:
    """Memory for single rows, which the calls of all parameters share."""

    def __init__(self) -> None:
        self.detailed, self.light = (Rooms(1, reference.width(detail)) for detail in (True, False))


class RowCall:
    """The native kernel's task for one gradient at a time, and the copy of the last one."""

    def __init__(self, kernel: native.Native, previous: StableTensors | None, rooms: RowRooms) -> None:
        self._kernel, self._previous, self._rooms = kernel, previous, rooms
        self._task = native.empty_tasks(1)
        self._kept_type, self._weighed = array("q"), False  # whether the task has a weight

    @classmethod
    def of(cls, kernel: native.Native, previous: Tensor | None, rooms: RowRooms) -> RowCall | None:
        """None where the copy is not plain and contiguous."""
        made = cls(kernel, None if previous is None else StableTensors((previous,)), rooms)
        with torch._C.DisableTorchFunction():
            return made if made._fill() else None

    def _fill(self) -> bool:
        if self._previous is None:
            return True
        fill, task = self._kernel.fill, self._task
        if not (fill(self._previous, task, _PREVIOUS) and fill(self._previous, task, _KEEP)):
            return False
        self._kept_type = native.types(task, _KEEP)
        return True

    def read(self, gradient: Tensor, weight: Tensor, detail: bool) -> Tensor | None:
        """The row of `summarize`; the last gradient is replaced. None, and nothing done, where the task does not fit."""
        kernel, task, weights = self._kernel, self._task, [weight]
        with torch._C.DisableTorchFunction():
            if native.modes_are_active():
                return None
            if not (self._weighed and kernel.is_same(weights, task, _W)):
                self._weighed = kernel.fill(weights, task, _W)
            if not (self._weighed and kernel.fill([gradient], task, _G)):
                return None
            if self._previous is not None and native.types(task, _G) != self._kept_type:
                return None
            room = (self._rooms.detailed if detail else self._rooms.light).take()
            entries = gradient.numel()
            calls, threads = kernel.library_for(entries), native.threads_for(entries)
            call = calls.gradlens_summarize if detail else calls.gradlens_summarize_light
            done = call(task.buffer_info()[0], 1, native.NO_LAYOUTS, room.address, threads, kernel.variant)
        return room.rows if done else None
