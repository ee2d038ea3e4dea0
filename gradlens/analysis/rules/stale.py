"""Gradients of earlier steps in this step's update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import Columns, History
from gradlens.analysis.rules.base import (
    ColumnRule,
    Condition,
    RowFindings,
    check_number,
    check_steps,
    format_number,
    judged,
    lasting,
    newest_of,
    tristate,
    unmoved,
)
from gradlens.analysis.rules.occasional import Occasional, newest_step, settings
from gradlens.facts import Graph
from gradlens.records import Finding, Severity, Snapshot, Stage, Status

#: How far a sum of float32 gradients may be from the sum of their sums, beside the sum of sizes: 16 roundings.
ROUNDING = 1e-6
_EXACT = ("float32", "float64", "complex64", "complex128")


@dataclass(frozen=True)
class Stale(ColumnRule):
    """The optimizer used more than this step's backwards gave: |g_used| > sum of |g_backward|.

    A sum of vectors is never longer than their lengths together, so the rest came from elsewhere: from earlier steps, as
    `zero_grad()` is missing, or it was added by hand, as a penalty is. Which of the two shows in the entries' sums, as those
    add: what was used is what the step before used and all backwards since; or the same times one number, if all gradients
    were clipped together. Sums are asked first, as what is clipped may not be longer. Where lengths say that there is more
    and sums that it is not this, it is an info. Where the step before was not observed, or gradients of 16 bits round their
    sums, nobody knows.

    Over several ranks all this says nothing (another rank's part may be larger): `LeftOver` is asked there.
    """

    steps: int = 3

    name: ClassVar[str] = "stale"
    stages: ClassVar[tuple[str, ...]] = (Stage.USED,)

    def __post_init__(self) -> None:
        check_steps(self)

    def holds(self, columns: Columns) -> np.ndarray:
        """Where what was used is not simply what this step's backwards gave, or less of it."""
        total, size, length = (columns.per_step(Stage.BACKWARD, name) for name in ("sum", "abs_sum", "l2"))
        known = judged(columns) & ~columns.has(Status.NONFINITE) & ~unmoved(columns)
        now, sizes = columns.columns["sum"], size + columns.columns["abs_sum"]
        with np.errstate(invalid="ignore", divide="ignore"):
            weight = np.where(known, np.nan_to_num(np.abs(total) / sizes), 0.0)
            best = weight.argmax(axis=-1)[:, None] if weight.shape[1] else np.zeros((len(columns), 0), np.int64)
            factor = np.take_along_axis(now / total, best, axis=-1)
            plain = np.abs(now - total) <= ROUNDING * sizes
            clipped = (np.abs(now - factor * total) <= ROUNDING * sizes) & (factor > 0) & (factor < 1)
        short = columns.column("l2") <= 1.01 * length
        even = ((plain & short) | ~known).all(axis=-1) | ((clipped & short) | ~known).all(axis=-1)
        return tristate(np.broadcast_to(~even[:, None], known.shape), known)

    def findings(self, history: History, rows: Sequence[int]) -> Iterable[Finding]:
        """One a parameter."""
        newest = newest_of(history)
        if newest.ranks > 1 or history.newest(Stage.REDUCED) is not None:
            return ()
        backward, used = (history.recent(self.steps + 1, stage) for stage in (Stage.BACKWARD, Stage.USED))
        own = _of(backward, newest.step)
        if foreign(history):
            return ()
        if not own or (len(own) == 1 and _equal(own[0], newest)):
            return ()
        rows, left = lasting(history, _carried(backward, used), self.steps), True if used else None
        if not rows:
            rows = lasting(history, _more_than(backward), self.steps)
            left = _left(backward, used, newest, rows)
        if not rows:
            return ()
        lengths = _added(own, newest, "l2")
        severity = Severity.INFO if left is False else Severity.WARNING
        causes = (_MISSING,) if left else (_BY_HAND,) if left is False else (_MISSING, _BY_HAND)
        remedy = "nothing if it is meant" if left is False else "call optimizer.zero_grad() once a step, before backward()"

        def finding(row: int) -> Finding:
            used, given = newest.column("l2")[row], lengths[row]
            return Finding(
                rule=self.name,
                step=newest.step,
                severity=severity,
                parameter=newest.names[row],
                stage=newest.stage,
                seen=f"the optimizer used a gradient of norm {format_number(used)}, this step's backward() gave "
                f"{format_number(given)}; "
                + ("what earlier steps left was added " if left else "it used more ")
                + f"at each of the last {self.steps} observed steps",
                causes=causes,
                remedy=remedy,
                value=float(used / given) if given > 0 else None,
            )

        return RowFindings(self.name, severity, newest, rows, finding)


_MISSING = "optimizer.zero_grad() is missing, so that gradients of earlier steps are still there"
_BY_HAND = "something adds to or multiplies .grad between backward() and step(): a penalty, noise, weight decay by hand"


@dataclass(frozen=True)
class LeftOver(Occasional):
    """Over ranks: as a step's first backward begins, what earlier steps left is still in `.grad`.

    Read at the looks at the loss's graph, of parameters that it reaches and an optimizer has. In one process `Stale` sees
    more, and is asked.
    """

    share: float = 0.9
    looks: int = 3

    name: ClassVar[str] = "stale"

    def __post_init__(self) -> None:
        check_number(self, "share", most=1.0)
        check_steps(self, "looks")

    def look(self, history: History) -> Iterator[Finding]:
        """At the last looks behind the first step."""
        if history.newest(Stage.REDUCED) is None:
            return
        first = [fact for fact in list(history.facts) if isinstance(fact, Graph) and not fact.backward and not fact.values]
        last = [fact.left for fact in first if fact.step > first[0].step][-self.looks :]
        if len(last) < self.looks or not min(last) >= self.share:
            return
        yield Finding(
            rule=self.name,
            step=newest_step(history),
            severity=Severity.WARNING,
            seen=f"as the first backward() of a step begins, {min(last):.0%} of the parameters that it reaches have a "
            f"gradient already, at each of the last {self.looks} steps that were looked at",
            causes=(_MISSING,),
            remedy="call optimizer.zero_grad() once a step, before backward()",
            value=min(last),
        )


def _more_than(backward: list[Snapshot]) -> Condition:
    def more(used: Snapshot) -> np.ndarray:
        own = _added(_of(backward, used.step), used, "l2")
        known = judged(used) & ~used.has(Status.NONFINITE) & ~np.isnan(own) & ~unmoved(used) & _owned(used)
        return tristate(used.column("l2") > 1.01 * own, known)

    return more


def _left(backward: list[Snapshot], used: list[Snapshot], newest: Snapshot, rows: list[int]) -> bool | None:
    """Whether what came on top is what was left, by most of the rows; None where the step before was not seen."""
    exact = np.asarray([row for row in rows if newest.parameters.dtypes[row] in _EXACT], np.int64)
    if not len(exact) or not _of(used, newest.step - 1):
        return None
    return bool(_left_over(backward, used, newest)[exact].mean() > 0.5)


def _carried(backward: list[Snapshot], used: list[Snapshot]) -> Condition:
    """Where what was used is all that was left and given, and not what was given alone."""

    def carried(now: Snapshot) -> np.ndarray:
        if not _of(used, now.step - 1):
            return np.full(len(now), -1, np.int8)
        exact = np.asarray([dtype in _EXACT for dtype in now.parameters.dtypes])
        known = judged(now) & ~now.has(Status.NONFINITE) & ~unmoved(now) & exact & _owned(now)
        return tristate(_left_over(backward, used, now), known)

    return carried


Sums = tuple[np.ndarray, np.ndarray]  #: `[n]` of entries and of their sizes


def _before(backward: list[Snapshot], used: list[Snapshot], now: Snapshot) -> Sums:
    """What is in `.grad` at this step if nobody emptied it: what the step before used, and all backwards since."""
    last = [snapshot for snapshot in _of(used, now.step - 1) if _shares(snapshot, now)]
    since = [snapshot for snapshot in _of(backward, now.step - 1) if last and snapshot.backward > last[-1].backward]
    parts = (_sums(last, now), _sums(since, now), _sums(_until(backward, now), now))
    return tuple(np.add.reduce([np.nan_to_num(part[i]) for part in parts]) for i in (0, 1))  # type: ignore[return-value]


def _until(backward: list[Snapshot], now: Snapshot) -> list[Snapshot]:
    return [snapshot for snapshot in _of(backward, now.step) if snapshot.backward <= now.backward]


def foreign(history: History) -> bool:
    """Whether an optimizer has parameters of other models alone: its `zero_grad()` empties nothing of this one."""
    known = settings(history).values()
    return any(not any(group.parameters for group in changes[-1].groups) for changes in known)


def _owned(now: Snapshot) -> np.ndarray:
    """`[n]` rows of which an optimizer has the parameter, where updates are measured: others' gradients nobody empties.

    `zero_grad()` of an optimizer reaches its own parameters alone. Where no update is measured, every row.
    """
    measured = now.columns["update_numel"] > 0
    return measured if measured.any() else np.ones(len(now), bool)


def _sums(snapshots: list[Snapshot], now: Snapshot) -> Sums:
    return _added(snapshots, now, "sum"), _added(snapshots, now, "abs_sum")


def _left_over(backward: list[Snapshot], used: list[Snapshot], now: Snapshot) -> np.ndarray:
    """`[n]` where the sums agree with what was left; nowhere, if those that tell it from this step's own say no.

    The sums of some parameters are always 0, as those of the last layer under cross entropy, and agree with anything.
    """
    own = _sums(_until(backward, now), now)
    left, factor = _in_proportion(now, *_before(backward, used, now))
    near = np.abs(now.column("sum") - own[0]) <= ROUNDING * (own[1] + now.column("abs_sum"))
    alone = near if factor == 1.0 else _in_proportion(now, *own)[0]
    exact = np.asarray([dtype in _EXACT for dtype in now.parameters.dtypes], bool)
    telling = exact & judged(now) & ~(left & alone) & ~unmoved(now)
    certain = factor <= 1.0 and (left & telling).sum() > 0.5 * telling.sum()
    return left if certain else np.zeros(len(now), bool)


def _in_proportion(now: Snapshot, total: np.ndarray, size: np.ndarray) -> tuple[np.ndarray, float]:
    """`[n]` where the entries' sum is c times this one; and c, the same for all rows, as clipping has it."""
    own, sizes = now.column("sum"), size + now.column("abs_sum")
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = np.nan_to_num(np.abs(total) / sizes)
        best = int(np.argmax(weight)) if len(weight) else 0
        c = float(own[best] / total[best]) if len(weight) > 1 and weight[best] > 0 else 1.0
        c = 1.0 if abs(c - 1) <= ROUNDING / weight[best] else c
        return np.asarray(np.abs(own - c * total) <= ROUNDING * sizes), c


def _equal(own: Snapshot, used: Snapshot) -> bool:
    """Whether the used rows are the backward's: then nothing came on top."""
    return own.names == used.names and all(
        own.columns[name] is used.columns[name] or np.array_equal(own.columns[name], used.columns[name], equal_nan=True)
        for name in ("square_sum", "sum")
    )


def _shares(a: Snapshot, b: Snapshot) -> bool:
    return not a.parameters.position.keys().isdisjoint(b.names)


def _of(snapshots: list[Snapshot], step: int) -> list[Snapshot]:
    return [snapshot for snapshot in snapshots if snapshot.step == step]


def _added(snapshots: list[Snapshot], used: Snapshot, name: str) -> np.ndarray:
    """`[n]` a column of several snapshots added up, in the rows of another; NaN where none has it, or one is not finite."""
    result, seen = np.zeros(len(used)), np.zeros(len(used), bool)
    for snapshot in snapshots:
        values = np.where(snapshot.has(Status.NONFINITE), np.nan, snapshot.column(name))
        if snapshot.names == used.names:
            result += values
            seen[:] = True
        else:
            position = snapshot.parameters.position
            rows = [row for row, parameter in enumerate(used.names) if parameter in position]
            result[rows] += values[[position[used.names[row]] for row in rows]]
            seen[rows] = True
    return np.where(seen, result, np.nan)
