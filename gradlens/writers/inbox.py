"""What one thread leaves for another: a list that it appends to, and nothing else.

    append    one call of a deque: no lock, no thread that wakes
    take      everything that has come, at once

The list is bounded, in items and in bytes. When it is full, whole steps are left out until there is room, and a finding
says which: memory does not grow, and whoever appends does not wait. Half full, it asks to be taken before its time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

from gradlens.findings import records_thinned

#: Items and bytes that may wait. A step's tables of 150 parameters take 0.8 MB, of 10,000 parameters 54 MB.
ITEMS, BYTES = 8192, 256 << 20


class Item(Protocol):
    """What waits. It may have `nbytes` too."""

    step: int


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
        waiting, held, size = len(self._waiting), self._put_bytes - self._taken_bytes, getattr(item, "nbytes", 0)
        full = waiting >= self.items or (held > 0 and held + size > self.nbytes)
        if self._gap:
            if full or item.step == self._gap[-1]:  # the rest of a step that has a hole is left out too
                self._miss(item.step)
                return
            self._waiting.append(records_thinned(self._gap))
            self._gap = []
        elif full:
            self._miss(item.step)
            return
        self._put_bytes += size
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
            self._waiting.append(records_thinned(self._gap))
            self._gap = []

    def take(self, ready: Callable[[Any], bool] = lambda item: True) -> list[Any]:
        """What has come and is ready, oldest first: items, and findings on steps that were left out."""
        taken: list[Any] = []
        while self._waiting and ready(self._waiting[0]):
            item = self._waiting.popleft()
            self.release(item)
            taken.append(item)
        return taken

    def first(self) -> Any:
        """The oldest alone, whose bytes count as waiting until it is released."""
        return self._waiting.popleft()

    def release(self, item: Any) -> None:
        """Its bytes wait no longer."""
        self._taken_bytes += getattr(item, "nbytes", 0)
