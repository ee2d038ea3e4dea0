"""Partials and weights that are NaN or infinite, and who wrote them first.

    forward       the loss of this step is not finite
    backward      the loss is finite, and what backward gave is not
    clipping      what backward gave is finite, and what the optimizer gets is not (or one parameter's NaN became all's)
    optimizer     what the optimizer got is finite, and the weights that it left are not
    before        the weights were not finite when the step began, and no step that was seen made them so

Numbers say which of these it was. Which operation may have done it, the graph of the loss says: by name where backward had
passed it already, by the entries themselves where they were still there (`capture/auditor.py` looks when a loss is NaN).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from gradlens.analysis import patterns
from gradlens.analysis.history import Columns, History
from gradlens.analysis.rules.base import (
    BlockCondition,
    ColumnRule,
    RowFindings,
    Rows,
    format_number,
    judged,
    layout,
    newest_of,
    tristate,
)
from gradlens.analysis.rules.occasional import features, graphs, settings
from gradlens.facts import Graph
from gradlens.records import Finding, Severity, Snapshot, Stage

#: A step that was too large shows in the numbers within so many.
DIVERGED = 5
#: Operations that a finding names, at most.
SUSPECTS = 3


@dataclass(frozen=True)
class NonFinite(ColumnRule):
    """NaN or infinite partials, at once, and weights that a step made so: one such step makes everything NaN.

    It says who wrote it first: the forward pass, backward, clipping or the optimizer. Under a known loss scale partials are
    the scaler's business, which skips the step: `Skipped` counts that. A scaler that gradlens was not told of looks for its
    scale in the same way, and is among the causes until the optimizer consumes them.
    """

    name: ClassVar[str] = "nonfinite"
    settled: ClassVar[bool] = True

    def conditions(self) -> tuple[tuple[BlockCondition, int], ...]:
        """Partials that are not finite; and weights that are not after a step on finite ones."""
        return ((self.holds, 1), (_written, 1))

    def holds(self, columns: Columns) -> np.ndarray:
        """Where a partial is not finite, under no known scale."""
        return tristate(_bad(columns) & _unscaled(columns), judged(columns))

    def findings(self, history: History, rows: Sequence[int], written: Sequence[int]) -> Iterable[Finding]:
        """One a parameter; why, is asked when somebody reads it."""
        newest = newest_of(history)
        if not rows:
            return RowFindings(self.name, Severity.ERROR, newest, written, lambda row: _by_the_step(history, newest, row))
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
    return np.asarray(rows.columns["nan"] + rows.columns["inf"] > 0)


def _written(columns: Columns) -> np.ndarray:
    """Where a step on finite partials left weights that are not finite, and found them finite."""
    if columns.stage != Stage.USED:
        return np.full(columns.status.shape, -1, np.int8)
    of = columns.columns
    made = (of["update_nonfinite"] > 0) & (of["weight_nonfinite"] == 0) & ~_bad(columns)
    return tristate(made, judged(columns))


# --- the optimizer --------------------------------------------------------------------------------------------------


def _by_the_step(history: History, newest: Snapshot, row: int) -> Finding:
    """The optimizer wrote it: its partials were finite."""
    count, numel = int(newest.columns["update_nonfinite"][row]), int(newest.columns["numel"][row])
    used = format_number(float(newest.column("l2")[row]))
    return Finding(
        rule=NonFinite.name,
        step=newest.step,
        severity=Severity.ERROR,
        parameter=newest.names[row],
        stage=newest.stage,
        seen=f"the optimizer wrote {count} of {numel} weights as NaN or infinite at step {newest.step}, from finite "
        f"partials (norm {used}) and finite weights",
        causes=_of_optimizers(history, newest.parameters.dtypes[row]),
        remedy="a smaller learning rate; an eps that is not 0 in the weights' type (1e-4 in float16); or float32 weights",
        value=float(count),
    )


def _of_optimizers(history: History, dtype: str) -> tuple[str, ...]:
    groups = [group for changes in settings(history).values() for group in changes[-1].groups]
    causes: tuple[str, ...] = ()
    if dtype == "float16" and any(group.eps is not None and group.eps <= 2.0**-25 for group in groups):
        causes += (
            "eps is 0 in float16: the optimizer's step divides by sqrt(v) + eps, which is 0 where partials are small",
        )
    if any(not math.isfinite(group.lr) or group.lr > 1e3 for group in groups):
        causes += ("a learning rate that is not finite, or so large that the weights overflow",)
    return (
        *causes,
        f"the step overflows {dtype}: too large a learning rate, or a state of the optimizer (a second moment) that does",
    )


# --- partials -------------------------------------------------------------------------------------------------------


def _why(history: History, newest: Snapshot, rows: Sequence[int]) -> tuple[tuple[str, ...], str]:
    """The causes, and what to do."""
    earlier = _poisoned(history, newest)
    if earlier:
        return earlier + _scaler(newest), _EARLIER
    clipped = _spread(history, newest, rows)
    if clipped:
        return clipped, _CLIPPED
    everywhere = len(rows) == judged(newest).sum()
    forward = not math.isfinite(newest.loss) if "loss" in newest.scalars else everywhere
    diverged = _diverged(history, newest)
    if forward:
        causes = diverged + _in_the_data(history, newest) + _in_forward(history, newest) + _FORWARD
        causes += () if "loss" in newest.scalars else _LOSS
    else:
        causes = diverged + _suspects(history, newest, everywhere) + (_LOSS if everywhere else _BACKWARD)
    remedy = _SLOWER if diverged else _TRACE if forward or everywhere else _behind(newest.names[rows[-1]])
    return causes + (() if diverged else _scaler(newest)), remedy


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
_TRACE = (
    "look at this step's batch, and at the loss of the steps before; gradlens.trace_nonfinite(model, loss_fn, batch) names "
    "the operation, its module and the row of the batch"
)
_EARLIER = "look at the first of these findings: what comes after it follows from it"
_SLOWER = "divide the learning rate by 10 or warm it up, or clip with torch.nn.utils.clip_grad_norm_"
_CLIPPED = (
    "clip_grad_norm_(..., error_if_nonfinite=True) stops at such a step; skip the step where the norm is not finite, and "
    "look for what made it so"
)


def _behind(last: str) -> str:
    return (
        f"look right behind {last!r}: of those concerned it is the last in the model, and backward comes from there; "
        "gradlens.trace_nonfinite(model, loss_fn, batch) names the operation"
    )


def _scaler(newest: Snapshot) -> tuple[str, ...]:
    return _SCALER if newest.stage != Stage.USED else ()


def _suspects(history: History, newest: Snapshot, everywhere: bool) -> tuple[str, ...]:
    """Operations of this loss's graph whose derivative may not exist."""
    named = [word for graph in _graphs(history, newest) for word in patterns.singular(graph)]
    some = ", ".join(dict.fromkeys(named[:SUSPECTS]))
    where = "the loss is finite and its derivative is not" if everywhere else "a derivative that does not exist"
    return (f"{where}: {some} ({'operation' if len(named) == 1 else 'operations'} of this loss's graph)",) if some else ()


