"""Loss scaling that gradlens was not told of, and steps that the scaler skipped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import Columns, History
from gradlens.analysis.rules.base import (
    BlockCondition,
    ColumnRule,
    Rows,
    check_number,
    check_steps,
    format_number,
    judged,
    newest_of,
    of_whole_model,
    on_steps,
    unmoved,
)
from gradlens.records import Finding, Severity, Snapshot, Stage, Status


def given_stage(history: History) -> Stage:
    """The stage that has what backward gave: `backward`, or `reduced` over ranks, where it is not read by default."""
    return Stage.BACKWARD if history.newest(Stage.BACKWARD) is not None else Stage.REDUCED


@dataclass(frozen=True)
class LossScaled(ColumnRule):
    """Backward's gradients are the same power of two larger than the used ones, on every parameter: they carry a loss scale.

    A `GradScaler` scales by powers of two (Micikevicius et al. 2018). Clipping divides by any number, so the ratio must be
    the same power of two on each of the last `steps` steps, one backward each. Who divides gradients by hand does it by 2, 4
    or 8, the number of micro-batches or ranks: `least` is the smallest factor that counts.
    """

    steps: int = 3
    least: float = 16.0

    name: ClassVar[str] = "loss_scaled"
    stages: ClassVar[tuple[str, ...]] = (Stage.USED,)

    def __post_init__(self) -> None:
        check_steps(self)
        check_number(self, "least", above=1.0)

    def holds(self, columns: Columns) -> np.ndarray:
        """Where all of backward's gradients are nearly the same power of two of the used ones."""
        assert columns.history is not None
        given = columns.per_step(given_stage(columns.history), "square_sum")
        known = columns.has(Status.OK) & (given > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            power = np.log2(given / columns.columns["square_sum"]) / 2
            near = (power > 0.9) & (np.abs(power - np.rint(power)) < 0.01)
        other = np.isnan(given).all(axis=-1)  # with other parameters: findings looks closer
        return of_whole_model(columns, (near | ~known).all(axis=-1) | other, known.any(axis=-1) | other)

    def findings(self, history: History, rows: Sequence[int]) -> Iterator[Finding]:
        """One of the model."""
        newest = newest_of(history)
        power = self._power(history)
        if not power or 2**power < self.least:
            return
        yield Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING,
            stage=given_stage(history),
            seen=f"these gradients look loss-scaled: after backward() every parameter's are {2**power} (2**{power}) times "
            f"those that the optimizer used, at each of the last {self.steps} observed steps",
            causes=(
                "a GradScaler multiplies the loss, and gradlens does not know its scale",
                "gradients are divided by hand between backward() and step(), by the number of micro-batches or ranks",
            ),
            remedy="pass scaler= to gradlens.watch(): all stages then have the loss's units; nothing if you divide by hand",
            value=float(2**power),
        )

    def _power(self, history: History) -> int:
        """The power of the last steps, the newest looked at first; 0 if they do not agree, or are too few."""
        backward = {s.step: s for s in history.recent(self.steps, given_stage(history))}
        used = {s.step: s for s in history.recent(self.steps, Stage.USED)}
        if len(used) < self.steps or not used.keys() <= backward.keys():
            return 0
        steps = sorted(used, reverse=True)
        power = _power(backward[steps[0]], used[steps[0]])
        return power if power and all(_power(backward[step], used[step]) == power for step in steps[1:]) else 0


def _power(backward: Snapshot, used: Snapshot) -> int:
    """k > 0 if every gradient of backward is 2**k times the used one, and nobody said so; else 0."""
    if backward.backward or used.backward or used.names != backward.names:
        return 0
    if not (np.isnan(used.scale) | (used.scale == 1.0)).all():
        return 0
    both = backward.has(Status.OK) & used.has(Status.OK)
    a, b = backward.columns["square_sum"][both], used.columns["square_sum"][both]
    if not len(a) or (a <= 4 * b * (1 - 1e-3)).any() or (b <= 0).any():
        return 0
    exponents = np.log2(a / b) / 2
    power = round(float(np.median(exponents)))
    return power if np.abs(exponents - power).max() < 2e-3 else 0


