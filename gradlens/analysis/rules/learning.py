"""A loss that does not fall, and why: steps too small, steps too large, batches that agree on nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import History
from gradlens.analysis.rules.base import check_number, check_steps, format_number
from gradlens.analysis.rules.occasional import Occasional, features, loss_trend, middle, newest_step, operations, settings
from gradlens.analysis.trend import State, Trend
from gradlens.facts import words
from gradlens.records import Finding, Severity

#: Losses that compare a prediction with a target.
SUPERVISED = words(
    "NllLoss NllLoss2D MseLoss SmoothL1Loss HuberLoss BinaryCrossEntropy BinaryCrossEntropyWithLogits CtcLoss "
    "MultiMarginLoss"
)


#: Noise of a loss, beside its start, that hides a fall.
NOISY = 0.2


def _loss(trend: Trend) -> str:
    start, now = format_number(trend.start), format_number(trend.now)
    return f"the loss went from {start} to {now} in {trend.last - trend.first + 1} steps"


@dataclass(frozen=True)
class TooSlow(Occasional):
    """Steps that agree with each other and are tiny: the training creeps.

    Successive gradients of a training that moves at a usual pace agree at first and less later (cosines of 0.02 to 0.3 were
    measured); where steps are far too small the gradient stays the same, and so does the loss.
    """

    ratio: float = 2e-4
    cosine: float = 0.25
    steps: int = 40

    name: ClassVar[str] = "too_slow"

    def __post_init__(self) -> None:
        check_number(self, "ratio", most=0.1)
        check_number(self, "cosine", most=1.0)
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """Of a loss that is flat."""
        trend = loss_trend(history)
        _, ratios = history.course.series("ratio")
        _, cosines = history.course.series("cosine")
        if trend.state != State.FLAT or len(ratios) < self.steps or len(cosines) < self.steps:
            return
        ratio, late, all_of = middle(ratios[-self.steps :]), middle(cosines[len(cosines) // 2 :]), middle(cosines)
        if not (0 < ratio < self.ratio) or min(late, all_of) < self.cosine or _rate_changes(history):
            return
        yield Finding(
            rule=self.name,
            step=newest_step(history),
            severity=Severity.WARNING,
            seen=f"the training creeps: a step moves the weights by {format_number(ratio)} of their norm (about 1e-3 is "
            f"usual), "
            f"successive gradients still agree (cosine {late:.2f}), and {_loss(trend)}",
            causes=(
                "the learning rate is too small",
                "the loss is multiplied by a small number, or its gradient is clipped far below its norm",
            ),
            remedy="raise the learning rate by factors of 10, until |dw|/|w| is near 1e-3 or the loss falls",
            value=ratio,
        )


def _rate_changes(history: History) -> bool:
    """Whether a learning rate is rising (a warm-up) or has fallen far: then this is no matter of its first value."""
    for changes in settings(history).values():
        rates = [change.lr for change in changes]
        if len(rates) > 1 and (rates[-1] > 2 * rates[0] or rates[-1] < 0.01 * max(rates)):
            return True
    return False


@dataclass(frozen=True)
class TooFast(Occasional):
    """Steps that are large and undo each other: the loss does not fall, or rises.

    Successive gradients that point against each other (a cosine below -0.5) are those of steps across a valley (Cohen et al.
    2021 call it the edge of stability, where training still works: so a falling loss keeps this quiet).
    """

    ratio: float = 0.05
    against: float = 0.4
    steps: int = 20

    name: ClassVar[str] = "too_fast"

    def __post_init__(self) -> None:
        check_number(self, "ratio")
        check_number(self, "against", most=1.0)
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """Of a loss that is flat or rises."""
        trend = loss_trend(history)
        _, ratios = history.course.series("ratio")
        _, cosines = history.course.series("cosine")
        if trend.state not in (State.FLAT, State.RISES) or len(ratios) < self.steps:
            return
        if trend.state == State.FLAT and (len(ratios) < 3 * self.steps or trend.noise > NOISY * abs(trend.start)):
            return
        early = float(np.nanmax(ratios[: max(10, len(ratios) // 4)]))
        late, cosine = middle(ratios[-self.steps :]), middle(cosines[-2 * self.steps :])
        bounces = cosine < -self.against and late > 1e-4
        leaps = early > 4 * self.ratio or late > self.ratio
        if not bounces and not (leaps and (trend.state == State.RISES or late > self.ratio or early > 0.5)):
            return
        how = f"successive gradients point against each other (cosine {cosine:.2f})" if bounces else ""
        size = f"steps move the weights by up to {format_number(max(early, late))} of their norm" if leaps else ""
        yield Finding(
            rule=self.name,
            step=newest_step(history),
            severity=Severity.WARNING,
            seen=f"the steps are too large: {' and '.join(part for part in (size, how) if part)}; {_loss(trend)}",
            causes=(
                "the learning rate is too large",
                "gradients that are summed where they should be averaged: over micro-batches, or over the batch",
            ),
            remedy="divide the learning rate by 10, or warm it up; clip with torch.nn.utils.clip_grad_norm_",
            value=max(early, late),
        )


@dataclass(frozen=True)
class Disagreement(Occasional):
    """Batches that agree on nothing from the start, with steps of a usual size and a flat loss: there is nothing to learn.

    Where labels belong to other inputs, each batch pulls somewhere else: successive gradients had cosines of 0.02 to 0.08,
    and 0.4 to 0.5 at the start of the same training with the right labels. Alone that is not enough (a healthy triplet loss
    has 0.1), so the loss must compare with targets and not fall, and the inputs must reach the last layer. A convolutional
    network without normalisation was flat for 85 steps with 0.09 before it learnt, so this is asked after `steps`, and of
    both halves of the run: gradients that begin to agree are those of a model that begins to learn.
    """

    cosine: float = 0.15
    spread: float = 0.05
    steps: int = 120

    name: ClassVar[str] = "disagreement"

    def __post_init__(self) -> None:
        check_number(self, "cosine", most=0.5)
        check_number(self, "spread", most=1.0)
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """Of a loss that is flat."""
        trend = loss_trend(history)
        _, ratios = history.course.series("ratio")
        _, cosines = history.course.series("cosine")
        if trend.state != State.FLAT or len(cosines) < self.steps or not operations(history) & SUPERVISED:
            return
        if trend.noise > NOISY * abs(trend.start):
            return  # it may fall unseen
        half = len(cosines) // 2
        parts = [float(np.nanmean(part)) for part in (cosines[: self.steps // 3], cosines[:half], cosines[half:])]
        whole, ratio = float(np.nanmean(cosines)), middle(ratios)
        if max(map(abs, parts)) > self.cosine or not 5e-4 < ratio < 0.1 or not last_spread(history) > self.spread:
            return
        yield Finding(
            rule=self.name,
            step=newest_step(history),
            severity=Severity.WARNING,
            seen=f"batches agree on nothing: successive gradients have a cosine of {whole:.2f} from the start on, with "
            f"steps of "
            f"a usual size (|dw|/|w| {format_number(ratio)}), and {_loss(trend)}",
            causes=(
                "labels or targets that do not belong to their inputs: one of the two was shuffled, sorted or cut alone",
                "inputs that say nothing about the target",
            ),
            remedy="look at some pairs of input and target as the loss gets them; a model must be able to learn ten of "
            "them by "
            "heart",
            value=whole,
        )


def last_spread(history: History) -> float:
    """How much the features that the last layer got differ from example to example, at the newest look; NaN if unknown."""
    looks = [fact for layer, facts in features(history).items() if ":" not in layer for fact in facts]
    return max(looks, key=lambda fact: fact.step).spread if looks else math.nan
