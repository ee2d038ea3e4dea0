"""The rows that a question needs, from the files of all segments.

    files -> those rows that meet the filter -> without what a resumed run has replaced -> in order of moment and model

Row groups that cannot hold what is asked for are not read, nor columns that no answer needs. The steps of a segment do not
fall: files that are older than one that begins before the steps asked for are not opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import TypeVar

import numpy as np

from gradlens.errors import ArgumentError, CorruptRunError, RunDirectoryError
from gradlens.store import lock, segment, tables, tail
from gradlens.store.filters import Condition, Filter
from gradlens.store.parts import Reader
from gradlens.store.segment import Segment
from gradlens.store.tables import TABLES, Key, Part
from gradlens.store.tail import Rows

MAX_BYTES = 2 << 30  #: of an answer's numbers: 5 million rows of all columns
ATTEMPTS = 20  #: a file that a writer has merged meanwhile is looked for again, so often
THREADS = 4  #: that read files side by side; Arrow decodes without Python's lock

_T = TypeVar("_T")

#: What every question reads.
_KEYS = ("snapshot", "step", "backward", "stage", "entry", "status", "scale")


class Found:
    """Rows of several segments. `columns` are numbers by name; `owner` says whose: a place in `segments`."""

    def __init__(self, columns: dict[str, np.ndarray], segments: Sequence[Segment]) -> None:
        self.columns, self.segments = columns, list(segments)

    def __len__(self) -> int:
        return len(self.columns["step"])

    def take(self, rows: np.ndarray) -> Found:
        """The given rows, in that order."""
        return Found({name: values[rows] for name, values in self.columns.items()}, self.segments)

    def words(self, column: str, words: Sequence[str]) -> np.ndarray:
        """Codes as words."""
        return np.asarray(words, dtype=object)[self.columns[column]]

    def entries(self) -> tuple[list[segment.Entry], np.ndarray]:
        """The parameters that occur (each piece of one apart), by segment and place in the model, and each row's place
        among them."""
        starts = np.cumsum([0, *(len(each.parameters) for each in self.segments)])
        codes = starts[self.columns["owner"]] + self.columns["entry"]
        occurring = np.zeros(starts[-1], bool)
        occurring[codes] = True
        places = np.zeros(starts[-1], np.int64)
        known: dict[segment.Entry, int] = {}
        everyone = [entry for each in self.segments for entry in each.parameters]
        for code in np.flatnonzero(occurring):
            places[code] = known.setdefault(everyone[code], len(known))
        return list(known), places[codes]

    def names(self) -> tuple[list[str], np.ndarray]:
        """The names that occur, and each row's place among them."""
        entries, at = self.entries()
        known: dict[str, int] = {}
        places = np.array([known.setdefault(name, len(known)) for name, *_ in entries], np.int64)
        return list(known), places[at]


def find(run: Path, table: str, values: Sequence[str], asked: Filter, max_bytes: int | None = None) -> Found:
    """The rows of a table that a filter lets through, with these columns and the keys.

    Raises:
        CorruptRunError: A file is damaged, or refers to what is not there.
        ArgumentError: No parameter is called so, or the answer is too large.
    """
    dtypes = {name: TABLES[table][name] for name in (*_KEYS, *values) if name in TABLES[table]}
    room = allowed = MAX_BYTES if max_bytes is None else max_bytes
    lock = Lock()
    begins: dict[Key, tuple[int, int]] = {}  # of each segment, the oldest file that was read and its first step

    def ask(part: Part, owner: Segment, stop: int | None) -> list[Rows]:
        nonlocal room
        if asked.rank not in (None, part.key.rank):
            return []
        condition, kept = asked.within(owner, stop), []
        newer, begin = begins.get(part.key, (0, condition.first))
        if part.last < newer and begin < condition.first:
            return []

        def begun(step: int) -> None:
            begins[part.key] = part.first, step

        for rows in read(part, owner, table, list(dtypes), condition, begun):
            kept.append(condition.of(rows))
            with lock:
                room -= sum(array.nbytes for array in kept[-1].values())
                if room < 0:
                    raise _too_much(run, table, allowed)
        return kept

    # from a step on: one file at a time, for the newest may be all that is needed
    answers, segments = _over(run, table, ask, threads=1 if asked.first else THREADS)
    asked.check(segments)
    at = {each.key: i for i, each in enumerate(segments)}
    groups = [(at[part.key], rows) for part, kept in answers for rows in kept]
    columns = {
        name: np.concatenate([np.empty(0, dtype), *(rows[name] for _, rows in groups)]) for name, dtype in dtypes.items()
    }
    columns["owner"] = np.repeat([place for place, _ in groups], [len(rows["step"]) for _, rows in groups]).astype(np.int64)
    return _ordered(columns, segments, replaced(segments))


