"""The largest entries of long lists of numbers, a chunk at a time: what a sort would put first, in little memory.

A *bar* rises while chunks go by: the smallest key that can still be among the `count` largest. Of a chunk only what is above
the bar is kept, so that each chunk is read once and hardly anything is sorted. Equal keys keep the order in which they came;
NaN comes last.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Candidates:
    """Numbers that may be among the largest, in the order in which they came: `[n]` each, on the CPU."""

    key: Tensor  # float64, NaN as -1
    source: Tensor  # int64: which list
    index: Tensor  # int64: where in it
    value: Tensor  # float64
    partial: Tensor

    def take(self, at: Tensor) -> Candidates:
        """Those at the given places."""
        return Candidates(*(getattr(self, name)[at] for name in self.__dataclass_fields__))


class Largest:
    """Collects the `count` entries with the largest keys."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._parts: list[Candidates] = []
        self._waiting = 0
        self._bar = -torch.inf
        self._marks = torch.empty(0, dtype=torch.bool)

    def _room(self, n: int, device: torch.device) -> Tensor:
        """Allocated once: see `live_weights.Workspace`."""
        if len(self._marks) < n or self._marks.device != device:
            self._marks = torch.empty(n, dtype=torch.bool, device=device)
        return self._marks[:n]

    def add(self, source: int, start: int, key: Tensor, value: Tensor, partial: Tensor) -> None:
        """Entries of one list from `start` on, flat. Lists and their chunks come in order."""
        if self._bar < 0:  # else it is above no bar
            key = torch.where(key.isnan(), -1.0, key)
        if self._bar == -torch.inf and len(key) > self._count:
            least = torch.topk(key, self._count, sorted=False).values.min()
            at = (key >= least).nonzero()[:, 0]  # equal ones too: the first of them are wanted
        else:
            bar = _at_most(self._bar, key.dtype)  # an equal one comes too late
            at = torch.gt(key, bar, out=self._room(len(key), key.device)).nonzero()[:, 0]
        if not len(at):
            return
        found = Candidates(
            key[at].double().cpu(),
            torch.full((len(at),), source),
            (at + start).cpu(),
            value[at].double().cpu(),
            partial[at].double().cpu(),
        )
        self._parts.append(found)
        self._waiting += len(at)
        if self._waiting >= max(2 * self._count, 4096) or self._bar == -torch.inf:
            self._prune()

    def _prune(self) -> None:
        columns = Candidates.__dataclass_fields__
        all_of = Candidates(*(torch.cat([getattr(part, name) for part in self._parts]) for name in columns))
        order = torch.argsort(all_of.key, descending=True, stable=True)[: self._count]
        if len(order) == self._count:
            self._bar = float(all_of.key[order[-1]])
        self._parts = [all_of.take(order.sort().values)]  # in the order in which they came
        self._waiting = len(order)

    def result(self) -> Candidates | None:
        """The largest, by falling key; None where there was nothing."""
        if not self._parts:
            return None
        self._prune()
        (best,) = self._parts
        return best.take(torch.argsort(best.key, descending=True, stable=True))


def _at_most(bar: float, dtype: torch.dtype) -> float:
    """The bar in another type, which may not raise it: keys of several types can be compared."""
    rounded = torch.tensor(bar, dtype=dtype)
    if float(rounded) > bar:
        rounded = torch.nextafter(rounded, torch.tensor(-torch.inf, dtype=dtype))
    return float(rounded)
