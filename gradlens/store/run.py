"""The reader of a run directory, also of one that is being written.

    files -> rows that a question needs -> the newest of each (step, backward, stage, parameter) -> ranks merged -> columns

Nothing is kept between questions: each sees the run as it then is. Row groups that cannot hold what is asked for are not
read, nor columns that no answer needs; derived columns are computed here.

A segment that resumed at step s replaces what earlier ones say of s and later steps. Their rows stay in the files, and
`history(superseded=True)` shows them. Where ranks hold disjoint pieces of a parameter, their rows merge as `fields` says
(quantiles are empty then); of copies the lowest rank's row is taken.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from gradlens import fields, frames
from gradlens.errors import (
    ArgumentError,
    CorruptRunError,
    GradlensWarning,
    NothingCapturedError,
    RunDirectoryError,
    choice,
    nearest,
)
from gradlens.records import COMPLEX, Finding, Parameters, Snapshot, Stage
from gradlens.store import lock, segment, tables, tail
from gradlens.store.parts import Reader
from gradlens.store.segment import Segment
from gradlens.store.tables import STAGES, STATUSES, TABLES, Key, Part
from gradlens.store.tail import Rows

if TYPE_CHECKING:
    import pandas as pd

ATTEMPTS = 20  #: a file that a writer has merged meanwhile is looked for again, so often
ORDERS = ("sensitivity", "saliency", "value", "partial")

Steps = int | range | slice | Sequence[int] | None
Names = str | Iterable[str] | None
_T = TypeVar("_T")


def open_run(path: str | os.PathLike[str]) -> Run:
    """A run directory that `watch(run=...)` has written, or is writing. Imports no torch.

    Raises:
        RunDirectoryError: It is not there, or no run.
        CorruptRunError: Its files are damaged.
    """
    return Run(path)


def _again(question: Callable[..., _T]) -> Callable[..., _T]:
    """Ask again where a file was merged into another between being listed and being read."""

    @functools.wraps(question)
    def asked(self: Run, *args: Any, **kwargs: Any) -> _T:
        for _ in range(ATTEMPTS):
            try:
                return question(self, *args, **kwargs)
            except FileNotFoundError as error:
                last: Exception = error
        raise RunDirectoryError(f"{self.path} changes faster than it can be read, or was removed: {last}")

    return asked


class Run:
    """What was recorded. Questions are those of a lens, with filters that are applied while reading.

    `parameters` are names or glob patterns, `columns` names of `gradlens.fields.FRAME`, `steps` a number, several,
    a range, or a slice, which ends before its stop.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.created = segment.marked(self.path).get("created")
        self.notes = self._torn()  #: what a crash has left incomplete
        for note in self.notes:
            warnings.warn(GradlensWarning(note), stacklevel=3)

    def __repr__(self) -> str:
        return f"<gradlens.Run {self.path}>"

    # --- questions ----------------------------------------------------------------------------------------------------

    @_again
    def history(
        self,
        *,
        columns: Iterable[str] | None = None,
        parameters: Names = None,
        steps: Steps = None,
        stage: str | None = None,
        rank: int | None = None,
        superseded: bool = False,
    ) -> pd.DataFrame:
        """Long: one row a (step, backward, stage, parameter), in the order in which they were recorded.

        `rank` gives one rank's own rows, unmerged. `superseded` adds the rows that a resumed run has replaced, and columns
        `segment` and `superseded` that tell them.
        """
        asked = _Columns(columns)
        rows = self._rows("history", asked.stored, _Filter(parameters, _steps(steps), stage, rank, superseded))
        if rank is None and not superseded:
            rows = _merged(rows, asked.stored)
        result = asked.frame(rows)
        if superseded:
            result["segment"], result["superseded"] = rows.columns["segment"], rows.columns["superseded"]
        return result

    @_again
    def table(
        self,
        step: int | None = None,
        *,
        stage: str | None = None,
        columns: Iterable[str] | None = None,
        parameters: Names = None,
    ) -> pd.DataFrame:
        """One row a parameter, in model order: that step's last stage read, the latest step by default."""
        wanted = self._last_step(stage) if step is None else step
        asked = _Columns(columns)
        rows = self._rows("history", asked.stored, _Filter(parameters, _steps(wanted), stage))
        if not len(rows):
            raise self._no_step(wanted)
        return asked.frame(_latest(_merged(rows, asked.stored)))

    @_again
    def weights(
        self, name: str | None = None, *, top: int | None = None, by: str = "sensitivity", step: int | None = None
    ) -> pd.DataFrame:
        """One row a weight: the most sensitive of each parameter, at the last step (or `step`) of which they were kept.

        Columns as of `lens.weights()`. `attrs` say which step and stage it is.
        """
        if by not in ORDERS:
            raise choice("by", by, ORDERS)
        if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
            raise ArgumentError(f"top is a whole number of weights of at least 1, not {top!r}")
        wanted = self._step_of("weights", step)
        rows = self._rows("weights", ["index", "partial", "value"], _Filter(name, _steps(wanted)))
        return _weights(rows, top, by)

    @_again
    def findings(self) -> list[Finding]:
        """What the rules found, in the order of steps; those that a resumed run has replaced are left out."""
        segments = segment.segments(self.path)
        until = _until(segments)
        found: list[Finding] = []
        for each in segments:
            listed, _ = segment.findings(self.path / "findings" / f"{each.key}.jsonl")
            stop = until[each.key]
            found += [finding for finding in listed if stop is None or finding.step < stop]
        return sorted(found, key=lambda finding: finding.step)

    @_again
    def scalars(self, *, steps: Steps = None) -> pd.DataFrame:
        """Observed numbers: one row a step, one column a name (`loss`, ...)."""
        rows = self._rows("scalars", ["value"], _Filter(None, _steps(steps), scalars=True))
        return rows.scalars()

    @_again
    def histograms(self, *, parameters: Names = None, steps: Steps = None, stage: str | None = None) -> pd.DataFrame:
        """Long: `step, backward, stage, parameter, bucket, count`, where they were kept; empty buckets
        have no row.

        Buckets are numbered as in `gradlens.fields.HISTOGRAM`.
        """
        import pandas as pd

        rows = self._rows("histograms", ["bucket", "count"], _Filter(parameters, _steps(steps), stage))
        names = ["step", "backward", "bucket", "count"]
        result = pd.DataFrame({name: rows.columns[name] for name in names})
        result.insert(2, "stage", pd.Series(rows.words("stage", STAGES), dtype="str"))
        result.insert(3, "parameter", pd.Series(rows.names(), dtype="str"))
        order = [*names[:2], "stage", "parameter", "bucket"]
        return result.groupby(order, sort=False)["count"].sum().reset_index()

    @_again
    def snapshots(
        self, *, steps: Steps = None, parameters: Names = None, stage: str | None = None, rank: int | None = None
    ) -> list[Snapshot]:
        """Records as rules and writers take them, in order, of one rank or merged."""
        asked = _Columns(None)
        filtered = _Filter(parameters, _steps(steps), stage, rank)
        rows = self._rows("history", asked.stored, filtered)
        return _snapshots(rows if rank is not None else _merged(rows, asked.stored))

    @_again
    def steps(self, stage: str | None = None) -> list[int]:
        """The steps of which there are rows, rising."""
        rows = self._rows("history", [], _Filter(None, None, stage))
        return sorted(int(step) for step in np.unique(rows.columns["step"]))

    def names(self) -> list[str]:
        """The parameters, in model order."""
        return list(dict.fromkeys(name for each in self._segments() for name, *_ in each.parameters))

    @property
    def settings(self) -> dict[str, Any]:
        """What the last lens was told."""
        segments = self._segments()
        return dict(segments[-1].settings) if segments else {}

    def ranks(self) -> list[int]:
        """The ranks that wrote."""
        return sorted({each.key.rank for each in self._segments()})

    # --- reading ------------------------------------------------------------------------------------------------------

    @_again
    def _segments(self) -> list[Segment]:
        return segment.segments(self.path)

    @_again
    def _torn(self) -> list[str]:
        notes = []
        for table in TABLES:
            for part in tables.parts(self.path / table):
                if part.tail and not lock.held(self.path, part.key.rank):
                    _, torn = tail.read(part.path)
                    if torn:
                        notes.append(
                            f"{part.path} ends in the middle of a record, as after a crash: {torn:,} bytes were left out; "
                            "all before them reads"
                        )
        return notes

    def _rows(self, table: str, values: Sequence[str], filtered: _Filter) -> _Rows:
        files = tables.parts(self.path / table)  # before the segments: what rows refer to is written first
        segments = segment.segments(self.path)
        known = {each.key: each for each in segments}
        until = dict.fromkeys(known) if filtered.superseded else _until(segments)
        replaced = _until(segments)
        columns = [*_KEYS, *(name for name in values if name not in _KEYS)]
        columns = [name for name in columns if name in TABLES[table]]
        filtered.check(segments)
        found = _Rows([], {name: [] for name in [*columns, "owner", "superseded", "segment", "rank"]}, segments)
        for part in files:
            owner = known.get(part.key)
            if owner is None:
                raise CorruptRunError(f"{part.path} belongs to a segment of which there is no {part.key}.json in segments/")
            if filtered.rank is not None and part.key.rank != filtered.rank:
                continue
            entries = filtered.entries(owner)
            stop = until[part.key]
            for rows in _read(part, table, columns, entries, filtered, stop):
                _check(part, rows, owner, table)
                kept = filtered.mask(rows, entries, stop)
                found.add(rows if kept is None else {name: v[kept] for name, v in rows.items()}, owner, replaced[part.key])
        found.join(TABLES[table])
        return found

    def _last_step(self, stage: str | None) -> int:
        return self._step_of("history", None, stage)

    def _step_of(self, table: str, step: int | None, stage: str | None = None) -> int:
        """The last step of a table; looked for in the newest files first."""
        if step is not None:
            return step
        segments = segment.segments(self.path)
        until = _until(segments)
        last: int | None = None
        for part in reversed(tables.parts(self.path / table)):
            if last is not None and part.key not in until:
                continue
            top = _highest(part, table, stage, until.get(part.key), last)
            last = top if last is None else last if top is None else max(last, top)
        if last is None:
            raise NothingCapturedError(f"there is nothing in {self.path / table} yet")
        return last

    def _no_step(self, step: int) -> ArgumentError:
        steps = self.steps()
        if not steps:
            return ArgumentError(f"there are no records in {self.path} yet")
        near = min(steps, key=lambda s: abs(s - step))
        return ArgumentError(
            f"there is nothing on step {step}: there are {len(steps)}, from {steps[0]} to {steps[-1]}; the nearest is {near}"
        )


