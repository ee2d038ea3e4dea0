"""Gradients of earlier steps in this step's update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import History
from gradlens.analysis.rules.base import Condition, EachRow, check_steps, judged, lasting, number, said
from gradlens.records import Finding, Severity, Snapshot, Stage, Status


@dataclass(frozen=True)
class Stale:
    """The optimizer used more than this step's backwards gave: |g_used| > sum of |g_backward|.

    A sum of vectors is never longer than their lengths together, so the rest came from elsewhere: as a rule from earlier
    steps, because `zero_grad()` is missing. Over several ranks this says nothing (another rank's part may be larger), and is
    not asked.
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
        lengths = _lengths(backward, newest)

        def finding(row: int) -> Finding:
            used, own = newest.column("l2")[row], lengths[row]
            return Finding(
                rule=self.name,
                step=newest.step,
                severity=Severity.WARNING,
                parameter=newest.names[row],
                stage=newest.stage,
                seen=f"the optimizer used a gradient of norm {number(used)}, but this step's backward() gave {number(own)}; "
                f"it used more at each of the last {self.steps} observed steps",
                causes=(
                    "optimizer.zero_grad() is missing, so that gradients of earlier steps are still there",
                    "something adds to or multiplies .grad between backward() and step()",
                ),
                remedy="call optimizer.zero_grad() once a step, before backward()",
                value=float(used / own) if own > 0 else None,
            )

        return EachRow(self.name, Severity.WARNING, newest, rows, finding)


def _more_than(backward: list[Snapshot]) -> Condition:
    def more(used: Snapshot) -> np.ndarray:
        own = _lengths(backward, used)
        known = judged(used) & ~used.has(Status.NONFINITE) & ~np.isnan(own)
        return said(used.column("l2") > 1.01 * own, known)

    return more


def _lengths(backward: list[Snapshot], used: Snapshot) -> np.ndarray:
    """`[n]` lengths of a step's backwards added up, in the rows of its used gradient; NaN where none was seen."""
    result = np.full(len(used), np.nan)
    for snapshot in backward:
        if snapshot.step != used.step:
            continue
        length = np.where(snapshot.has(Status.NONFINITE), np.nan, snapshot.column("l2"))
        if snapshot.names == used.names:
            result = np.where(np.isnan(result), 0, result) + length
        else:
            for row, name in enumerate(used.names):
                at = snapshot.parameters.position.get(name)
                if at is not None:
                    result[row] = (0 if np.isnan(result[row]) else result[row]) + length[at]
    return result
