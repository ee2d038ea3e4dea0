"""The tables that have not left for the recorder: made by a first reading, sent when nothing more can come of them.

A backward's table leaves when a later one has ended, a `used` one when the next backward begins, all of a step's when that
is over.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gradlens.records import Note, Parameters, Stage, TableKey
from gradlens.statistics.table import Piece, Table
from gradlens.watching import process_group
from gradlens.watching.recorder import Recorder


class OpenTables:
    """Tables by what they are of, and the losses of their backwards."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.tables: dict[TableKey, Table] = {}
        self.losses: dict[tuple[int, int], float | Tensor] = {}  #: by step and backward
        self.last: Table | None = None  #: the last `backward` or `reduced` table, which `used` may copy
        self.reading: Any = None  #: how it was read, if that went by the book
        self.copied: Stage | None = None  #: the stage whose rows the open step's `used` rows are
        self.count = 0  #: tables that were made
        self._rank = 0  # of this process, as it was when the first of these tables was made

    def of(self, key: TableKey, parameters: Parameters) -> Table:
        """The table, made where there is none: without rows."""
        table = self.tables.get(key)
        if table is None:
            table = self._made(key, Table(*key, parameters, time.time(), notes=[Note.ELSEWHERE] * len(parameters)))
        table.host = False  # what is added may be a device's
        return table

    def whole(self, key: TableKey, parameters: Parameters, pieces: list[Piece], notes: Sequence[Note | None] = ()) -> Table:
        """A table of the host's numbers that is complete at once, in place of any other."""
        made = Table(*key, parameters, time.time(), notes=list(notes), pieces=pieces, complete=True, host=True)
        return self._made(key, made)

    def joined(self, key: TableKey, parameters: Parameters, pieces: list[Piece], notes: Sequence[Note | None] = ()) -> Table:
        """The same, added to what is there: optimizers that step one after the other have a table together."""
        table = self.tables.get(key)
        if table is None or not table.complete:
            return self.whole(key, parameters, pieces, notes)
        table.pieces += pieces
        table.notes = merged(table.notes, notes)
        return table

    def _made(self, key: TableKey, table: Table) -> Table:
        if not self.tables:
            self._rank = process_group.rank()
        table.rank = self._rank
        self.tables[key] = table
        self.count += 1
        return table

    def ended(self, table: Table) -> None:
        """This backward has ended: those before it leave, so that memory stays bounded."""
        if len(self.tables) > 1:
            older = [t for t in self.tables.values() if t.complete and (t.step, t.backward) < (table.step, table.backward)]
            self.send([t for t in older if t.stage != Stage.USED], {})
        self.last = table

    def last_of(self, key: TableKey) -> Table | None:
        """What the backward that this `used` table is of has given, if it is the last one that gave anything."""
        last = self.last
        return None if last is None or (last.stage == Stage.REDUCED and last.backward != key.backward) else last

    def send_until(self, key: TableKey) -> None:
        """The next backward begins: nothing is added to what was read of those before it."""
        self.send([t for t in self.tables.values() if t.complete and (t.step, t.backward) <= key[:2]], {})

    def release(self, step: int, scalars: Mapping[str, Any]) -> None:
        """The step is over."""
        self.send([t for t in self.tables.values() if t.step <= step and t.complete], scalars)

    def forget(self, step: int) -> None:
        """Nothing more comes of this step, whatever could not be sent."""
        if self.tables:
            self.tables = {key: table for key, table in self.tables.items() if key.step > step}
        if self.losses:
            self.losses = {key: loss for key, loss in self.losses.items() if key[0] > step}
        self.last, self.reading, self.copied = None, None, None

    def answered(self) -> list[Table]:
        """What is complete of the open step, for a question asked in the middle of it."""
        return [t for t in self.tables.values() if t.complete and t.stage != Stage.USED]

    def send(self, tables: Sequence[Table], scalars: Mapping[str, Any]) -> None:
        """Hand them to the recorder."""
        self.recorder.send(list(tables), scalars, [self.losses.get((table.step, table.backward)) for table in tables])
        for table in tables:
            self.tables.pop((table.step, table.backward, table.stage), None)  # type: ignore[call-overload]


def merged(notes: Sequence[Note | str | None], others: Sequence[Note | str | None]) -> list[Note | str | None]:
    """The notes of two readings of a table: a row keeps the note of the reading that had it."""
    if not (notes and others):
        return []
    return [note if other == Note.ELSEWHERE else other for note, other in zip(notes, others, strict=True)]
