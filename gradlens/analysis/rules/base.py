"""What rules are made of.

A rule is a callable value: `rule(history) -> findings`, asked after each snapshot about the newest one. It keeps no state.
A user's is a plain function. Those of gradlens are *conditions over columns* with words for them:

    holds(columns)            [moments, parameters]: 1 where the thing holds, 0 where not, -1 where that is unknown
    steps                     it has to hold on each of the last so many observed steps of its stage
    findings(history, rows)   the words, where it has

so that the recorder asks each rule one vectorised question a block, and a healthy training costs no words at all. Called
with a history, such a rule answers for its newest snapshot: the same answer, one snapshot at a time. A condition may hold
too often: `findings` may look closer, and find nothing.

Parameters that are frozen, left out, or that the loss does not depend on have no health: `judged` are the others.

An illness lasts, and a rule repeats itself at each step; the rule set drops what it has heard. So what rules say of many
parameters is worded late (`RowFindings`), and what several conditions share is kept (`remembered`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np

from gradlens.analysis.history import Columns, History, Moment
from gradlens.blocks import Block
from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.records import Finding, Parameters, Severity, Snapshot, Stage, Status

Rule = Callable[[History], Iterable[Finding] | None]

#: Where a thing holds: 1 true, 0 false, -1 unknown; `[n]` of a snapshot.
Condition = Callable[[Snapshot], np.ndarray]

#: The same of a block: `[moments, n]`.
BlockCondition = Callable[[Columns], np.ndarray]

#: What a formula over the last axis is asked of.
Rows = Block | Snapshot

_NARROW = ("bfloat16", "float16", "complex32")
_SILENT = (Status.FROZEN, Status.UNCAPTURED, Status.ABSENT, Status.EXCLUDED, Status.UNDEFINED)


@dataclass(frozen=True, eq=False)
class RowFindings:
    """A finding for each of some rows of a snapshot, worded when somebody reads it."""

    rule: str
    severity: Severity
    snapshot: Snapshot
    rows: Sequence[int]
    finding: Callable[[int], Finding]  #: of a row

    def __iter__(self) -> Iterator[Finding]:
        return map(self.finding, self.rows)


class ColumnRule:
    """A rule that is a condition over columns. Subclasses are frozen dataclasses with `name`, `holds` and `findings`."""

    name: ClassVar[str]
    stages: ClassVar[tuple[str, ...]] = ()  #: whose blocks it is asked about; (): all
    #: Whether the same rows at the next moment mean the same findings: it is not asked again while they stay.
    settled: ClassVar[bool] = False

    def holds(self, columns: Columns) -> np.ndarray:
        """`[moments, parameters]` 1 where the thing holds, 0 where not, -1 where that is unknown."""
        raise NotImplementedError

    def conditions(self) -> tuple[tuple[BlockCondition, int], ...]:
        """The conditions, and on how many of the last observed steps each has to hold."""
        return ((self.holds, getattr(self, "steps", 1)),)

    def findings(self, *args: Any, **kwargs: Any) -> Iterable[Finding]:
        """`findings(history, rows)`: what is found at the newest moment, in the rows where the condition has lasted.

        Of several conditions, `findings(history, rows_of_the_first, rows_of_the_second, ...)`; some may have none.
        """
        raise NotImplementedError

    def __call__(self, history: History) -> Iterable[Finding]:
        """What is found at the newest moment."""
        newest = history.newest()
        if newest is None or (self.stages and newest.block.stage not in self.stages):
            return ()
        rows = [lasting_rows(history, condition, steps) for condition, steps in self.conditions()]
        return self.findings(history, *rows) if any(rows) else ()


def remembered(of: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The same function of a snapshot or block, or method of a rule, that remembers its answer while what it is of lives.

    Of a snapshot that is a view of a block, the block's answer serves.
    """
    answers: WeakKeyDictionary[Rows, dict[tuple[Any, ...], np.ndarray]] = WeakKeyDictionary()

    @wraps(of)
    def answer(*asked: Any) -> np.ndarray:
        *rule, rows = asked
        home = getattr(rows, "_home", None)
        if home is not None:
            block, moment = home
            return answer(*rule, block)[moment]  # type: ignore[no-any-return]
        known, key = answers.setdefault(rows, {}), tuple(rule)
        if key not in known:
            known[key] = of(*asked)
        return known[key]

    return answer


