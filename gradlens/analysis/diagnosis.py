"""The findings of a run put in order: where it began, what follows from that, and how sure this is.

    findings + what the loss did -> origin, what follows from it, what stands beside it -> one sentence

Three things decide which finding is the origin. **What explains what**: a mistake in how the training is made (a softmax
taken twice, a schedule that ran out) explains what goes wrong in its steps, and these explain what becomes of the weights;
`EXPLAINS` has the pairs for which that order is not enough. **Onset**: of two on one level the earlier one. **Severity**:
an info is no origin, unless the loss is known not to fall and nothing louder was found.

What says something of the watching alone (a writer that failed, a feature that cannot be had) is told beside the verdict on
the training. It is an origin where it is an error and nothing loud was found of the training: nothing is on disk then.

Where nothing loud was found, the loss decides what may be said: "nothing looks ill" is said only of a loss that falls, or
one that cannot be judged, and then that is said too.

`confidence` is how often such a verdict was right on the trainings of `benchmarks/trainings.py` (`confidence.py`): by the
rule at its origin, and less where other findings stand beside it unexplained, or where the loss falls all the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gradlens import markup
from gradlens.analysis.confidence import MEASURED
from gradlens.analysis.rules.base import format_number
from gradlens.analysis.trend import State, Trend
from gradlens.records import Finding, Severity

#: How a training is made: what is wrong from the first step on, whatever the numbers do.
MADE = (
    "cut",
    "eps",
    "foreign-parameters",
    "unregistered",
    "softmax-twice",
    "sigmoid-twice",
    "no-log",
    "clamped-logits",
    "softmax-over-batch",
    "softmax-wrong-axis",
    "softmax-of-one",
    "broadcast",
    "target-with-gradient",
    "out-of-range",
    "masked-row",
    "edge",
    "batchnorm-of-one",
    "clipped_scaled",
    "last_only",
    "stale",
    "left_over",
    "lost",
    "unstepped",
    "eval_mode",
    "lr_gone",
    "undivided",
    "summed-loss",
    "unknown-optimizer",
    "identical",
    "input_scale",
    "rounded_away",
)
#: What goes wrong in its steps.
DOES = (
    "weight_decay",
    "discriminator_won",
    "empty_latent",
    "rare_class",
    "fading",
    "loss_scaled",
    "too_slow",
    "exploding",
    "too_fast",
    "vanishing",
    "disagreement",
    "skipped",
    "unmoved",
    "absent",
    "uncaptured",
)
#: What becomes of it.
BECOMES = ("update_ratio", "spike", "nonfinite", "collapse", "dead", "dead_units", "saturated", "shrunk")

#: What says nothing of the training: what could not be read, shown or kept of it.
WATCHING = frozenset(
    {
        "evidence-unavailable",
        "evidence-left-out",
        "updates-unavailable",
        "activations-unavailable",
        "reduced-unavailable",
        "memory",
        "scaler-found",
        "watched-already",
        "used-unknown",
        "partial-gradient",
        "read-at-step",
        "flat-parameters",
        "ranks-apart",
        "ranks-missing",
        "cuda-graph",
        "budget",
        "records-thinned",
        "records-torn",
        "records-damaged",
        "writer-failed",
        "recorder-stuck",
        "findings-bounded",
        "findings-left-out",
        "gradlens-fault",
    }
)

_LARGE = frozenset(
    {
        "cut",
        "eps",
        "masked-row",
        "edge",
        "no-log",
        "summed-loss",
        "input_scale",
        "undivided",
        "stale",
        "left_over",
        "loss_scaled",
    }
    | {"exploding", "too_fast", "update_ratio", "spike", "weight_decay"}
)
#: What these alone explain, whatever the levels say: tiny steps make no NaN.
ONLY_BY: dict[str, frozenset[str]] = {"nonfinite": _LARGE, "spike": _LARGE - {"spike"}}

_LEVEL = {rule: level for level, rules in enumerate((MADE, DOES, BECOMES)) for rule in rules}

#: Beside the order of levels: a finding that explains another one of its own level, or of one above.
EXPLAINS: dict[str, frozenset[str]] = {
    "cut": frozenset({"absent", "unmoved", "foreign-parameters"}),
    "foreign-parameters": frozenset({"stale", "left_over", "unmoved", "disagreement"}),
    "eps": frozenset({"nonfinite"}),
    "unmoved": frozenset({"stale", "left_over"}),
    "fading": frozenset({"disagreement", "vanishing", "too_slow"}),
    "weight_decay": frozenset({"vanishing", "disagreement", "fading", "too_slow"}),
    "exploding": frozenset({"too_fast", "disagreement"}),
    "too_fast": frozenset({"disagreement"}),
    "update_ratio": frozenset({"dead", "dead_units", "saturated", "collapse", "spike", "nonfinite"}),
    "spike": frozenset({"nonfinite", "dead", "dead_units", "saturated", "collapse"}),
    "nonfinite": frozenset({"dead", "dead_units"}),
    "dead": frozenset({"too_slow"}),
    "dead_units": frozenset({"too_slow", "dead", "collapse", "vanishing"}),
    "saturated": frozenset({"too_slow", "vanishing", "fading", "collapse"}),
    "vanishing": frozenset({"too_slow"}),
    "lr_gone": frozenset({"too_slow"}),
    "clipped_scaled": frozenset({"loss_scaled", "too_slow"}),
    "input_scale": frozenset({"identical"}),
}


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a training, as far as that can be said."""

    verdict: str  #: one sentence
    origin: Finding | None  #: None where nothing was found that is more than an info
    follows: tuple[Finding, ...]  #: what the origin explains, by onset
    beside: tuple[Finding, ...]  #: warnings and errors that it does not explain
    watching: tuple[Finding, ...] = field(default=(), kw_only=True)  #: those that say nothing of the training
    confidence: float  #: from 0 to 1: how often such a verdict was right
    loss: Trend

    @property
    def ill(self) -> bool:
        """Whether something is wrong: a warning or an error was found, or the loss is known not to fall."""
        return self.origin is not None or self.loss.ill

    def groups(self) -> tuple[tuple[str, tuple[Finding, ...]], ...]:
        """Everything but the origin, by what it is to it, in words."""
        return ("follows from it", self.follows), ("beside it", self.beside), ("gradlens itself", self.watching)

    @property
    def sure(self) -> str:
        """The confidence in words; no verdict is called certain."""
        return "over 99%" if self.confidence > 0.99 else f"{self.confidence:.0%}"

    def line(self, more: str = "print(lens.diagnosis())") -> str:
        """The verdict in one line, with how sure it is where something was found, and the call that says more."""
        ours = f"; gradlens itself: {_names(self.watching)}" if self.watching else ""
        if self.origin is None:
            return self.verdict + ours
        return f"{self.verdict}; {self.sure} sure, {more} says what to do{ours}"

    def __str__(self) -> str:
        lines = [self.verdict]
        if self.origin is not None:
            lines.append(f"  seen: {self.origin.seen}")
            if self.origin.remedy:
                lines.append(f"  do: {self.origin.remedy}")
            if self.follows:
                lines.append(f"  follows from it: {_names(self.follows)}")
            if self.beside:
                lines.append(f"  beside it: {_names(self.beside)}")
            lines.append(f"  confidence: {self.sure}")
        lines += [f"  gradlens itself ({finding.rule}): {finding.seen}" for finding in self.watching]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return markup.diagnosis(self)