#: What every question reads.
_KEYS = ("snapshot", "step", "backward", "stage", "time", "entry", "status", "scale")


def _read(
    part: Part, table: str, columns: Sequence[str], entries: np.ndarray | None, filtered: _Filter, stop: int | None
) -> Iterator[Rows]:
    if part.tail:
        rows, _ = tail.read(part.path)
        missing = [name for name in columns if rows and name not in rows]
        if missing:
            raise CorruptRunError(f"{part.path} lacks the column {missing[0]!r}")
        if rows:
            yield {name: rows[name] for name in columns}
        return
    reader = Reader(part.path, table)
    try:
        yield from reader.read(columns, lambda name, low, high: filtered.touches(name, low, high, entries, stop))
    finally:
        reader.close()


def _highest(part: Part, table: str, stage: str | None, stop: int | None, beyond: int | None) -> int | None:
    code = None if stage is None else STAGES.index(stage)
    if not part.tail:
        reader = Reader(part.path, table)
        bounds = reader.bounds("step")
        reader.close()
        if bounds is None or (beyond is not None and min(bounds[1], stop or bounds[1]) <= beyond):
            return None
        if code is None and (stop is None or bounds[1] < stop):
            return bounds[1]
    found = [-1]
    for rows in _read(part, table, ["step", "stage", "entry"], None, _Filter(None, None), stop):
        kept = rows["step"][np.ones(len(rows["step"]), bool) if code is None else rows["stage"] == code]
        kept = kept if stop is None else kept[kept < stop]
        found += [int(kept.max())] if len(kept) else []
    return max(found) if max(found) >= 0 else None