def _over(
    run: Path, table: str, ask: Callable[[Part, Segment, int | None], _T], threads: int = 1
) -> tuple[list[tuple[Part, _T]], list[Segment]]:
    """What `ask(part, segment, stop)` gives for each file of a table, the newest asked first, so many at once; and the
    segments.

    A writer may merge files meanwhile. Then those that are new are asked, and tails once more: they have grown.
    """
    known: dict[Part, _T] = {}
    until: dict[Key, int | None] = {}
    error: Exception | None = None
    for _ in range(ATTEMPTS):
        files = tables.parts(run / table)
        segments = segment.segments(run)  # after the files: what rows refer to is written first
        owners = {each.key: each for each in segments}
        before, until = until, replaced(segments)
        known = {part: answer for part, answer in known.items() if not part.tail and until == before}
        for part in files:
            if part.key not in owners:
                raise CorruptRunError(f"{part.path} belongs to a segment of which there is no {part.key}.json in segments/")
        unknown = [part for part in reversed(files) if part not in known]

        def answer(part: Part, owners: dict[Key, Segment] = owners, until: dict[Key, int | None] = until) -> _T:
            return ask(part, owners[part.key], until[part.key])

        for part, found in zip(unknown, _at_once(answer, unknown, threads), strict=True):
            if isinstance(found, FileNotFoundError):
                error = found
            else:
                known[part] = found
        if all(part in known for part in files):
            return [(part, known[part]) for part in files], segments
    raise RunDirectoryError(f"{run} changes faster than it can be read: {error}")


def _at_once(ask: Callable[[Part], _T], parts: Sequence[Part], threads: int) -> Iterator[_T | FileNotFoundError]:
    """What each file gives, in their order, or that it is gone: what others gave meanwhile is not asked twice."""

    def answer(part: Part) -> _T | FileNotFoundError:
        try:
            return ask(part)
        except FileNotFoundError as gone:
            return gone

    if threads < 2 or len(parts) < 2:
        yield from map(answer, parts)
        return
    with ThreadPoolExecutor(threads) as pool:
        try:
            found: Iterator[_T | FileNotFoundError] = pool.map(answer, parts)
        except RuntimeError:  # the interpreter ends, as in an atexit call: no thread can be begun any more
            found = map(answer, parts)
        yield from found


def _ordered(columns: dict[str, np.ndarray], segments: Sequence[Segment], until: dict[Key, int | None]) -> Found:
    owner = columns["owner"]

    def of_owner(values: list[int]) -> np.ndarray:
        return np.array(values, np.int64)[owner]

    columns["segment"] = of_owner([each.key.segment for each in segments])
    columns["rank"] = of_owner([each.key.rank for each in segments])
    last = [until[each.key] for each in segments]
    columns["superseded"] = columns["step"] >= of_owner([1 << 62 if stop is None else stop for stop in last])
    keys = [columns[name] for name in ("bucket", "entry", "rank", "snapshot", "segment") if name in columns]
    order = np.lexsort(keys)
    found = Found(columns, segments)
    return found if (order[1:] > order[:-1]).all() else found.take(order)


def read(
    part: Part,
    owner: Segment,
    table: str,
    columns: Sequence[str],
    condition: Condition,
    begins: Callable[[int], None] = lambda step: None,
) -> Iterator[Rows]:
    """These columns of a file, without rows whose group cannot meet the condition. `begins` is told its first step."""
    if part.tail:
        rows, _ = tail.read(part.path, {name: TABLES[table][name] for name in columns})
        owner.check(part.path, table, rows)
        if len(rows["step"]):
            begins(int(rows["step"].min()))
        yield rows
        return
    reader = Reader(part.path, table)
    try:
        if condition.first and (bounds := reader.bounds("step")) is not None:
            begins(bounds[0])
        for rows in reader.read(columns, condition.touches):
            owner.check(part.path, table, rows)
            yield rows
    finally:
        reader.close()


