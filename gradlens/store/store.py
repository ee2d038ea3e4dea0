"""The writer of a run directory. Rows are collected in memory and, twice in `interval`, written as one frame a table.

    write(record), write_moments(blocks) -> memory        a copy of nothing: arrays are kept until the next flush
    pulse thread  -> flush()       also when no more records come
    keeper thread -> full tails become Parquet parts, eight parts become one

So a killed process loses what came since the last flush: no more than `interval` seconds of it, of which the queue before
the store and the disk may take half. What rows are is `encoding`'s, what becomes of files `compaction`'s.

What fails switches the store off: the error is raised to whoever calls next, and nothing is written from then on.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gradlens import findings
from gradlens.activations import Activations
from gradlens.blocks import Block, block_of
from gradlens.errors import ArgumentError, CorruptRunError, RunDirectoryError
from gradlens.records import Finding, Record
from gradlens.store import segment, tables
from gradlens.store.compaction import ROLL, Compactor, give_back, read_checked
from gradlens.store.encoding import RowEncoder
from gradlens.store.lock import Lock
from gradlens.store.tables import TABLES, Key, Part
from gradlens.store.tail import Rows, Tail
from gradlens.workers import Worker

INTERVAL = 1.0  #: seconds that a killed process may lose
FRAMES = 4096  #: frames of a tail that make it a part
WAITING = 8  #: full tails that may wait for the keeper; then write() waits, and records are thinned upstream


class Store:
    """Writes snapshots and findings to `run`, which is made if missing and continued if it is there.

    Args:
        run: The directory.
        settings: What the lens was told; kept as JSON. `rank` says which rank's segment this is (0 without it).
        interval: Seconds after which a record is on disk, at most.
        roll: Rows of a tail that make it a Parquet part.

    Raises:
        RunDirectoryError: It cannot be made or written, is no run, or another lens writes to it.
        ArgumentError: `interval` is no time.
    """

    durable = True  #: it gets records before others do

    @property
    def key(self) -> Key:
        """Which segment it writes."""
        return self._segment.key

    def __init__(
        self,
        run: str | os.PathLike[str],
        settings: Mapping[str, Any] | None = None,
        *,
        interval: float = INTERVAL,
        roll: int = ROLL,
    ) -> None:
        if not interval > 0:
            raise ArgumentError(f"interval is a number of seconds above 0, not {interval!r}")
        settings = settings or {}
        self._run, self._interval, self._roll = Path(run), interval, roll
        rank = int(settings.get("rank", 0))
        try:
            self._lock = self._open(rank)
            try:
                known = segment.segments(self._run)
                number = 1 + max((s.key.segment for s in known if s.key.rank == rank), default=-1)
                self._segment = segment.Segment(Key(number, rank), dict(settings), _versions(settings), time.time())
                self._segment.write(self._run / "segments")
                self._findings = open(self._run / "findings" / f"{self._segment.key}.jsonl", "a", encoding="utf-8")  # noqa: SIM115
            except BaseException:
                self._lock.release()
                raise
        except RunDirectoryError:
            raise
        except OSError as error:
            raise RunDirectoryError(
                f"no records can be written to {os.fspath(run)!r} ({error}); give a directory that can be written"
            ) from error
        self._rows = RowEncoder(self._segment)
        self._lines: list[str] = []
        self._tails: dict[str, Tail] = {}
        self._number = dict.fromkeys(TABLES, 0)  # of the next tail
        self._error: Exception | None = None
        self._closed = False
        self._guard = threading.RLock()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._sealed: list[tuple[str, Path]] = []  # tails that wait for the keeper
        self._left: list[tuple[str, Path]] = []  # those of earlier writers, for when it has nothing else to do
        self._recover(known)
        self._compactor = Compactor(self._run, self._segment, self._older, lambda: not self._stop.is_set())
        if self._left:
            self._wake.set()
        self.threads = [  #: its own, for whoever asks what they cost
            Worker(self._beat, "gradlens-store"),
            Worker(self._keep, "gradlens-store-keeper", native=True),
        ]
        for thread in self.threads:
            thread.start()

    def _open(self, rank: int) -> Lock:
        self._run.mkdir(parents=True, exist_ok=True)
        there = (self._run / "run.json").exists()
        if there:
            segment.marked(self._run)
        for name in ("segments", "findings", *TABLES):
            (self._run / name).mkdir(exist_ok=True)
        lock = Lock(self._run, rank)
        try:
            if not there:
                segment.mark(self._run, {"created": time.time()})
        except BaseException:
            lock.release()
            raise
        return lock

    def _recover(self, known: Sequence[segment.Segment]) -> None:
        """Clear away what a crash has left, say what it has torn, and have its tails made into parts."""
        rank = self._segment.key.rank
        self._older = {s.key: s for s in known}
        for folder in (self._run / name for name in ("segments", *TABLES)):
            tables.settle(folder, rank)
        for table in TABLES:
            for part in tables.parts(self._run / table):
                if part.tail and part.key.rank == rank:
                    self._recover_tail(table, part)

    def _recover_tail(self, table: str, part: Part) -> None:
        step = int(self._segment.settings.get("first_step", 0))
        try:
            _, torn = read_checked(table, part, self._older)
        except (CorruptRunError, OSError) as error:
            self._lines.append(segment.finding_line(findings.records_damaged(step, str(error))))
            return
        if torn:
            self._lines.append(segment.finding_line(findings.records_torn(step, part.path.name, torn)))
        self._left.append((table, part.path))

    # --- the writer's three calls -------------------------------------------------------------------------------------

    def write(self, record: Record) -> None:
        """Take a record. It is on disk within `interval` seconds."""
        with self._guard:
            self._check()
            if isinstance(record, Finding):
                self._lines.append(segment.finding_line(record))
                return
            block = block_of(record)
            self._rows.take([(block, 0)])
        self._make_room()

    def write_moments(self, moments: Sequence[tuple[Block, int]]) -> None:
        """Take moments, each a block and a place in it: all of each block, in the order in which they came."""
        with self._guard:
            self._check()
            self._rows.take(moments)
        self._make_room()

    def write_activations(self, passes: Sequence[Activations]) -> None:
        """Take what modules made in forward passes."""
        with self._guard:
            self._check()
            self._rows.take_activations(passes)
        self._make_room()

    def _make_room(self) -> None:
        if self._rows.waiting >= self._roll:
            self.flush()
        while len(self._sealed) > WAITING and self._error is None and not self._stop.is_set():
            time.sleep(0.01)

    def flush(self) -> None:
        """What was taken is in the files."""
        with self._guard:
            self._check()
            try:
                self._flush()
            except Exception as error:
                self._error = error
                raise

    def annotate(self, **facts: Any) -> None:
        """Add to the settings what is known only later, such as what watching cost. On disk with the next flush."""
        with self._guard:
            self._segment.settings = {**self._segment.settings, **facts}
            self._rows.stale = True

    def close(self) -> None:
        """Flush, make parts of the tails, let go of the directory."""
        with self._guard:
            if self._closed:
                return
            self._closed = True
        self._stop.set()
        self._wake.set()
        for thread in self.threads:
            thread.join()
        try:
            if self._error is None:
                self._finish()
        finally:
            for each in self._tails.values():
                each.close()
            with contextlib.suppress(OSError):
                self._findings.close()
            self._lock.release()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    # --- rows to files ------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._rows.stale:  # before the rows that refer to it
            self._segment.write(self._run / "segments")
            self._rows.stale = False
        if self._lines:  # before the rows: which steps were left out is known when those after them are there
            self._findings.write("".join(self._lines))
            self._lines = []
            self._findings.flush()
        for table, batches in self._rows.batches():
            self._append(table, batches)
            self._rows.written(table)
        self._rows.waiting = 0
        for path in (self._run / "segments" / f"{self._segment.key}.json", *(each.path for each in self._tails.values())):
            if not path.exists():
                what = self._run if not self._run.exists() else path.parent if not path.parent.exists() else path
                raise RunDirectoryError(f"{what} was removed while it was written")

    def _append(self, table: str, batches: list[Rows]) -> None:
        current = self._tails.get(table)
        if current is None:
            path = tables.part(self._run / table, self._segment.key, self._number[table])
            current = self._tails[table] = Tail(path, TABLES[table])
            self._number[table] += 1
        current.append(batches)
        if current.rows >= self._roll or current.frames >= FRAMES:
            self._seal(table)

    def _seal(self, table: str) -> None:
        full = self._tails.pop(table)
        full.close()
        self._sealed.append((table, full.path))
        self._wake.set()

    def _finish(self) -> None:
        self._rows.take_rest()
        self._flush()
        for table in list(self._tails):
            self._seal(table)
        while self._sealed or self._left:
            self._roll_one()
        give_back()

    # --- threads ------------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self.threads[0].rest(self._stop, self._interval / 2):
            with self._guard, contextlib.suppress(Exception):  # kept, and raised to the next caller
                self.flush()

    def _keep(self) -> None:
        while not self._stop.is_set():
            self.threads[1].rest(self._wake)
            self._wake.clear()
            try:
                while (self._sealed or self._left) and not self._stop.is_set():
                    self._compactor.merge(self._roll_one())
                give_back()
            except Exception as error:  # noqa: BLE001 - raised to the next caller
                self._error = self._error or error
                return

    def _roll_one(self) -> str:
        """The oldest full tail becomes a part: of which table?"""
        tails = self._sealed or self._left
        table, path = tails[0]
        self._compactor.to_part(table, path)
        tails.pop(0)
        return table


def _versions(settings: Mapping[str, Any]) -> dict[str, str]:
    torch = {"torch": str(settings["torch"])} if "torch" in settings else {}
    return {"python": platform.python_version(), "numpy": np.__version__, "pyarrow": pa.__version__, **torch}