def _check(part: Part, rows: Rows, owner: Segment, table: str) -> None:
    """What refers to something has to refer to something that is there."""
    limits = {
        "entry": len(owner.scalars if table == "scalars" else owner.parameters),
        "stage": len(STAGES),
        "status": len(STATUSES),
    }
    limits["bucket"] = 2 * fields.BUCKETS
    for name, limit in limits.items():
        values = rows.get(name)
        if values is not None and len(values) and not (values.min() >= 0 and values.max() < limit):
            raise CorruptRunError(
                f"{part.path} has the {name} {int(values.max())} of {limit}. Move it away to read the rest"
            )


def _until(segments: Sequence[Segment]) -> dict[Key, int | None]:
    """The step from which on a later segment of the rank has replaced a segment's rows; None: it has not."""
    result: dict[Key, int | None] = {}
    least: dict[int, int] = {}
    for each in reversed(segments):
        result[each.key] = least.get(each.key.rank)
        if each.first_step is not None:
            least[each.key.rank] = min(each.first_step, least.get(each.key.rank, each.first_step))
    return result


# --- filters --------------------------------------------------------------------------------------------------------


def _steps(given: Steps) -> np.ndarray | tuple[int, int] | None:
    """None, an inclusive interval, or a sorted array."""
    if given is None:
        return None
    if isinstance(given, slice):
        if given.step not in (None, 1):
            raise ArgumentError("steps as a slice takes a start and a stop; for each n-th give range(start, stop, n)")
        return (given.start or 0, (1 << 62) if given.stop is None else given.stop - 1)
    if isinstance(given, int | np.integer):
        return (int(given), int(given))
    try:
        return np.unique(np.asarray(list(given), np.int64))
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"steps is a number, several, a range or a slice, not {given!r}") from None


