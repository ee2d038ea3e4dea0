"""A writer on a thread of its own, so that the caller never waits for a disk.

The queue is bounded. When it is full, whole steps are left out until there is room again, and a finding says which: memory
does not grow and the caller does not wait. Each item has a `step`, and may have `nbytes`; what it is else is the inner
writer's business.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import time
import warnings
from typing import Any, Protocol

from gradlens.errors import GradlensWarning
from gradlens.findings import records_thinned

#: Items and bytes that may wait. A step's tables of 150 parameters take 0.8 MB, of 10,000 parameters 54 MB. Small models
#: step hundreds of times a second, and a busy machine may keep the thread from running for a quarter of one.
MAXSIZE, MAX_BYTES = 1000, 256 << 20


class Item(Protocol):
    """What is queued."""

    step: int


class Background:
    """Hands items to a writer on a daemon thread. `flush()` waits until all of them were handed on.

    With `patience`, `flush()` and `close()` wait no longer than so many seconds, and leave the thread to itself: for a
    writer that may wait for another machine.
    """

    def __init__(self, writer: Any, maxsize: int = MAXSIZE, max_bytes: int = MAX_BYTES, patience: float = math.inf) -> None:
        self._writer, self._patience = writer, patience
        self._queue: queue.Queue[Any] = queue.Queue(maxsize)
        self._pid = os.getpid()
        self._max_bytes, self._put_bytes, self._done_bytes = max_bytes, 0, 0  # each count has one writing thread
        self._put_items = self._done_items = 0
        self._gap: list[int] = []  # steps that were left out since there was last room
        self._failed = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="gradlens", daemon=True)
        self._thread.start()

    def write(self, item: Item) -> None:
        """Queue the item; or, when there is no room, note its step as left out. Never waits."""
        if self._closed or os.getpid() != self._pid:
            return
        if self._gap and (item.step == self._gap[-1] or not self._tell_gap()):
            self._miss(item.step)  # the rest of a step that has a hole is left out too
            return
        size = getattr(item, "nbytes", 0)
        waiting = self._put_bytes - self._done_bytes
        try:
            if waiting and waiting + size > self._max_bytes:
                raise queue.Full
            self._queue.put_nowait(item)
            self._put_bytes += size
            self._put_items += 1
        except queue.Full:
            self._miss(item.step)

    def _miss(self, step: int) -> None:
        if not self._gap or self._gap[-1] != step:
            self._gap.append(step)

    def _tell_gap(self) -> bool:
        try:
            self._queue.put_nowait(records_thinned(self._gap))
            self._put_items += 1
        except queue.Full:
            return False
        self._gap = []
        return True

    @property
    def busy(self) -> bool:
        """Whether something is queued or being written."""
        return self._done_items < self._put_items

    def waiting(self) -> list[Any]:
        """The items that are queued, oldest first."""
        with self._queue.mutex:
            return [item for item in self._queue.queue if not (item is None or isinstance(item, threading.Event))]

    def flush(self) -> None:
        """Wait until everything queued so far was written, then flush the writer; while it closes, until it is closed."""
        if os.getpid() != self._pid:
            return
        until = self._until()
        if self._closed:
            self._end(until)
            return
        done = threading.Event()
        self._put(done, until)
        while not done.wait(0.1) and self._thread.is_alive() and time.monotonic() < until:
            pass

    def close(self) -> None:
        """Write what is queued, close the writer, end the thread."""
        if self._closed or os.getpid() != self._pid:
            return
        until = self._until()
        if self._gap:
            self._put(records_thinned(self._gap), until)
        self._closed = True
        self._put(None, until)
        self._end(until)

    def _until(self) -> float:
        return time.monotonic() + self._patience

    def _end(self, until: float) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(None if math.isinf(until) else max(until - time.monotonic(), 0.0))

    def _put(self, item: Any, until: float) -> None:
        while self._thread.is_alive() and time.monotonic() < until:
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                self._try(self._writer.flush)
                item.set()
            else:
                self._try(self._writer.write, item)
                self._done_bytes += getattr(item, "nbytes", 0)
                self._done_items += 1
        self._try(self._writer.close)

    def _try(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # noqa: BLE001 - the thread must live, and say what it lost
            if not self._failed:
                self._failed = True
                text = f"records are being lost: {type(error).__name__}: {error}. Training goes on"
                with contextlib.suppress(GradlensWarning):
                    warnings.warn(GradlensWarning(text), stacklevel=2)
