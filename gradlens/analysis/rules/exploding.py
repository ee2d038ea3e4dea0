"""Gradients far too large, from the start or suddenly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import Columns, History
from gradlens.analysis.rules.base import (
    BlockCondition,
    ColumnRule,
    RowFindings,
    Rows,
    check_number,
    check_steps,
    consumed,
    format_number,
    judged,
    layout,
    newest_of,
    of_whole_model,
    remembered,
    tristate,
)
from gradlens.analysis.rules.occasional import loss_trend, settings
from gradlens.records import Finding, Severity, Snapshot, Stage

SMALL = 0.05  #: |dw| / |w| of a step that does no harm


@dataclass(frozen=True)
class Exploding(ColumnRule):
    """A weight whose gradient is large by itself and beside the weight, where the optimizer gets it (so after clipping).

    `norm`: gradient norms are clipped at 1 as a rule (Pascanu et al. 2013), and a sum over a batch of a thousand gives some
    hundreds. `ratio`: |g| / |w|; at 100, plain gradient descent with a learning rate of 0.01 replaces the weight in one
    step. Both together also leave alone what starts at 0, and sums over large batches with the small learning rate they
    need. Where the optimizer divides by the gradient's own size (Adam), the steps are small (|dw| / |w| below 0.05) and the
    loss is not known to be ill, it is an info.
    """

    norm: float = 1e3
    ratio: float = 1e2
    steps: int = 2

    name: ClassVar[str] = "exploding"

    def __post_init__(self) -> None:
        check_number(self, "norm")
        check_number(self, "ratio")
        check_steps(self)

    def holds(self, columns: Columns) -> np.ndarray:
        """Where the gradient is large by itself and beside the weight."""
        norm, weight = columns.column("l2"), columns.column("weight_l2")
        known = judged(columns) & layout(columns.parameters).matrix & (weight > 0)
        return tristate((norm > self.norm) & (norm > self.ratio * weight), known)

    def findings(self, history: History, rows: Sequence[int]) -> Iterable[Finding]:
        """One a parameter."""
        if not consumed(history):
            return ()
        newest = newest_of(history)
        severity = Severity.INFO if self._harmless(history, newest, rows) else Severity.WARNING
        return RowFindings(self.name, severity, newest, rows, lambda row: self._finding(newest, row, severity))

    def _harmless(self, history: History, newest: Snapshot, rows: Sequence[int]) -> bool:
        """Whether the gradient's size does not matter to the optimizer, and nothing says that the loss does not fall."""
        newest_settings = [those[-1] for those in settings(history).values()]
        if not newest_settings or not all(s.adaptive for s in newest_settings):
            return False
        ratios = np.asarray([s.column("update_ratio") for s in history.recent(1, Stage.USED) if s.names == newest.names])
        small = bool(len(ratios)) and bool((ratios[-1][np.asarray(rows, np.int64)] < SMALL).all())
        return small and not loss_trend(history).ill

    def _finding(self, newest: Snapshot, row: int, severity: Severity) -> Finding:
        norm, weight = newest.column("l2")[row], newest.column("weight_l2")[row]
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=severity,
            parameter=newest.names[row],
            stage=newest.stage,
            seen=f"the gradient's norm is {format_number(norm)}, {format_number(norm / weight)} times the norm of the "
            f"weights ({format_number(weight)})",
            causes=(
                "weights that start too large, in a deep model without normalisation",
                "inputs or targets that are not normalised, or a loss that sums where it should average",
                "a learning rate that has already driven the model away",
            ),
            remedy="torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) between backward() and step(); then "
            "normalise inputs and targets, and initialise with kaiming_normal_",
            value=float(norm),
        )


@dataclass(frozen=True)
class Spike(ColumnRule):
    """The norm of the whole gradient, suddenly far above what it was, where the optimizer gets it.

    It must be `factor` times the median of the last `steps` observed steps, a tenth of that times their largest (close to
    convergence the norm varies by orders of magnitude from batch to batch), and a tenth of the weights' norm: less cannot do
    harm.
    """

    factor: float = 100.0
    steps: int = 100

    name: ClassVar[str] = "spike"

    def __post_init__(self) -> None:
        check_number(self, "factor", above=1.0)
        check_steps(self)

    def conditions(self) -> tuple[tuple[BlockCondition, int], ...]:
        """`steps` is how far back it compares, and not how long it lasts."""
        return ((self.holds, 1),)

    def holds(self, columns: Columns) -> np.ndarray:
        """Where the norm is large beside the weights', and beside the moment's before."""
        norm, weight = np.moveaxis(_norms(columns), -1, 0)
        before = np.concatenate([[0.0], norm[:-1]])  # of a block's first, the history knows
        return of_whole_model(columns, (norm > 0.1 * weight) & (norm > self.factor / 10 * before))

    def findings(self, history: History, rows: Sequence[int]) -> Iterator[Finding]:
        """One of the model."""
        if not consumed(history):
            return
        newest = newest_of(history)
        norm = _norms(newest)[0]
        before = [snapshot for snapshot in history.recent(2, newest.stage)[:-1] if snapshot.names == newest.names]
        if not before or not norm > self.factor / 10 * _norms(before[-1])[0]:
            return
        past = np.asarray([_norms(snapshot)[0] for snapshot in history.recent(self.steps + 1, newest.stage)[:-1]])
        past = past[past > 0]
        if len(past) < min(20, self.steps):
            return
        median, largest = float(np.median(past)), float(past.max())
        if norm > self.factor * median and norm > self.factor / 10 * largest:
            yield self._finding(newest, float(norm), median, largest, len(past))

    def _finding(self, newest: Snapshot, norm: float, median: float, largest: float, seen: int) -> Finding:
        square = np.where(judged(newest), newest.column("square_sum"), 0)
        worst = int(np.nanargmax(square))
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING,
            stage=newest.stage,
            seen=f"the norm of the whole gradient is {format_number(norm)}: {format_number(norm / median)} times the "
            f"median of the last {seen} observed steps, {format_number(norm / largest)} times their largest; "
            f"{square[worst] / np.nansum(square):.0%} of its square is {newest.names[worst]}",
            causes=(
                "an unusual batch: an outlier, a wrong label, a very long sequence",
                "a learning rate at the edge of stability",
            ),
            remedy="look at this step's batch; torch.nn.utils.clip_grad_norm_ keeps such a step harmless",
            value=float(norm),
        )


@remembered
def _norms(rows: Rows) -> np.ndarray:
    """`[..., 2]` of the whole gradient and of the weights it is for; the second is 0 where no weights were read."""
    own = judged(rows)
    squares = [np.where(own, rows.columns[name], 0.0) for name in ("square_sum", "weight_square_sum")]
    return np.sqrt(np.stack([np.nansum(values, axis=-1) for values in squares], axis=-1))
