"""Steps of the wrong size: too large, too small, or rounded away."""

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
    format_number,
    judged,
    layout,
    newest_of,
    of_whole_model,
    on_steps,
    remembered,
    tristate,
    unmoved,
)
from gradlens.analysis.rules.lost import nothing_used
from gradlens.analysis.rules.occasional import loss_trend, settings
from gradlens.errors import ArgumentError
from gradlens.records import Finding, Severity, Snapshot, Stage, Status


@dataclass(frozen=True)
class UpdateRatio(ColumnRule):
    """Steps that are too large or too small beside the weights: |dw| / |w|, for which about 1e-3 is usual (Karpathy,
    CS231n).

    `largest`, at any step: 1 means that one step replaces the weight. Healthy Adam and SGD were measured at up to 0.05 for
    usual learning rates and 0.9 for bold ones, both at the start. That a weight which begins at 0 moves by more than itself
    is as it should be. Biases and scales, which often do, are left out. Where the loss is known (`lens.observe`), such a
    step is named only if the next one's is not lower: a regression that starts far from its answer may leap towards it.

    `smallest`, for the fastest weight of the model at each of the last `steps` steps: the model hardly moves. Only if it
    never was faster: when a learning rate schedule has run out, that is as it should be.
    """

    largest: float = 1.0
    smallest: float = 1e-5
    steps: int = 20

    name: ClassVar[str] = "update_ratio"
    stages: ClassVar[tuple[str, ...]] = (Stage.USED,)

    def __post_init__(self) -> None:
        check_number(self, "largest")
        check_number(self, "smallest")
        check_steps(self)
        if self.smallest >= self.largest:
            raise ArgumentError(f"UpdateRatio: smallest={self.smallest!r} must be below largest={self.largest!r}")

    def conditions(self) -> tuple[tuple[BlockCondition, int], ...]:
        """A leap, at any step; and hardly any movement, on each of the last."""
        return ((self._leapt, 1), (self._still, self.steps))

    def findings(self, history: History, leapt: Sequence[int], still: Sequence[int]) -> Iterator[Finding]:
        """One a weight that leapt, and one of a model that stands still."""
        newest = newest_of(history)
        if leapt and not iterates(history):
            yield from self._leaps(history, newest)
        if still and not _moved(history, 10 * self.smallest):
            yield self._small(newest, float(np.nanmax(_ratios(newest))))

    def _leapt(self, columns: Columns) -> np.ndarray:
        """Where a weight leapt, at this moment or the one before: only then the loss says what came of it."""
        leapt = np.asarray((_ratios(columns) > self.largest).any(axis=-1))
        before = np.concatenate([[True], leapt[:-1]])  # of a block's first, the history knows
        return of_whole_model(columns, leapt | before)

    def _leaps(self, history: History, newest: Snapshot) -> Iterator[Finding]:
        """Of the newest step; where the loss is known, of the one before: only now it shows what came of it."""
        at = newest
        if "loss" in newest.scalars:
            before = [s for s in history.recent(2, Stage.USED) if s.step < newest.step and s.names == newest.names]
            if not before or "loss" not in before[-1].scalars or newest.loss < before[-1].loss:
                return
            at = before[-1]
        ratios = _ratios(at)
        for row in np.flatnonzero(ratios > self.largest):
            if not _began_at_zero(history, at.names[row]):
                yield self._large(at, int(row), float(ratios[row]))

    def _large(self, newest: Snapshot, row: int, ratio: float) -> Finding:
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING,
            parameter=newest.names[row],
            stage=newest.stage,
            seen=f"this step moved it by {format_number(ratio)} times its own norm: what it was before hardly matters "
            "any more",
            causes=("the learning rate is too large", "gradients that explode, without clipping"),
            remedy="divide the learning rate by 10 or warm it up, or clip with torch.nn.utils.clip_grad_norm_",
            value=ratio,
        )

    def _small(self, newest: Snapshot, ratio: float) -> Finding:
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING,
            stage=newest.stage,
            seen=f"the model hardly moves: this step changed the fastest weight by {format_number(ratio)} of its "
            f"norm, and by less than {format_number(self.smallest)} {on_steps(self.steps)}; about 1e-3 is usual",
            causes=(
                "the learning rate is too small",
                "the gradient is tiny: it vanishes, or the loss is multiplied by a tiny number",
                "a warm-up that has only begun",
            ),
            remedy="raise the learning rate (by factors of 10, until |dw|/|w| is near 1e-3), or use Adam",
            value=ratio,
        )

    def _still(self, columns: Columns) -> np.ndarray:
        fastest = np.asarray(np.fmax.reduce(_ratios(columns), axis=-1, initial=-np.inf))
        return of_whole_model(columns, fastest < self.smallest, fastest >= 0)


