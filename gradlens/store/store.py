"""The writer of a run directory. Rows are collected in memory and, twice in `interval`, written as one frame a table.

    write(record), write_moments(blocks) -> memory        a copy of nothing: arrays are kept until the next flush
    pulse thread  -> flush()       also when no more records come
    keeper thread -> full tails become Parquet parts, eight parts become one

So a killed process loses what came since the last flush: no more than `interval` seconds of it, of which the queue before
the store and the disk may take half. The number of files grows with the logarithm of the run's length, up to parts of
`LARGEST` rows. History has every row. Histograms and the most sensitive weights of a step are kept when the run has grown by
a tenth since the last that were, and at the end; the weights of moments around a step that went wrong too (`flight.py`).

What fails switches the store off: the error is raised to whoever calls next, and nothing is written from then on.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gradlens import blocks
from gradlens.blocks import Block, block_of
from gradlens.errors import ArgumentError, CorruptRunError, RunDirectoryError
from gradlens.records import Finding, Parameters, Record, Severity, Snapshot
from gradlens.store import parts, segment, tables, tail
from gradlens.store.flight import Flight
from gradlens.store.lock import Lock
from gradlens.store.tables import STAGES, STATUSES, TABLES, Key, Part
from gradlens.store.tail import Rows, Tail

INTERVAL = 1.0  #: seconds that a killed process may lose
ROLL = 100_000  #: rows of a tail that make it a part: 35 MB that become 12
FRAMES = 4096  #: frames of a tail that make it a part
FAN_IN = 8  #: parts of a size that become one
LARGEST = 64_000_000  #: rows beyond which parts are left alone
WAITING = 8  #: full tails that may wait for the keeper; then write() waits, and records are thinned upstream
GROWTH = 1.1  #: of the run, between two steps whose histograms and weights are kept


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
        self._pending: dict[str, list[Rows]] = {table: [] for table in TABLES}
        self._waiting = 0  # rows among them
        self._lines: list[str] = []
        self._tails: dict[str, Tail] = {}
        self._number = dict.fromkeys(TABLES, 0)  # of the next tail
        self._snapshots = 0
        self._entries: dict[segment.Entry, int] = {}
        self._lately: dict[int, tuple[Parameters, np.ndarray]] = {}  # rows' entries, by the identity of their parameters
        self._stale = False  # whether the segment's file lacks something
        self._kept, self._flight = _Kept(), Flight()
        self._error: Exception | None = None
        self._closed = False
        self._guard = threading.RLock()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._sealed: list[tuple[str, Path]] = []  # tails that wait for the keeper
        self._left: list[tuple[str, Path]] = []  # those of earlier writers, for when it has nothing else to do
        self._recover(known)
        if self._left:
            self._wake.set()
        self.threads = [  #: its own, for whoever asks what they cost
            threading.Thread(target=call, name=name, daemon=True)
            for call, name in ((self._beat, "gradlens-store"), (self._keep, "gradlens-store-keeper"))
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
            rows, torn = tail.read(part.path, TABLES[table])
            if part.key not in self._older:
                raise CorruptRunError(f"{part.path} belongs to a segment of which there is no {part.key}.json")
            self._older[part.key].check(part.path, table, rows)
        except (CorruptRunError, OSError) as error:
            self._lines.append(segment.finding_line(_damaged(str(error), step)))
            return
        if torn:
            self._lines.append(segment.finding_line(_torn(part, torn, step)))
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
            self._take([(block, 0)])
        self._make_room()

    def write_moments(self, moments: Sequence[tuple[Block, int]]) -> None:
        """Take moments, each a block and a place in it: all of each block, in the order in which they came."""
        with self._guard:
            self._check()
            self._take(moments)
        self._make_room()

    def _make_room(self) -> None:
        if self._waiting >= self._roll:
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
            self._stale = True

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

    # --- records to rows ----------------------------------------------------------------------------------------------

    def _take(self, moments: Sequence[tuple[Block, int]]) -> None:
        if self._segment.first_step is None and moments:
            block, at = moments[0]
            self._segment.first_step, self._stale = int(block.step[at]), True
        numbers: dict[int, tuple[Block, list[int]]] = {}
        for number, (block, _) in enumerate(moments, start=self._snapshots):
            numbers.setdefault(id(block), (block, []))[1].append(number)
        for block, own in numbers.values():
            self._put_block(block, np.array(own, np.int64))
        self._put_scalars(moments)
        wrong = {id(block): self._flight.wrong(block) for block, _ in numbers.values()}
        steps = {key: block.step.tolist() for key, (block, _) in numbers.items()}
        for number, (block, at) in enumerate(moments, start=self._snapshots):
            due = self._kept.due(steps[id(block)][at], number, block, at)
            if due:
                self._put_detail(number, block.snapshot(at))
            for earlier, snapshot in self._flight.take(number, block, at, wrong=wrong[id(block)][at], written=due):
                self._put_detail(earlier, snapshot)
                self._kept.forget(earlier)
        self._kept.hold()
        if self._flight.steps and self._segment.settings.get("flight") != self._flight.steps:
            self.annotate(flight=list(self._flight.steps))
        self._snapshots += len(moments)

    def _put_block(self, block: Block, numbers: np.ndarray) -> None:
        entries = self._entries_of(block.parameters)
        n = len(entries)
        rows = {name: np.repeat(values, n) for name, values in _keys(numbers, block).items()}
        rows["entry"] = np.tile(entries, len(numbers))
        rows["status"], rows["scale"] = _CODES[block.status].ravel(), block.scale.ravel()
        for name in TABLES["history"]:
            if name not in rows:
                rows[name] = np.ravel(block.column(name))
        self._put("history", rows)

    def _entries_of(self, parameters: Parameters) -> np.ndarray:
        known = self._lately.get(id(parameters))
        if known is not None and known[0] is parameters:
            return known[1]
        rows = np.empty(len(parameters), np.int32)
        for row, (name, shape, dtype) in enumerate(zip(parameters.names, parameters.shapes, parameters.dtypes, strict=True)):
            entry = (name, tuple(int(n) for n in shape), dtype, parameters.piece(row))
            if entry not in self._entries:
                self._entries[entry] = len(self._segment.parameters)
                self._segment.parameters.append(entry)
                self._stale = True
            rows[row] = self._entries[entry]
        if len(self._lately) >= 8:
            self._lately.clear()
        self._lately[id(parameters)] = parameters, rows
        return rows

    def _put_scalars(self, moments: Sequence[tuple[Block, int]]) -> None:
        names = self._segment.scalars
        places = {name: i for i, name in enumerate(names)}
        of: list[int] = []  # which of the moments
        entry: list[int] = []
        values: list[float] = []
        for at, (block, place) in enumerate(moments):
            for name, value in block.scalars[place].items():
                if name not in places and len(names) < segment.MAX_SCALARS:
                    places[name] = len(names)
                    names.append(name)
                    self._stale = True
                if name in places:
                    of.append(at)
                    entry.append(places[name])
                    values.append(value)
        if of:
            self._put(
                "scalars", {**_keys_of(moments, of, self._snapshots), "entry": np.array(entry), "value": np.array(values)}
            )

    def _put_detail(self, number: int, snapshot: Snapshot) -> None:
        keys = _keys(np.array([number]), block_of(snapshot))
        entries = self._entries_of(snapshot.parameters)

        def put(table: str, entry: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
            self._put(table, {**{name: np.repeat(v, len(entry)) for name, v in keys.items()}, "entry": entry, **columns})

        if snapshot.histogram is not None:
            row, bucket = np.nonzero(snapshot.histogram)
            put("histograms", entries[row], {"bucket": bucket, "count": snapshot.histogram[row, bucket]})
        if snapshot.top is not None:
            row, column = np.nonzero(snapshot.top.index >= 0)
            put(
                "weights",
                entries[row],
                {name: getattr(snapshot.top, name)[row, column] for name in ("index", "partial", "value")},
            )

    def _put(self, table: str, columns: Mapping[str, np.ndarray]) -> None:
        rows = {name: np.asarray(columns[name]).astype(dtype, copy=False) for name, dtype in TABLES[table].items()}
        count = len(rows["entry"])
        if count:
            self._pending[table].append(rows)
            self._waiting += count

    # --- rows to files ------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._stale:  # before the rows that refer to it
            self._segment.write(self._run / "segments")
            self._stale = False
        if self._lines:  # before the rows: which steps were left out is known when those after them are there
            self._findings.write("".join(self._lines))
            self._lines = []
            self._findings.flush()
        for table, batches in self._pending.items():
            if batches:
                self._append(table, batches)
                self._pending[table] = []
        self._waiting = 0
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
        for number, snapshot in self._kept.rest():
            self._put_detail(number, snapshot)
        self._flush()
        for table in list(self._tails):
            self._seal(table)
        while self._sealed or self._left:
            self._roll_one()

    # --- threads ------------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._stop.wait(self._interval / 2):
            with self._guard, contextlib.suppress(Exception):  # kept, and raised to the next caller
                self.flush()

    def _keep(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._wake.clear()
            try:
                while (self._sealed or self._left) and not self._stop.is_set():
                    self._compact(self._roll_one())
            except Exception as error:  # noqa: BLE001 - raised to the next caller
                self._error = self._error or error
                return

    def _roll_one(self) -> str:
        """The oldest full tail becomes a part: of which table?"""
        tails = self._sealed or self._left
        table, path = tails[0]
        self._to_part(table, path)
        tails.pop(0)
        return table

    def _to_part(self, table: str, path: Path) -> None:
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

    def _compact(self, table: str) -> None:
        """Eight parts of a size, the newest part left out, become one: the newest rows stay in a small file."""
        while not self._stop.is_set():
            own = [p for p in tables.parts(self._run / table) if p.key == self._segment.key and not p.tail]
            run = _mergeable(own[:-1])
            if not run:
                return
            output = tables.part(self._run / table, self._segment.key, run[0].first, run[-1].last)
            paths = [p.path for p in run]
            names = self._names(table, self._segment.key)
            hidden = tables.hidden(output)  # a reader that globs sees the eight, then none, then the one
            if not parts.merge(paths, hidden, table, self._segment.key, names, lambda: not self._stop.is_set()):
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


def _keys(numbers: np.ndarray, block: Block) -> dict[str, np.ndarray]:
    """What rows of a block's moments begin with, `[m]` each."""
    return {
        "snapshot": numbers,
        "step": block.step,
        "backward": block.backward,
        "stage": np.full(len(numbers), STAGES.index(block.stage)),
        "time": _microseconds(block.time),
    }


