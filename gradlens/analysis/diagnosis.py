"""The findings of a run put in order: where it began, what follows from that, and how sure this is.

    findings + what the loss did -> origin, what follows from it, what stands beside it -> one sentence

Three things decide which finding is the origin. **What explains what**: a mistake in how the training is made (a softmax
taken twice, a schedule that ran out) explains what goes wrong in its steps, and these explain what becomes of the weights;
`EXPLAINS` has the pairs for which that order is not enough. **Onset**: of two on one level the earlier one. **Severity**:
an info is no origin, unless the loss is known not to fall and nothing louder was found.

Where nothing loud was found, the loss decides what may be said: "nothing looks ill" is said only of a loss that falls, or
one that cannot be judged, and then that is said too.

`confidence` ranks how directly a rule shows its cause: 0.95 of what is read off the graph, the settings or the sums of
gradients, 0.8 of what the course of the run speaks for, 0.6 of what may have many causes; less where other findings stand
beside it unexplained, and where the loss falls all the same. It is no measured frequency yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradlens import markup
from gradlens.analysis.rules.base import format_number
from gradlens.analysis.trend import State, Trend
from gradlens.records import Finding, Severity

#: How a training is made: what is wrong from the first step on, whatever the numbers do.
MADE = (
    "cut",
    "eps",
    "foreign-parameters",
    "foreign_parameters",
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
    "masked-row",
    "edge",
    "batchnorm-of-one",
    "clipped_scaled",
    "last_only",
    "stale",
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
BECOMES = ("update_ratio", "spike", "nonfinite", "collapse", "dead", "shrunk")

_LEVEL = {rule: level for level, rules in enumerate((MADE, DOES, BECOMES)) for rule in rules}

#: Beside the order of levels: a finding that explains another one of its own level, or of one above.
EXPLAINS: dict[str, frozenset[str]] = {
    "cut": frozenset({"absent", "unmoved", "foreign_parameters"}),
    "foreign_parameters": frozenset({"foreign-parameters", "stale", "unmoved", "disagreement"}),
    "foreign-parameters": frozenset({"stale", "unmoved", "disagreement"}),
    "eps": frozenset({"nonfinite"}),
    "unmoved": frozenset({"stale"}),
    "fading": frozenset({"disagreement", "vanishing", "too_slow"}),
    "weight_decay": frozenset({"vanishing", "disagreement", "fading", "too_slow"}),
    "exploding": frozenset({"too_fast", "disagreement"}),
    "too_fast": frozenset({"disagreement"}),
    "update_ratio": frozenset({"dead", "collapse", "spike", "nonfinite"}),
    "spike": frozenset({"nonfinite", "dead", "collapse"}),
    "nonfinite": frozenset({"dead"}),
    "lr_gone": frozenset({"too_slow"}),
    "clipped_scaled": frozenset({"loss_scaled", "too_slow"}),
    "input_scale": frozenset({"identical"}),
}

#: How directly a rule shows its cause; `_USUAL` for others.
CONFIDENCE: dict[str, float] = {
    **dict.fromkeys(MADE, 0.95),
    **dict.fromkeys(("stale", "identical", "input_scale", "undivided", "rounded_away"), 0.9),
    **dict.fromkeys(DOES, 0.8),
    **dict.fromkeys(("too_fast", "disagreement", "absent", "unmoved"), 0.7),
    **dict.fromkeys(BECOMES, 0.6),
}
_USUAL = 0.5


@dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a training, as far as that can be said."""

    verdict: str  #: one sentence
    origin: Finding | None  #: None where nothing was found that is more than an info
    follows: tuple[Finding, ...]  #: what the origin explains, by onset
    beside: tuple[Finding, ...]  #: warnings and errors that it does not explain
    confidence: float  #: from 0 to 1
    loss: Trend

    @property
    def ill(self) -> bool:
        """Whether something is wrong: a warning or an error was found, or the loss is known not to fall."""
        return self.origin is not None or self.loss.ill

    def __str__(self) -> str:
        lines = [self.verdict]
        if self.origin is not None:
            lines.append(f"  seen: {self.origin.seen}")
            if self.origin.remedy:
                lines.append(f"  do: {self.origin.remedy}")
            if self.follows:
                lines.append(f"  follows from it: {', '.join(dict.fromkeys(finding.rule for finding in self.follows))}")
            if self.beside:
                lines.append(f"  beside it: {', '.join(dict.fromkeys(finding.rule for finding in self.beside))}")
            lines.append(f"  confidence: {self.confidence:.0%}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return markup.diagnosis(self)


def diagnose(found: Sequence[Finding], loss: Trend) -> Diagnosis:
    """Put the findings of a run in order."""
    loud = [finding for finding in found if finding.severity != Severity.INFO]
    if not loud and loss.ill:
        loud = [finding for finding in found if finding.rule in _LEVEL]
    if not loud:
        return Diagnosis(_quiet(loss), None, (), (), _sure(loss), loss)
    origin = min(loud, key=lambda finding: _order(finding, loud))
    rest = [finding for finding in found if finding.rule != origin.rule and finding.severity != Severity.INFO]
    follows = tuple(sorted((f for f in rest if explains(origin.rule, f.rule)), key=lambda f: f.step))
    beside = tuple(f for f in rest if not explains(origin.rule, f.rule))
    confidence = CONFIDENCE.get(origin.rule, _USUAL)
    confidence *= 0.9 if beside else 1.0
    confidence *= 0.8 if loss.state == State.FALLS and origin.severity != Severity.ERROR else 1.0
    confidence *= 0.7 if origin.severity == Severity.INFO else 1.0
    return Diagnosis(_verdict(origin, loss), origin, follows, beside, round(confidence, 2), loss)


def explains(rule: str, other: str) -> bool:
    """Whether a finding of one rule explains one of another."""
    if other in EXPLAINS.get(rule, ()):
        return True
    if rule in EXPLAINS.get(other, ()):
        return False
    return _LEVEL.get(rule, 1) < _LEVEL.get(other, 1)


def _order(finding: Finding, loud: Sequence[Finding]) -> tuple[object, ...]:
    """Sorting: what another one explains comes last, then by level, severity and onset."""
    explained = sum(1 for other in loud if other.rule != finding.rule and explains(other.rule, finding.rule))
    place = _LEVEL.get(finding.rule, 1)
    return explained > 0, place, -finding.severity.rank, finding.step


def _verdict(origin: Finding, loss: Trend) -> str:
    cause = origin.causes[0] if origin.causes else origin.seen
    where = f" ({origin.rule}{f' of {origin.parameter}' if origin.parameter else ''}, from step {origin.step})"
    return f"most likely {cause}{where}; {said_of_loss(loss)}"


def _quiet(loss: Trend) -> str:
    if loss.state == State.UNKNOWN:
        return "nothing looks ill in the gradients; the loss is not known, so whether it falls cannot be said"
    if loss.ill:
        return f"{said_of_loss(loss)}, and no rule knows why"
    if loss.state == State.FALLS:
        return f"nothing looks ill: {said_of_loss(loss)}"
    return f"nothing looks ill so far; {said_of_loss(loss)}"


def said_of_loss(loss: Trend) -> str:
    """What the loss did, in half a sentence."""
    numbers = f"{format_number(loss.start)} to {format_number(loss.now)}"
    return {
        State.UNKNOWN: "the loss is not known",
        State.YOUNG: f"the loss is known at {loss.points} steps, too few to say whether it falls",
        State.SEVERAL: "the losses of several optimizers are no measure of progress",
        State.SIGNED: f"the loss changes its sign ({numbers}), and is no measure of progress",
        State.NONFINITE: "the loss is NaN or infinite",
        State.FALLS: f"the loss falls, from {numbers}",
        State.FLAT: f"the loss does not fall ({numbers})",
        State.RISES: f"the loss rises, from {numbers}",
    }[loss.state]


def _sure(loss: Trend) -> float:
    return {State.FALLS: 0.9, State.FLAT: 0.0, State.RISES: 0.0, State.NONFINITE: 0.0}.get(loss.state, 0.5)
