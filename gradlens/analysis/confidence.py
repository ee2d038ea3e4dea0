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
        "absent": (10, 10),
        "batchnorm-of-one": (3, 3),
        "broadcast": (9, 9),
        "clamped-logits": (7, 7),
        "clipped_scaled": (5, 5),
        "collapse": (6, 6),
        "cut": (5, 5),
        "dead": (7, 7),
        "disagreement": (6, 6),
        "discriminator_won": (3, 3),
        "edge": (1, 1),
        "empty_latent": (3, 3),
        "eps": (3, 3),
        "eval_mode": (6, 6),
        "exploding": (11, 12),
        "fading": (8, 8),
        "foreign-parameters": (11, 11),
        "identical": (6, 6),
        "input_scale": (5, 6),
        "last_only": (4, 4),
        "left_over": (1, 1),
        "lost": (5, 5),
        "lr_gone": (10, 10),
        "no-log": (5, 5),
        "nonfinite": (18, 18),
        "out-of-range": (1, 1),
        "rare_class": (6, 6),
        "rounded_away": (6, 6),
        "sigmoid-twice": (6, 6),
        "softmax-of-one": (4, 4),
        "softmax-over-batch": (3, 3),
        "softmax-twice": (8, 8),
        "softmax-wrong-axis": (2, 2),
        "spike": (2, 2),
        "stale": (11, 11),
        "summed-loss": (3, 3),
        "target-with-gradient": (4, 4),
        "too_fast": (6, 7),
        "too_slow": (12, 12),
        "undivided": (3, 3),
        "unmoved": (6, 6),
        "unregistered": (6, 6),
        "unstepped": (3, 3),
        "update_ratio": (15, 17),
        "vanishing": (2, 2),
        "weight_decay": (7, 7),
    },
    levels=((146, 147), (80, 82), (48, 50)),
    situations={"beside": (18, 18), "falls": (105, 106), "info": (0, 0)},
    quiet={"falls": (171, 177), "flat": (3, 3), "several": (5, 5), "signed": (5, 5)},
)
