"""What holds for every rule: validated when made, silent on nothing, and words that teach."""

import dataclasses
import math
from pathlib import Path

import pytest

from gradlens.analysis import rules
from gradlens.analysis.history import History
from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.records import Status
from tests.analysis.made import asked, snapshot

CLASSES = [getattr(rules, name) for name in rules.__all__ if isinstance(getattr(rules, name), type)]
STEPS = [(one, field.name) for one in CLASSES for field in dataclasses.fields(one) if field.type == "int"]
NUMBERS = [(one, field.name) for one in CLASSES for field in dataclasses.fields(one) if field.type == "float"]


def ids(pair):
    return f"{pair[0].__name__}.{pair[1]}"


def test_every_rule_is_public_and_every_default_is_one_of_them():
    """Each module of rules gives its classes away, and the default is one of each."""
    assert {type(rule) for rule in rules.DEFAULT} == set(CLASSES)
    assert len({rule.name for rule in rules.DEFAULT}) == len(rules.DEFAULT)
    folder = Path(rules.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "base", "occasional"}
    assert {one.__module__.rpartition(".")[2] for one in CLASSES} == modules


@pytest.mark.parametrize("one", CLASSES, ids=lambda one: one.__name__)
def test_a_rule_is_a_frozen_value(one):
    """Equal settings make equal rules, which cannot be changed and have no state."""
    assert one() == one()
    assert hash(one()) == hash(one())
    assert vars(one()) == {field.name: getattr(one(), field.name) for field in dataclasses.fields(one)}
    for field in dataclasses.fields(one):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(one(), field.name, 1)


@pytest.mark.parametrize("case", STEPS, ids=ids)
def test_a_number_of_steps_is_checked(case):
    """Whole, and at least 1; the message names the rule, the setting and what was given."""
    one, name = case
    for wrong in (0, -3):
        with pytest.raises(ArgumentError, match=rf"{one.__name__}\({name}=...\) must be at least 1, not {wrong}"):
            one(**{name: wrong})
    for wrong in (True, 2.5, "3", None):
        with pytest.raises(ArgumentTypeError, match="whole number"):
            one(**{name: wrong})


@pytest.mark.parametrize("case", NUMBERS, ids=ids)
def test_a_threshold_is_checked(case):
    """A number above its bound; NaN, words and truth values are refused."""
    one, name = case
    for wrong in (0, -1.0, math.nan):
        with pytest.raises(ArgumentError, match=rf"{one.__name__}\({name}=...\) must be above"):
            one(**{name: wrong})
    for wrong in (True, "1e-3", None):
        with pytest.raises(ArgumentTypeError, match="is a number"):
            one(**{name: wrong})


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda: rules.Vanishing(ratio=0.2), "at most 0.1"),
        (lambda: rules.RoundedAway(share=1.1), "at most 1"),
        (lambda: rules.Shrunk(share=0.6), "at most 0.5"),
        (lambda: rules.Skipped(most=2.0), "at most 1"),
        (lambda: rules.Spike(factor=1.0), "above 1"),
    ],
)
def test_thresholds_that_would_always_hold_are_refused(make, limit):
    """Each with its limit in the message."""
    with pytest.raises(ArgumentError, match=limit):
        make()


@pytest.mark.parametrize("rule", rules.DEFAULT, ids=lambda rule: rule.name)
def test_an_empty_history_has_no_illness(rule):
    """Nor has one of a single snapshot of a model without parameters."""
    assert list(rule(History()) or ()) == []
    assert asked(rule, snapshot(0, ())) == [[]]
    assert asked(rule, snapshot(0, (), stage="used")) == [[]]


@pytest.mark.parametrize("rule", rules.DEFAULT, ids=lambda rule: rule.name)
def test_a_healthy_training_has_none_either(rule):
    """The snapshots of a gradient that is well, with updates of a thousandth, over forty steps."""
    well = {"update_numel": 100, "update_square_sum": 1e-6, "update_before_square_sum": 1.0, "update_moving": 100}
    steps = [
        snapshot(k, stage=stage, **(well if stage == "used" else {})) for k in range(40) for stage in ("backward", "used")
    ]
    assert not any(asked(rule, *steps))


#: What no rule but these has a word on: parameters without a gradient of their own.
OF_STATUS = {"absent": {"absent", "undefined"}, "uncaptured": {"uncaptured"}, "frozen": {"frozen"}}


@pytest.mark.parametrize("rule", rules.DEFAULT, ids=lambda rule: rule.name)
@pytest.mark.parametrize("status", [Status.FROZEN, Status.ABSENT, Status.EXCLUDED, Status.UNDEFINED, Status.UNCAPTURED])
def test_what_has_no_gradient_of_its_own_is_not_judged(rule, status):
    """However wild the numbers that happen to stand in its row: large, small, non-finite, rounded away."""
    wild = {"square_sum": [1e12, 0.01], "nan": [3, 0], "zero": [100, 0], "update_numel": 100, "update_stuck": [100, 0]}
    steps = [
        snapshot(k, status=[status, "ok"], stage=stage, update_square_sum=[1e6, 1e-6], update_before_square_sum=1.0, **wild)
        for k in range(30)
        for stage in ("backward", "used")
    ]
    found = [finding for findings in asked(rule, *steps) for finding in findings]
    assert bool(found) is (status in OF_STATUS.get(rule.name, ()))
    assert all(finding.rule == rule.name and finding.causes and finding.remedy for finding in found)
