"""Models that say the same whatever they are given: collapsed features, an empty latent, a rare class that is never said."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
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
)
from gradlens.analysis.trend import State, Trend
from gradlens.facts import Features, Graph, words
from gradlens.records import Finding, Severity


@dataclass(frozen=True)
class Collapse(Occasional):
    """What the last layer gets, or what it makes of it, is nearly the same for every example.

    `spread`: the standard deviation over the batch beside the rms, of all features. Trainings that learn have 0.2 to 0.8;
    deep networks that pass nothing on 0.02 and less, and a collapsed embedding 0. Features that had a spread and lost it
    are a collapse as soon as the loss has stopped falling; features that never had one may get it yet (a vision
    transformer took 50 steps), so these are asked after `steps`. An output whose deviation fell below `share` of its
    largest while its features drew together is one as well, whatever the loss does: 0 is easy to reach by a constant. Where
    the loss compares what the model says with what it says (pairs, triplets), the features need not draw together: an
    output that shrinks from look to look, below `together` of its largest, is enough; healthy embeddings grow.
    """

    spread: float = 0.03
    share: float = 0.03
    together: float = 0.1
    steps: int = 100

    name: ClassVar[str] = "collapse"

    def __post_init__(self) -> None:
        check_number(self, "spread", most=0.5)
        check_number(self, "share", most=0.5)
        check_number(self, "together", most=0.5)
        check_steps(self)

    def look(self, history: History) -> Iterator[Finding]:
        """At all looks at the features."""
        trend = loss_trend(history)
        if trend.state not in (State.FLAT, State.RISES, State.FALLS):
            return
        for layer, facts in (features(history) or as_features(history)).items():
            if ":" in layer or len(facts) < 4 or facts[-1].backward:
                continue
            alone = compares_itself(history)
            if not (self._collapsed(facts, trend) or (self._shrinks(facts) and alone)):
                continue
            now, first = facts[-1], facts[0]
            causes = _causes(first.spread, self.spread, now.dead)
            dead = f"; {now.dead:.0%} of the features are 0 for every example" if now.dead > 0.5 else ""
            made = max((fact.output_spread for fact in facts), default=math.nan)
            shrank = f", its output by {now.output_spread / made:.2%} of what it did at most" if made > 0 else ""
            yield Finding(
                rule=self.name,
                step=newest_step(history),
                severity=Severity.WARNING,
                seen=f"the model says nearly the same for every example: the features that {layer or 'the last layer'!r} "
                f"gets differ by {format_number(now.spread)} of their size over the batch (at the start by "
                f"{format_number(first.spread)}){shrank}{dead}{where_lost(history, self.spread)}, and {_said(trend)}",
                causes=(_ALONE, *causes) if alone else causes,
                remedy=f"{_APART}; a smaller learning rate"
                if alone
                else f"a smaller learning rate; {_APART}; in a deep model normalisation or kaiming_normal_",
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

    def _shrinks(self, facts: Sequence[Features]) -> bool:
        """Whether the output's deviation is a small part of its largest, and fell at each of the last looks."""
        made = [fact.output_spread for fact in facts]
        falls = all(after < before for before, after in pairwise(made[-4:]))
        return falls and len(made) > 6 and max(made[-2:]) < self.together * max(made)


#: Operations of two inputs that say how far one is from the other.
_DISTANCES = words("MseLoss L1Loss SmoothL1Loss HuberLoss Sub Cdist EuclideanDist")


def compares_itself(history: History) -> bool:
    """Whether a loss is a distance between two answers of one layer of the model: nothing else keeps them apart."""
    return any(_compares_itself(graph) for graph in graphs(history))


def _compares_itself(graph: Graph) -> bool:
    for at in range(min(len(graph.operations), NEAR)):
        op = graph.operations[at]
        if op.name in _DISTANCES and len(op.inputs) == 2 and min(op.inputs) >= 0 and _before_layers(graph, at):
            one, other = ({graph.layer_of(layer) for layer in graph.layers_below(i)} for i in op.inputs)
            if one and one == other:
                return True
    return False


def _before_layers(graph: Graph, at: int) -> bool:
    """Whether no layer lies between an operation and the loss."""
    return not any(graph.is_layer(user) for user in graph.above(at) - {at})


#: Operations from the loss on, among which a distance is looked for.
NEAR = 40
#: A loss that fell at first and stands since this share of the run.
STANDS = 0.7


_ALONE = (
    "the loss compares the model's answers with each other, and a constant answer is the cheapest: nothing keeps them apart"
)
_APART = "for embeddings a loss that is 0 only when they differ (negatives, semi-hard triplets, a variance term)"


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
