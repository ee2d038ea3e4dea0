"""Units that are never on, outputs at the ends of their range, and where examples become the same."""

import math

import numpy as np
import pytest

from gradlens import rules
from gradlens.activations import Activations
from gradlens.analysis.diagnosis import diagnose
from gradlens.analysis.rules.activations import as_features, made_lately
from gradlens.analysis.trend import trend
from gradlens.facts import Features
from tests.analysis.rules.courses import falling, flat, history_of, looks, passes, rules_of

STEPS = range(0, 200, 2)
WELL = ("ReLU", 0.5, 0.2, math.nan)
LINEAR = ("Linear", 0.5, 0.0, math.nan)


def found(rule, loss, steps=STEPS, **modules):
    return rules_of(rule, history_of(loss, *passes(steps, **modules)))


@pytest.mark.parametrize(
    ("loss", "dead", "said"),
    [
        (flat(), 0.95, "warning"),
        (falling(), 0.95, "info"),
        (flat(), 0.85, None),
        (flat(), [0.95] * 99 + [0.1], None),  # not at each of the last steps
        (flat(), [0.1] * 80 + [0.95] * 20, "warning"),
    ],
)
def test_units_that_are_0_for_every_example(loss, dead, said):
    """Nearly all of a rectifier's, at each of the last steps; loud where the loss does not fall."""
    relu = [("ReLU", 0.5, d, math.nan) for d in dead] if isinstance(dead, list) else ("ReLU", 0.5, dead, math.nan)
    assert found(rules.DeadUnits(), loss, a=LINEAR, b=relu, c=LINEAR) == [("dead_units", said)] * (said is not None)


def test_the_first_dead_module_is_named():
    """What lies behind it follows."""
    dead = ("ReLU", 0.1, 1.0, math.nan)
    (finding,) = rules.DeadUnits()(history_of(flat(), *passes(STEPS, a=WELL, b=dead, c=dead, d=dead)))
    assert "100% of what 'b' (ReLU) makes is 0 for every example" in finding.seen
    assert "in 2 more modules" in finding.seen


def test_only_rectifiers_and_batches_that_say_something():
    """A dropout's zeros are meant, and four examples may all be off."""
    dead = ("Dropout", 0.5, 1.0, math.nan)
    assert found(rules.DeadUnits(), flat(), a=dead) == []
    small = Activations(199, 0, 0.0, ("a",), ("ReLU",), (1,), np.array([[400.0, 0, 400, 100, 100, 100, math.nan]]))
    assert rules_of(rules.DeadUnits(), history_of(flat(), small)) == []


@pytest.mark.parametrize(
    ("loss", "share", "said"), [(flat(), 0.9, "warning"), (falling(), 0.9, "info"), (flat(), 0.7, None)]
)
def test_outputs_at_the_ends_of_their_range(loss, share, said):
    """A tanh or sigmoid that passes no gradient back."""
    tanh = ("Tanh", 0.5, 0.0, share)
    assert found(rules.Saturated(), loss, a=LINEAR, b=tanh, c=LINEAR) == [("saturated", said)] * (said is not None)


def test_the_last_module_may_be_sure():
    """A sigmoid at the model's end says yes and no."""
    assert found(rules.Saturated(), flat(), a=LINEAR, b=("Sigmoid", 0.5, 0.0, 1.0)) == []


def test_nothing_is_asked_of_a_young_run_or_without_activations():
    """Without the feature, or before so many steps, both are silent."""
    dead = ("ReLU", 0.1, 1.0, 1.0)
    assert rules_of(rules.DeadUnits(), history_of(flat())) == []
    young = history_of(flat(steps=10), *passes(range(10), a=dead, b=LINEAR), steps=10)
    assert rules_of(rules.DeadUnits(), young) == []
    assert rules_of(rules.Saturated(), young) == []


def test_collapse_says_where_examples_become_the_same():
    """The two modules between which the spread is lost."""
    same = ("Linear", 0.001, 0.0, math.nan)
    history = history_of(flat(), *looks([0.4, 0.3, 0.2, 0.1, 0.02, 0.01]), *passes(range(200), a=WELL, b=same, c=same))
    (finding,) = rules.Collapse()(history)
    assert "what 'a' (ReLU) makes differs by 0.5 of its size, and what 'b' (Linear) makes of it by 0.001" in finding.seen


def test_collapse_asks_activations_where_the_graph_tells_nothing():
    """A last layer whose features are not to be had from its node: what the module before it made stands for them."""
    spreads = np.geomspace(0.4, 0.001, 100)
    shrinking = [("ReLU", s, 0.0, math.nan) for s in spreads]
    last = [("Conv2d", s, 0.0, math.nan) for s in spreads]
    assert found(rules.Collapse(), flat(), a=LINEAR, b=shrinking, c=last) == [("collapse", "warning")]
    assert found(rules.Collapse(), flat(), a=LINEAR, b=WELL, c=LINEAR) == []
    (series,) = as_features(history_of(flat(), *passes(STEPS, a=WELL, b=LINEAR))).values()
    assert series[0] == Features(0, 0, "b", 0.5, 1.0, 0.2, 0.5)


def test_an_empty_latent_says_what_its_module_makes():
    """Beside the noise, the size of its own."""
    history = history_of(
        flat(),
        *looks([0.05, 0.04, 0.02, 0.01, 0.01], layer="latent:mean"),
        *passes(range(200), mean=("Linear", 0.02, 0, math.nan)),
    )
    (finding,) = rules.EmptyLatent()(history)
    assert "what 'mean' makes differs by 0.02 of its size" in finding.seen


def test_dead_units_are_the_origin_of_dead_partials():
    """Of what follows from them, the forward pass says it first."""
    dead = ("ReLU", 0.1, 1.0, math.nan)
    history = history_of(flat(), *looks([0.02] * 6, [0.01] * 6), *passes(range(200), a=dead, b=LINEAR))
    findings = [*rules.DeadUnits()(history), *rules.Collapse()(history)]
    diagnosis = diagnose(findings, trend(history.course))
    assert diagnosis.origin.rule == "dead_units"
    assert [f.rule for f in diagnosis.follows] == ["collapse"]


def test_a_module_that_is_called_now_and_then():
    """One that was there in more than half of the passes counts, one that was not does not."""
    seldom = passes(range(180, 200), a=WELL, b=LINEAR)
    without = passes(range(190, 200), a=WELL)
    history = history_of(flat(), *seldom[:10], *without)
    assert [made.name for made in made_lately(history, 20)] == ["a"]