@dataclass(frozen=True)
class ClippedScaled(ColumnRule):
    """Gradients clipped while they still carried the loss scale: what the optimizer used times the scale has the same small
    norm at each of the last steps, and backward gave far more.

    `scaler.unscale_(optimizer)` has to come before `clip_grad_norm_`, or the clipped gradient is divided by the scale once
    more (PyTorch's AMP examples): the training hardly moves. `most` is the largest norm that people clip at. While the scale
    stays, the right order gives the same norm at each step too; people clip at 0.05 and not at 51.2, so of the two norms the
    one with at most two digits is taken for theirs.
    """

    steps: int = 3
    most: float = 100.0

    name: ClassVar[str] = "clipped_scaled"
    stages: ClassVar[tuple[str, ...]] = (Stage.USED,)

    def __post_init__(self) -> None:
        check_steps(self)
        check_number(self, "most")

    def conditions(self) -> tuple[tuple[BlockCondition, int], ...]:
        """That it lasts, findings looks up: steps that cannot be told do not break it."""
        return ((self.holds, 1),)

    def holds(self, columns: Columns) -> np.ndarray:
        """Where the used gradient times a large scale has a small norm."""
        scale = columns.scale[:, 0] if len(columns.parameters) else np.full(len(columns), np.nan)
        return of_whole_model(columns, (scale > 10 * self.most) & (_norm(columns) * scale <= self.most))

    def findings(self, history: History, rows: Sequence[int]) -> Iterator[Finding]:
        """One of the model."""
        newest = newest_of(history)
        used, backward = (history.recent(self.steps, stage) for stage in (Stage.USED, given_stage(history)))
        if len({snapshot.step for snapshot in used}) < self.steps:
            return
        given = {snapshot.step: _norm(snapshot) for snapshot in backward}
        norms = np.asarray([_norm(snapshot) for snapshot in used])
        clipped = norms * [_scale(snapshot) for snapshot in used]
        own = np.asarray([given.get(snapshot.step, np.nan) for snapshot in used])
        if not (own > 2 * norms).all() or not (clipped <= self.most).all() or np.ptp(clipped) > 0.01 * clipped.max():
            return
        if np.ptp(norms) <= 0.01 * norms.max() and _is_round(norms[-1]) and not _is_round(clipped[-1]):
            return
        yield Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING,
            stage=newest.stage,
            seen=f"the optimizer used a gradient of norm {format_number(norms[-1])}, and backward() gave "
            f"{format_number(own[-1])}; times the loss scale of {_scale(newest):g} it is "
            f"{format_number(clipped[-1])}, the same {on_steps(self.steps)}",
            causes=("clip_grad_norm_() before scaler.unscale_(optimizer): it clips the scaled gradients",),
            remedy="scaler.unscale_(optimizer) before torch.nn.utils.clip_grad_norm_(...), then scaler.step(optimizer)",
            value=float(clipped[-1]),
        )


def _is_round(norm: float) -> bool:
    """Whether a number has at most two digits, up to what rounding leaves of a norm that was clipped."""
    return math.isclose(norm, float(f"{norm:.1e}"), rel_tol=1e-3)


def _norm(rows: Rows) -> np.ndarray:
    """`[...]` of the whole gradient."""
    return np.sqrt(np.nansum(np.where(judged(rows), rows.columns["square_sum"], 0.0), axis=-1))


def _scale(snapshot: Snapshot) -> float:
    """The loss scale, if it is known; else NaN."""
    return float(snapshot.scale[0]) if len(snapshot) else np.nan


@dataclass(frozen=True)
class Skipped(ColumnRule):
    """Steps that the loss scaler skipped because a gradient was not finite.

    Some at the start are how a `GradScaler` finds its scale, and one in 2,000 is its normal pace: worth an info. `most` of
    the last `steps` is a warning; `row` in a row means that no scale helps: the model itself gives NaN or inf.
    """

    most: float = 0.1
    steps: int = 100
    row: int = 10

    name: ClassVar[str] = "skipped"
    stages: ClassVar[tuple[str, ...]] = (Stage.USED,)

    def __post_init__(self) -> None:
        check_number(self, "most", most=1.0)
        check_steps(self)
        check_steps(self, "row")

    def conditions(self) -> tuple[tuple[BlockCondition, int], ...]:
        """`steps` is how far back it counts, and not how long it lasts."""
        return ((self.holds, 1),)

    def holds(self, columns: Columns) -> np.ndarray:
        """Where the scaler skipped the step."""
        return of_whole_model(columns, _skipped(columns))

    def findings(self, history: History, rows: Sequence[int]) -> Iterator[Finding]:
        """One of the model."""
        newest = newest_of(history)
        last = [bool(_skipped(snapshot)) for snapshot in history.recent(self.steps, Stage.USED)]
        row = next((i for i, skipped in enumerate(reversed(last)) if not skipped), len(last))
        severity = Severity.INFO
        if row >= self.row:
            severity = Severity.ERROR
        elif len(last) >= self.steps and sum(last) > self.most * len(last):
            severity = Severity.WARNING
        yield Finding(
            rule=self.name,
            step=newest.step,
            severity=severity,
            stage=newest.stage,
            seen=f"the scaler skipped this step: a gradient is not finite at a loss scale of {np.nanmax(newest.scale):g}; "
            f"{sum(last)} of the last {len(last)} observed steps were skipped, {row} in a row",
            causes=_HOPELESS if severity == Severity.ERROR else _NORMAL,
            remedy=(
                "torch.autograd.set_detect_anomaly(True) names the operation"
                if severity == Severity.ERROR
                else "nothing if it stays rare; else clip after scaler.unscale_(), or compute in bfloat16 without a scaler"
            ),
            value=float(sum(last)),
        )


_NORMAL = ("the scaler is looking for its scale, as it does at the start and from time to time", "gradients that spike")
_HOPELESS = ("NaN or inf that no loss scale removes: in the data, in the weights, or from 0/0, log(0), sqrt at 0",)


def _skipped(rows: Rows) -> np.ndarray:
    """`[...]` whether this is the record of a step that the scaler skipped, be it for one of several optimizers."""
    own = judged(rows)
    known = np.isfinite(rows.scale) & (rows.scale != 1.0)
    bad = own & rows.has(Status.NONFINITE) & known
    finite = rows.columns["nan"] + rows.columns["inf"] == 0  # and still not finite: a neighbour was not
    some = (bad & (finite | unmoved(rows))).any(axis=-1)
    return np.asarray(own.any(axis=-1) & ((bad | ~own).all(axis=-1) | some))