class _Filter:
    """Which rows a question is about."""

    def __init__(
        self,
        parameters: Names,
        steps: np.ndarray | tuple[int, int] | None,
        stage: str | None = None,
        rank: int | None = None,
        superseded: bool = False,
        scalars: bool = False,
    ) -> None:
        if stage is not None and stage not in list(Stage):
            raise choice("stage", str(stage), list(Stage))
        self.rank, self.superseded, self._scalars = rank, superseded, scalars
        self._patterns = None if parameters is None else [parameters] if isinstance(parameters, str) else list(parameters)
        self._steps = steps
        self._stage = None if stage is None else STAGES.index(stage)

    def check(self, segments: Sequence[Segment]) -> None:
        """A pattern that fits no parameter is a mistake that the user should hear of."""
        names = dict.fromkeys(name for each in segments for name, *_ in each.parameters)
        for pattern in self._patterns or ():
            if names and not any(_fits(name, pattern) for name in names):
                raise ArgumentError(f"there is no parameter {pattern!r} in this run{nearest(pattern, names)}")

    def entries(self, owner: Segment) -> np.ndarray | None:
        """The segment's entries that are asked for, sorted; None: all."""
        if self._patterns is None:
            return None
        named = enumerate(name for name, *_ in owner.parameters)
        return np.array([i for i, name in named if any(_fits(name, p) for p in self._patterns)], np.int64)

    def touches(self, column: str, low: int, high: int, entries: np.ndarray | None, stop: int | None) -> bool:
        """Whether rows between these bounds may be asked for."""
        if column == "entry":
            return entries is None or _any_between(entries, low, high)
        if stop is not None and low >= stop:
            return False
        if self._steps is None:
            return True
        if isinstance(self._steps, tuple):
            return low <= self._steps[1] and high >= self._steps[0]
        return _any_between(self._steps, low, high)

    def mask(self, rows: Rows, entries: np.ndarray | None, stop: int | None) -> np.ndarray | None:
        """Which rows are asked for; None: all."""
        masks = []
        if entries is not None:
            masks.append(np.isin(rows["entry"], entries))
        if stop is not None:
            masks.append(rows["step"] < stop)
        if self._stage is not None:
            masks.append(rows["stage"] == self._stage)
        if isinstance(self._steps, tuple):
            masks.append((rows["step"] >= self._steps[0]) & (rows["step"] <= self._steps[1]))
        elif self._steps is not None:
            masks.append(np.isin(rows["step"], self._steps))
        return np.logical_and.reduce(masks) if masks else None


def _any_between(values: np.ndarray, low: int, high: int) -> bool:
    at = np.searchsorted(values, low)
    return bool(at < len(values) and values[at] <= high)