@dataclass(frozen=True, eq=False)
class Layout:
    """What follows from names and shapes alone."""

    matrix: np.ndarray  #: [n] whether the parameter has two axes or more: a weight, not a bias or a scale
    narrow: np.ndarray  #: [n] a weight stored in 16 bits or fewer
    layer: np.ndarray  #: [n] the number of the module that owns it
    front: np.ndarray  #: [layers] the row that stands for a layer: its first weight, or its first parameter
    weighty: np.ndarray  #: [layers] whether it has a weight: normalisations and lone scalars have not
    order: np.ndarray  #: [n] the rows, layer by layer
    start: np.ndarray  #: [layers] where a layer begins in `order`


@lru_cache(maxsize=8)
def layout(parameters: Parameters) -> Layout:
    """The layout of a model's parameters."""
    owners = [name.rpartition(".")[0] or name for name in parameters.names]
    numbers = {owner: i for i, owner in enumerate(dict.fromkeys(owners))}
    layer = np.asarray([numbers[owner] for owner in owners], np.int64)
    matrix = np.asarray([len(shape) >= 2 for shape in parameters.shapes], bool)
    order = np.lexsort((np.arange(len(layer)), ~matrix, layer))
    start = np.searchsorted(layer[order], np.arange(len(numbers)))
    narrow = np.asarray([dtype in _NARROW or dtype.startswith("float8") for dtype in parameters.dtypes], bool)
    front = order[start]
    return Layout(matrix, matrix & narrow, layer, front, matrix[front], order, start)


def judged(rows: Rows) -> np.ndarray:
    """`[..., n]` rows with a gradient of their own, zero and non-finite ones included."""
    return ~rows.has(*_SILENT)


def unmoved(rows: Rows) -> np.ndarray:
    """`[..., n]` rows whose parameters no optimizer has: of others the update was measured, and of these not."""
    measured = rows.columns["update_numel"] > 0
    return ~measured & (rows.columns["numel"] > 0) & measured.any(axis=-1, keepdims=True)


def by_layer(rows: Rows, values: np.ndarray) -> np.ndarray:
    """`[..., layers]` the largest of the values of each layer's parameters; -inf where it has none."""
    where = layout(rows.parameters)
    if not len(where.start):
        return np.empty((*values.shape[:-1], 0))
    return np.maximum.reduceat(np.where(np.isnan(values), -np.inf, values)[..., where.order], where.start, axis=-1)


def tristate(holds: np.ndarray, known: np.ndarray) -> np.ndarray:
    """1 true, 0 false, -1 unknown: whether the thing holds, where that is known."""
    return np.where(known, holds, -1).astype(np.int8)


def of_whole_model(rows: Rows, holds: np.ndarray | bool, known: np.ndarray | bool = True) -> np.ndarray:
    """A condition's answer on the whole model, `[...]`, which stands on the first row alone."""
    result = np.full(rows.columns["numel"].shape, -1, np.int8)
    result[..., :1] = np.where(known, holds, -1)[..., None]
    return result


def lasting(history: History, condition: Condition, steps: int) -> list[int]:
    """The rows of the newest snapshot where the condition held on each of the last `steps` observed steps of its stage.

    Where a step has several snapshots it must hold in each that can say, and at least one must be able to. It looks back
    only where the newest snapshot already shows the thing.
    """
    return _lasting(history, lambda moment: condition(moment.snapshot), steps)


def lasting_rows(history: History, condition: BlockCondition, steps: int) -> list[int]:
    """The same of a condition over blocks."""
    known: dict[int, np.ndarray] = {}

    def at(moment: Moment) -> np.ndarray:
        if id(moment.block) not in known:
            known[id(moment.block)] = condition(moment.block)
        return known[id(moment.block)][moment.at]

    return _lasting(history, at, steps)


