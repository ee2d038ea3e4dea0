"""What has been seen, newest last: a bounded succession of moments that rules, reports and the lens ask.

Blocks come in, and are kept as they are; a `Snapshot` of one moment is a view that is made when somebody asks for it.
Several moments share a step: one for each backward and stage, and each may cover only some of the parameters (two
optimizers read their own). `at` lays them over each other, so that a step has one row a parameter: the last one read.

Memory is bounded in moments and in rows. Only the newest keep their histogram and their most sensitive weights, which are
the larger part of a row: 2.5 KB of its 2.8 KB.

`history.until(moment)` is the history as it was when that moment was the newest: rules are asked about many moments at
once, and must not know what came later. One thread appends and any number read: every answer is taken from one moment.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from operator import attrgetter
from threading import Lock
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np

from gradlens.activations import Activations
from gradlens.analysis.course import Course
from gradlens.blocks import Block, block_of
from gradlens.errors import ArgumentError, NothingCapturedError, choice
from gradlens.facts import Fact
from gradlens.moments import as_moments
from gradlens.records import Parameters, Snapshot, Stage, Status, Top

Kind = TypeVar("Kind")

#: 500,000 rows of 37 columns are about 160 MB: 1,000 moments of 500 parameters.
MAX_ROWS = 500_000
MAX_FACTS = 500
REMEMBERED = 256  #: answers about moments
LAYOUTS = 16  #: stages times sets of parameters whose first rows are kept


@dataclass(frozen=True, eq=False)
class Columns(Block):
    """A block that knows its place: what a rule's condition is asked of."""

    first: Snapshot | None = None  #: of the run, the first moment of this stage with these parameters
    moments: list[Moment] = field(default_factory=list, repr=False)  #: [m]
    history: History | None = field(default=None, repr=False)

    def per_step(self, stage: str, name: str) -> np.ndarray:
        """`[m, n]` what a column of another stage adds up to over the moments of the same step that came before.

        NaN where there is none, and where a row is not finite.
        """
        result = np.full(self.status.shape, np.nan)
        assert self.history is not None
        others = self.history.columns_of(stage, int(self.step[0]), int(self.step[-1]))
        if not others:
            return result
        seqs = np.array([moment.seq for other in others for moment in other.moments])
        steps = np.concatenate([other.step for other in others])
        start = np.searchsorted(steps, self.step)
        stop = np.minimum(
            np.searchsorted(steps, self.step, side="right"), np.searchsorted(seqs, [moment.seq for moment in self.moments])
        )
        known = np.flatnonzero(stop > start)
        if len(known):
            each = [
                _aligned(self, other, np.where(other.has(Status.NONFINITE), np.nan, other.column(name))) for other in others
            ]
            values = np.concatenate([*each, np.zeros((1, len(self.parameters)))])  # reduceat wants a row behind the last
            pairs = np.stack([start[known], stop[known]], axis=1).ravel()
            result[known] = np.add.reduceat(values, pairs, axis=0)[::2]
        return result

    def split(self) -> list[Columns]:
        """Each moment as a block of its own."""
        return [
            Columns(**_parts_of(self.part(at, at + 1)), first=self.first, moments=[moment], history=self.history)
            for at, moment in enumerate(self.moments)
        ]


def _parts_of(block: Block) -> dict[str, Any]:
    return {each.name: getattr(block, each.name) for each in fields(Block)}


def _aligned(to: Block, other: Block, values: np.ndarray) -> np.ndarray:
    """Another block's values in the rows of this one; NaN for parameters that it does not have."""
    if other.parameters is to.parameters or other.names == to.names:
        return values
    position = other.parameters.position
    at = np.array([position.get(name, -1) for name in to.names], np.int64)
    return np.where(at < 0, np.nan, values[:, at])


class Moment:
    """One moment's place in the history."""

    __slots__ = ("at", "block", "ordinal", "rows", "seq", "step")

    def __init__(self, block: Columns, at: int, step: int, seq: int, rows: int, ordinal: int) -> None:
        self.block, self.at = block, at
        self.step = step
        self.seq = seq  #: of all moments ever
        self.rows = rows  #: of all moments so far
        self.ordinal = ordinal  #: of its step among those of its stage

    @property
    def snapshot(self) -> Snapshot:
        """It as a snapshot."""
        return self.block.snapshot(self.at)


_SEQ, _ROWS, _BLOCK = attrgetter("seq"), attrgetter("rows"), attrgetter("block")