@remembered
def _ratios(rows: Rows) -> np.ndarray:
    """Update ratios of weights; NaN for other parameters, and where no gradient made the step."""
    known = layout(rows.parameters).matrix & rows.has(Status.OK) & ~nothing_used(rows)
    return np.where(known, rows.column("update_ratio"), np.nan)


def _began_at_zero(history: History, parameter: str) -> bool:
    """Whether the weight was 0 within the last ten observed steps."""
    return any(
        snapshot.value("update_before_square_sum", parameter) == 0
        for snapshot in history.recent(10, Stage.USED)
        if parameter in snapshot.parameters.position
    )


def _moved(history: History, ratio: float, looks: int = 16) -> bool:
    """Whether some weight's update ratio was above this, in snapshots spread evenly over the history."""
    used = history.moments(Stage.USED)
    at = np.unique(np.linspace(0, len(used) - 1, looks).astype(int))
    return any(np.fmax.reduce(_ratios(used[i].block)[used[i].at], initial=-np.inf) > ratio for i in at)


#: Points of a loss that does not fall from which on weights that do not move are the likely reason.
LONG = 100


@dataclass(frozen=True)
class RoundedAway(ColumnRule):
    """Weights with a partial that did not move, as the step is smaller than their storage type can add to them.

    bfloat16 keeps 8 bits: a step below 1/512 of the weight is lost (Micikevicius et al. 2018 keep a float32 copy for that).
    Asked of types of 16 bits and fewer: what float32 swallows is too small to matter, and `UpdateRatio` says so.

    Above `share` it is an info: the weights that do move may be enough, and a perceptron whose layers lose two thirds to
    three quarters was measured to train as well as in float32. Above `most`, in some parameter, it is a warning, and where
    the loss is known not to fall.
    """

    share: float = 0.5
    most: float = 0.9
    steps: int = 10

    name: ClassVar[str] = "rounded_away"
    stages: ClassVar[tuple[str, ...]] = (Stage.USED,)

    def __post_init__(self) -> None:
        check_number(self, "share", most=1.0)
        check_number(self, "most", most=1.0)
        check_steps(self)

    def conditions(self) -> tuple[tuple[BlockCondition, int], ...]:
        """Many, and nearly all, on each of the last steps."""
        return ((self._many, self.steps), (self._most, self.steps))

    def findings(self, history: History, rows: Sequence[int], most: Sequence[int]) -> Iterable[Finding]:
        """One a parameter; a warning where some parameter hardly moves at all."""
        trend = loss_trend(history)
        loud = bool(most) or (trend.ill and trend.points >= LONG)
        newest, severity = newest_of(history), Severity.WARNING if loud else Severity.INFO
        return RowFindings(self.name, severity, newest, rows, lambda row: self._finding(newest, row, severity))

    def _finding(self, newest: Snapshot, row: int, severity: Severity) -> Finding:
        share = float(_rounded_away(newest)[row])
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=severity,
            parameter=newest.names[row],
            stage=newest.stage,
            seen=f"{share:.0%} of the weights with a partial did not move (more than {self.share:.0%} "
            f"{on_steps(self.steps)}): the step is rounded away in {newest.parameters.dtypes[row]}",
            causes=("16-bit weights with a small learning rate", "a learning rate schedule that has run out"),
            remedy="keep the weights in float32 and compute in 16 bits with torch.autocast, or use an optimizer with "
            "float32 master weights or stochastic rounding",
            value=share,
        )

    def _many(self, columns: Columns) -> np.ndarray:
        share = _rounded_away(columns)
        return tristate(share > self.share, ~np.isnan(share))

    def _most(self, columns: Columns) -> np.ndarray:
        share = _rounded_away(columns)
        return tristate(share > self.most, ~np.isnan(share))


def _rounded_away(rows: Rows) -> np.ndarray:
    """Share of the weights with a partial that stuck; NaN where that is not known or of no concern."""
    narrow = layout(rows.parameters).narrow
    if not narrow.any():
        return np.full(rows.scale.shape, np.nan)
    moving = rows.columns["positive"] + rows.columns["negative"]
    known = judged(rows) & (rows.columns["update_numel"] > 0) & (moving > 0) & narrow
    return np.where(known, np.minimum(rows.column("rounded_away") / np.maximum(moving, 1), 1.0), np.nan)