def _lasting(history: History, condition: Callable[[Moment], np.ndarray], steps: int) -> list[int]:
    newest = history.newest()
    if newest is None:
        return []
    held = condition(newest) == 1
    if steps > 1 and held.any():
        moments = history.recent_moments(steps, newest.block.stage)
        if len({moment.step for moment in moments}) < steps:
            return []
        held = held & _held(newest, moments, condition)
    return np.flatnonzero(held).tolist()


def _held(newest: Moment, moments: Sequence[Moment], condition: Callable[[Moment], np.ndarray]) -> np.ndarray:
    """`[n]` whether it held on each step, the newest looked at first; nothing more is looked at when it holds nowhere."""
    held = np.ones(len(newest.block.parameters), bool)
    at_step: dict[int, np.ndarray] = {}
    for moment in reversed(moments):
        there = _rows_of(newest, moment, condition(moment))
        held &= there != 0
        if not held.any():
            return held
        holds = there == 1
        at_step[moment.step] = at_step[moment.step] | holds if moment.step in at_step else holds
    return held & np.logical_and.reduce(list(at_step.values()))


def _rows_of(newest: Moment, moment: Moment, values: np.ndarray) -> np.ndarray:
    """The values of another moment in the rows of the newest; -1 for parameters that it does not have."""
    ours, theirs = newest.block.parameters, moment.block.parameters
    if ours is theirs or ours.names == theirs.names:
        return values
    position = theirs.position
    return np.asarray([values[position[name]] if name in position else -1 for name in ours.names])


def newest_of(history: History) -> Snapshot:
    """The newest snapshot of a history that has one."""
    newest = history.latest()
    assert newest is not None
    return newest


def consumed(history: History) -> bool:
    """Whether the newest snapshot is of the gradient that the optimizer gets, as far as that is read at all.

    What is done about a large gradient before the optimizer (clipping, unscaling) is done: only what is left counts.
    """
    newest = history.newest()
    return newest is not None and (newest.block.stage == Stage.USED or history.newest(Stage.USED) is None)


def check_number(rule: object, name: str, *, above: float = 0.0, most: float = math.inf) -> None:
    """Raise unless the rule's setting is a number above one bound and not above another."""
    value = getattr(rule, name)
    where = f"{type(rule).__name__}({name}=...)"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(f"{where} is a number, not {value!r}")
    if not above < value <= most:
        limit = f" and at most {most:g}" if most < math.inf else ""
        raise ArgumentError(f"{where} must be above {above:g}{limit}, not {value!r}")


def check_steps(rule: object, name: str = "steps") -> None:
    """Raise unless the rule's setting is a whole number of steps of at least 1."""
    value = getattr(rule, name)
    where = f"{type(rule).__name__}({name}=...)"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{where} is a whole number of observed steps, not {value!r}")
    if value < 1:
        raise ArgumentError(f"{where} must be at least 1, not {value!r}")


def format_number(value: float) -> str:
    """Three digits at most."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}" if value else "0"


def on_steps(steps: int) -> str:
    """`at each of the last 10 observed steps`."""
    return f"at each of the last {steps} observed steps" if steps > 1 else "at this step"


def last_layer(snapshot: Snapshot, rows: Sequence[int]) -> str:
    """The module that owns the last of these rows, all of whose judged parameters are among them; '' if there is none."""
    where, known = layout(snapshot.parameters), judged(snapshot)
    chosen = np.zeros(len(snapshot), bool)
    chosen[np.asarray(rows, np.int64)] = True
    own, theirs = (np.bincount(where.layer[mask], minlength=len(where.front)) for mask in (known, known & chosen))
    whole = np.flatnonzero((own > 0) & (own == theirs))
    if not len(whole):
        return ""
    name = snapshot.names[where.front[whole[-1]]]
    return name.rpartition(".")[0] or name
