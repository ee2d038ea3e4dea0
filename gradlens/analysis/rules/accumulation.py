"""Several backward passes to a step: what the optimizer got of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import History
from gradlens.analysis.rules.base import check_steps, format_number, judged, on_steps
from gradlens.analysis.rules.occasional import Occasional, graphs, loss_trend, settings
from gradlens.records import Finding, Severity, Snapshot, Stage, Status

#: Updates that are looked at, the last of which may be NaN.
LOOKED = 24
#: How far equal sums may be apart, beside their sizes.
EQUAL = 1e-6


@dataclass(frozen=True)
class LastOnly(Occasional):
    """The optimizer used the gradient of the last backward alone, though each had some: `zero_grad()` for each micro-batch.

    The weights must not have moved between the passes: where they do (SAM), the last gradient is meant. Asked on `steps`
    steps.
    """

    steps: int = 3

    name: ClassVar[str] = "last_only"

    def __post_init__(self) -> None:
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """At the last steps."""
        newest = history.latest(Stage.USED)
        if newest is None or newest.backward < 1:
            return
        checked = 0
        for now in reversed(history.recent(self.steps, Stage.USED)):
            rows = _last_alone(_passes(history, now), now)
            if rows is None or not rows.any():
                return
            checked += 1
        if checked < self.steps:
            return
        passes = newest.backward + 1
        yield Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING,
            stage=newest.stage,
            seen=f"the optimizer used the gradient of the last of {passes} backwards alone, {on_steps(self.steps)}: what "
            f"the "
            "others gave was thrown away",
            causes=("optimizer.zero_grad() is called for each micro-batch, before each backward()",),
            remedy="call zero_grad() once a step: after optimizer.step(), or before the first micro-batch",
            value=float(passes),
        )


def _passes(history: History, now: Snapshot) -> list[Snapshot]:
    """The backward passes of a step up to its update."""
    own = [s for s in history.recent(LOOKED, Stage.BACKWARD) if s.step == now.step and s.backward <= now.backward]
    return own if len(own) > 1 and all(s.names == now.names for s in own) else []


def _last_alone(passes: list[Snapshot], now: Snapshot) -> np.ndarray | None:
    """`[n]` where what was used is the last pass's gradient, and the others had some; None where weights moved between."""
    if len(passes) < 2:
        return None
    first, last = passes[0], passes[-1]
    weights = first.columns["weight_square_sum"], last.columns["weight_square_sum"]
    both = first.has(Status.OK) & last.has(Status.OK) & judged(now)
    if not both.any() or (weights[0][both] != weights[1][both]).any():
        return None
    near = _near(now.columns["square_sum"], last.columns["square_sum"], last.columns["square_sum"])
    near &= _near(now.columns["sum"], last.columns["sum"], last.columns["abs_sum"])
    together = np.add.reduce([s.columns["sum"] for s in passes])
    other = ~_near(now.columns["sum"], together, last.columns["abs_sum"])
    telling = both & other  # sums that are 0 in each pass, as those of the last layer under cross entropy, tell nothing
    return telling if near[telling].all() else np.zeros(len(now), bool)


def _near(a: np.ndarray, b: np.ndarray, size: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.asarray(np.abs(a - b) <= EQUAL * np.abs(size))


@dataclass(frozen=True)
class Undivided(Occasional):
    """Micro-batches whose gradients add up, of losses that were not divided: the step is that many times too large.

    An info where the training learns all the same, as a smaller learning rate makes up for it. Where it ended in NaN, the
    last steps before are asked.
    """

    least: int = 3
    steps: int = 3

    name: ClassVar[str] = "undivided"

    def __post_init__(self) -> None:
        check_steps(self, "least")
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """At the last steps."""
        newest = history.latest(Stage.USED)
        if newest is None or newest.backward + 1 < self.least or len(settings(history)) > 1:
            return
        looked = graphs(history)
        if not looked or any(_divided(graph.operations[0].name) for graph in looked if graph.operations):
            return
        known = [now for now in history.recent(LOOKED, Stage.USED) if not now.has(Status.NONFINITE).any()]
        recent = known[-self.steps :]
        if len(recent) < self.steps or not all(_added(_passes(history, now), now) for now in recent):
            return
        trend = loss_trend(history)
        passes = newest.backward + 1
        yield Finding(
            rule=self.name,
            step=newest.step,
            severity=Severity.WARNING if trend.ill else Severity.INFO,
            stage=newest.stage,
            seen=f"the gradients of {passes} backwards are summed and their losses are not divided by {passes}: the step is "
            f"{passes} times that of their mean"
            + (f", and the loss went from {format_number(trend.start)} to {format_number(trend.now)}" if trend.ill else ""),
            causes=(f"gradient accumulation without dividing the loss: the sum of {passes} micro-batches, not their mean",),
            remedy=f"(loss / {passes}).backward(), or a learning rate for the sum",
            value=float(passes),
        )


def _divided(root: str) -> bool:
    return root in ("Div", "Mul")


def _added(passes: list[Snapshot], now: Snapshot) -> bool:
    """Whether what was used is all passes' gradients together."""
    if len(passes) < 2:
        return False
    known = judged(now) & now.has(Status.OK)
    together = np.add.reduce([s.columns["sum"] for s in passes])
    size = np.add.reduce([s.columns["abs_sum"] for s in passes])
    near = np.abs(now.columns["sum"] - together) <= 10 * EQUAL * np.abs(size)
    return bool(known.any() and near[known].mean() > 0.9)
