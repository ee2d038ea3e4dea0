"""Makes a run whole that a killed process has left: its last rows become Parquet, which every reader knows.

    history/_0000-rank0-000008.tail  ->  history/0000-rank0-000008-000008.parquet

Nothing else changes: `open_run` reads tails as they are, and a lens that goes on with the run does the same. A run that is
being written is left alone. A tail that is damaged stays where it is, and is named.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gradlens.errors import CorruptRunError
from gradlens.store import segment, tables
from gradlens.store.compaction import read_checked, to_part
from gradlens.store.lock import Lock
from gradlens.store.segment import Segment
from gradlens.store.tables import TABLES, Key, Part


@dataclass(frozen=True)
class Finished:
    """What was done."""

    files: int = 0  #: tails that became Parquet
    rows: int = 0  #: in them
    torn: int = 0  #: bytes of records that a kill had cut off: they are lost
    removed: int = 0  #: half-written files
    damaged: tuple[str, ...] = ()  #: tails that do not read, and why

    def __str__(self) -> str:
        if not (self.files or self.removed or self.damaged):
            return "the run was whole: nothing to do"
        said = [f"{self.rows:,} rows of {self.files} unfinished file{'s' * (self.files != 1)} are Parquet now"]
        if self.torn:
            said.append(f"{self.torn:,} bytes of a record that was cut off were dropped")
        if self.removed:
            said.append(f"{self.removed} half-written file{'s' * (self.removed != 1)} removed")
        return "; ".join(said) + "".join(f"\nleft as it is: {reason}" for reason in self.damaged)


def finish(run: str | os.PathLike[str]) -> Finished:
    """Roll what is left of each rank.

    Raises:
        RunDirectoryError: It is no run, or somebody writes to it.
    """
    path = Path(run)
    segment.marked(path)
    known = {each.key: each for each in segment.segments(path)}
    with _locked(path, sorted({key.rank for key in known})):
        leftovers = [file for rank in sorted({key.rank for key in known}) for file in _leftovers(path, rank)]
        for rank in sorted({key.rank for key in known}):
            for name in ("segments", *TABLES):
                tables.settle(path / name, rank)
        results = [_roll(table, part, known) for table, part in _tails(path)]
    return Finished(
        files=sum(not result.damaged for result in results),
        rows=sum(result.rows for result in results),
        torn=sum(result.torn for result in results),
        removed=len(leftovers),
        damaged=tuple(reason for result in results for reason in result.damaged),
    )


@contextmanager
def _locked(run: Path, ranks: Sequence[int]) -> Iterator[None]:
    with ExitStack() as held:
        for rank in ranks:
            held.callback(Lock(run, rank).release)
        yield


def _leftovers(run: Path, rank: int) -> list[Path]:
    return [file for name in ("segments", *TABLES) for file in tables.leftovers(run / name, rank)]


def _tails(run: Path) -> list[tuple[str, Part]]:
    return [(table, part) for table in TABLES for part in tables.parts(run / table) if part.tail]


def _roll(table: str, part: Part, known: dict[Key, Segment]) -> Finished:
    try:
        rows, torn = read_checked(table, part, known)
    except (CorruptRunError, OSError) as error:
        return Finished(damaged=(str(error),))
    to_part(table, part, rows, known[part.key])
    return Finished(rows=len(rows["step"]), torn=torn)
