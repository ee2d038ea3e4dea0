"""Illnesses of a training, one class each: called with the history, a rule yields what it found.

    gradlens.watch(model, optimizer, rules=[*gradlens.rules.DEFAULT, gradlens.rules.Absent(steps=50), my_rule])

A rule is any callable `history -> findings`: a frozen class as here, or a plain function.
"""

from __future__ import annotations

from gradlens.analysis.rules.absent import Absent, Frozen, Uncaptured
from gradlens.analysis.rules.accumulation import LastOnly, Undivided
from gradlens.analysis.rules.activations import DeadUnits, Saturated
from gradlens.analysis.rules.base import Rule, judged, lasting
from gradlens.analysis.rules.collapse import Collapse, DiscriminatorWon, EmptyLatent
from gradlens.analysis.rules.dead import Dead
from gradlens.analysis.rules.exploding import Exploding, Spike
from gradlens.analysis.rules.graph import Cut, GraphAudit
from gradlens.analysis.rules.learning import Disagreement, TooFast, TooSlow
from gradlens.analysis.rules.lost import Lost, Unstepped
from gradlens.analysis.rules.nonfinite import NonFinite
from gradlens.analysis.rules.rare import RareClass
from gradlens.analysis.rules.scaling import ClippedScaled, LossScaled, Skipped
from gradlens.analysis.rules.settings import Epsilon, EvalMode, LearningRateGone, WeightDecay
from gradlens.analysis.rules.stale import LeftOver, Stale
from gradlens.analysis.rules.structure import Fading, Identical, InputScale
from gradlens.analysis.rules.updates import RoundedAway, Shrunk, Unmoved, UpdateRatio
from gradlens.analysis.rules.vanishing import Vanishing

DEFAULT: tuple[Rule, ...] = (
    NonFinite(),
    Exploding(),
    Spike(),
    Vanishing(),
    Dead(),
    Absent(),
    Frozen(),
    Uncaptured(),
    Lost(),
    Unstepped(),
    UpdateRatio(),
    RoundedAway(),
    Shrunk(),
    Unmoved(),
    Stale(),
    LeftOver(),
    LossScaled(),
    ClippedScaled(),
    Skipped(),
    GraphAudit(),
    Cut(),
    LearningRateGone(),
    Epsilon(),
    EvalMode(),
    WeightDecay(),
    TooSlow(),
    TooFast(),
    Disagreement(),
    Identical(),
    InputScale(),
    Fading(),
    LastOnly(),
    Undivided(),
    Collapse(),
    EmptyLatent(),
    DiscriminatorWon(),
    RareClass(),
    DeadUnits(),
    Saturated(),
)

__all__ = [
    "DEFAULT",
    "Rule",
    # the gradient's size
    "NonFinite",
    "Exploding",
    "Spike",
    "Vanishing",
    "Dead",
    # what it does not reach
    "Absent",
    "Frozen",
    "Uncaptured",
    "Lost",
    "Unstepped",
    # what the optimizer does with it
    "UpdateRatio",
    "RoundedAway",
    "Shrunk",
    "Unmoved",
    "Stale",
    "LeftOver",
    # loss scaling
    "LossScaled",
    "ClippedScaled",
    "Skipped",
    # the loss's graph
    "GraphAudit",
    "Cut",
    # what the training was told to do
    "LearningRateGone",
    "Epsilon",
    "EvalMode",
    "WeightDecay",
    # a loss that does not fall
    "TooSlow",
    "TooFast",
    "Disagreement",
    # how the model was made
    "Identical",
    "InputScale",
    "Fading",
    # several backwards to a step
    "LastOnly",
    "Undivided",
    # the same answer to everything
    "Collapse",
    "EmptyLatent",
    "DiscriminatorWon",
    "RareClass",
    # what modules make of a batch, where that is seen
    "DeadUnits",
    "Saturated",
    # for rules of one's own
    "lasting",
    "judged",
]