def _fits(name: str, pattern: str) -> bool:
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


# --- rows -----------------------------------------------------------------------------------------------------------


class _Rows:
    """Rows of several segments, sorted by moment and then by place in the model."""

    def __init__(self, owners: list[Segment], columns: dict[str, Any], segments: Sequence[Segment]) -> None:
        self.columns = columns
        self._segments = list(segments)
        self._at = {each.key: i for i, each in enumerate(segments)}

    def __len__(self) -> int:
        return len(self.columns["step"])

    def add(self, rows: Rows, owner: Segment, replaced: int | None) -> None:
        """Some more."""
        count = len(rows["step"])
        for name, values in rows.items():
            self.columns[name].append(values)
        self.columns["owner"].append(np.full(count, self._at[owner.key], np.int32))
        self.columns["segment"].append(np.full(count, owner.key.segment, np.int64))
        self.columns["rank"].append(np.full(count, owner.key.rank, np.int64))
        self.columns["superseded"].append(np.full(count, False) if replaced is None else rows["step"] >= replaced)

    def join(self, dtypes: dict[str, str]) -> None:
        """No more come."""
        kinds = {"owner": "int32", "superseded": "bool", "segment": "int64", "rank": "int64"} | dtypes
        for name, parts in self.columns.items():
            self.columns[name] = np.concatenate(parts) if parts else np.empty(0, kinds[name])
        c = self.columns
        last = c["bucket"] if "bucket" in c else np.zeros(len(self), np.int8)
        keys = (last, c["entry"], c["rank"], c["snapshot"], c["segment"])
        order = np.lexsort(keys)
        if not (order[1:] > order[:-1]).all():
            self.take(order)

    def take(self, order: np.ndarray) -> None:
        """Only these, in this order."""
        self.columns = {name: values[order] for name, values in self.columns.items()}

    def cut(self, order: np.ndarray) -> _Rows:
        """These, as rows of their own."""
        result = _Rows([], dict(self.columns), self._segments)
        result.take(order)
        return result

    def words(self, column: str, words: Sequence[str]) -> np.ndarray:
        """Codes as words."""
        return np.asarray(words, dtype=object)[self.columns[column]]

    def unique(self) -> tuple[list[segment.Entry], np.ndarray]:
        """The parameters that occur (with piece), in order of segment and model, and each row's place among them."""
        codes = self.columns["owner"].astype(np.int64) << 32 | self.columns["entry"]
        values, inverse = np.unique(codes, return_inverse=True)
        entries = [self._segments[int(code >> 32)].parameters[int(code & 0xFFFFFFFF)] for code in values]
        known: dict[segment.Entry, int] = {}
        places = np.array([known.setdefault(entry, len(known)) for entry in entries], np.int64)
        return list(known), places[inverse] if len(values) else np.empty(0, np.int64)

    def names(self) -> np.ndarray:
        """Each row's parameter."""
        entries, at = self.unique()
        return _objects([name for name, *_ in entries])[at]

    def scalars(self) -> pd.DataFrame:
        """One row a step, one column a name."""
        import pandas as pd

        owners, entries = self.columns["owner"], self.columns["entry"]
        names = [self._segments[o].scalars[e] for o, e in zip(owners.tolist(), entries.tolist(), strict=True)]
        frame = pd.DataFrame({"step": self.columns["step"], "name": names, "value": self.columns["value"]})
        order = list(dict.fromkeys(names))
        last = frame.drop_duplicates(["step", "name"], keep="last")
        wide = last.pivot(index="step", columns="name", values="value")[order].reset_index()
        wide.columns.name = None
        return wide


def _objects(values: Sequence[object]) -> np.ndarray:
    result = np.empty(len(values), object)
    result[:] = values
    return result