def last_step(run: Path, table: str, stage: str | None = None) -> int | None:
    """The last step of a table; None of an empty one. The newest file of a segment that has rows of this stage tells."""
    asked = Filter(stage=stage)
    found: dict[Key, tuple[int, int]] = {}  # the file, and its last step

    def ask(part: Part, owner: Segment, stop: int | None) -> int | None:
        if part.last < found.get(part.key, (0, 0))[0]:
            return None
        condition = asked.within(owner, stop)
        read_steps = (condition.of(rows)["step"] for rows in read(part, owner, table, ["step", "stage", "entry"], condition))
        last = max((int(each.max()) for each in read_steps if len(each)), default=None)
        if last is not None:
            found[part.key] = part.first, last
        return last

    answers, _ = _over(run, table, ask)
    return max((last for _, last in answers if last is not None), default=None)


def extent(run: Path, table: str) -> tuple[int, int, int] | None:
    """How many rows a table has, replaced ones included, and its first and last step, from what files say of themselves."""

    def ask(part: Part, owner: Segment, stop: int | None) -> tuple[int, int, int] | None:
        if part.tail:
            found, _ = tail.read(part.path, {"step": TABLES[table]["step"]})
            count, step = len(found["step"]), found["step"]
            return (count, int(step.min()), int(step.max())) if count else None
        reader = Reader(part.path, table)
        try:
            bounds = reader.bounds("step")
            return None if bounds is None else (reader.rows, *bounds)
        finally:
            reader.close()

    found = [each for _, each in _over(run, table, ask)[0] if each is not None]
    if not found:
        return None
    counts, firsts, lasts = zip(*found, strict=True)
    return sum(counts), min(firsts), max(lasts)


def steps(run: Path, table: str, stage: str | None = None) -> list[int]:
    """The steps of which a table has rows, rising."""
    asked = Filter(stage=stage)

    def ask(part: Part, owner: Segment, stop: int | None) -> set[int]:
        condition = asked.within(owner, stop)
        found = read(part, owner, table, ["step", "stage"], condition)
        return {step for rows in found for step in np.unique(condition.of(rows)["step"]).tolist()}

    answers, _ = _over(run, table, ask)
    return sorted(set().union(*(found for _, found in answers)))


def replaced(segments: Sequence[Segment]) -> dict[Key, int | None]:
    """The step from which on a later segment has replaced a segment's rows; None: none has.

    A later segment of the same rank does, and of other ranks one that knows of so few that this one's is not among them.
    """
    result: dict[Key, int | None] = {}
    of_rank: dict[int, int] = {}
    for each in reversed(segments):  # by number: clocks may go back
        result[each.key] = of_rank.get(each.key.rank)
        if each.first_step is not None:
            of_rank[each.key.rank] = min(each.first_step, of_rank.get(each.key.rank, each.first_step))
    of_size: dict[int, int] = {}
    for each in sorted(segments, key=lambda each: each.started, reverse=True):
        steps = [step for ranks, step in of_size.items() if each.key.rank >= ranks]
        known = result[each.key]
        result[each.key] = min([*steps, *([] if known is None else [known])], default=None)
        if each.first_step is not None and each.ranks is not None:
            of_size[each.ranks] = min(each.first_step, of_size.get(each.ranks, each.first_step))
    return result


def _too_much(run: Path, table: str, max_bytes: int) -> ArgumentError:
    most = f"{max_bytes >> 30} GB" if max_bytes >= 1 << 30 else f"{max_bytes >> 20} MB"
    return ArgumentError(
        f"the rows asked for take more than {most}; ask for less with columns=, parameters= or steps=, or "
        f"have DuckDB or polars read {run / table}/*.parquet"
    )


def torn(run: Path) -> list[str]:
    """What a crash has left incomplete: a note on each tail that ends in the middle of a record, and has no writer."""
    notes = []
    for part in (part for table in TABLES for part in tables.parts(run / table)):
        if part.tail and not lock.held(run, part.key.rank):
            with contextlib.suppress(FileNotFoundError):  # a new writer has just made a part of it
                _, lost = tail.read(part.path, {})
                if lost:
                    notes.append(
                        f"{part.path} ends in the middle of a record, as after a crash: {lost:,} bytes were left out; "
                        "all before them reads"
                    )
    return notes
