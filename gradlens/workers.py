"""Threads of ours. They work now and then and rest in between, which whoever asks what they cost wants to know.

    worker.rest(event, seconds)    waits for the event as long, and is at rest meanwhile
    worker.turns                   grows as a rest begins and as it ends: even while the thread rests
    worker.native                  whether nearly all of its work is native code that does without Python's lock

So who reads its clock can do so when the thread has worked, and not all the time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class Worker(threading.Thread):
    """A daemon thread that counts its rests."""

    def __init__(self, work: Callable[[], object], name: str, *, native: bool = False) -> None:
        super().__init__(target=work, name=name, daemon=True)
        self.native, self.turns = native, 1

    def rest(self, event: threading.Event, seconds: float | None = None) -> bool:
        """Wait for the event, so many seconds at most. Whether it is set."""
        self.turns += 1
        try:
            return event.wait(seconds)
        finally:
            self.turns += 1
