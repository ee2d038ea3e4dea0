"""Which rows a question is about. A filter is held against the bounds of rows, so as not to read them, then against each.

Filter(parameters, steps, stage, rank)    what the user asked
Condition                                 what that means for the rows of one segment: entries are numbered in each
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from gradlens.errors import ArgumentError, choice, nearest
from gradlens.records import Stage
from gradlens.store.segment import Segment
from gradlens.store.tables import STAGES, Key
from gradlens.store.tail import Rows

Steps = int | range | slice | Sequence[int] | None
Names = str | Iterable[str] | None

_GLOB = frozenset("*?[")  #: a pattern without these fits its own name alone


def listed(names: Names) -> list[str] | None:
    """One or several names or glob patterns, as a list; None: all."""
    return None if names is None else [names] if isinstance(names, str) else list(names)


def fitting(patterns: Sequence[str]) -> Callable[[str], bool]:
    """Whether a name is one of these, or fits one that is a glob pattern."""
    exact, globs = set(patterns), [pattern for pattern in patterns if not _GLOB.isdisjoint(pattern)]
    return lambda name: name in exact or any(fnmatch.fnmatchcase(name, pattern) for pattern in globs)


@dataclass(frozen=True)
class Condition:
    """What rows of one segment have to be. None: anything."""

    entries: np.ndarray | None = None  #: rising
    steps: tuple[int, int] | np.ndarray | None = None  #: first and last, or rising numbers
    stage: int | None = None
    stop: int | None = None  #: the step from which on rows are replaced

    @property
    def first(self) -> int:
        """The first step that may meet it."""
        if self.steps is None or not len(self.steps):
            return 0
        return int(self.steps[0])

    def touches(self, column: str, low: int, high: int) -> bool:
        """Whether rows whose `entry` or `step` lies between these bounds may meet it."""
        if column == "entry":
            return self.entries is None or _any_between(self.entries, low, high)
        if self.stop is not None and low >= self.stop:
            return False
        if self.steps is None:
            return True
        if isinstance(self.steps, tuple):
            return low <= self.steps[1] and high >= self.steps[0]
        return _any_between(self.steps, low, high)

    def mask(self, rows: Rows) -> np.ndarray | None:
        """Which rows meet it; None: all."""
        masks = []
        if self.entries is not None:
            masks.append(np.isin(rows["entry"], self.entries))
        if self.stop is not None:
            masks.append(rows["step"] < self.stop)
        if self.stage is not None:
            masks.append(rows["stage"] == self.stage)
        if isinstance(self.steps, tuple):
            masks.append((rows["step"] >= self.steps[0]) & (rows["step"] <= self.steps[1]))
        elif self.steps is not None:
            masks.append(np.isin(rows["step"], self.steps))
        return np.logical_and.reduce(masks) if masks else None

    def of(self, rows: Rows) -> Rows:
        """Those that meet it."""
        kept = self.mask(rows)
        return rows if kept is None else {name: values[kept] for name, values in rows.items()}


class Filter:
    """What a user asks for.

    Raises:
        ArgumentError: There is no such stage, or steps are no steps.
    """

    def __init__(
        self,
        parameters: Names = None,
        steps: Steps = None,
        stage: str | None = None,
        rank: int | None = None,
        superseded: bool = False,
    ) -> None:
        if stage is not None and stage not in list(Stage):
            raise choice("stage", str(stage), list(Stage))
        self.rank, self.superseded = rank, superseded
        self._patterns = listed(parameters)
        self._steps = _steps(steps)
        self._stage = None if stage is None else STAGES.index(stage)
        self._entries: dict[Key, tuple[Segment, np.ndarray]] = {}

    def check(self, segments: Sequence[Segment]) -> None:
        """A pattern that fits no parameter is a mistake that the user should hear of."""
        if not self._patterns:
            return
        names = dict.fromkeys(name for each in segments for name, *_ in each.parameters)
        for pattern in self._patterns:
            if names and not any(map(fitting([pattern]), names)):
                raise ArgumentError(f"there is no parameter {pattern!r} in this run{nearest(pattern, names)}")

    @property
    def first(self) -> int:
        """The first step that is asked for."""
        return Condition(steps=self._steps).first

    def has(self, step: int) -> bool:
        """Whether the step is asked for."""
        return Condition(steps=self._steps).touches("step", step, step)

    def within(self, owner: Segment, stop: int | None) -> Condition:
        """As a condition on the segment's rows, which are replaced from step `stop` on."""
        return Condition(self._of(owner), self._steps, self._stage, None if self.superseded else stop)

    def _of(self, owner: Segment) -> np.ndarray | None:
        """The entries of the parameters that are asked for."""
        if self._patterns is None:
            return None
        known = self._entries.get(owner.key)
        if known is None or known[0] is not owner:
            fits = fitting(self._patterns)
            entries = [entry for entry, (name, *_) in enumerate(owner.parameters) if fits(name)]
            known = self._entries[owner.key] = owner, np.array(entries, np.int64)
        return known[1]


def _steps(given: Steps) -> np.ndarray | tuple[int, int] | None:
    """None, the first and the last, or rising numbers."""
    if given is None:
        return None
    if isinstance(given, slice):
        if given.step not in (None, 1):
            raise ArgumentError("steps as a slice takes a start and a stop; for each n-th give range(start, stop, n)")
        return (given.start or 0, (1 << 62) if given.stop is None else given.stop - 1)
    if isinstance(given, int | np.integer):
        return (int(given), int(given))
    if isinstance(given, range) and given.step == 1:
        return (given.start, given.stop - 1)
    try:
        return np.unique(np.asarray(list(given), np.int64))
    except (TypeError, ValueError, OverflowError):
        raise ArgumentError(f"steps is a number, several, a range or a slice, not {given!r}") from None


def _any_between(values: np.ndarray, low: int, high: int) -> bool:
    at = np.searchsorted(values, low)
    return bool(at < len(values) and values[at] <= high)