def _keys_of(moments: Sequence[tuple[Block, int]], of: Sequence[int], first: int) -> dict[str, np.ndarray]:
    """The same of some moments of several blocks, the first of them all being number `first`."""
    chosen = [moments[at] for at in of]
    return {
        "snapshot": first + np.array(of),
        "step": np.array([block.step[at] for block, at in chosen]),
        "backward": np.array([block.backward[at] for block, at in chosen]),
        "stage": np.array([STAGES.index(block.stage) for block, _ in chosen]),
        "time": _microseconds(np.array([block.time[at] for block, at in chosen])),
    }


def _microseconds(seconds: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.round(seconds * 1e6), nan=0.0, posinf=0.0, neginf=0.0).astype(np.int64)


#: The code that the files have of each status of a block.
_CODES = np.array([STATUSES.index(status) for status in blocks.STATUSES], np.int8)


class _Kept:
    """Which steps' histograms and weights are kept: each at first, then when their count has grown; and the last."""

    def __init__(self) -> None:
        self._count, self._next, self._step, self._due = 0, 1, -1, False
        self._last: list[tuple[int, Block | None, int, Snapshot | None]] = []

    def due(self, step: int, number: int, block: Block, at: int) -> bool:
        """Whether this moment's are to be kept."""
        if step != self._step:
            self._step, self._count, self._last = step, self._count + 1, []
            self._due = self._count >= self._next
            if self._due:
                self._next = max(self._count + 1, math.ceil(self._count * GROWTH))
        if not self._due:
            self._last.append((number, block, at, None))
            del self._last[:-8]
        return self._due

    def forget(self, number: int) -> None:
        """It was kept for another reason."""
        self._last = [each for each in self._last if each[0] != number]

    def hold(self) -> None:
        """Keep the last step's moments themselves, and not their blocks."""
        self._last = [
            (number, None, 0, _single(block, at) if block is not None else kept) for number, block, at, kept in self._last
        ]

    def rest(self) -> list[tuple[int, Snapshot]]:
        """The last step's, if they were not kept."""
        last, self._last = self._last, []
        return [(number, kept) for number, _, _, kept in last if kept is not None]


def _single(block: Block, at: int) -> Snapshot:
    return block.snapshot(at) if len(block) == 1 else block.part(at, at + 1).snapshot(0)


def _versions(settings: Mapping[str, Any]) -> dict[str, str]:
    torch = {"torch": str(settings["torch"])} if "torch" in settings else {}
    return {"python": platform.python_version(), "numpy": np.__version__, "pyarrow": pa.__version__, **torch}


def _torn(part: Part, torn: int, step: int) -> Finding:
    return Finding(
        rule="records-torn",
        step=step,
        severity=Severity.INFO,
        seen=f"the last writer of {part.path.name} stopped within a record: {torn:,} bytes at its end were dropped",
        causes=("the process was killed", "the disk was full"),
        remedy="nothing: all whole records before it are there",
    )


def _damaged(error: str, step: int) -> Finding:
    return Finding(
        rule="records-damaged",
        step=step,
        severity=Severity.WARNING,
        seen=f"a file of an earlier writer was left as it is: {error}",
        causes=("a faulty disk", "another program wrote to it"),
        remedy="move it away; the rest of the run reads then",
    )