def blocks_of(moments: Iterable[Moment]) -> list[Columns]:
    """The blocks that the moments are in, in order, each once."""
    return list(dict.fromkeys(map(_BLOCK, moments)))


class History:
    """The last `maxlen` moments, fewer of a model with very many parameters."""

    def __init__(self, maxlen: int = 1000, keep_histograms: int = 32, max_rows: int = MAX_ROWS) -> None:
        for name, value in (("maxlen", maxlen), ("max_rows", max_rows)):
            if value < 1:
                raise ArgumentError(f"{name}={value} keeps nothing; give at least 1")
        self._maxlen, self._keep, self._max_rows = maxlen, max(keep_histograms, 0), max_rows
        self._moments: list[Moment] = []
        self._by_stage: dict[str, list[Moment]] = {}
        self._firsts: dict[tuple[str, tuple[str, ...]], Snapshot] = {}
        self._heavy = 0  #: the number of the first moment that has what is large
        self._lock = Lock()
        self._course = Course()
        self._facts: list[Fact] = []  # of which nobody asks any more when they came
        self._activations: list[Activations] = []  # the same of these, of which there are many
        self._fresh: list[tuple[int, Fact]] = []  # and the first moment that knows each
        self._memory: dict[tuple[object, ...], Any] = {}

    # --- growth -----------------------------------------------------------------------------------------------------

    def note(self, fact: Fact) -> None:
        """Take what is known beside gradients, from the next moment on."""
        self._fresh.append((self._next(), fact))

    def _next(self) -> int:
        return self._moments[-1].seq + 1 if self._moments else self._heavy

    def append(self, snapshot: Snapshot) -> None:
        """Take the newest snapshot; the oldest leave when it is too many."""
        self.extend([(block_of(snapshot), 0)])
        self.trim()

    def extend(self, moments: Sequence[tuple[Block, int]], facts: Sequence[tuple[int, Fact]] = ()) -> list[Columns]:
        """Take moments, each a block and a place in it, in the order in which they came. The oldest stay until `trim`.

        The moments of a block have to be all of it, in order; those of several blocks may alternate. A fact comes with the
        place of the first moment that knows it.
        """
        moments = as_moments(moments)
        placed: dict[int, Columns] = {}
        with self._lock:
            seq = self._next()
            self._fresh += [(seq + place, fact) for place, fact in facts]
            rows = self._moments[-1].rows if self._moments else 0
            rows_of = [len(block.parameters) for block in moments.blocks]
            each = zip(moments.number.tolist(), moments.place.tolist(), moments.step.tolist(), strict=True)
            for seq_, (number, at, step) in enumerate(each, start=seq):
                columns = placed.get(number)
                if columns is None:
                    columns = placed[number] = self._place(moments.blocks[number])
                rows += rows_of[number]
                self._add(columns, at, step, seq_, rows)
        self._course.add(moments, seq)
        return list(placed.values())

    def _place(self, block: Block) -> Columns:
        key = block.stage, block.names
        first = self._firsts.get(key)
        if first is None and len(block) and len(self._firsts) < LAYOUTS:
            first = self._firsts[key] = _alone(block.snapshot(0))
        parts = _parts_of(block)
        parts["_views"] = WeakValueDictionary()
        return Columns(**parts, first=first, history=self)

    def _add(self, columns: Columns, at: int, step: int, seq: int, rows: int) -> None:
        known = self._by_stage.get(columns.stage)
        if known is None:
            known = self._by_stage[columns.stage] = []
        ordinal = known[-1].ordinal + (known[-1].step != step) if known else 0
        moment = Moment(columns, at, step, seq, rows, ordinal)
        columns.moments.append(moment)
        known.append(moment)
        self._moments.append(moment)

    def trim(self) -> None:
        """Let the oldest leave that are too many, and what is large of all but the newest."""
        with self._lock:
            if not self._moments:
                return
            newest = self._moments[-1]
            first = self._first(newest)
            light = max(newest.seq + 1 - self._keep, first)
            for moment in self._between(self._heavy, light):  # those that leave now too: their block may stay
                moment.block.lighten(moment.at)
            self._heavy = max(light, self._heavy)
            gone = bisect_left(self._moments, first, key=_SEQ)
            for moment in self._moments[:gone]:
                if moment is moment.block.moments[-1]:
                    moment.block.moments.clear()  # they have each other: nothing else would free them at once
            del self._moments[:gone]
            for stage in list(self._by_stage) if gone else ():
                known = self._by_stage[stage]
                del known[: bisect_left(known, first, key=_SEQ)]
            settled = [fact for seq, fact in self._fresh if seq <= first]
            if settled:
                others, activations = _told_apart(settled)
                self._facts = _thinned(self._facts, others)
                self._activations = _thinned(self._activations, activations)
                self._fresh = self._fresh[len(settled) :]
        self._course.settle(first)

    def _first(self, newest: Moment) -> int:
        """The number of the oldest moment that stays while this one is the newest."""
        least = newest.seq + 1 - self._maxlen
        if newest.rows - self._max_rows > self._moments[0].rows - len(self._moments[0].block.parameters):
            at = bisect_left(self._moments, newest.rows - self._max_rows, key=lambda m: m.rows - len(m.block.parameters))
            return max(least, min(self._moments[min(at, len(self._moments) - 1)].seq, newest.seq))
        return max(least, self._moments[0].seq)

    def _between(self, first: int, stop: int) -> list[Moment]:
        return self._moments[bisect_left(self._moments, first, key=_SEQ) : bisect_left(self._moments, stop, key=_SEQ)]

    # --- windows ----------------------------------------------------------------------------------------------------

    def until(self, moment: Moment) -> History:
        """The history as it was when this moment was the newest."""
        return _Until(self, moment)

    def columns_of(self, stage: str, first: int, last: int) -> list[Columns]:
        """The blocks of a stage that have steps from `first` to `last`, in order, each once."""
        with self._lock:
            known = self._by_stage.get(stage, [])
            start, stop = bisect_left(known, first, key=_STEP), bisect_right(known, last, key=_STEP)
            return blocks_of(known[start:stop])

    def _end(self) -> Moment | None:
        """The newest moment that this history has; asked under the lock."""
        return self._moments[-1] if self._moments else None

    def _window(self, stage: str | None = None) -> list[Moment]:
        """The moments (of a stage), oldest first."""
        with self._lock:
            end = self._end()
            if end is None:
                return []
            known = self._moments if stage is None else self._by_stage.get(stage, [])
            return known[bisect_left(known, self._first(end), key=_SEQ) : bisect_right(known, end.seq, key=_SEQ)]

    def moments(self, stage: str | None = None) -> list[Moment]:
        """The moments (of a stage), oldest first: snapshots that are not made yet."""
        return self._window(stage)

    def __len__(self) -> int:
        return len(self._window())

    def __iter__(self) -> Iterator[Snapshot]:
        return iter([moment.snapshot for moment in self._window()])

    def newest(self, stage: str | None = None) -> Moment | None:
        """The newest moment (of a stage), or None."""
        with self._lock:
            end = self._end()
            if end is None or stage is None or stage == end.block.stage:
                return end
            known = self._by_stage.get(stage, [])
            at = bisect_right(known, end.seq, key=_SEQ)
            return known[at - 1] if at and known[at - 1].seq >= self._first(end) else None

    def latest(self, stage: str | None = None) -> Snapshot | None:
        """The newest snapshot (of a stage), or None."""
        newest = self.newest(stage)
        return None if newest is None else newest.snapshot

    def since(self, seq: int) -> list[Moment]:
        """The moments whose number is larger, oldest first."""
        with self._lock:
            return self._moments[bisect_right(self._moments, seq, key=_SEQ) :]

    def first(self) -> Snapshot:
        """The first snapshot of the run of the newest one's stage and parameters, as far as it was kept."""
        newest = self.newest()
        assert newest is not None
        return newest.block.first or newest.snapshot

    def recent_moments(self, steps: int, stage: str | None = None) -> list[Moment]:
        """Every moment (of a stage) of the last `steps` steps that have one, oldest first."""
        with self._lock:
            end = self._end()
            if end is None:
                return []
            known = self._moments if stage is None else self._by_stage.get(stage, [])
            at = stop = bisect_right(known, end.seq, key=_SEQ)
            first, seen, last = self._first(end), 0, None
            while at and known[at - 1].seq >= first and (known[at - 1].step == last or seen < steps):
                at -= 1
                if known[at].step != last:
                    last, seen = known[at].step, seen + 1
            return known[at:stop]

    def recent(self, steps: int, stage: str | None = None) -> list[Snapshot]:
        """Every snapshot (of a stage) of the last `steps` steps that have one, oldest first."""
        return [moment.snapshot for moment in self.recent_moments(steps, stage)]

    def steps(self) -> list[int]:
        """The steps of which something is known, rising."""
        return sorted({moment.step for moment in self._window()})

    # --- the run ----------------------------------------------------------------------------------------------------

    @property
    def course(self) -> Course:
        """Of the whole run, up to the newest moment."""
        return self._course

    @property
    def facts(self) -> list[Fact]:
        """What is known beside gradients, oldest first: all of what is first and last, fewer and fewer between."""
        return self._facts_until(math.inf)

    @property
    def activations(self) -> list[Activations]:
        """What modules made of the batches, thinned as `facts` are."""
        return self._activations_until(math.inf)

    def _facts_until(self, seq: float) -> list[Fact]:
        with self._lock:
            settled, (fresh, _) = self._facts, self._fresh_until(seq)
        return _thinned(settled, fresh)

    def _activations_until(self, seq: float) -> list[Activations]:
        with self._lock:
            settled, (_, fresh) = self._activations, self._fresh_until(seq)
        return _thinned(settled, fresh)

    def _fresh_until(self, seq: float) -> tuple[list[Fact], list[Activations]]:
        return _told_apart([fact for known, fact in self._fresh if known <= seq])

    def remembered(self, name: str, of: Callable[[History], Any]) -> Any:
        """What a question gives, asked once for each newest moment."""
        newest = self.newest()
        key = name, -1 if newest is None else newest.seq, len(self.facts)
        if key not in self._memory:
            if len(self._memory) >= REMEMBERED:
                self._memory.clear()
            self._memory[key] = of(self)
        return self._memory[key]

    # --- questions --------------------------------------------------------------------------------------------------

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
        having = [moment for moment in self._window(stage) if parameter in moment.block.parameters.position]
        last = [list(readings)[-1] for _, readings in groupby(having, key=_STEP)]
        steps = np.asarray([moment.step for moment in last], np.int64)
        return steps, np.asarray([moment.snapshot.value(column, parameter) for moment in last])

    def _of_step(self, step: int | None, stage: str | None) -> list[Snapshot]:
        _check(stage)
        known = self._window(stage)
        if not known:
            what = "no gradient" if stage is None else f"no gradient of stage {str(stage)!r}"
            raise NothingCapturedError(f"{what} has been captured yet; run loss.backward() after watch()")
        wanted = known[-1].step if step is None else step
        readings = [moment.snapshot for moment in known if moment.step == wanted]
        if not readings:
            steps = sorted({moment.step for moment in known})
            near = min(steps, key=lambda s: abs(s - wanted))
            there = f"{len(steps)} steps are, from {steps[0]} to {steps[-1]}"
            raise ArgumentError(f"step {step} is not in memory: {there}; the nearest is {near}")
        return readings


