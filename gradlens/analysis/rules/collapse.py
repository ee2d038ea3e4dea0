"""Models that say the same whatever they are given: collapsed features, an empty latent, a rare class that is never said."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradlens.analysis.history import History
from gradlens.analysis.rules.activations import as_features, said_of, where_lost
from gradlens.analysis.rules.base import check_number, check_steps, format_number
from gradlens.analysis.rules.occasional import (
    Occasional,
    features,
    graphs,
    loss_trend,
    middle,
    newest_step,
    operations,
)
from gradlens.analysis.trend import State, Trend
from gradlens.facts import Features
from gradlens.records import Finding, Severity, Stage


@dataclass(frozen=True)
class Collapse(Occasional):
    """What the last layer gets, or what it makes of it, is nearly the same for every example.

    `spread`: the standard deviation over the batch beside the rms, of all features. Trainings that learn have 0.2 to 0.8;
    deep networks that pass nothing on 0.02 and less, and a collapsed embedding 0. Features that had a spread and lost it
    are a collapse as soon as the loss has stopped falling; features that never had one may get it yet (a vision
    transformer took 50 steps), so these are asked after `steps`. An output whose deviation fell below `share` of its
    largest while its features drew together is one as well, whatever the loss does: 0 is easy to reach by a constant.
    """

    spread: float = 0.03
    share: float = 0.03
    steps: int = 100

    name: ClassVar[str] = "collapse"

    def __post_init__(self) -> None:
        check_number(self, "spread", most=0.5)
        check_number(self, "share", most=0.5)
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """At all looks at the features."""
        trend = loss_trend(history)
        if trend.state not in (State.FLAT, State.RISES, State.FALLS):
            return
        for layer, facts in (features(history) or as_features(history)).items():
            if ":" in layer or len(facts) < 4 or facts[-1].backward or not self._collapsed(facts, trend):
                continue
            now, first = facts[-1], facts[0]
            dead = f"; {now.dead:.0%} of the features are 0 for every example" if now.dead > 0.5 else ""
            made = max((fact.output_spread for fact in facts), default=math.nan)
            shrank = f", its output by {now.output_spread / made:.2%} of what it did" if made > 0 else ""
            yield Finding(
                rule=self.name,
                step=newest_step(history),
                severity=Severity.WARNING,
                seen=f"the model says nearly the same for every example: the features that {layer or 'the last layer'!r} "
                f"gets differ by {format_number(now.spread)} of their size over the batch (at the start by "
                f"{format_number(first.spread)}){shrank}{dead}{where_lost(history, self.spread)}, and {_said(trend)}",
                causes=_causes(first.spread, self.spread, now.dead),
                remedy="a smaller learning rate; for embeddings a loss that is 0 only when they differ (semi-hard "
                "triplets, a variance term); in a deep model normalisation or kaiming_normal_",
                value=now.spread,
            )

    def _collapsed(self, facts: Sequence[Features], trend: Trend) -> bool:
        now, before, first = facts[-1], facts[-2], facts[0]
        stands = trend.state != State.FALLS or trend.flat_since < STANDS
        close = now.spread < self.spread
        if close and now.spread < 0.2 * first.spread:
            return stands
        if close and before.spread < self.spread and trend.points >= self.steps:
            return trend.state != State.FALLS and not now.output_spread > 2 * first.output_spread
        most = max(fact.output_spread for fact in facts)
        shrank = max(now.output_spread, before.output_spread) < self.share * most
        return shrank and now.spread < 0.5 * max(fact.spread for fact in facts)


#: A loss that fell at first and stands since this share of the run.
STANDS = 0.7


def _said(trend: Trend) -> str:
    return "the loss falls" if trend.state == State.FALLS else "the loss does not fall"


def _causes(first: float, least: float, dead: float) -> tuple[str, ...]:
    collapsed = "the output collapsed to a constant: to say the same for all was the cheapest way to lower the loss"
    dying = "units that died (ReLUs that are shut), after steps that were too large"
    weak = "a signal that fades on its way through a deep model: weights that start too small"
    if first < least:
        return (weak, collapsed)
    return (dying, collapsed) if dead > 0.9 else (collapsed, dying)


@dataclass(frozen=True)
class EmptyLatent(Occasional):
    """A latent z = mu + e * sigma whose mu hardly depends on the input: the decoder gets noise alone (posterior collapse).

    Measured over the batch: the standard deviation of mu beside sigma. At the start of a training it is small too (0.05),
    so it is asked late, and a latent that is waking up is left alone.
    """

    least: float = 0.05
    steps: int = 100

    name: ClassVar[str] = "empty_latent"

    def __post_init__(self) -> None:
        check_number(self, "least", most=1.0)
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """At the newest look."""
        for layer, facts in features(history).items():
            kind, _, name = layer.partition(":")
            if kind != "latent" or len(facts) < 5 or newest_step(history) - facts[0].step < self.steps:
                continue
            ratios = [fact.spread / max(fact.rms, 1e-30) for fact in facts]
            if ratios[-1] > self.least or ratios[-1] > ratios[-3]:
                continue
            yield Finding(
                rule=self.name,
                step=newest_step(history),
                severity=Severity.WARNING,
                seen=f"the latent carries nothing: {name or 'mu'} differs between examples by {format_number(ratios[-1])} "
                f"of the noise that is added (at the start by {format_number(ratios[0])}{said_of(history, name)}), so the "
                "decoder gets noise alone",
                causes=(
                    "posterior collapse: the KL term is too heavy beside the reconstruction (one summed, the other "
                    "averaged)",
                    "a decoder that does without the latent",
                ),
                remedy="sum or average both terms alike; warm the KL up from 0, or give it a weight below 1 (beta-VAE)",
                value=ratios[-1],
            )


@dataclass(frozen=True)
class DiscriminatorWon(Occasional):
    """One of two opponents has nothing left to learn, and the other nothing to learn from.

    The discriminator is the part that both losses reach. Its loss fell below `share` of where it began, and the gradient
    that reaches the other part fell tenfold, or its loss rose threefold. Losses below 0 (a critic's) say nothing here.
    """

    share: float = 0.05
    steps: int = 40

    name: ClassVar[str] = "discriminator_won"

    def __post_init__(self) -> None:
        check_number(self, "share", most=0.5)
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """Of two backward passes a step."""
        roles = _opponents(history)
        if roles is None:
            return
        own, other, judge, maker = roles
        _, losses = history.course.series(f"loss_{own}")
        _, theirs = history.course.series(f"loss_{other}")
        _, norms = history.course.series(f"norm_{other}")
        if len(losses) < self.steps or len(theirs) < self.steps or len(norms) < self.steps:
            return
        k = max(5, len(losses) // 20)
        began, now = float(np.max(losses[:k])), middle(losses[-2 * k :])
        if (losses < 0).any() or not began > 0 or not now < self.share * began:
            return
        faded = middle(norms[-2 * k :]) / max(float(np.max(norms[:k])), 1e-30)
        rose = middle(np.abs(theirs[-2 * k :])) / max(middle(np.abs(theirs[:k])), 1e-30)
        if not (faded < 0.1 or rose > 3):
            return
        yield Finding(
            rule=self.name,
            step=newest_step(history),
            severity=Severity.WARNING,
            seen=f"the discriminator {judge!r} has won: its loss fell from {format_number(began)} to {format_number(now)}, "
            f"and what its "
            f"verdict "
            f"tells {maker!r} " + (f"fell to {faded:.1%} of what it was" if faded < 0.1 else "no longer lowers its loss"),
            causes=(
                "a discriminator that is too strong beside the generator: larger, or with a larger learning rate",
                "a saturating loss log(1 - D(G(z))), which has no gradient where the discriminator is sure",
            ),
            remedy="the loss -log D(G(z)) for the generator; a smaller learning rate, dropout or noise for the "
            "discriminator; or a "
            "Wasserstein critic",
            value=now / began,
        )


def _opponents(history: History) -> tuple[int, int, str, str] | None:
    """`(pass of the discriminator, pass of the generator, its part, its part)`, where two losses reach one part and two."""
    looked = {graph.backward: {name.partition(".")[0] for name in graph.leaves} for graph in graphs(history)}
    for own, alone in looked.items():
        for other, both in looked.items():
            makers = both - alone
            if own != other and len(alone) == 1 and alone < both and makers:
                return own, other, next(iter(alone)), sorted(makers)[0]
    return None


@dataclass(frozen=True)
class RareClass(Occasional):
    """A yes-or-no question where "no" is said to everything: the rare class is never predicted.

    Where the answer p does not depend on the input, the loss of a batch is a straight line in its share of positives s, and
    the gradient of the output's bias is p - s. So the batch losses lie on a line over that gradient, and the level of the
    loss is the entropy of p. Both are asked: `fit` is the least share of the variance that the line explains. The gradient
    varies as s does, by p (1 - p) / n in batches of n; where it varies far more, the loss has weights (`pos_weight`).
    """

    fit: float = 0.7
    most: float = 0.15
    steps: int = 60

    name: ClassVar[str] = "rare_class"

    def __post_init__(self) -> None:
        check_number(self, "fit", most=1.0)
        check_number(self, "most", most=0.5)
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """Of a model with one output."""
        if "BinaryCrossEntropyWithLogits" not in operations(history) and "BinaryCrossEntropy" not in operations(history):
            return
        layer = next((name for name in reversed(list(features(history))) if ":" not in name), None)
        newest = history.latest(Stage.BACKWARD)
        bias = f"{layer}.bias" if layer else "bias"
        if layer is None or newest is None or bias not in newest.parameters.position or newest.value("numel", bias) != 1:
            return
        pairs = [
            (float(s.value("sum", bias)), s.loss)
            for s in history.recent(300, Stage.BACKWARD)
            if bias in s.parameters.position and "loss" in s.scalars
        ]
        if len(pairs) < 2 * self.steps:
            return
        gradient, losses = np.asarray(pairs[-300:]).T
        half, quarter = len(losses) // 2, len(losses) // 4
        if losses[-quarter:].mean() < 0.75 * losses[half:-quarter].mean():
            return  # it is still learning
        share, slope, fit = rare_share(gradient[half:], losses[half:])
        if not (fit > self.fit and 0 < share < self.most and slope < 0):
            return
        if share * (1 - share) < CHANCE * _examples(history) * float(gradient[half:].var()):
            return  # the gradient varies more than the draw of a batch explains: its loss is weighted, or the answer moves
        yield Finding(
            rule=self.name,
            step=newest_step(history),
            severity=Severity.WARNING,
            seen=f"the rare class is never predicted: batch losses follow the share of positives in a batch alone "
            f"({fit:.0%} of "
            f"their variance), as if the answer were {share:.1%} for every input",
            causes=(
                f"class imbalance: about {share:.1%} of the examples are positive, and to say no to all is a low loss "
                f"already",
            ),
            remedy=f"pos_weight=torch.tensor([{max(1, round((1 - share) / share))}.]) in the loss, or a sampler that draws "
            f"positives "
            "more often; judge by recall or average precision, not by accuracy",
            value=share,
        )


#: Of the batch's size, the least that the variance of its share of positives may amount to.
CHANCE = 0.3


def _examples(history: History) -> int:
    """How many examples a batch has: the first axis of what the layers near the loss made; 8 where it is not known."""
    shapes = [op.shape for graph in graphs(history) for op in graph.operations[:12] if op.shape]
    return max((shape[0] for shape in shapes), default=8)


def rare_share(gradient: np.ndarray, losses: np.ndarray) -> tuple[float, float, float]:
    """`(share of positives, slope, share of variance explained)` of batch losses over the gradient p - s of the bias.

    L = -s ln p - (1 - s) ln(1 - p) has the slope ln(p / (1 - p)) over p - s. Its mean is the
    entropy of p, which gives p more exactly.
    """
    if len(losses) < 3 or np.ptp(gradient) == 0 or not np.isfinite(losses).all() or not np.isfinite(gradient).all():
        return float("nan"), float("nan"), 0.0
    slope, offset = np.polyfit(gradient, losses, 1)
    rest = losses - (slope * gradient + offset)
    explained = 1 - float(rest.var() / max(float(losses.var()), 1e-30))
    return _entropic(float(losses.mean())), float(slope), explained


def _entropic(loss: float) -> float:
    """The share p below a half whose entropy is this loss."""
    low, high = 0.0, 0.5
    for _ in range(40):
        p = (low + high) / 2
        entropy = -p * np.log(max(p, 1e-300)) - (1 - p) * np.log1p(-p)
        low, high = (p, high) if entropy < loss else (low, p)
    return (low + high) / 2
