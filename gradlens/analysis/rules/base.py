"""What rules are made of.

A rule is a callable value: `rule(history) -> findings`, asked after each snapshot about the newest one. It keeps no state:
what lasts is looked up in the history. One step proves little, so most rules ask that something held on each of the last n
*observed* steps, which `lasting` answers; it looks back only where the newest snapshot already shows the thing.

Parameters that are frozen, left out, or that the loss does not depend on have no health: `judged` are the others.

An illness lasts, and a rule repeats itself at each step; the diagnosis drops what it has heard. So what rules say of many
parameters is worded late (`EachRow`), and what is looked back at again and again is kept (`remembered`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from gradlens.analysis.history import History
from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.records import Finding, Parameters, Severity, Snapshot, Stage, Status

Rule = Callable[[History], Iterable[Finding] | None]

#: Where a thing holds in a snapshot: 1 where it does, 0 where not, -1 where that cannot be said; `[n]`.
Condition = Callable[[Snapshot], np.ndarray]

_NARROW = ("bfloat16", "float16", "complex32")
_SILENT = (Status.FROZEN, Status.UNCAPTURED, Status.ABSENT, Status.EXCLUDED, Status.UNDEFINED)


@dataclass(frozen=True, eq=False)
class EachRow:
    """A finding for each of some rows of a snapshot, worded when somebody reads it."""

    rule: str
    severity: Severity
    snapshot: Snapshot
    rows: Sequence[int]
    finding: Callable[[int], Finding]  #: of a row

    def __iter__(self) -> Iterator[Finding]:
        return map(self.finding, self.rows)


def remembered(of: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The same function of a snapshot, or method of a rule, that remembers its answer for as long as the snapshot lives."""
    answers: WeakKeyDictionary[Snapshot, dict[tuple[Any, ...], np.ndarray]] = WeakKeyDictionary()

    @wraps(of)
    def answer(*asked: Any) -> np.ndarray:
        *rule, snapshot = asked
        known, key = answers.setdefault(snapshot, {}), tuple(rule)
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


def judged(snapshot: Snapshot) -> np.ndarray:
    """`[n]` rows with a gradient of their own, zero and non-finite ones included."""
    return ~snapshot.has(*_SILENT)


def unmoved(snapshot: Snapshot) -> np.ndarray:
    """`[n]` rows whose parameters no optimizer has: of others the update was measured, and of these not."""
    measured = snapshot.columns["update_numel"] > 0
    return ~measured & (snapshot.columns["numel"] > 0) & measured.any()


def by_layer(snapshot: Snapshot, values: np.ndarray) -> np.ndarray:
    """`[layers]` the largest of the values of each layer's parameters; -inf where it has none."""
    where = layout(snapshot.parameters)
    if not len(where.start):
        return np.empty(0)
    return np.maximum.reduceat(np.where(np.isnan(values), -np.inf, values)[where.order], where.start)


def said(holds: np.ndarray, known: np.ndarray) -> np.ndarray:
    """A condition's answer, `[n]`: whether the thing holds, where that is known."""
    return np.where(known, holds, -1).astype(np.int8)


def said_of_all(snapshot: Snapshot, holds: bool | None) -> np.ndarray:
    """A condition's answer on the whole model, which stands on the first row alone; None: that is not known."""
    result = np.full(len(snapshot), -1, np.int8)
    if holds is not None:
        result[:1] = holds
    return result


def lasting(history: History, condition: Condition, steps: int) -> list[int]:
    """The rows of the newest snapshot where the condition held on each of the last `steps` observed steps of its stage.

    Where a step has several snapshots it must hold in each that can say, and at least one must be able to.
    """
    newest = history.latest()
    if newest is None:
        return []
    held = condition(newest) == 1
    if steps > 1 and held.any():
        snapshots = history.recent(steps, newest.stage)
        if len({snapshot.step for snapshot in snapshots}) < steps:
            return []
        held = _held(newest, snapshots, condition)
    return np.flatnonzero(held).tolist()


def _held(newest: Snapshot, snapshots: Sequence[Snapshot], condition: Condition) -> np.ndarray:
    """`[n]` whether it held on each step, the newest looked at first; nothing more is looked at when it holds nowhere."""
    held = np.ones(len(newest), bool)
    at_step: dict[int, np.ndarray] = {}
    for snapshot in reversed(snapshots):
        there = condition(snapshot)
        if snapshot.parameters is not newest.parameters:
            there = _rows_of(newest, snapshot, there)
        held &= there != 0
        if not held.any():
            return held
        holds = there == 1
        at_step[snapshot.step] = at_step[snapshot.step] | holds if snapshot.step in at_step else holds
    return held & np.logical_and.reduce(list(at_step.values()))


def _rows_of(newest: Snapshot, snapshot: Snapshot, values: np.ndarray) -> np.ndarray:
    """The values of another snapshot in the rows of the newest; -1 for parameters that it does not have."""
    if newest.names == snapshot.names:
        return values
    position = snapshot.parameters.position
    return np.asarray([values[position[name]] if name in position else -1 for name in newest.names])


def consumed(history: History) -> bool:
    """Whether the newest snapshot is of the gradient that the optimizer gets, as far as that is read at all.

    What is done about a large gradient before the optimizer (clipping, unscaling) is done: only what is left counts.
    """
    newest = history.latest()
    return newest is not None and (newest.stage == Stage.USED or history.latest(Stage.USED) is None)


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


def number(value: float) -> str:
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
