"""A progress bar, for what takes long: on standard error, or in the output of a notebook's cell."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

EVERY = 0.2  #: seconds between two states of a bar in a notebook


def tracked(items: Iterable[T], what: str, total: int | None, progress: bool | None) -> Iterator[T]:
    """The items, one by one, with a bar where `progress` is True, or None and there is a terminal or a notebook."""
    kernel = _in_notebook()
    if not (kernel or sys.stderr.isatty() if progress is None else progress):
        yield from items
    elif kernel:
        yield from _in_cell(items, what, total)
    else:
        from rich.console import Console
        from rich.progress import track

        yield from track(items, what, total, console=Console(stderr=True))


def _in_notebook() -> bool:
    """Whether this process is a notebook's kernel; asked without importing anything."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython is not None and hasattr(ipython, "get_ipython") else None
    return hasattr(shell, "kernel")


def _in_cell(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    """One output that is replaced in place, and says at the end how many there were."""
    from IPython.display import HTML, display

    handle, shown, done = display(HTML(_bar(what, 0, total)), display_id=True), time.monotonic(), 0
    for done, item in enumerate(items, 1):
        yield item
        if time.monotonic() - shown > EVERY:
            shown = time.monotonic()
            handle.update(HTML(_bar(what, done, total)))
    handle.update(HTML(_bar(what, done, done)))


def _bar(what: str, done: int, total: int | None) -> str:
    from gradlens import markup

    of = "" if total is None else f" of {total:,}"
    bar = "<progress></progress>" if total is None else f'<progress value="{done}" max="{max(total, 1)}"></progress>'
    return markup.block(bar, f" {markup.words(what)}: {done:,}{of}")
