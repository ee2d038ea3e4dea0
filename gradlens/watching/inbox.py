"""What the training thread leaves for the recorder: a list that it appends to, and nothing else.

    append    one call of a deque: no lock, no thread that wakes
    take      everything that has come, at once

The list is bounded, in items and in bytes. When it is full, whole steps are left out until there is room, and a finding
says which: memory does not grow, and training does not wait. Half full, it asks to be taken before its time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from gradlens.records import Finding, Severity

#: Items and bytes that may wait. A step's tables of 150 parameters take 0.8 MB, of 10,000 parameters 54 MB.
ITEMS, BYTES = 8192, 256 << 20


class Item(Protocol):
    """What waits."""

    step: int
    nbytes: int


class Inbox:
    """One thread appends, another takes. Each count has one thread that writes it."""

    def __init__(self, hurry: Callable[[], None] = lambda: None, items: int = ITEMS, nbytes: int = BYTES) -> None:
        self.items, self.nbytes = items, nbytes
        self._hurry = hurry
        self._waiting: deque[Any] = deque()
        self._put_bytes = self._taken_bytes = 0
        self._gap: list[int] = []  # the steps that were left out since there was last room

    def __len__(self) -> int:
        return len(self._waiting)

    def append(self, item: Item) -> None:
        """Leave an item; or, where there is no room, note its step as left out. Never waits."""
        waiting, held = len(self._waiting), self._put_bytes - self._taken_bytes
        full = waiting >= self.items or (held > 0 and held + item.nbytes > self.nbytes)
        if self._gap:
            if full or item.step == self._gap[-1]:  # the rest of a step that has a hole is left out too
                self._miss(item.step)
                return
            self._waiting.append(_left_out(self._gap))
            self._gap = []
        elif full:
            self._miss(item.step)
            return
        self._put_bytes += item.nbytes
        self._waiting.append(item)
        if 2 * waiting > self.items or 2 * held > self.nbytes:
            self._hurry()

    def _miss(self, step: int) -> None:
        if not self._gap or self._gap[-1] != step:
            self._gap.append(step)
        self._hurry()

    def close(self) -> None:
        """Nothing comes any more: what was left out at the very end is said."""
        if self._gap:
            self._waiting.append(_left_out(self._gap))
            self._gap = []

    def take(self, ready: Callable[[Any], bool] = lambda item: True) -> list[Any]:
        """What has come and is ready, oldest first: items, and findings on steps that were left out."""
        taken: list[Any] = []
        while self._waiting and ready(self._waiting[0]):
            item = self._waiting.popleft()
            self._taken_bytes += getattr(item, "nbytes", 0)
            taken.append(item)
        return taken


def _left_out(steps: list[int]) -> Finding:
    first, last = steps[0], steps[-1]
    missing = f"{len(steps)} observed step{'s' * (len(steps) > 1)} from {first} to {last}"
    return Finding(
        rule="records-thinned",
        step=first,
        severity=Severity.WARNING,
        seen=f"{missing} left no record: writing was slower than training",
        causes=("a slow disk or network file system", "very short steps", "a slow rule or writer"),
        remedy="look less often (schedule=10), select fewer parameters, or write to a local disk",
        value=float(len(steps)),
    )
