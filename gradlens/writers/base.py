"""What a writer is: anything with `write(record)`, `flush()` and `close()`.

Writers compose: a fan-out of writers is a writer, a writer on a background thread is a writer. One that has `durable = True`
gets records before the rules and the other writers do.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Writer(Protocol):
    """Takes records, snapshots and findings, in order. May raise: whoever calls it isolates it."""

    def write(self, record: Any) -> None:
        """Take one record."""

    def flush(self) -> None:
        """Everything taken so far is where it should be."""

    def close(self) -> None:
        """Flush and let go; nothing is written afterwards."""
