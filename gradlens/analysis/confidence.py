"""How often a diagnosis was right, by the rule that it rests on: measured on trainings, and kept here as counts.

    P(right | rule)        (right + 2 L) / (verdicts + 2), with L the share of its level: few verdicts say little
    P(right | situation)   beside that of all verdicts: a factor of at most 1, for what weakens a verdict, and a half
                           where it was never met

A verdict is right where the rule at its origin says the mistake that was made; a warning on a healthy training is wrong.
`python benchmarks/trainings.py --calibrate benchmarks/trainings.csv` writes `MEASURED`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Count = tuple[int, int]  #: verdicts that were right, verdicts

_FEW = 2.0


@dataclass(frozen=True)
class Counts:
    """Verdicts that were right, and all, of some trainings."""

    rules: Mapping[str, Count] = field(default_factory=dict)  #: by the rule at the origin
    levels: tuple[Count, ...] = ((0, 0), (0, 0), (0, 0))  #: how a training is made, what its steps do, what becomes of it
    #: What may weaken a verdict: a loss that falls all the same, loud findings beside it, an origin that is an info.
    situations: Mapping[str, Count] = field(default_factory=dict)
    quiet: Mapping[str, Count] = field(default_factory=dict)  #: nothing was found: by what the loss did

    def of_verdict(self, rule: str, level: int, situations: Iterable[str]) -> float:
        """How sure a verdict is that has this rule at its origin."""
        result = share(self.rules.get(rule, (0, 0)), share(self.levels[level]))
        usual = share((sum(right for right, _ in self.levels), sum(of for _, of in self.levels)))
        for situation in situations:
            result *= min(share(self.situations.get(situation, (0, 0)), usual / 2) / usual, 1.0)
        return result

    def of_quiet(self, state: str) -> float:
        """How sure it is that a training is well in which nothing was found, by what its loss did."""
        return share(self.quiet.get(state, (0, 0)))


def share(count: Count, prior: float = 0.5) -> float:
    """The share that was right, drawn towards `prior` where there are few."""
    right, of = count
    return (right + _FEW * prior) / (of + _FEW)


# --- written by benchmarks/trainings.py -----------------------------------------------------------------------------

MEASURED = Counts(
    rules={
        "absent": (7, 7),
        "batchnorm-of-one": (1, 1),
        "broadcast": (4, 4),
        "clamped-logits": (3, 3),
        "clipped_scaled": (2, 2),
        "collapse": (2, 2),
        "cut": (2, 2),
        "dead": (3, 3),
        "disagreement": (3, 4),
        "discriminator_won": (1, 1),
        "empty_latent": (1, 1),
        "eps": (1, 1),
        "eval_mode": (2, 2),
        "exploding": (7, 7),
        "fading": (4, 4),
        "foreign-parameters": (5, 5),
        "identical": (3, 3),
        "input_scale": (2, 3),
        "last_only": (2, 2),
        "lost": (3, 3),
        "lr_gone": (4, 4),
        "no-log": (2, 2),
        "nonfinite": (10, 10),
        "rare_class": (1, 1),
        "rounded_away": (4, 4),
        "sigmoid-twice": (2, 2),
        "softmax-of-one": (2, 2),
        "softmax-over-batch": (1, 1),
        "softmax-twice": (4, 4),
        "softmax-wrong-axis": (1, 1),
        "spike": (1, 1),
        "stale": (7, 7),
        "summed-loss": (1, 1),
        "target-with-gradient": (2, 2),
        "too_fast": (5, 6),
        "too_slow": (5, 5),
        "undivided": (1, 1),
        "unmoved": (3, 3),
        "unregistered": (2, 2),
        "unstepped": (2, 2),
        "update_ratio": (8, 10),
        "vanishing": (2, 2),
        "weight_decay": (4, 4),
    },
    levels=((65, 66), (43, 45), (24, 26)),
    situations={"beside": (7, 7), "falls": (44, 45), "info": (0, 0)},
    quiet={"falls": (89, 92), "flat": (2, 2), "several": (5, 5)},
)
