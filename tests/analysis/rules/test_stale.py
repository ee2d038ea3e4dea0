"""Gradients of earlier steps, or of elsewhere, in this step's update."""

import numpy as np
import pytest

from gradlens.analysis.rules import Stale
from gradlens.records import Parameters, Severity, Stage
from tests.analysis.made import asked, last, parameters_of, snapshot
from tests.analysis.rules.courses import in_order


def step(k, backward, used, *, sums=None, status=None, **options):
    """The norms of a step's backwards and of what was used, of every parameter; `sums` of the entries likewise."""
    sums = sums or ([0.0] * len(backward), 0.0)
    own = [
        snapshot(k, backward=i, square_sum=np.square(norm), sum=total, status=status, **options)
        for i, (norm, total) in enumerate(zip(backward, sums[0], strict=True))
    ]
    end = {"backward": len(backward) - 1, "stage": Stage.USED, "square_sum": np.square(used), "sum": sums[1]}
    return [*own, snapshot(k, **end, status=status, **options)]


@pytest.mark.parametrize(("used", "found"), [(1.01, False), (1.011, True)])
def test_more_than_backward_gave_came_from_elsewhere(used, found):
    """By more than a hundredth, at three steps."""
    said = asked(Stale(), *in_order(step(k, [1.0], used) for k in range(3)))
    assert [len(findings) for findings in said] == [0] * 5 + [2 * found]


def test_several_backwards_add_up():
    """A sum of vectors is never longer than their lengths together."""
    assert last(Stale(), *in_order(step(k, [1.0, 2.0, 0.5], 3.5) for k in range(3))) == []
    assert last(Stale(), *in_order(step(k, [1.0, 2.0, 0.5], 3.6) for k in range(3)))


def test_clipping_makes_smaller():
    """So does dividing."""
    assert last(Stale(), *in_order(step(k, [5.0], 1.0) for k in range(3))) == []


def grown(k, *, hand):
    """Entries of sum 2 a step; what was left from the step before, or a hand that adds 1 each time, comes on top."""
    before = 3.0 if hand else 2.0 * (k + 1)
    return step(k, [0.1], 0.3, sums=([2.0], before))


def test_what_the_step_before_used_is_known_by_its_sum():
    """Then `zero_grad()` is missing, and there is no other cause."""
    findings = last(Stale(), *in_order(grown(k, hand=False) for k in range(4)))
    assert parameters_of(findings) == ["a.weight", "a.bias"]
    for finding in findings:
        assert finding.severity == Severity.WARNING
        assert [cause for cause in finding.causes if "zero_grad() is missing" in cause] == list(finding.causes)
        assert "call optimizer.zero_grad()" in finding.remedy


def test_what_a_hand_added_is_an_info():
    """A penalty's gradient, noise, weight decay: nothing is wrong if it is meant."""
    findings = last(Stale(), *in_order(grown(k, hand=True) for k in range(4)))
    assert [(f.severity, f.causes[0].startswith("something adds")) for f in findings] == [(Severity.INFO, True)] * 2
    assert findings[0].remedy == "nothing if it is meant"


def test_unless_the_step_before_was_seen_both_are_possible():
    """On a schedule of each second step nobody knows what was left."""
    findings = last(Stale(), *in_order(step(2 * k, [1.0], 2.0) for k in range(3)))
    assert [(f.severity, len(f.causes)) for f in findings] == [(Severity.WARNING, 2)] * 2


def test_gradients_of_sixteen_bits_do_not_tell():
    """Their sums are rounded too far."""
    half = Parameters(("a.weight", "a.bias"), ((10, 10), (100,)), ("bfloat16",) * 2)
    steps = in_order(step(k, [0.1], 0.3, sums=([2.0], 2.0 * (k + 1)), parameters=half) for k in range(4))
    assert [(f.severity, len(f.causes)) for f in last(Stale(), *steps)] == [(Severity.WARNING, 2)] * 2


def test_ranks_are_not_asked():
    """Another rank's part of the mean may be larger than this one's."""
    several = in_order(step(k, [1.0], 2.0) for k in range(3))
    assert last(Stale(), snapshot(0, stage=Stage.REDUCED), *several) == []


@pytest.mark.parametrize("status", ["frozen", "excluded", "uncaptured", "nonfinite"])
def test_what_cannot_be_compared_is_silent(status):
    """No gradient of its own, or not a finite one."""
    steps = in_order(step(k, [1.0], 2.0, status=[status, "ok"]) for k in range(3))
    assert parameters_of(last(Stale(), *steps)) == ["a.bias"]


def test_a_backward_that_was_not_finite_says_nothing_of_the_sum():
    """As when a scaler skipped it and another backward followed."""
    steps = [
        [
            snapshot(k, status=["nonfinite", "ok"], backward=0, square_sum=1.0),
            snapshot(k, backward=1, square_sum=1.0),
            snapshot(k, stage=Stage.USED, backward=1, square_sum=9.0),
        ]
        for k in range(3)
    ]
    assert parameters_of(last(Stale(), *in_order(steps))) == ["a.bias"]


def test_parameters_are_compared_by_name():
    """Where two optimizers read their own, each row finds its backward."""
    steps = [
        [
            snapshot(k, ("a", "b", "c"), square_sum=[1.0, 1.0, 4.0]),
            snapshot(k, ("c", "b"), Stage.USED, square_sum=[4.0, 4.0]),
        ]
        for k in range(3)
    ]
    assert parameters_of(last(Stale(), *in_order(steps))) == ["b"]


def test_without_backward_readings_there_is_nothing_to_compare():
    """Or without readings of these parameters."""
    assert last(Stale(), *(snapshot(k, stage=Stage.USED) for k in range(3))) == []
    other = [[snapshot(k, ("x",)), snapshot(k, ("y",), Stage.USED, square_sum=100.0)] for k in range(3)]
    assert last(Stale(), *in_order(other)) == []
