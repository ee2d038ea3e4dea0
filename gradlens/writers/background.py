"""A writer on a thread of its own, so that the caller never waits for a disk or for another machine.

What is to be written waits in an `Inbox`, which is bounded: whole steps are left out while it is full. Each item has a
`step`, and may have `nbytes`; what it is else is the inner writer's business.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
import warnings
from collections import deque
from typing import Any

from gradlens.errors import GradlensWarning
from gradlens.workers import Worker
from gradlens.writers.inbox import BYTES, Inbox, Item

#: Items that may wait. Small models step hundreds of times a second, and a busy machine may keep the thread from running for
#: a quarter of one.
MAXSIZE = 1000


class Background:
    """Hands items to a writer on a daemon thread. `flush()` waits until all of them were handed on.

    With `patience`, `flush()` and `close()` wait no longer than so many seconds, and leave the thread to itself: for a
    writer that may wait for another machine.
    """

    def __init__(self, writer: Any, maxsize: int = MAXSIZE, max_bytes: int = BYTES, patience: float = math.inf) -> None:
        self._writer, self._patience = writer, patience
        self._inbox = Inbox(items=maxsize, nbytes=max_bytes)
        self._wake = threading.Event()
        self._requests: deque[threading.Event] = deque()
        self._pid = os.getpid()
        self._failed = False
        self._closed = False
        self._thread = Worker(self._work, "gradlens")
        self._thread.start()

    @property
    def threads(self) -> list[Worker]:
        """Its own, for whoever asks what they cost."""
        return [self._thread]

    def write(self, item: Item) -> None:
        """Leave the item; or, when there is no room, note its step as left out. Never waits."""
        if self._closed or os.getpid() != self._pid:
            return
        self._inbox.append(item)
        self._wake.set()

    def flush(self) -> None:
        """Wait until everything left so far was written, then flush the writer; while it closes, until it is closed."""
        if os.getpid() != self._pid:
            return
        until = self._until()
        if self._closed:
            self._end(until)
            return
        done = threading.Event()
        self._requests.append(done)
        self._wake.set()
        while not done.wait(0.1) and self._thread.is_alive() and time.monotonic() < until:
            pass

    def close(self) -> None:
        """Write what waits, close the writer, end the thread."""
        if self._closed or os.getpid() != self._pid:
            return
        until = self._until()
        self._inbox.close()
        self._closed = True
        self._wake.set()
        self._end(until)

    def _until(self) -> float:
        return time.monotonic() + self._patience

    def _end(self, until: float) -> None:
        if threading.current_thread() is not self._thread:
            self._thread.join(None if math.isinf(until) else max(until - time.monotonic(), 0.0))

    def _work(self) -> None:
        closing = False
        while not closing:
            self._thread.rest(self._wake)
            self._wake.clear()
            closing, requests = self._closed, [self._requests.popleft() for _ in range(len(self._requests))]
            for _ in range(len(self._inbox)):
                item = self._inbox.first()
                self._try(self._writer.write, item)
                self._inbox.release(item)
            if requests:
                self._try(self._writer.flush)
            for done in requests:
                done.set()
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
