"""Several writers as one. A writer that raises is named once in a warning and left out; the others go on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from gradlens.errors import GradlensWarning
from gradlens.writers.base import Writer


class Fanout:
    """Hands every record to every writer that works. `failed` lists those that do not, and why."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)
        self.failed: list[tuple[Writer, Exception]] = []

    def write(self, record: Any) -> None:
        """To each writer."""
        self._each(lambda writer: writer.write(record))

    def flush(self) -> None:
        """Each writer."""
        self._each(lambda writer: writer.flush())

    def close(self) -> None:
        """Each writer, those that failed too: they may hold a file."""
        failed_before = list(self.failed)
        self._each(lambda writer: writer.close())
        for writer, _ in failed_before:
            with contextlib.suppress(Exception):
                writer.close()
        self._writers = []

    def _each(self, call: Callable[[Writer], None]) -> None:
        for writer in list(self._writers):
            try:
                call(writer)
            except Exception as error:  # noqa: BLE001 - a broken disk or server must not stop training or the other writers
                self._writers.remove(writer)
                self.failed.append((writer, error))
                _warn(writer, error)


def _warn(writer: Writer, error: Exception) -> None:
    text = (
        f"{type(writer).__name__} failed and is switched off: {type(error).__name__}: {error}. Training and the other "
        "writers go on"
    )
    with contextlib.suppress(GradlensWarning):  # warnings may be turned into errors; not on this thread
        warnings.warn(GradlensWarning(text), stacklevel=2)
