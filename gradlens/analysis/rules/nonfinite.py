"""Partials that are NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import Columns, History
from gradlens.analysis.rules.base import ColumnRule, RowFindings, Rows, format_number, judged, layout, newest_of, tristate
from gradlens.records import Finding, Severity, Snapshot, Stage

#: A step that was too large shows in the numbers within so many.
DIVERGED = 5


@dataclass(frozen=True)
class NonFinite(ColumnRule):
    """NaN or infinite partials, at once: one executed step with them makes the weights NaN, and then everything.

    Under a known loss scale they are the scaler's business, which skips the step: `Skipped` counts that. A scaler that
    gradlens was not told of looks for its scale in the same way, and is among the causes until the optimizer consumes them.
    """

    name: ClassVar[str] = "nonfinite"
    settled: ClassVar[bool] = True

    def holds(self, columns: Columns) -> np.ndarray:
        """Where a partial is not finite, under no known scale."""
        return tristate(_bad(columns) & _unscaled(columns), judged(columns))

    def findings(self, history: History, rows: Sequence[int]) -> Iterable[Finding]:
        """One a parameter; why, is asked when somebody reads it."""
        newest = newest_of(history)
        why = cache(lambda: _why(history, newest, rows))

        def finding(row: int) -> Finding:
            causes, remedy = why()
            return Finding(
                rule=self.name,
                step=newest.step,
                severity=Severity.ERROR,
                parameter=newest.names[row],
                stage=newest.stage,
                seen=_seen(newest, row),
                causes=causes,
                remedy=remedy,
                value=float(newest.column("nan")[row] + newest.column("inf")[row]),
            )

        return RowFindings(self.name, Severity.ERROR, newest, rows, finding)


def _bad(rows: Rows) -> np.ndarray:
    return rows.columns["nan"] + rows.columns["inf"] > 0


def _why(history: History, newest: Snapshot, rows: Sequence[int]) -> tuple[tuple[str, ...], str]:
    """The causes, and what to do."""
    everywhere = len(rows) == judged(newest).sum()
    forward = not math.isfinite(newest.loss) if "loss" in newest.scalars else everywhere
    poisoned, diverged = _poisoned(history, newest), _diverged(history, newest)
    causes, remedy = poisoned, _EARLIER
    if not poisoned:
        causes = diverged + (_FORWARD if forward else _LOSS if everywhere else _BACKWARD)
        causes += _LOSS if forward and "loss" not in newest.scalars else ()
        remedy = _SLOWER if diverged else _ANOMALY if forward or everywhere else _behind(newest.names[rows[-1]])
    return causes + (_SCALER if newest.stage != Stage.USED and not diverged else ()), remedy


def _seen(snapshot: Snapshot, row: int) -> str:
    numel, nan, inf = (int(snapshot.column(name)[row]) for name in ("numel", "nan", "inf"))
    words = " and ".join(f"{count} {what}" for count, what in ((nan, "NaN"), (inf, "infinite")) if count)
    if math.isnan(snapshot.loss):
        known = "" if "loss" not in snapshot.scalars else "; the loss is NaN"
    else:
        known = f"; the loss is {snapshot.loss:.4g}"
    return f"{words} of {numel} partials{known}"


_FORWARD = ("the forward pass already divides by 0 or overflows: too large a learning rate, NaN or huge values in the data",)
_BACKWARD = (
    "a derivative that does not exist at this point: sqrt or a norm at 0, log of 0, 0/0, the std of a constant",
    "overflow in float16 without a loss scaler",
)
_LOSS = ("the loss is finite and its derivative is not: sqrt or a norm at 0, log of 0, 0/0 in the loss itself",)
_SCALER = ("a GradScaler that gradlens does not know: it skips such steps, as a rule at the start; pass scaler= to watch()",)
_ANOMALY = (
    "look at this step's batch, and at the loss of the steps before; torch.autograd.set_detect_anomaly(True) names the "
    "operation"
)

_EARLIER = "look at the first of these findings: what comes after it follows from it"
_SLOWER = "divide the learning rate by 10 or warm it up, or clip with torch.nn.utils.clip_grad_norm_"


def _behind(last: str) -> str:
    return (
        f"look right behind {last!r}: of those concerned it is the last in the model, and backward comes from there; "
        "torch.autograd.set_detect_anomaly(True) names the operation"
    )


def _poisoned(history: History, newest: Snapshot) -> tuple[str, ...]:
    """The cause, where the step before already had it."""
    for before in [s for s in history.recent(2, newest.stage) if s.step != newest.step][-1:]:
        bad = _bad(before) & _unscaled(before)
        if bad.any():
            first = before.names[int(np.argmax(bad))]
            return (f"step {before.step} wrote non-finite partials (of {first}) into the weights",)
    return ()


def _unscaled(rows: Rows) -> np.ndarray:
    """`[..., n]` rows under no loss scale that is known: of others the scaler skips the step."""
    return np.isnan(rows.scale) | (rows.scale == 1.0)


def _diverged(history: History, newest: Snapshot) -> tuple[str, ...]:
    """The cause, where one of the last steps was larger than the weight that it moved."""
    worst, seen = 1.0, ""
    for before in history.recent(DIVERGED, Stage.USED):
        ratios = np.where(layout(before.parameters).matrix, before.column("update_ratio"), np.nan)
        if before.step < newest.step and np.fmax.reduce(ratios, initial=-np.inf) > worst:
            row = int(np.nanargmax(ratios))
            worst = float(ratios[row])
            seen = f"step {before.step} moved {before.names[row]} by {format_number(worst)} times its own norm"
    return (
        (f"the training has diverged, as the learning rate is too large: {seen}",) if math.isfinite(worst) and seen else ()
    )