def _names(found: Sequence[Finding]) -> str:
    return ", ".join(dict.fromkeys(finding.rule for finding in found))


def diagnose(found: Sequence[Finding], loss: Trend) -> Diagnosis:
    """Put the findings of a run in order."""
    watching = tuple(f for f in found if f.rule in WATCHING and f.severity != Severity.INFO)
    training = [f for f in found if f.rule not in WATCHING]
    diagnosis = _of_training(training, loss)
    lost = [f for f in watching if f.severity == Severity.ERROR]
    if diagnosis.origin is None and lost:
        diagnosis, watching = _of_training([*training, *lost], loss), tuple(f for f in watching if f not in lost)
    return replace(diagnosis, watching=watching)


def _of_training(found: Sequence[Finding], loss: Trend) -> Diagnosis:
    loud = [finding for finding in found if finding.severity != Severity.INFO]
    if not loud and loss.ill:
        loud = [finding for finding in found if finding.rule in _LEVEL]
    if not loud:
        return Diagnosis(_quiet(loss), None, (), (), _sure(loss), loss)
    origin = min(loud, key=lambda finding: _order(finding, loud))
    rest = [finding for finding in found if finding.rule != origin.rule and finding.severity != Severity.INFO]
    follows = tuple(sorted((f for f in rest if _explained(f, origin)), key=lambda f: f.step))
    beside = tuple(f for f in rest if not _explained(f, origin))
    sure = MEASURED.of_verdict(origin.rule, level_of(origin.rule), situations(origin, beside, loss))
    return Diagnosis(_verdict(origin, loss), origin, follows, beside, round(sure, 2), loss)


