"""What has been seen, newest last: a bounded succession of snapshots that rules, reports and the lens ask.

Several snapshots share a step: one for each backward and stage, and each may cover only some of the parameters (two
optimizers read their own). `at` lays them over each other, so that a step has one row a parameter: the last one read.

Memory is bounded in snapshots and in rows. Only the newest keep their histogram and their most sensitive weights, which are
the larger part of a snapshot: 2.5 KB of its 2.8 KB a parameter.

One thread appends and any number read: every answer is taken from one moment of the history.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from threading import Lock

import numpy as np

from gradlens.analysis.course import Course
from gradlens.errors import ArgumentError, NothingCapturedError, choice
from gradlens.facts import Fact
from gradlens.records import Parameters, Snapshot, Stage, Top

#: 500,000 rows of 37 columns are about 160 MB: 1,000 snapshots of 500 parameters.
MAX_ROWS = 500_000
MAX_FACTS = 500


class History:
    """The last `maxlen` snapshots, fewer of a model with very many parameters."""

    def __init__(self, maxlen: int = 1000, keep_histograms: int = 32, max_rows: int = MAX_ROWS) -> None:
        for name, value in (("maxlen", maxlen), ("max_rows", max_rows)):
            if value < 1:
                raise ArgumentError(f"{name}={value} keeps nothing; give at least 1")
        self._maxlen, self._keep, self._max_rows = maxlen, max(keep_histograms, 0), max_rows
        self._snapshots: deque[Snapshot] = deque()
        self._newest: dict[str, Snapshot] = {}
        self._rows = 0
        self.course = Course()
        self.facts: list[Fact] = []
        self._lock = Lock()

    def note(self, fact: Fact) -> None:
        """Keep what is known beside gradients: all of what is first and last, and fewer and fewer of what is between."""
        self.facts.append(fact)
        if len(self.facts) > 2 * MAX_FACTS:
            self.facts = [
                *self.facts[: MAX_FACTS // 2],
                *self.facts[MAX_FACTS // 2 : -MAX_FACTS : 2],
                *self.facts[-MAX_FACTS:],
            ]

    def append(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot; the oldest leave when it is too many."""
        with self._lock:
            self.course.add(snapshot)
            self._snapshots.append(snapshot)
            self._newest[snapshot.stage] = snapshot
            self._rows += len(snapshot)
            if len(self._snapshots) > self._keep:
                self._lighten(-1 - self._keep)
            while len(self._snapshots) > self._maxlen or (self._rows > self._max_rows and len(self._snapshots) > 1):
                self._forget(self._snapshots.popleft())

    def _lighten(self, at: int) -> None:
        old = self._snapshots[at]
        new = self._snapshots[at] = replace(old, histogram=None, top=None)
        if self._newest[old.stage] is old:
            self._newest[old.stage] = new

    def _forget(self, snapshot: Snapshot) -> None:
        self._rows -= len(snapshot)
        if self._newest[snapshot.stage] is snapshot:
            del self._newest[snapshot.stage]

    def __len__(self) -> int:
        return len(self._snapshots)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._all())

    def _all(self) -> tuple[Snapshot, ...]:
        with self._lock:
            return tuple(self._snapshots)

    def latest(self, stage: str | None = None) -> Snapshot | None:
        """The newest snapshot (of a stage), or None."""
        with self._lock:
            if stage is None:
                return self._snapshots[-1] if self._snapshots else None
            return self._newest.get(stage)

    def recent(self, steps: int, stage: str | None = None) -> list[Snapshot]:
        """Every snapshot (of a stage) of the last `steps` steps that have one, oldest first."""
        result: list[Snapshot] = []
        last, seen = None, 0
        with self._lock:
            if stage is not None and stage not in self._newest:
                return []
            for snapshot in reversed(self._snapshots):
                if stage in (None, snapshot.stage):
                    if snapshot.step != last:
                        last, seen = snapshot.step, seen + 1
                    if seen > steps:
                        break
                    result.append(snapshot)
        return result[::-1]

    def steps(self) -> list[int]:
        """The steps of which something is known, rising."""
        return sorted({snapshot.step for snapshot in self._all()})

    def parts(self, step: int | None = None, stage: str | None = None) -> list[Snapshot]:
        """What `at` lays over each other, cut so that no parameter is in two: each part says its own backward and stage."""
        return _cut(self._of_step(step, stage))

    def at(self, step: int | None = None, stage: str | None = None) -> Snapshot:
        """A step (the latest by default), one row a parameter: for each the last one read, of `stage` or of any.

        Rows are in model order. `step`, `backward`, `stage` and `time` are those of the newest part; rows of an older one
        are told apart with `parts`. Raises `NothingCapturedError` while empty, `ArgumentError` for a step that is not known.
        """
        readings = self._of_step(step, stage)
        parts = _cut(readings)
        return parts[0] if len(parts) == 1 else _over(parts, _model_order([reading.names for reading in readings]))

    def series(self, parameter: str, column: str, stage: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """One column of one parameter over time: steps `[k]` and values `[k]`, for each step the last one read."""
        _check(stage)
        having = [s for s in self._all() if stage in (None, s.stage) and parameter in s.parameters.position]
        last = [list(readings)[-1] for _, readings in groupby(having, key=lambda snapshot: snapshot.step)]
        steps = np.asarray([snapshot.step for snapshot in last], np.int64)
        return steps, np.asarray([snapshot.value(column, parameter) for snapshot in last])

    def _of_step(self, step: int | None, stage: str | None) -> list[Snapshot]:
        _check(stage)
        known = [snapshot for snapshot in self._all() if stage in (None, snapshot.stage)]
        if not known:
            what = "no gradient" if stage is None else f"no gradient of stage {str(stage)!r}"
            raise NothingCapturedError(f"{what} has been captured yet; run loss.backward() after watch()")
        wanted = known[-1].step if step is None else step
        readings = [snapshot for snapshot in known if snapshot.step == wanted]
        if not readings:
            steps = sorted({snapshot.step for snapshot in known})
            near = min(steps, key=lambda s: abs(s - wanted))
            there = f"{len(steps)} steps are, from {steps[0]} to {steps[-1]}"
            raise ArgumentError(f"step {step} is not in memory: {there}; the nearest is {near}")
        return readings


def _check(stage: str | None) -> None:
    if stage is not None and stage not in list(Stage):
        raise choice("stage", stage, [str(s) for s in Stage])


def _cut(readings: Sequence[Snapshot]) -> list[Snapshot]:
    """The readings without the rows that a later one has."""
    taken: set[str] = set()
    parts = []
    for reading in reversed(readings):
        rows = [i for i, name in enumerate(reading.names) if name not in taken]
        if rows:
            parts.append(reading if len(rows) == len(reading) else reading.take(rows))
            taken.update(reading.names)
    return parts[::-1]


def _over(parts: Sequence[Snapshot], order: Sequence[str]) -> Snapshot:
    """Disjoint parts as one snapshot, its rows in the given order."""
    joined = [(part, row) for part in parts for row in range(len(part))]
    names = [part.names[row] for part, row in joined]
    position = {name: i for i, name in enumerate(names)}
    at = [position[name] for name in order]

    def laid(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(arrays)[at]

    newest = parts[-1]
    return replace(
        newest,
        parameters=Parameters(
            tuple(order),
            tuple(part.parameters.shapes[row] for part, row in (joined[i] for i in at)),
            tuple(part.parameters.dtypes[row] for part, row in (joined[i] for i in at)),
            _pieces(joined, at),
        ),
        status=laid([part.status for part in parts]),
        scale=laid([part.scale for part in parts]),
        columns={name: laid([part.column(name) for part in parts]) for name in newest.columns},
        histogram=_laid_if_all([part.histogram for part in parts], at),
        top=_top([part.top for part in parts], at),
        scalars={name: value for part in parts for name, value in part.scalars.items()},
    )


def _pieces(joined: Sequence[tuple[Snapshot, int]], at: Sequence[int]) -> tuple[str, ...]:
    """Empty where every row is of a whole tensor."""
    pieces = tuple(part.parameters.piece(row) for part, row in (joined[i] for i in at))
    return pieces if any(pieces) else ()


def _laid_if_all(arrays: Sequence[np.ndarray | None], at: Sequence[int]) -> np.ndarray | None:
    present = [array for array in arrays if array is not None]
    return np.concatenate(present)[at] if len(present) == len(arrays) else None


def _top(tops: Sequence[Top | None], at: Sequence[int]) -> Top | None:
    present = [top for top in tops if top is not None]
    if len(present) < len(tops):
        return None
    index, partial, value = (
        np.concatenate([getattr(top, name) for top in present]) for name in ("index", "partial", "value")
    )
    return Top(index, partial, value).take(at)


def _model_order(sequences: Sequence[Sequence[str]]) -> list[str]:
    """All names, in the order of the sequence that has most (the newest of these); others go behind their predecessors."""
    leading = max(reversed(sequences), key=len)
    order, known = list(leading), set(leading)
    for names in reversed(sequences):
        if known.issuperset(names):
            continue
        cursor = 0
        for name in names:
            if name in known:
                cursor = order.index(name) + 1
            else:
                order.insert(cursor, name)
                known.add(name)
                cursor += 1
    return order
