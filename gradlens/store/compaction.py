"""Files to fewer files: a full tail becomes a Parquet part, eight parts of a size become one.

So the number of files grows with the logarithm of the run's length, up to parts of `LARGEST` rows. Each takes 100 MB for
a moment, which `give_back` hands to the system again: allocators would keep it, and a long training would seem to grow.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from gradlens.errors import CorruptRunError
from gradlens.store import parts, tables, tail
from gradlens.store.segment import Segment
from gradlens.store.tables import TABLES, Key, Part
from gradlens.store.tail import Rows

ROLL = 100_000  #: rows of a tail that make it a part: 35 MB that become 12
FAN_IN = 8  #: parts of a size that become one
LARGEST = 64_000_000  #: rows beyond which parts are left alone


def read_checked(table: str, part: Part, known: Mapping[Key, Segment]) -> tuple[Rows, int]:
    """The rows of a tail that a segment of these has left, and how many torn bytes were behind them.

    Raises:
        CorruptRunError: It is damaged, or its segment is not there or lacks what it refers to.
        OSError: It cannot be read.
    """
    if part.key not in known:
        raise CorruptRunError(f"{part.path} belongs to a segment of which there is no {part.key}.json")
    rows, torn = tail.read(part.path, TABLES[table])
    known[part.key].check(part.path, table, rows)
    return rows, torn


def to_part(table: str, part: Part, rows: Rows, owner: Segment) -> None:
    """The rows of a tail become a Parquet part in its place."""
    count = len(rows["step"])
    if count:
        to = tables.part(part.path.parent, part.key, part.first, part.first)
        parts.write(to, table, part.key, list(owner.names(table)), [rows], count)
    part.path.unlink()


def give_back() -> None:
    """What was freed goes back to the system, as far as this one's allocators can be asked to."""
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


class Compactor:
    """Makes parts, in the directory of a run, of what one segment and those before it have left."""

    def __init__(self, run: Path, own: Segment, older: Mapping[Key, Segment], go_on: Callable[[], bool]) -> None:
        self._run, self._segment, self._older, self._go_on = run, own, older, go_on

    def to_part(self, table: str, path: Path) -> None:
        """A full tail becomes a part."""
        rows, _ = tail.read(path, TABLES[table])
        (part,) = (p for p in tables.parts(path.parent) if p.path == path)
        to_part(table, part, rows, self._segment if part.key == self._segment.key else self._older[part.key])

    def merge(self, table: str) -> None:
        """Eight parts of a size, the newest part left out, become one: the newest rows stay in a small file."""
        while self._go_on():
            own = [p for p in tables.parts(self._run / table) if p.key == self._segment.key and not p.tail]
            run = _mergeable(own[:-1])
            if not run:
                return
            output = tables.part(self._run / table, self._segment.key, run[0].first, run[-1].last)
            paths = [p.path for p in run]
            names = list(self._segment.names(table))
            hidden = tables.hidden(output)  # a reader that globs sees the eight, then none, then the one
            if not parts.merge(paths, hidden, table, self._segment.key, names, self._go_on):
                return
            for path in paths:
                path.unlink()
            os.replace(hidden, output)


def _mergeable(own: Sequence[Part]) -> list[Part]:
    """The last `FAN_IN` neighbours that hold the same number of tails."""
    size = [p.last - p.first + 1 for p in own]
    for end in range(len(own), FAN_IN - 1, -1):
        group = slice(end - FAN_IN, end)
        if len(set(size[group])) == 1 and size[end - 1] * FAN_IN * ROLL <= LARGEST:
            return list(own[group])
    return []