def _merged(rows: _Rows, values: Sequence[str]) -> _Rows:
    """The ranks' rows as those of the whole."""
    if len(np.unique(rows.columns["rank"])) < 2:
        return rows
    entries, at = rows.unique()
    names = {name: i for i, name in enumerate(dict.fromkeys(name for name, *_ in entries))}
    pieces = {piece: i for i, piece in enumerate(dict.fromkeys(piece for *_, piece in entries))}
    name = np.array([names[e[0]] for e in entries])[at]
    piece = np.array([pieces[e[3]] for e in entries])[at]
    c = rows.columns
    # of the same piece, the last row of the lowest rank
    order = np.lexsort((-c["snapshot"], c["rank"], piece, name, c["stage"], c["backward"], c["step"]))
    group = np.stack([c["step"], c["backward"], c["stage"], name, piece])[:, order]
    first = np.concatenate([[True], (group[:, 1:] != group[:, :-1]).any(axis=0)])
    chosen = order[first]
    whole = group[:4, first]
    begins = np.flatnonzero(np.concatenate([[True], (whole[:, 1:] != whole[:, :-1]).any(axis=0)]))
    counts = np.diff(np.append(begins, len(chosen)))
    result = rows.cut(chosen[begins])
    if (counts > 1).any():
        _merge_pieces(rows, chosen, begins, counts > 1, values, result)
    c = result.columns
    result.take(np.lexsort((name[chosen[begins]], c["stage"], c["backward"], c["step"])))
    return result


#: Statuses from weak to strong: of several pieces' the strongest holds for the whole.
_STRENGTH = ("frozen", "absent", "excluded", "undefined", "zero", "ok", "uncaptured", "nonfinite")


def _merge_pieces(
    rows: _Rows, chosen: np.ndarray, begins: np.ndarray, several: np.ndarray, values: Sequence[str], result: _Rows
) -> None:
    for name in values:
        column = rows.columns[name][chosen]
        if name in fields.BY_NAME:
            merge = fields.BY_NAME[name].merge
            if merge == "sum" and column.dtype.kind == "f":
                merged = np.add.reduceat(np.nan_to_num(column, nan=0.0, posinf=np.inf, neginf=-np.inf), begins)
                merged[np.logical_and.reduceat(np.isnan(column), begins)] = np.nan
            else:
                merged = {"sum": np.add, "min": np.fmin, "max": np.fmax}[merge].reduceat(column, begins)
            result.columns[name] = merged.astype(column.dtype)
        elif name in fields.QUANTILES:
            result.columns[name] = np.where(several, np.nan, result.columns[name])
    strength = np.array([_STRENGTH.index(word) for word in STATUSES])
    codes = np.array([STATUSES.index(word) for word in _STRENGTH], np.int8)
    result.columns["status"] = codes[np.maximum.reduceat(strength[rows.columns["status"][chosen]], begins)]
    result.columns["scale"] = np.fmin.reduceat(rows.columns["scale"][chosen], begins)


def _latest(rows: _Rows) -> _Rows:
    """For each parameter the last row, in model order."""
    entries, at = rows.unique()
    order = list(dict.fromkeys(name for name, *_ in entries))
    place = {name: i for i, name in enumerate(order)}
    name = np.array([place[e[0]] for e in entries])[at]
    _, back = np.unique(name[::-1], return_index=True)
    return rows.cut(len(rows) - 1 - back)


# --- answers --------------------------------------------------------------------------------------------------------


class _Columns:
    """The columns of a frame, and what has to be read for them."""

    def __init__(self, asked: Iterable[str] | None) -> None:
        self._asked = list(fields.FRAME) if asked is None else [asked] if isinstance(asked, str) else list(asked)
        for name in self._asked:
            if name not in fields.FRAME and name not in fields.BY_NAME:
                raise ArgumentError(f"there is no column {name!r}{nearest(str(name), fields.FRAME)}")
        stored = [*fields.BY_NAME, *fields.QUANTILES]
        self.stored = [name for name in stored if name in self._needed()]

    def _needed(self) -> set[str]:
        needed: set[str] = set()
        for name in self._asked:
            needed |= _raw_of(name) if name in fields.DERIVED_BY_NAME else {name}
        return needed

    def frame(self, rows: _Rows) -> pd.DataFrame:
        """The answer."""
        import pandas as pd

        entries, at = rows.unique()
        result = {}
        for name in self._asked:
            if name == "parameter":
                result[name] = pd.Series(_objects([e[0] for e in entries])[at], dtype="str")
            elif name == "dtype":
                result[name] = pd.Series(_objects([e[2] for e in entries])[at], dtype="str")
            elif name == "shape":
                result[name] = pd.Series(_objects([e[1] for e in entries])[at], dtype=object)
            elif name in ("stage", "status"):
                result[name] = pd.Series(rows.words(name, STAGES if name == "stage" else STATUSES), dtype="str")
            elif name in ("step", "backward"):
                result[name] = pd.Series(rows.columns[name].astype(np.int64))
            else:
                result[name] = pd.Series(fields.derive(name, rows.columns))
        return pd.DataFrame(result, columns=self._asked)