_STEP = attrgetter("step")


class _Until(History):
    """A history that ends at a moment: the same lists, cut where they are asked."""

    def __init__(self, whole: History, newest: Moment) -> None:
        self.__dict__.update(whole.__dict__, _newest=newest)

    def _end(self) -> Moment:
        return self._newest  # type: ignore[attr-defined,no-any-return]

    @property
    def course(self) -> Course:
        return self._course.until(self._end().seq)

    @property
    def facts(self) -> list[Fact]:
        return self._facts_until(self._end().seq)

    @property
    def activations(self) -> list[Activations]:
        return self._activations_until(self._end().seq)

    def extend(self, moments: Sequence[tuple[Block, int]], facts: Sequence[tuple[int, Fact]] = ()) -> list[Columns]:
        """Refused: this is the past."""
        raise TypeError("a history that a rule is given is there to read; it takes no snapshot")


def _told_apart(facts: Sequence[Fact]) -> tuple[list[Fact], list[Activations]]:
    """Activations come with each backward, anything else now and then."""
    activations = [fact for fact in facts if isinstance(fact, Activations)]
    others: list[Fact] = [fact for fact in facts if not isinstance(fact, Activations)]
    return others, activations


def _thinned(facts: list[Kind], more: Sequence[Kind]) -> list[Kind]:
    """The facts and those that came then, thinned as each came: the same however many come at once."""
    result = [*facts, *more[: max(2 * MAX_FACTS - len(facts), 0)]]
    for fact in more[max(2 * MAX_FACTS - len(facts), 0) :]:
        result.append(fact)
        if len(result) > 2 * MAX_FACTS:
            first, last = MAX_FACTS // 2, len(result) - MAX_FACTS
            result = [*result[:first], *result[first:last:2], *result[last:]]
    return result


def _alone(snapshot: Snapshot) -> Snapshot:
    """A copy without what is large, which keeps no block alive."""
    light = replace(snapshot, histogram=None, top=None)
    return replace(light, columns={name: values.copy() for name, values in light.columns.items()}, scale=light.scale.copy())


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
