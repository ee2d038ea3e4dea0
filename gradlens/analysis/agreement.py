"""How often the partial of one weight had the same sign, and which way that says the weight should move.

    p = P(|X - n/2| >= |same - n/2|),   X the number of heads in n tosses of a fair coin

The two-sided sign test: n steps kept the weight, `same` of them with the sign that its partial has now. Steps while weights
move are no independent sample, and a weight is kept only where its partial was large: p is a measure of agreement, and no
chance of being wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradlens.records import Direction

LEAST = 8  #: steps that agree, below which nothing is said
LEVEL = 0.05  #: of the test
NOT_SURE = "not sure"

#: For readers of a verdict.
MEANING = (
    f"The verdict is a direction where the partial had the sign that it has now on at least {LEAST} of the steps that kept "
    f"this weight, and on so many that a two-sided sign test has p < {LEVEL}. Steps while weights move are no independent "
    "sample, and a weight is kept only where its partial is among the largest: gradlens.survey() holds the weights still."
)


@dataclass(frozen=True)
class Agreement:
    """Of the steps that kept a weight, those at which its partial had the sign that it has now."""

    same: int
    kept: int

    @classmethod
    def of(cls, signs: tuple[int, int], partial: float) -> Agreement:
        """From how often the partial was above and below 0, and what it is now."""
        above, below = signs
        return cls(above if partial > 0 else below if partial < 0 else 0, above + below)

    @property
    def p(self) -> float:
        """Of the two-sided sign test."""
        return sign_test(self.same, self.kept)

    def verdict(self, direction: str) -> str:
        """That direction, or that it is not sure: too few steps agree, or too many do not."""
        known = direction in (Direction.INCREASE, Direction.DECREASE)
        sure = known and self.same >= LEAST and 2 * self.same > self.kept and self.p < LEVEL
        return str(direction) if sure else NOT_SURE

    def __str__(self) -> str:
        return f"same sign on {self.same:,} of {self.kept:,} kept step{'s' * (self.kept != 1)}"


def sign_test(same: int, kept: int) -> float:
    """The two-sided p value of `same` equal signs among `kept`, where either sign is as likely; 1 where nothing was kept."""
    most = max(same, kept - same)
    if 2 * most == kept:
        return 1.0
    term = math.exp(math.lgamma(kept + 1) - math.lgamma(most + 1) - math.lgamma(kept - most + 1) - kept * math.log(2))
    tail = 0.0
    for heads in range(most, kept + 1):
        tail += term
        term *= (kept - heads) / (heads + 1)
    return min(2 * tail, 1.0)
