"""A progress bar on standard error, for probes that take long."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def tracked(items: Iterable[T], what: str, total: int | None, progress: bool | None) -> Iterator[T]:
    """The items, one by one, with a bar where `progress` is True, or None and standard error is a terminal."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, what, total, console=Console(stderr=True))
