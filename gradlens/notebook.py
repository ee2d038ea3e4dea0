"""A live view of a lens in a notebook: one output that is replaced in place while the cell trains.

    lens = gradlens.watch(model, optimizer)
    lens.live()
    train()

A thread asks the lens, as any other thread may, about the steps that are over; training does not wait for it. The view ends
with the lens, or with `stop()`.
"""

from __future__ import annotations

import contextvars
import threading
import weakref
from typing import Any

from gradlens.errors import ArgumentError, GradlensError


class LiveView:
    """What `lens.live()` returns: the output in the notebook, until `stop()`."""

    def __init__(self, lens: Any, seconds: float = 1.0) -> None:
        if not seconds > 0:
            raise ArgumentError(f"seconds is the time between two looks, more than 0, not {seconds!r}")
        try:
            from IPython.core.getipython import get_ipython
            from IPython.display import HTML, display
        except ImportError:
            raise GradlensError("a live view is for notebooks: pip install notebook, or print(lens)") from None
        if get_ipython() is None:
            raise GradlensError("a live view needs a notebook to be in; print(lens) says the same, or `gradlens top RUN`")
        self._html, self._lens, self._seconds = HTML, weakref.ref(lens), seconds
        self._shown = lens._repr_html_()
        self._handle = display(HTML(self._shown), display_id=True)
        self._stop = threading.Event()
        context = contextvars.copy_context()  # outputs go to the cell that began the view
        self._thread = threading.Thread(target=context.run, args=(self._follow,), name="gradlens-live", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Show the last state and end. May be called again."""
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self._stop.wait(self._seconds)
            lens = self._lens()
            if lens is None:
                return
            ended |= lens.closed
            self._show(lens)
            del lens

    def _show(self, lens: Any) -> None:
        shown = lens._repr_html_()
        if shown != self._shown:
            self._shown = shown
            self._handle.update(self._html(shown))
