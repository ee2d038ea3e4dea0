"""What was in `.grad` at some moment, to tell later whether it was written since.

Identity and version are what can be asked without reading: an in-place write raises the version, a new tensor has another
identity. The id of a gradient that was freed may be used again; a weak reference would tell, and would keep torch from
swapping the tensor. So where that matters, for parameters whose gradients are written by hand, the gradient is held. A write
through `.data` raises no version: for that there are fixed samples, which whoever reads the tensors takes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter

import torch
from torch import Tensor

from gradlens._torch import local_part
from gradlens.capture.attachment import Slot

_VERSION = attrgetter("_version")


def version(tensor: Tensor) -> int:
    """Rises when the tensor is written; -1 for inference tensors, which have no version counter."""
    try:
        return tensor._version
    except RuntimeError:
        return -1


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """The versions of many: a call for each would take as long again."""
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:
        return list(map(version, tensors))


def states(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Identity and version of each."""
    return list(zip(map(id, tensors), versions(tensors), strict=True))


class Marks:
    """The gradients of some slots, as they were."""

    __slots__ = ("_held", "_known", "_listed")

    def __init__(
        self,
        slots: Iterable[Slot] = (),
        gradients: Sequence[Tensor] = (),
        listed: tuple[Sequence[Slot], Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        """Of these gradients; or of all slots, from their gradients' identities and versions: `listed`."""
        self._known = dict(zip(slots, states(gradients), strict=True)) if gradients else {}
        self._listed = listed  # until one of them is looked up
        self._held: list[Tensor] = []

    @property
    def _seen(self) -> dict[Slot, tuple[int, int]]:
        if self._listed is not None:
            slots, ids, seen = self._listed
            self._known, self._listed = dict(zip(slots, zip(ids, seen, strict=True), strict=True)), None
        return self._known

    def update(self, slots: Iterable[Slot], gradients: Sequence[Tensor | None]) -> None:
        """Mark these as they are now."""
        there = {slot: g for slot, g in zip(slots, gradients, strict=True) if g is not None}
        for slot in slots if len(there) < len(gradients) else ():
            if slot not in there:
                self._seen.pop(slot, None)
        self._seen.update(zip(there, states(list(there.values())), strict=True))

    def hold(self, gradients: Iterable[Tensor], most: int) -> None:
        """Keep these from being freed, up to so many bytes, so that their ids are not used again."""
        for gradient in gradients:
            most -= gradient.numel() * gradient.element_size()
            if most < 0:
                return
            self._held.append(gradient)

    def same(self, slot: Slot, gradient: Tensor | None) -> bool:
        """Whether this, which is in `.grad` now, is what was marked."""
        mark = self._seen.get(slot)
        return (None if gradient is None else (id(gradient), version(gradient))) == mark

    def are(self, slots: list[Slot], ids: list[int], seen: list[int]) -> bool:
        """Whether the gradients of these slots, by identity and version, are what was marked."""
        if self._listed is not None and self._listed[0] is slots:
            return self._listed[1:] == (ids, seen)
        return list(map(self._seen.get, slots)) == list(zip(ids, seen, strict=True))

    def all_same(self, slots: Sequence[Slot], gradients: Sequence[Tensor | None]) -> bool:
        """Whether all of these are what was marked."""
        there = {slot: g for slot, g in zip(slots, gradients, strict=True) if g is not None}
        now = dict(zip(there, states(list(there.values())), strict=True))
        seen = self._seen
        return now == {slot: mark for slot in slots if (mark := seen.get(slot)) is not None}


def zeroed(gradient: Tensor) -> bool:
    """Whether nothing is left of what is here of a gradient. On a device, where the host would wait, something is."""
    here = local_part(gradient)
    known = here.device.type == "cpu" and here.layout is torch.strided and here.numel() > 0
    return known and not bool(here.count_nonzero())