def _graphs(history: History, newest: Snapshot) -> list[Graph]:
    """The newest graph of the backward pass that a snapshot is of; of a used one those of all."""
    known = graphs(history)
    own = [graph for graph in known if graph.backward == newest.backward]
    return own if own and newest.stage != Stage.USED else known


def _read(history: History, newest: Snapshot) -> list[Graph]:
    """Graphs of this step that were read with the numbers in them."""
    return [f for f in list(history.facts) if isinstance(f, Graph) and f.values and f.step == newest.step]


def _in_the_data(history: History, newest: Snapshot) -> tuple[str, ...]:
    for layer, facts in features(history).items():
        kind, _, name = layer.partition(":")
        if kind == "input" and any(fact.step == newest.step and not math.isfinite(fact.rms) for fact in facts):
            return (f"NaN or infinite values in the data: what {name!r} is given at step {newest.step} is not finite",)
    return ()


def _in_forward(history: History, newest: Snapshot) -> tuple[str, ...]:
    """What the graph of this step's loss shows: an entry at the edge of an operation, or between which layers it came up."""
    causes: list[str] = []
    for graph in _read(history, newest):
        causes += [f.seen for f in patterns.matched(graph) if f.rule in ("edge", "masked-row")]
        found = patterns.born(graph)
        if found is not None and found[0]:
            between = f"it came up between {found[0]!r}, whose input is finite, and {found[1]!r}, whose input is not"
            causes.append(", ".join((between, *patterns.masking(graph))))
        elif found is not None:
            causes.append(f"the input of {found[1]!r}, the first layer, is not finite already")
    return tuple(dict.fromkeys(causes))


def _poisoned(history: History, newest: Snapshot) -> tuple[str, ...]:
    """The cause, where the weights were not finite any more when the step began."""
    for before in [s for s in history.recent(2, newest.stage) if s.step != newest.step][-1:]:
        bad = _bad(before) & _unscaled(before)
        if bad.any():
            first = before.names[int(np.argmax(bad))]
            return (f"step {before.step} wrote non-finite partials (of {first}) into the weights",)
    for before in [s for s in history.recent(2, Stage.USED) if s.step < newest.step][-1:]:
        bad = before.columns["update_nonfinite"] > 0
        if bad.any():
            first = before.names[int(np.argmax(bad))]
            return (f"step {before.step} left weights that are not finite (of {first}), from finite partials",)
    bad = newest.columns["weight_nonfinite"] > 0
    if bad.any() and newest.stage != Stage.USED:
        first = newest.names[int(np.argmax(bad))]
        return (
            f"the weights were NaN or infinite before this step (of {first}), and no step that was seen wrote them: a "
            "checkpoint or an initialisation, or something between steps",
        )
    return ()


def _spread(history: History, newest: Snapshot, rows: Sequence[int]) -> tuple[str, ...]:
    """The cause, where what backward gave for a row was finite and what the optimizer gets is not."""
    if newest.stage != Stage.USED:
        return ()
    gave = [s for s in history.recent(1, Stage.BACKWARD) if s.step == newest.step and s.names == newest.names]
    gave = gave or [s for s in history.recent(1, Stage.REDUCED) if s.step == newest.step and s.names == newest.names]
    if not gave or not all(judged(s)[list(rows)].all() for s in gave[-1:]):
        return ()
    bad = np.logical_or.reduce([_bad(snapshot) for snapshot in gave])
    if bad[list(rows)].all():
        return ()
    if bad.any():
        first = newest.names[int(np.argmax(bad))]
        return (
            f"clipping: the norm over all gradients was NaN or infinite, as {first!r} has such partials, and "
            f"clip_grad_norm_ multiplied all others by it; {int(bad.sum())} of {len(rows)} had them after backward",
        )
    return (
        "between backward and the step: what backward gave is finite. Clipping by a norm that overflowed, a division by a "
        "loss scale or a count that is 0, or gradients written by hand",
    )


def _unscaled(rows: Rows) -> np.ndarray:
    """`[..., n]` rows under no loss scale that is known: of others the scaler skips the step."""
    return np.asarray(np.isnan(rows.scale) | (rows.scale == 1.0))


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
