"""Parameters in the graph whose partials are all exactly 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import Columns, History
from gradlens.analysis.rules.base import (
    ColumnRule,
    RowFindings,
    check_steps,
    judged,
    last_layer,
    layout,
    newest_of,
    on_steps,
    tristate,
)
from gradlens.analysis.rules.lost import gave
from gradlens.records import Finding, Severity, Snapshot, Stage, Status


@dataclass(frozen=True)
class Dead(ColumnRule):
    """All partials of a parameter were exactly 0 at each of the last steps, though the loss depends on it.

    A layer of rectifiers that are all shut passes nothing back (Lu et al. 2019): it and all layers before it are dead, and
    the weight behind it too, as its inputs are 0. The culprit is the last layer that is dead as a whole. A bias whose
    weight has a gradient is not dead: what it gets from the examples cancels out, as in the output of a Wasserstein critic.
    Where no weight has a gradient the loss is a constant: it is said so. A step whose loss is exactly 0, a hinge that every
    example meets, speaks for no death: there is nothing left to learn.
    """

    steps: int = 10

    name: ClassVar[str] = "dead"

    def __post_init__(self) -> None:
        check_steps(self)

    def holds(self, columns: Columns) -> np.ndarray:
        """Where all partials are 0, and the loss is not."""
        met = np.array([scalars.get("loss") == 0 for scalars in columns.scalars], bool)
        zero = columns.has(Status.ZERO) & (columns.columns["numel"] > 0) & ~met[:, None]
        return tristate(zero, judged(columns))

    def findings(self, history: History, rows: Sequence[int]) -> Iterable[Finding]:
        """One a parameter."""
        newest = newest_of(history)
        if newest.stage == Stage.USED:  # what backward gave and was lost is no death
            alive = gave(history.recent(1, Stage.BACKWARD), newest)
            rows = [row for row in rows if not alive[row]]
        cancels = cancelled(newest)
        rows = [row for row in rows if not cancels[row]]
        everything = len(rows) == int((judged(newest) & ~cancels).sum())
        if not rows:
            return ()
        culprit = "" if everything else last_layer(newest, rows)
        first = _CONSTANT if everything else ()
        return RowFindings(self.name, Severity.WARNING, newest, rows, lambda row: self._finding(newest, row, culprit, first))

    def _finding(self, newest: Snapshot, row: int, culprit: str, first: tuple[str, ...]) -> Finding:
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING,
            parameter=newest.names[row],
            stage=newest.stage,
            seen=f"all {int(newest.column('numel')[row])} partials were exactly 0 {on_steps(self.steps)}",
            causes=_likely(newest, row)
            + first
            + (
                "ReLUs that are shut for every input: a large negative bias after too large a step",
                "an output that is multiplied by 0: a closed gate, a mask, a zero-initialised layer behind it",
            ),
            remedy=(f"look at {culprit!r} first: the last layer with no gradient at all; " if culprit else "")
            + "lower the learning rate, use LeakyReLU or GELU, or initialise the layer again",
            value=0.0,
        )


#: Of a model in which no weight has a gradient.
_CONSTANT = (
    "the loss is a constant here: no weight changes it (an output that is clamped or saturated everywhere, or not used)",
)


def cancelled(snapshot: Snapshot) -> np.ndarray:
    """`[n]` rows of no weight whose layer's weight has a gradient: theirs adds up to 0, and may not be able to do else."""
    where = layout(snapshot.parameters)
    alive = where.matrix & snapshot.has(Status.OK)
    layers = np.bincount(where.layer, weights=alive, minlength=len(where.front)) > 0
    return np.asarray(~where.matrix & layers[where.layer])


def _likely(snapshot: Snapshot, row: int) -> tuple[str, ...]:
    """What the snapshot itself speaks for."""
    causes = []
    if snapshot.parameters.dtypes[row] == "float16":
        causes.append("underflow of float16 gradients without a loss scaler")
    empty = (snapshot.columns["weight_square_sum"] == 0) & layout(snapshot.parameters).matrix
    if empty.any():
        causes.append(f"weights that are all 0, those of {snapshot.names[int(np.flatnonzero(empty)[-1])]}: nothing passes")
    return tuple(causes)
