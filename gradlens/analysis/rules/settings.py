"""The optimizer's settings and the modules' mode: what a training was told to do, beside what it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import History
from gradlens.analysis.rules.base import check_number, check_steps, format_number
from gradlens.analysis.rules.occasional import Occasional, loss_trend, middle, modes, newest_step, settings
from gradlens.records import Finding, Severity


def _finding(rule: str, history: History, severity: Severity, seen: str, causes: tuple[str, ...], remedy: str) -> Finding:
    return Finding(rule=rule, step=newest_step(history), severity=severity, seen=seen, causes=causes, remedy=remedy)


@dataclass(frozen=True)
class LearningRateGone(Occasional):
    """A learning rate below `share` of its peak, on at least `part` of the run and `steps` steps: the training stands still.

    A schedule made for epochs and stepped for each batch ends so (StepLR by 0.1 each 5 is 1e-58 of itself after 280). A
    cosine to 0 is below 1e-4 of its peak in the last 0.6 % of its way, one cycle in the last 0.1 %.
    """

    share: float = 1e-4
    part: float = 0.2
    steps: int = 30

    name: ClassVar[str] = "lr_gone"

    def __post_init__(self) -> None:
        check_number(self, "share", most=0.1)
        check_number(self, "part", most=1.0)
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """Of each optimizer."""
        now = newest_step(history)
        for changes in settings(history).values():
            peak = max(change.lr for change in changes)
            if not peak > 0 or not changes[-1].lr < self.share * peak:
                continue
            after = len(changes)
            while after and changes[after - 1].lr < self.share * peak:
                after -= 1
            since = changes[after].step
            whole = now - changes[0].step + 1
            if now - since < max(self.steps, self.part * whole):
                continue
            yield _finding(
                self.name,
                history,
                Severity.WARNING,
                f"the learning rate fell from {format_number(peak)} to {format_number(changes[-1].lr)}: it has been gone "
                f"since step "
                f"{since}, for {now - since} of {whole} steps",
                (
                    "the schedule is stepped for each batch, and its numbers are meant for epochs: step_size, T_max, gamma",
                    "the schedule has run out, and the training goes on",
                ),
                "call scheduler.step() once an epoch, or give the schedule its length in batches",
            )


@dataclass(frozen=True)
class Epsilon(Occasional):
    """An optimizer's eps that is 0 in the type of the weights: a division by 0 where a gradient is small.

    float16 has nothing below 6e-8, so Adam's 1e-8 is 0 there (pytorch#8860).
    """

    name: ClassVar[str] = "eps"

    def look(self, history: History) -> Iterator[Finding]:
        """Of each optimizer."""
        for changes in settings(history).values():
            for group in changes[-1].groups:
                if group.eps is None or "float16" not in group.dtypes or group.eps > 2.0**-25:
                    continue
                yield _finding(
                    self.name,
                    history,
                    Severity.WARNING,
                    f"{changes[-1].optimizer} has eps={group.eps:g} and weights in float16, where that is 0: its division "
                    f"by "
                    "sqrt(v) + eps is one by 0 wherever the squared gradient is below 6e-8 too",
                    ("eps too small for float16 weights: the update is infinite or NaN after finite gradients",),
                    "eps=1e-4; or float32 weights with torch.autocast and a GradScaler",
                )
                break


@dataclass(frozen=True)
class EvalMode(Occasional):
    """The model trains in evaluation mode, and has dropout or batch normalisation, which then do nothing or stand still.

    Where only some modules are, it is meant as a rule (frozen normalisation in fine-tuning): an info.
    """

    name: ClassVar[str] = "eval_mode"

    def look(self, history: History) -> Iterator[Finding]:
        """Of the newest look at the modules."""
        looked = modes(history)
        if not looked or not looked[-1].evaluated:
            return
        now, few = looked[-1], ", ".join(looked[-1].evaluated[:3]) + ", ..." * (len(looked[-1].evaluated) > 3)
        before = [mode.step for mode in looked[:-1] if mode.training]
        kinds = [word for word, names in (("dropout", now.dropout), ("BatchNorm", now.normalised)) if names]
        yield _finding(
            self.name,
            history,
            Severity.INFO if now.training else Severity.WARNING,
            f"{'some modules are' if now.training else 'the model trains'} in evaluation mode ({' and '.join(kinds)}: {few})"
            + (f", and was in training mode until a step between {before[-1]} and {now.step}" if before else ""),
            ("modules that are frozen on purpose, as in fine-tuning",)
            if now.training
            else (
                "model.eval() was called for validation, and model.train() not again: dropout is off, BatchNorm takes its "
                "running statistics",
            ),
            "nothing if it is meant; else model.train() before the training loop and after each validation",
        )


@dataclass(frozen=True)
class WeightDecay(Occasional):
    """A weight decay that wins against the gradient: the weights lose their norm and the loss does not fall.

    Coupled decay adds wd * w to the gradient (SGD, Adam), decoupled takes lr * wd of the weight (AdamW). `share`: |wd w|
    beside |g| that counts; healthy trainings with 5e-4 have 0.02, and more only when they have converged. `left`: of the
    norm.
    """

    share: float = 0.3
    left: float = 0.6

    name: ClassVar[str] = "weight_decay"

    def __post_init__(self) -> None:
        check_number(self, "share")
        check_number(self, "left", most=1.0)

    def look(self, history: History) -> Iterator[Finding]:
        """Of the whole model."""
        trend = loss_trend(history)
        if not trend.ill or len(settings(history)) != 1:
            return
        last = next(iter(settings(history).values()))[-1]
        decay = max((group.weight_decay for group in last.groups), default=0.0)
        _, weights = history.course.series("weight")
        _, norms = history.course.series("norm")
        _, ratios = history.course.series("ratio")
        if not decay > 0 or len(weights) < 20 or len(norms) < 20:
            return
        half = max(10, len(weights) // 2)
        pull = middle(decay * weights[:half] / np.maximum(norms[:half], 1e-30))
        if last.decoupled:
            pull = middle(last.lr * decay / np.maximum(ratios[:half], 1e-30))
        if pull < self.share or weights[-5:].mean() > self.left * weights[0]:
            return
        yield _finding(
            self.name,
            history,
            Severity.WARNING,
            f"weight decay {decay:g} wins against the gradient: it pulls {format_number(pull)} times as hard in the first "
            f"half of "
            f"the "
            f"run, the weights' norm went from {format_number(weights[0])} to {format_number(float(weights[-1]))}, and the "
            f"loss does not "
            f"fall",
            ("weight_decay is too large beside the gradient",),
            "divide weight_decay by 10 or 100: 1e-4 to 5e-4 is usual for SGD and Adam, 0.01 to 0.1 for AdamW",
        )
