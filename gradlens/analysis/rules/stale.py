"""Gradients of earlier steps in this step's update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import History
from gradlens.analysis.rules.base import Condition, EachRow, check_steps, judged, lasting, number, said, unmoved
from gradlens.records import Finding, Severity, Snapshot, Stage, Status

#: How far a sum of float32 gradients may be from the sum of their sums, beside the sum of sizes: 16 roundings.
ROUNDING = 1e-6
_EXACT = ("float32", "float64", "complex64", "complex128")


@dataclass(frozen=True)
class Stale:
    """The optimizer used more than this step's backwards gave: |g_used| > sum of |g_backward|.

    A sum of vectors is never longer than their lengths together, so the rest came from elsewhere: from earlier steps, as
    `zero_grad()` is missing, or it was added by hand, as a penalty is. Which of the two shows in the entries' sums, as those
    add: what came on top is what the step before used, if that is still there. Where it is not, this is an info. Where the
    step before was not observed, or gradients of 16 bits round their sums, nobody knows.

    Over several ranks all this says nothing (another rank's part may be larger), and is not asked.
    """

    steps: int = 3

    name: ClassVar[str] = "stale"

    def __post_init__(self) -> None:
        check_steps(self)

    def __call__(self, history: History) -> Iterable[Finding]:
        newest = history.latest()
        if newest is None or newest.stage != Stage.USED or newest.ranks > 1 or history.latest(Stage.REDUCED) is not None:
            return ()
        backward = history.recent(self.steps, Stage.BACKWARD)
        if not backward:
            return ()
        rows = lasting(history, _more_than(backward), self.steps)
        if not rows:
            return ()
        lengths, left = _added(_of(backward, newest.step), newest, "l2"), _left(history, backward, newest, rows)
        severity = Severity.INFO if left is False else Severity.WARNING
        causes = (_MISSING,) if left else (_BY_HAND,) if left is False else (_MISSING, _BY_HAND)
        remedy = "nothing if it is meant" if left is False else "call optimizer.zero_grad() once a step, before backward()"

        def finding(row: int) -> Finding:
            used, own = newest.column("l2")[row], lengths[row]
            return Finding(
                rule=self.name,
                step=newest.step,
                severity=severity,
                parameter=newest.names[row],
                stage=newest.stage,
                seen=f"the optimizer used a gradient of norm {number(used)}, but this step's backward() gave {number(own)}; "
                f"it used more at each of the last {self.steps} observed steps",
                causes=causes,
                remedy=remedy,
                value=float(used / own) if own > 0 else None,
            )

        return EachRow(self.name, severity, newest, rows, finding)


_MISSING = "optimizer.zero_grad() is missing, so that gradients of earlier steps are still there"
_BY_HAND = "something adds to or multiplies .grad between backward() and step(): a penalty, noise, weight decay by hand"


def _more_than(backward: list[Snapshot]) -> Condition:
    def more(used: Snapshot) -> np.ndarray:
        own = _added(_of(backward, used.step), used, "l2")
        known = judged(used) & ~used.has(Status.NONFINITE) & ~np.isnan(own) & ~unmoved(used)
        return said(used.column("l2") > 1.01 * own, known)

    return more


def _left(history: History, backward: list[Snapshot], newest: Snapshot, rows: list[int]) -> bool | None:
    """Whether what came on top is what the step before used, by most of the rows; None where that step was not seen."""
    before = _of(history.recent(2, Stage.USED), newest.step - 1)
    exact = [row for row in rows if newest.parameters.dtypes[row] in _EXACT]
    if not before or not exact:
        return None
    last, size = (_added(before, newest, name) for name in ("sum", "abs_sum"))
    rest = newest.column("sum") - _added(_of(backward, newest.step), newest, "sum")
    near = np.abs(rest - last) <= ROUNDING * (size + newest.column("abs_sum"))
    return bool(near[exact].mean() > 0.5)


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
