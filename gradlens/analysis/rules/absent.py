"""Parameters that the training does not reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import Columns, History
from gradlens.analysis.rules.base import ColumnRule, RowFindings, check_steps, judged, newest_of, on_steps
from gradlens.records import Finding, Severity, Snapshot, Stage, Status


@dataclass(frozen=True)
class Absent(ColumnRule):
    """A parameter that the loss has not depended on, at any backward of the last steps. It gets no partials and does not
    learn.

    A parameter whose custom backward returned None all the time is named too, with the cause that fits. One that had a
    gradient before is used rarely, or is a part that has finished: an info.
    """

    steps: int = 10

    name: ClassVar[str] = "absent"
    settled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_steps(self)

    def holds(self, columns: Columns) -> np.ndarray:
        """Where the loss does not depend on it, or its backward gave None."""
        return columns.has(Status.ABSENT, Status.UNDEFINED).astype(np.int8)

    def findings(self, history: History, rows: Sequence[int]) -> Iterable[Finding]:
        """One a parameter."""
        newest = newest_of(history)
        if newest.has(Status.ABSENT, Status.FROZEN).all():
            return  # `Cut` says it
        before = _had_gradients(history, newest)
        for severity, some in ((Severity.WARNING, ~before), (Severity.INFO, before)):
            chosen = [row for row in rows if some[row]]
            if chosen:
                yield from (self._finding(newest, row, severity) for row in chosen)

    def _finding(self, newest: Snapshot, row: int, severity: Severity) -> Finding:
        undefined = newest.status[row] == Status.UNDEFINED
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=severity,
            parameter=newest.names[row],
            stage=newest.stage,
            seen=(
                f"its backward returned None {on_steps(self.steps)}"
                if undefined
                else f"the loss did not depend on it {on_steps(self.steps)}"
            ),
            causes=_UNDEFINED if undefined else _ABSENT,
            remedy=(
                "return its gradient from the function's backward"
                if undefined
                else "use it in the forward pass, add its output to the loss, or freeze it with requires_grad_(False)"
            ),
            value=float(self.steps),
        )


def _had_gradients(history: History, newest: Snapshot) -> np.ndarray:
    """`[n]` whether it had a gradient at some moment that is remembered: of sixteen spread over all, and the first."""
    moments = [snapshot for snapshot in history.recent(10_000, newest.stage) if snapshot.names == newest.names]
    at = np.unique(np.linspace(0, len(moments) - 1, 64).astype(int))
    known = [history.first()] * (history.first().names == newest.names) + [moments[i] for i in at]
    return np.logical_or.reduce([snapshot.has(Status.OK) for snapshot in known])


_ABSENT = (
    "its module is not called in forward(), or its output does not reach the loss",
    "the path to it is cut by detach(), .data, .item() or torch.no_grad()",
    "it is a head or branch that this phase of the training does not use, or an expert that no example is sent to",
)
_UNDEFINED = ("a custom autograd.Function whose backward returns None for this input",)


@dataclass(frozen=True)
class Frozen(ColumnRule):
    """Parameters with `requires_grad=False` that the optimizer has all the same, and those that have just been frozen.

    An info: fine-tuning means it, and a forgotten `requires_grad_(False)` looks the same.
    """

    name: ClassVar[str] = "frozen"
    stages: ClassVar[tuple[str, ...]] = (Stage.USED,)
    settled: ClassVar[bool] = True

    def holds(self, columns: Columns) -> np.ndarray:
        """Where the optimizer has a frozen parameter."""
        return (columns.has(Status.FROZEN) & (columns.columns["update_numel"] > 0)).astype(np.int8)

    def findings(self, history: History, rows: Sequence[int]) -> Iterator[Finding]:
        """One for all."""
        newest = newest_of(history)
        names = tuple(newest.names[row] for row in rows)
        share = newest.columns["numel"][np.asarray(rows)].sum() / max(newest.columns["numel"].sum(), 1)
        before = [snapshot for snapshot in history.recent(2, Stage.USED) if snapshot.step < newest.step]
        learnt = before and before[-1].names == newest.names and judged(before[-1])[np.asarray(rows)].any()
        few = ", ".join(names[:NAMED]) + ", ..." * (len(names) > NAMED)
        what, it = ("1 parameter", "it") if len(names) == 1 else (f"{len(names)} parameters", "them")
        yield Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.INFO,
            parameter=names[0] if len(names) == 1 else None,
            stage=newest.stage,
            seen=f"{what} ({few}; {share:.0%} of the weights) with requires_grad=False, though the optimizer has {it}"
            + (f"; they had a gradient at step {before[-1].step}" if learnt else ""),
            causes=("fine-tuning, as meant", "a requires_grad_(False) that was forgotten, or that reached too many modules"),
            remedy="nothing if it is meant; else requires_grad_(True)",
            value=float(len(names)),
            parameters=names if len(names) > 1 else (),
        )


#: How many parameters a finding on several names.
NAMED = 3


@dataclass(frozen=True)
class Uncaptured(ColumnRule):
    """A parameter whose `.grad` changed though no hook fired: its own partials of this backward were not seen."""

    name: ClassVar[str] = "uncaptured"
    settled: ClassVar[bool] = True

    def holds(self, columns: Columns) -> np.ndarray:
        """Where no hook fired; not where none did at a whole step: capture says then why (`written-by-hand`)."""
        uncaptured = columns.has(Status.UNCAPTURED)
        if columns.stage == Stage.USED:
            uncaptured = uncaptured & ~uncaptured.all(axis=-1, keepdims=True)
        return uncaptured.astype(np.int8)

    def findings(self, history: History, rows: Sequence[int]) -> Iterable[Finding]:
        """One a parameter."""
        newest = newest_of(history)
        return RowFindings(self.name, Severity.WARNING, newest, rows, lambda row: self._finding(newest, row))

    def _finding(self, newest: Snapshot, row: int) -> Finding:
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING,
            parameter=newest.names[row],
            stage=newest.stage,
            seen="its .grad changed, but the hook that reads its partials did not fire, or not in time: the row shows what "
            ".grad was then",
            causes=(
                "the parameter was replaced or swapped after watch(): model.to(), load_state_dict(assign=True)",
                "something writes .grad by hand, or shards the parameters (FSDP with original parameters)",
                "a hook of somebody else's used .grad and freed it before backward was over",
            ),
            remedy="nothing if it does not last: hooks are set again at the next step; else call gradlens.watch() after "
            "the model has got its final parameters",
        )
