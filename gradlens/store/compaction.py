"""Files to fewer files: a full tail becomes a Parquet part, eight parts of a size become one.

So the number of files grows with the logarithm of the run's length, up to parts of `LARGEST` rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from gradlens.store import parts, tables, tail
from gradlens.store.segment import Segment
from gradlens.store.tables import TABLES, Key, Part

ROLL = 100_000  #: rows of a tail that make it a part: 35 MB that become 12
FAN_IN = 8  #: parts of a size that become one
LARGEST = 64_000_000  #: rows beyond which parts are left alone


class Compactor:
    """Makes parts, in the directory of a run, of what one segment and those before it have left."""

    def __init__(self, run: Path, own: Segment, older: Mapping[Key, Segment], go_on: Callable[[], bool]) -> None:
        self._run, self._segment, self._older, self._go_on = run, own, older, go_on

    def to_part(self, table: str, path: Path) -> None:
        """A full tail becomes a part."""
        rows, _ = tail.read(path, TABLES[table])
        (part,) = (p for p in tables.parts(path.parent) if p.path == path)
        if len(rows["step"]):
            names = self._names(table, part.key)
            to = tables.part(path.parent, part.key, part.first, part.first)
            parts.write(to, table, part.key, names, [rows], len(rows["step"]))
        path.unlink()

    def _names(self, table: str, key: Key) -> list[str]:
        owner = self._segment if key == self._segment.key else self._older[key]
        return list(owner.scalars) if table == "scalars" else [name for name, *_ in owner.parameters]

    def merge(self, table: str) -> None:
        """Eight parts of a size, the newest part left out, become one: the newest rows stay in a small file."""
        while self._go_on():
            own = [p for p in tables.parts(self._run / table) if p.key == self._segment.key and not p.tail]
            run = _mergeable(own[:-1])
            if not run:
                return
            output = tables.part(self._run / table, self._segment.key, run[0].first, run[-1].last)
            paths = [p.path for p in run]
            names = self._names(table, self._segment.key)
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