@dataclass(frozen=True)
class Shrunk(ColumnRule):
    """Weights that have lost nearly all of their norm since they were first seen: something pulls them to 0.

    Weight decay takes lr * weight_decay of a weight at each step (Loshchilov and Hutter 2019), so 0.9 is left after a
    hundred steps at 1e-3 and 1. Below a normalisation, weights may shrink to a tenth and work as before.
    """

    share: float = 0.05

    name: ClassVar[str] = "shrunk"
    stages: ClassVar[tuple[str, ...]] = (Stage.USED,)
    settled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self, "share", most=0.5)

    def holds(self, columns: Columns) -> np.ndarray:
        """Where the norm is a small share of the first that was seen."""
        known = columns.has(Status.OK, Status.ZERO) & layout(columns.parameters).matrix
        if columns.first is None:
            return np.full(known.shape, -1, np.int8)
        now, then = columns.columns["weight_square_sum"], columns.first.columns["weight_square_sum"]
        return tristate(now < self.share**2 * then, known)

    def findings(self, history: History, rows: Sequence[int]) -> Iterable[Finding]:
        """One a parameter."""
        newest, first = newest_of(history), history.first()
        now, then = newest.columns["weight_square_sum"], first.columns["weight_square_sum"]

        def finding(row: int) -> Finding:
            left = float(now[row] / then[row]) ** 0.5
            return Finding(
                rule=self.name,
                step=newest.step,
                severity=Severity.WARNING,
                parameter=newest.names[row],
                stage=newest.stage,
                seen=f"its norm is {format_number(now[row] ** 0.5)}, {left:.2%} of what it was at step {first.step}",
                causes=("a weight decay, or a penalty on the weights, that is too strong beside the gradient",),
                remedy="divide weight_decay by 10: 0.01 to 0.1 is usual for AdamW, 1e-4 for SGD",
                value=left,
            )

        return RowFindings(self.name, Severity.WARNING, newest, rows, finding)


@dataclass(frozen=True)
class Unmoved(ColumnRule):
    """A parameter that has a gradient and that no watched optimizer has, beside others that one moves.

    Asked where updates are measured: an optimizer's own parameters are, and only they. Where it is so from the start, and
    what is left out comes before all that moves, the training is a classic fine-tuning of the last layers: an info.
    """

    steps: int = 3

    name: ClassVar[str] = "unmoved"
    stages: ClassVar[tuple[str, ...]] = (Stage.USED,)
    settled: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_steps(self)

    def holds(self, columns: Columns) -> np.ndarray:
        """Where a gradient was, and no update."""
        return tristate(unmoved(columns), columns.has(Status.OK))

    def findings(self, history: History, rows: Sequence[int]) -> Iterable[Finding]:
        """One a parameter."""
        newest = newest_of(history)
        severity = Severity.INFO if _fine_tuning(history, newest, rows) else Severity.WARNING
        return RowFindings(self.name, severity, newest, rows, lambda row: self._finding(newest, row, severity))

    def _finding(self, newest: Snapshot, row: int, severity: Severity) -> Finding:
        return Finding(
            rule=self.name,
            step=newest.step,
            severity=severity,
            parameter=newest.names[row],
            stage=newest.stage,
            seen=f"it had a gradient, and no optimizer that gradlens watches moved it, {on_steps(self.steps)}",
            causes=(
                "it was added, unfrozen or replaced after the optimizer was made, or is not among what the optimizer got",
                "its optimizer was not given to gradlens.watch()",
            ),
            remedy="optimizer.add_param_group({'params': [...]}); or requires_grad_(False) if it is not to learn: backward "
            "then leaves it out",
        )


def iterates(history: History) -> bool:
    """Whether an optimizer takes many steps in one: LBFGS does, and may go far."""
    return any(changes[-1].optimizer == "LBFGS" for changes in settings(history).values())


def _fine_tuning(history: History, newest: Snapshot, rows: Sequence[int]) -> bool:
    """Whether the rows were left out from the start, and come before all that an optimizer moves."""
    first, left = history.first(), np.asarray(rows, np.int64)
    moved = np.flatnonzero((newest.columns["update_numel"] > 0) & judged(newest))
    if first.names != newest.names or not len(moved) or left.max() > moved.min():
        return False
    strange = any(group.strange for changes in settings(history).values() for group in changes[-1].groups)
    return bool(unmoved(first)[left].all() and first.has(Status.OK)[left].all() and not strange)
