"""What rules are made of.

A rule is a callable value: `rule(history) -> findings`, asked after each snapshot about the newest one. It keeps no state:
what lasts is looked up in the history. One step proves little, so most rules ask that something held on each of the last n
*observed* steps, which `lasting` answers; it looks back only where the newest snapshot already shows the thing.

Parameters that are frozen, left out, or that the loss does not depend on have no health: `judged` are the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gradlens.analysis.history import History
from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.records import Finding, Parameters, Snapshot, Stage, Status

Rule = Callable[[History], Iterable[Finding] | None]

#: Where a thing holds in a snapshot: 1 where it does, 0 where not, NaN where that cannot be said; `[n]`.
Condition = Callable[[Snapshot], np.ndarray]

_NARROW = ("bfloat16", "float16", "complex32")
_SILENT = (Status.FROZEN, Status.UNCAPTURED, Status.ABSENT, Status.EXCLUDED, Status.UNDEFINED)


@dataclass(frozen=True, eq=False)
class Layout:
    """What follows from names and shapes alone."""

    matrix: np.ndarray  #: [n] whether the parameter has two axes or more: a weight, not a bias or a scale
    narrow: np.ndarray  #: [n] a weight stored in 16 bits or fewer
    layer: np.ndarray  #: [n] the number of the module that owns it
    front: np.ndarray  #: [layers] the row that stands for a layer: its first weight, or its first parameter
    weighty: np.ndarray  #: [layers] whether it has a weight: normalisations and lone scalars have not


@lru_cache(maxsize=8)
def layout(parameters: Parameters) -> Layout:
    """The layout of a model's parameters."""
    owners = [name.rpartition(".")[0] or name for name in parameters.names]
    numbers = {owner: i for i, owner in enumerate(dict.fromkeys(owners))}
    layer = np.asarray([numbers[owner] for owner in owners], np.int64)
    matrix = np.asarray([len(shape) >= 2 for shape in parameters.shapes], bool)
    order = np.lexsort((np.arange(len(layer)), ~matrix, layer))
    front = order[np.searchsorted(layer[order], np.arange(len(numbers)))]
    narrow = np.asarray([dtype in _NARROW or dtype.startswith("float8") for dtype in parameters.dtypes], bool)
    return Layout(matrix, matrix & narrow, layer, front, matrix[front])


def judged(snapshot: Snapshot) -> np.ndarray:
    """`[n]` rows with a gradient of their own, zero and non-finite ones included."""
    status = snapshot.status
    silent = status == _SILENT[0]
    for word in _SILENT[1:]:
        silent |= status == word
    return ~silent


def by_layer(snapshot: Snapshot, values: np.ndarray) -> np.ndarray:
    """`[layers]` the largest of the values of each layer's parameters; -inf where it has none."""
    where = layout(snapshot.parameters)
    result = np.full(len(where.front), -np.inf)
    np.maximum.at(result, where.layer, np.where(np.isnan(values), -np.inf, values))
    return result


def lasting(history: History, condition: Condition, steps: int) -> list[int]:
    """The rows of the newest snapshot where the condition held on each of the last `steps` observed steps of its stage.

    Where a step has several snapshots it must hold in each that can say, and at least one must be able to.
    """
    newest = history.latest()
    if newest is None:
        return []
    held = condition(newest) == 1
    if steps <= 1 or not held.any():
        return [int(row) for row in np.flatnonzero(held)]
    snapshots = history.recent(steps, newest.stage)
    if len({snapshot.step for snapshot in snapshots}) < steps:
        return []
    said: dict[int, np.ndarray] = {}
    for snapshot in reversed(snapshots):
        there = condition(snapshot)
        if snapshot.parameters is not newest.parameters:
            there = _rows_of(newest, snapshot, there)
        held &= there != 0
        if not held.any():
            return []
        said[snapshot.step] = said.get(snapshot.step, False) | (there == 1)
    held &= np.all(list(said.values()), axis=0)
    return [int(row) for row in np.flatnonzero(held)]


def _rows_of(newest: Snapshot, snapshot: Snapshot, values: np.ndarray) -> np.ndarray:
    """The values of another snapshot in the rows of the newest; NaN for parameters that it does not have."""
    if newest.names == snapshot.names:
        return values
    position = snapshot.parameters.position
    return np.asarray([values[position[name]] if name in position else math.nan for name in newest.names])


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


def last_layer(snapshot: Snapshot, rows: Iterable[int]) -> str:
    """The module that owns the last of these rows, all of whose judged parameters are among them; '' if there is none."""
    chosen = set(rows)
    where, known = layout(snapshot.parameters), judged(snapshot)
    for front in where.front[::-1]:
        own = np.flatnonzero((where.layer == where.layer[front]) & known)
        if len(own) and chosen.issuperset(own.tolist()):
            name = snapshot.names[front]
            return name.rpartition(".")[0] or name
    return ""