@functools.cache
def _raw_of(derived: str) -> frozenset[str]:
    """The stored columns that a derived one is computed from: those that its formula looks at."""
    seen: set[str] = set()

    class Watched(dict[str, np.ndarray]):
        def __getitem__(self, name: str) -> np.ndarray:
            seen.add(name)
            return super().__getitem__(name)

    with np.errstate(all="ignore"):
        fields.DERIVED_BY_NAME[derived].formula(Watched(fields.empty(1)))
    return frozenset(seen)


def _weights(rows: _Rows, top: int | None, by: str) -> pd.DataFrame:
    import pandas as pd

    c = rows.columns
    entries, at = rows.unique()
    names = {name: i for i, name in enumerate(dict.fromkeys(name for name, *_ in entries))}
    name = np.array([names[e[0]] for e in entries], np.int64)[at]
    kept = []  # of each parameter the rows of the last snapshot, over all ranks; a weight once
    for i in range(len(names)):
        own = np.flatnonzero(name == i)
        moment = np.stack([c["backward"][own], c["stage"][own]], axis=1)
        last = own[(moment == max(map(tuple, moment.tolist()))).all(axis=1)]
        _, unique = np.unique(c["index"][last], return_index=True)
        last = last[unique]
        kept.append(last[np.argsort(-np.abs(c["partial"][last]), kind="stable")][: fields.TOP])
    parts = []
    for own in kept:
        word, shape, dtype, _ = entries[at[own[0]]]
        whole = (*shape, 2) if dtype in COMPLEX else shape
        size = int(np.prod(whole, dtype=object)) if whole else 1
        if len(own) and not (c["index"][own].min() >= 0 and c["index"][own].max() < size):
            raise CorruptRunError(f"weights of {word} have the index {int(c['index'][own].max())}; it has {size} weights")
        parts.append(frames.weights(word, whole, c["index"][own], c["value"][own], c["partial"][own]))
    empty = frames.weights("", (), np.empty(0), np.empty(0), np.empty(0))
    result = pd.concat(parts, ignore_index=True) if parts else empty
    if top is not None:
        order = result[by].abs().sort_values(ascending=False, kind="stable", na_position="last").index[:top]
        result = result.loc[order].reset_index(drop=True)
    if kept:
        newest = max((own[0] for own in kept), key=lambda row: (c["backward"][row], c["stage"][row]))
        result.attrs.update(step=int(c["step"][newest]), stage=STAGES[c["stage"][newest]])
    return result


def _snapshots(rows: _Rows) -> list[Snapshot]:
    c = rows.columns
    entries, at = rows.unique()
    keys = np.stack([c["segment"], c["step"], c["backward"], c["stage"].astype(np.int64), c["snapshot"]])
    begins = np.flatnonzero(np.concatenate([[len(rows) > 0], (keys[:, 1:] != keys[:, :-1]).any(axis=0)])[: len(rows)])
    known: dict[bytes, Parameters] = {}
    result = []
    for start, stop in zip(begins, [*begins[1:], len(rows)], strict=True):
        places = at[start:stop]
        parameters = known.get(places.tobytes())
        if parameters is None:
            names, shapes, dtypes, pieces = zip(*(entries[i] for i in places), strict=True)
            parameters = known[places.tobytes()] = Parameters(names, shapes, dtypes, pieces if any(pieces) else ())
        own = slice(start, stop)
        stored = [*fields.BY_NAME, *fields.QUANTILES]
        result.append(
            Snapshot(
                step=int(c["step"][start]),
                backward=int(c["backward"][start]),
                stage=STAGES[c["stage"][start]],
                time=float(c["time"][start]) / 1e6,
                parameters=parameters,
                status=rows.words("status", STATUSES)[own],
                scale=c["scale"][own],
                columns={name: c[name][own] for name in stored if name in c},
                rank=int(c["rank"][start]),
            )
        )
    return result
