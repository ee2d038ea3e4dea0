"""Several writers as one. A writer that raises is named once and left out; the others go on.

A writer that has `write_moments(moments)` is given whole blocks: a list of `(block, place)`, in order. Any other gets each
moment as a snapshot. One that has `write_activations(passes)` is given what modules made, where that was asked for.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from gradlens.activations import Activations
from gradlens.blocks import Block
from gradlens.errors import GradlensWarning
from gradlens.writers.base import Writer


class Fanout:
    """Hands every record to every writer that works. `failed` lists those that do not, and why.

    Args:
        writers: Where records go.
        on_failure: Told of each writer that failed, beside the warning.
        entering: Told whose function is called next.
        on_loss: Told of each writer that could not take activations: it gets no more of those, and all else.
    """

    def __init__(
        self,
        writers: Sequence[Writer],
        on_failure: Callable[[Writer, BaseException], None] = lambda writer, error: None,
        entering: Callable[[str], None] = lambda whose: None,
        on_loss: Callable[[Writer, BaseException], None] = lambda writer, error: None,
    ) -> None:
        self._writers = list(writers)
        self._on_failure, self._entering, self._on_loss = on_failure, entering, on_loss
        self._without: list[Writer] = []  # that get no activations any more
        self.failed: list[tuple[Writer, BaseException]] = []

    def write(self, record: Any) -> None:
        """To each writer."""
        self._each(lambda writer: writer.write(record))

    def write_moments(self, moments: Sequence[tuple[Block, int]]) -> None:
        """Each moment's snapshot to each writer; the blocks themselves to those that take them."""
        if len(moments):
            self._each(lambda writer: _write_moments(writer, moments))

    def write_activations(self, passes: Sequence[Activations]) -> None:
        """To the writers that take them. A fault there costs the writer its activations, and nothing else."""
        for writer in self._writers if passes else ():
            if hasattr(writer, "write_activations") and not any(writer is each for each in self._without):
                self._entering(f"the writer {type(writer).__name__}")
                try:
                    writer.write_activations(passes)
                except BaseException as error:
                    if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                        raise  # the user's own Ctrl-C
                    self._without.append(writer)
                    self._on_loss(writer, error)

    def flush(self) -> None:
        """Each writer."""
        self._each(lambda writer: writer.flush())

    def close(self) -> None:
        """Each writer, those that failed too: they may hold a file."""
        failed_before = list(self.failed)
        self._each(lambda writer: writer.close())
        for writer, _ in failed_before:
            with contextlib.suppress(BaseException):
                writer.close()
        self._writers = []

    def _each(self, call: Callable[[Writer], None]) -> None:
        for writer in list(self._writers):
            self._entering(f"the writer {type(writer).__name__}")
            try:
                call(writer)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                    raise  # the user's own Ctrl-C
                self._writers.remove(writer)
                self.failed.append((writer, error))
                _warn(writer, error)
                self._on_failure(writer, error)


def _write_moments(writer: Any, moments: Sequence[tuple[Block, int]]) -> None:
    if hasattr(writer, "write_moments"):
        writer.write_moments(moments)
        return
    for block, at in moments:
        writer.write(block.snapshot(at))


def _warn(writer: Writer, error: BaseException) -> None:
    text = (
        f"{type(writer).__name__} failed and is switched off: {type(error).__name__}: {error}. Training and the other "
        "writers go on"
    )
    with contextlib.suppress(GradlensWarning):  # warnings may be turned into errors; not on this thread
        warnings.warn(GradlensWarning(text), stacklevel=2)
