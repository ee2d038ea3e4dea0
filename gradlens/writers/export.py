"""Records for other tools: a DataFrame in memory, a file of comma-separated values, a file of JSON lines.

They are writers, so they work while training runs, `watch(writers=[CSV("gradients.csv")])`, and from what was recorded,
`open_run(path).replay(CSV("gradients.csv"))`, with the same rows. Columns are those of `fields.FRAME`, in the order asked.

    Frame        .frame: what `lens.history()` gives; .findings, .scalars
    CSV          a line a row, as pandas writes and reads it; what is empty is empty
    JSONLines    an object a line: {"kind": "row", "step": 0, ...}, {"kind": "scalars", ...}, {"kind": "finding", ...};
                 what is empty or not finite is null

Files are written every second, and at `flush()`. In a job of several ranks each process needs a file of its own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gradlens import fields, frames
from gradlens.errors import ArgumentError, ClosedError, nearest
from gradlens.records import Finding, Record, Snapshot

if TYPE_CHECKING:
    import pandas as pd

ROWS = 20_000  #: that wait in memory at most: some 8 MB
INTERVAL = 1.0  #: seconds that they wait at most, while records come

Target = str | os.PathLike[str] | IO[str]


class Frame:
    """Keeps rows in memory, 0.4 KB each: all, or those of the `last` so many snapshots."""

    def __init__(self, columns: Iterable[str] | None = None, *, last: int | None = None) -> None:
        if last is not None and last < 1:
            raise ArgumentError(f"last={last} keeps nothing; give at least 1, or None to keep all")
        self._columns = _columns(columns)
        self._snapshots: deque[Snapshot] = deque(maxlen=last)
        self._findings: list[Finding] = []

    def write(self, record: Record) -> None:
        """Keep it, without histogram and single weights."""
        if isinstance(record, Finding):
            self._findings.append(record)
        else:
            self._snapshots.append(_bare(record))

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """What was kept stays."""

    @property
    def frame(self) -> pd.DataFrame:
        """Long: one row a (step, backward, stage, parameter), in the order in which they came."""
        return frames.frame(list(self._snapshots))[self._columns]

    @property
    def findings(self) -> pd.DataFrame:
        """One row a finding."""
        return frames.to_frame(self._findings)

    @property
    def scalars(self) -> pd.DataFrame:
        """One row a step, one column a name (`loss`, ...); `step` is the step."""
        import pandas as pd

        by_step: dict[int, dict[str, float]] = {}
        for snapshot in self._snapshots:
            if snapshot.scalars:
                named = {frames.scalar_name(name): value for name, value in snapshot.scalars.items()}
                by_step.setdefault(snapshot.step, {}).update(named)
        rows = [{**observed, "step": step} for step, observed in by_step.items()]
        names = dict.fromkeys(name for row in rows for name in row if name != "step")
        return pd.DataFrame(rows, columns=["step", *names])


class _File:
    """Rows on their way to a file: they wait together, as a frame of many is made nearly as fast as one of few."""

    def __init__(self, target: Target, columns: Iterable[str] | None, append: bool) -> None:
        self._columns = _columns(columns)
        self._append = append
        self._waiting: list[Snapshot] = []
        self._due = time.monotonic() + INTERVAL
        self._own = isinstance(target, str | os.PathLike)
        self._file: IO[str] | None = _opened(Path(target), append) if isinstance(target, str | os.PathLike) else target

    def write(self, record: Record) -> None:
        """Take a record."""
        if self._file is None:
            raise ClosedError(f"{type(self).__name__} was closed")
        if isinstance(record, Finding):
            self._write_waiting(self._file)
            self._write_finding(self._file, record)
            return
        self._waiting.append(_bare(record))
        if sum(map(len, self._waiting)) >= ROWS or time.monotonic() >= self._due:
            self.flush()

    def flush(self) -> None:
        """What was taken is in the file."""
        if self._file is not None:
            self._write_waiting(self._file)
            self._file.flush()
            self._due = time.monotonic() + INTERVAL

    def close(self) -> None:
        """Flush, and close the file if it was opened here."""
        if self._file is not None:
            try:
                self.flush()
            finally:
                if self._own:
                    self._file.close()
                self._file = None

    def _write_waiting(self, file: IO[str]) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._write_rows(file, waiting)

    def _write_rows(self, file: IO[str], snapshots: Sequence[Snapshot]) -> None:
        raise NotImplementedError

    def _write_finding(self, file: IO[str], finding: Finding) -> None:
        raise NotImplementedError


class CSV(_File):
    """A line a row, under a line of names. Findings are not in it.

    Args:
        target: A path, which must not be there yet; or an open text file, which stays open.
        columns: Those of `fields.FRAME` that are wanted; None: all.
        append: Go on with a file that is there and has the same columns, or begin one.

    Raises:
        ArgumentError: No such column; or the file is there, and `append` is not given, or its columns are others.
    """

    def __init__(self, target: Target, *, columns: Iterable[str] | None = None, append: bool = False) -> None:
        super().__init__(target, columns, append)
        self._headed = append and _headed(target, self._columns)

    def _write_rows(self, file: IO[str], snapshots: Sequence[Snapshot]) -> None:
        frame = frames.frame(snapshots)[self._columns]
        frame.to_csv(file, index=False, header=not self._headed, lineterminator="\n")
        self._headed = True

    def _write_finding(self, file: IO[str], finding: Finding) -> None:
        pass


class JSONLines(_File):
    """An object a line, of `kind` row, scalars or finding.

    Args:
        target: A path, which must not be there yet; or an open text file, which stays open.
        columns: Those of `fields.FRAME` that rows have; None: all.
        append: Go on with a file that is there, or begin one.

    Raises:
        ArgumentError: No such column; or the file is there, and `append` is not given.
    """

    def __init__(self, target: Target, *, columns: Iterable[str] | None = None, append: bool = False) -> None:
        super().__init__(target, columns, append)
        self._observed: tuple[int, dict[str, float]] = (-1, {})

    def _write_rows(self, file: IO[str], snapshots: Sequence[Snapshot]) -> None:
        frame = frames.frame(snapshots)[self._columns]
        rows = zip(*(_jsonable(frame[name].tolist()) for name in self._columns), strict=True)
        for snapshot in snapshots:
            self._write_scalars(file, snapshot)
            for row in itertools.islice(rows, len(snapshot)):
                _line(file, "row", dict(zip(self._columns, row, strict=True)))

    def _write_scalars(self, file: IO[str], snapshot: Snapshot) -> None:
        observed = (snapshot.step, {frames.scalar_name(name): value for name, value in snapshot.scalars.items()})
        if observed[1] and observed != self._observed:  # all snapshots of a step have them
            _line(
                file,
                "scalars",
                dict(zip(observed[1], _jsonable(list(observed[1].values())), strict=True)) | {"step": observed[0]},
            )
            self._observed = observed

    def _write_finding(self, file: IO[str], finding: Finding) -> None:
        names = ("step", "rule", "severity", "parameter", "stage", "seen", "value", "causes", "remedy", "parameters")
        _line(file, "finding", dict(zip(names, _jsonable([getattr(finding, name) for name in names]), strict=True)))


def _columns(asked: Iterable[str] | None) -> list[str]:
    columns = list(fields.FRAME) if asked is None else [asked] if isinstance(asked, str) else list(asked)
    for name in columns:
        if name not in fields.FRAME:
            raise ArgumentError(f"there is no column {name!r}{nearest(str(name), fields.FRAME)}")
    return columns


def _bare(snapshot: Snapshot) -> Snapshot:
    return snapshot.without_histogram().without_top()


def _opened(path: Path, append: bool) -> IO[str]:
    try:
        return open(path, "a" if append else "x", encoding="utf-8", newline="")
    except FileExistsError:
        raise ArgumentError(
            f"{path} is there already; give append=True to go on with it, or another name (each rank needs one of its own)"
        ) from None


def _headed(target: Target, columns: Sequence[str]) -> bool:
    """Whether a file has its line of names: these."""
    if not isinstance(target, str | os.PathLike):
        return False
    with open(target, encoding="utf-8", newline="") as file:
        line = file.readline()
    if line and line.rstrip("\n") != ",".join(columns):
        raise ArgumentError(f"{os.fspath(target)} has other columns than {', '.join(columns[:4])}, ...; give another name")
    return bool(line)


def _jsonable(values: Sequence[Any]) -> list[Any]:
    return [None if isinstance(value, float) and not math.isfinite(value) else value for value in values]


def _line(file: IO[str], kind: str, content: dict[str, Any]) -> None:
    file.write(json.dumps({"kind": kind, **content}, allow_nan=False) + "\n")