def situations(origin: Finding, beside: Sequence[Finding], loss: Trend) -> tuple[str, ...]:
    """What may weaken a verdict: the keys of `confidence.Counts.situations`."""
    holds = {
        "falls": loss.state == State.FALLS and origin.severity != Severity.ERROR,
        "beside": bool(beside),
        "info": origin.severity == Severity.INFO,
    }
    return tuple(name for name, here in holds.items() if here)


def explains(rule: str, other: str) -> bool:
    """Whether a finding of one rule explains one of another."""
    if other in EXPLAINS.get(rule, ()):
        return True
    if other in ONLY_BY and rule not in ONLY_BY[other]:
        return False
    if rule in EXPLAINS.get(other, ()):
        return False
    return _LEVEL.get(rule, 1) < _LEVEL.get(other, 1)


def _after_collapse(finding: Finding, other: Finding) -> bool:
    """Whether it came when the model had said the same for every example for a while: nothing passes back then."""
    return other.rule == "collapse" and finding.rule in _AFTER and finding.step > other.step + LATER


_AFTER = frozenset({"vanishing", "dead", "dead_units", "too_slow"})
LATER = 50  #: steps


def _after_leap(finding: Finding, other: Finding) -> bool:
    """Whether the gradient began to vanish when weights had leapt: what they were made as is gone by then."""
    leapt = other.rule == "update_ratio" and (other.value or 0.0) > LEAP
    return leapt and finding.rule == "vanishing" and finding.step > other.step + FOUND


LEAP = 0.1  #: of a weight's own norm; the rule also finds weights that hardly move
FOUND = 10  #: steps that a vanishing gradient lasts before it is found


def _explained(finding: Finding, other: Finding) -> bool:
    if other.rule == finding.rule or _after_collapse(other, finding) or _after_leap(other, finding):
        return False
    return _after_collapse(finding, other) or _after_leap(finding, other) or explains(other.rule, finding.rule)


def _order(finding: Finding, loud: Sequence[Finding]) -> tuple[object, ...]:
    """Sorting: what another one explains comes last; errors first, then by level, severity and onset."""
    explained = sum(1 for other in loud if _explained(finding, other))
    place = _LEVEL.get(finding.rule, 1)
    return explained > 0, finding.severity != Severity.ERROR, place, -finding.severity.rank, finding.step


def _verdict(origin: Finding, loss: Trend) -> str:
    cause = origin.causes[0] if origin.causes else origin.seen
    where = f" ({origin.rule}{f' of {origin.parameter}' if origin.parameter else ''}, from step {origin.step})"
    return f"most likely {cause}{where}; {said_of_loss(loss)}"


def _quiet(loss: Trend) -> str:
    if loss.state == State.UNKNOWN:
        return "nothing looks ill in the gradients; the loss is not known, so whether it falls cannot be said"
    if loss.ill:
        return f"{said_of_loss(loss)}, and no rule found why"
    if loss.state == State.FALLS:
        return f"nothing looks ill{' so far' * loss.leapt}: {said_of_loss(loss)}"
    return f"nothing looks ill so far; {said_of_loss(loss)}"


def said_of_loss(loss: Trend) -> str:
    """What the loss did, in half a sentence."""
    numbers = f"{format_number(loss.start)} to {format_number(loss.now)}"
    falls = f"the loss falls, from {numbers}"
    if loss.leapt:
        falls = f"the loss leapt at first, from {format_number(loss.begin)}, and falls since, from {numbers}"
    return {
        State.UNKNOWN: "the loss is not known",
        State.YOUNG: f"the loss is known at {loss.points} step{'s' * (loss.points != 1)}, too few to say whether it falls",
        State.SEVERAL: "the losses of several optimizers are no measure of progress",
        State.SIGNED: f"the loss changes its sign ({numbers}), and is no measure of progress",
        State.NONFINITE: "the loss is NaN or infinite",
        State.FALLS: falls,
        State.FLAT: f"the loss does not fall ({numbers})",
        State.RISES: f"the loss rises, from {numbers}",
    }[loss.state]


def _sure(loss: Trend) -> float:
    return 0.0 if loss.ill else round(MEASURED.of_quiet(loss.state), 2)


def level_of(rule: str) -> int:
    """0: how a training is made, 1: what goes wrong in its steps (and rules of one's own), 2: what becomes of it."""
    return _LEVEL.get(rule, 1)
