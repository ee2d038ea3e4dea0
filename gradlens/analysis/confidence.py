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
        "absent": (9, 9),
        "batchnorm-of-one": (2, 2),
        "broadcast": (8, 8),
        "clamped-logits": (7, 7),
        "clipped_scaled": (5, 5),
        "collapse": (2, 2),
        "cut": (5, 5),
        "dead": (3, 4),
        "disagreement": (6, 6),
        "discriminator_won": (3, 3),
        "empty_latent": (3, 3),
        "eps": (3, 3),
        "eval_mode": (5, 5),
        "exploding": (11, 13),
        "fading": (8, 8),
        "foreign-parameters": (11, 11),
        "identical": (6, 6),
        "input_scale": (5, 6),
        "last_only": (4, 4),
        "lost": (5, 5),
        "lr_gone": (9, 9),
        "no-log": (5, 5),
        "nonfinite": (17, 17),
        "rare_class": (2, 2),
        "rounded_away": (6, 6),
        "sigmoid-twice": (5, 5),
        "softmax-of-one": (4, 4),
        "softmax-over-batch": (3, 3),
        "softmax-twice": (8, 8),
        "softmax-wrong-axis": (2, 2),
        "spike": (2, 2),
        "stale": (11, 11),
        "summed-loss": (3, 3),
        "target-with-gradient": (4, 4),
        "too_fast": (6, 7),
        "too_slow": (12, 14),
        "undivided": (2, 2),
        "unmoved": (6, 6),
        "unregistered": (5, 5),
        "unstepped": (3, 3),
        "update_ratio": (14, 16),
        "vanishing": (2, 2),
        "weight_decay": (7, 7),
    },
    levels=((136, 137), (75, 80), (38, 41)),
    situations={"beside": (12, 12), "falls": (93, 95), "info": (0, 0)},
    quiet={"falls": (157, 164), "flat": (3, 4), "several": (7, 7), "signed": (2, 2)},
)
