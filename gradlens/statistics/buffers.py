"""The buffers of features `updates` and `flips`: weights before the step, and the last gradient of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradlens import fields, kernels
from gradlens.records import Parameters
from gradlens.statistics.memory import Plan

_DTYPE, _LAYOUT = attrgetter("dtype"), attrgetter("layout")

#: Groups of rows that are remembered: what each backward of a step reaches, and what each optimizer moves.
GROUPS = 16


class Group(NamedTuple):
    """Rows that are all kept whole, and their memory."""

    rows: list[int]
    dtypes: list[torch.dtype]
    rooms: kernels.StableTensors


class Buffer:
    """A copy of each parameter, or of a sample of its entries; a row is empty until it is first kept.

    A row number stands for the same parameter as long as the `Parameters` object is the same. That object is replaced when
    any name, shape, dtype or device changes; the buffer is then cleared.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, self._samples = plan, plan.samples
        self._parameters: Parameters | None = None
        self._rooms: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] = {}  # those of the rooms that are filled
        self._groups: list[Group] = []  # rows that are kept whole together; the last one that was asked for comes first

    def use(self, parameters: Parameters) -> Buffer:
        """This buffer, cleared first if it held rows of other parameters."""
        if parameters is not self._parameters:
            self._parameters, self._rooms, self._kept, self._groups = parameters, {}, {}, []
            self._samples = self._plan.samples_of(parameters)
        return self

    def together(self, rows: Sequence[int], tensors: Sequence[Tensor]) -> kernels.StableTensors | None:
        """The copies of these rows, if calls have kept exactly these, every entry of them: the usual case in training."""
        rooms = self._rooms_of(rows, tensors)
        return rooms if rooms is not None and all(map(self._kept.__contains__, rows)) else None

    def rooms(self, parameters: Parameters, rows: Sequence[int], *, kept: bool) -> kernels.StableTensors | None:
        """The memory for these rows, where all of it was allocated for whole rows. `kept`: only if each holds a copy.

        The same object each time, while that memory is the same.
        """
        if parameters is not self._parameters:
            self.use(parameters)
        groups = self._groups
        group = groups[0] if groups and groups[0].rows == rows else self._group(rows)
        if group is None and rows and all(map(self._rooms.__contains__, rows)):
            group = self.remember(rows, [self._rooms[row] for row in rows])
        if group is None or (kept and not all(map(self._kept.__contains__, rows))):
            return None
        return group.rooms

    def fill(self, rows: Sequence[int], rooms: kernels.StableTensors) -> None:
        """Mark these rows as kept: the caller has written to their memory."""
        self._kept.update(zip(rows, rooms, strict=True))

    def _rooms_of(self, rows: Sequence[int], tensors: Sequence[Tensor]) -> kernels.StableTensors | None:
        asked: Any = tensors
        group = self._group(rows)
        if group is None or group.dtypes != list(map(_DTYPE, asked)):
            return None
        return group.rooms if set(map(_LAYOUT, asked)) == {torch.strided} else None

    def _group(self, rows: Sequence[int]) -> Group | None:
        groups = self._groups
        for at, group in enumerate(groups):
            if group.rows == rows:
                if at:
                    groups.insert(0, groups.pop(at))
                return group
        return None

    def remember(self, rows: Sequence[int], tensors: Sequence[Tensor]) -> Group | None:
        """Note that these rows are kept together; None where some of them are sampled."""
        if not all(self._samples[row].whole for row in rows):
            return None
        group = Group(list(rows), [t.dtype for t in tensors], kernels.StableTensors(self._rooms[row] for row in rows))
        self._groups = [group, *(other for other in self._groups[: GROUPS - 1] if other.rows != group.rows)]
        return group

    def whole(self, row: int) -> bool:
        """Whether every entry of the row is kept."""
        return self._samples[row].whole

    def view(self, row: int, tensor: Tensor) -> Tensor:
        """The entries of the tensor that the buffer copies."""
        return self._samples[row].view(tensor)

    def get(self, row: int) -> Tensor | None:
        """The copy of this row; None where it is empty."""
        return self._kept.get(row)

    def room(self, row: int, view: Tensor) -> Tensor:
        """The memory for the copy of this row, allocated at first use."""
        room = self._rooms.get(row)
        if room is None or room.dtype != view.dtype:
            self._groups = [group for group in self._groups if row not in group.rows]
            room = self._rooms[row] = torch.empty_like(view, memory_format=torch.preserve_format, requires_grad=False)
            self._kept.pop(row, None)
        return room

    def filled(self, rows: Sequence[int]) -> None:
        """Mark these rows as kept: the caller has written to their memory."""
        self._kept.update((row, self._rooms[row]) for row in rows)

    def keep(self, rows: Sequence[int], tensors: Sequence[Tensor]) -> None:
        """Copy the tensors' entries."""
        rooms = self._rooms_of(rows, tensors)
        if rooms is not None:
            torch._foreach_copy_(rooms, list(tensors))
            self._kept.update(zip(rows, rooms, strict=True))
            return
        views = [self.view(row, tensor) for row, tensor in zip(rows, tensors, strict=True)]
        places = [self.room(row, view) for row, view in zip(rows, views, strict=True)]
        if views:
            torch._foreach_copy_(places, views)
        self.filled(rows)
        self.remember(rows, tensors)

    def forget(self) -> None:
        """Invalidate the copies; keep the allocated memory."""
        self._kept.clear()


def keepable(tensor: Tensor) -> bool:
    """Whether a dense copy is sensible: an embedding's sparse gradient is not turned into a dense one."""
    return tensor.layout == torch.strided and tensor.device.type != "meta"


def summarize(
    rows: Sequence[int],
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    last: Buffer | None,
    detail: bool = True,
) -> tuple[Tensor, tuple[list[int], Tensor] | None]:
    """Rows of the gradients compared with those in `last`, which then holds these.

    Second: the rows of which `last` holds a sample, and their `FLIPS` columns.
    """
    if last is None:
        return kernels.summarize(gradients, weights, detail=detail), None
    rooms = last.together(rows, gradients)
    if rooms is not None:
        return kernels.summarize(gradients, weights, rooms, rooms, detail), None
    previous: list[Tensor | None] = []
    keep: list[Tensor | None] = []
    sampled: list[tuple[int, Tensor]] = []
    kept: list[int] = []
    for row, g in zip(rows, gradients, strict=True):
        whole = False
        if keepable(g):
            kept.append(row)
            whole = last.whole(row)
            if not whole:
                sampled.append((row, last.view(row, g)))
        keep.append(last.room(row, g) if whole else None)
        previous.append(last.get(row) if whole else None)
    numbers = kernels.summarize(gradients, weights, previous, keep, detail)
    flips = _sampled_flips(sampled, last) if sampled else None
    last.filled(kept)
    if len(kept) == len(rows):
        last.remember(rows, gradients)
    return numbers, flips


def _sampled_flips(sampled: Sequence[tuple[int, Tensor]], last: Buffer) -> tuple[list[int], Tensor]:
    rows, views = [row for row, _ in sampled], [view for _, view in sampled]
    rooms = [last.room(row, view) for row, view in sampled]
    numbers = kernels.summarize(views, None, [last.get(row) for row in rows], rooms, False)
    first = fields.AT[fields.FLIPS[0].name]
    return rows, numbers[:, first : first + len(fields.FLIPS)].contiguous()
