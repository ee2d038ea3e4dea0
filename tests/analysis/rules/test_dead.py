"""Partials that are all exactly 0, though the loss depends on them."""

import pytest

from gradlens.analysis.rules import Dead
from tests.analysis.made import asked, last, parameters_of, snapshot

LAYERS = ("a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "c.bias")


def shut(step, *statuses, **columns):
    return snapshot(step, LAYERS, status=list(statuses), **columns)


def test_zero_at_each_of_the_last_steps_is_dead():
    """The tenth step in a row names it, and one step with a partial begins the count anew."""
    statuses = [["zero", "ok"]] * 9 + [["ok", "ok"]] + [["zero", "ok"]] * 10
    said = asked(Dead(), *(snapshot(step, status=s) for step, s in enumerate(statuses)))
    assert [len(findings) for findings in said] == [0] * 19 + [1]
    assert "all 100 partials were exactly 0 at each of the last 10 observed steps" in said[-1][0].seen


def test_the_culprit_is_the_last_layer_that_is_dead_as_a_whole():
    """The weight behind a shut layer is dead too, but its bias is not: the shut one is to blame."""
    findings = last(Dead(steps=1), shut(0, "zero", "zero", "zero", "zero", "zero", "ok"))
    assert parameters_of(findings) == list(LAYERS[:5])
    assert all(finding.remedy.startswith("look at 'b' first") for finding in findings)


def test_a_frozen_part_of_the_layer_does_not_speak_for_it():
    """Only parameters with a gradient of their own count for a layer being dead as a whole."""
    (finding,) = last(Dead(steps=1), shut(0, "ok", "ok", "zero", "frozen", "ok", "ok"))
    assert finding.parameter == "b.weight"
    assert "'b'" in finding.remedy


def test_without_a_whole_dead_layer_there_is_no_culprit():
    """A weight alone is named without pointing anywhere."""
    (finding,) = last(Dead(steps=1), shut(0, "ok", "ok", "ok", "ok", "zero", "ok"))
    assert "look at" not in finding.remedy


@pytest.mark.parametrize("status", ["frozen", "absent", "excluded", "undefined", "uncaptured", "nonfinite", "ok"])
def test_other_statuses_are_not_dead(status):
    """What has no gradient of its own cannot have a dead one."""
    assert last(Dead(steps=1), snapshot(0, status=[status, "ok"])) == []


def test_a_bias_that_cancels_is_not_dead_once_the_loss_is_met():
    """Of triplets the last bias gets nothing, and the weights nothing where all are met: neither is a death."""
    steps = [shut(n, "ok", "ok", "ok", "ok", "ok", "zero", loss=0.1) for n in range(10)]
    steps += [shut(n, *["zero"] * 6, loss=0.0) for n in range(10, 30)]
    assert [findings for findings in asked(Dead(), *steps) if findings] == []
    assert last(Dead(), *steps, *[shut(n, *["zero"] * 6, loss=0.5) for n in range(30, 40)])


def test_an_empty_parameter_is_not_dead():
    """A shard without entries has all its partials 0, and none."""
    assert last(Dead(steps=1), snapshot(0, status=["zero", "ok"], numel=[0, 100])) == []


def test_two_backwards_of_a_step_must_both_be_zero():
    """One micro-batch that lights the layer up is enough."""
    pair = [snapshot(0, status=["ok", "ok"]), snapshot(0, backward=1, status=["zero", "ok"])]
    assert last(Dead(steps=1), *pair)  # this rule looked at one snapshot only
    assert last(Dead(steps=2), *pair, snapshot(1, status=["zero", "ok"])) == []


@pytest.mark.parametrize(("loss", "found"), [(0.0, 0), (2.3, 2), (None, 2)])
def test_where_no_weight_has_a_gradient_the_loss_is_a_constant(loss, found):
    """F29: that is said; a loss of exactly 0, as of a hinge that every example meets, leaves nothing to learn."""
    steps = [snapshot(step, status=["zero"] * 2, positive=0, negative=0, zero=100, loss=loss) for step in range(10)]
    findings = last(Dead(), *steps)
    assert len(findings) == found
    assert all("the loss is a constant here" in finding.causes[0] for finding in findings)
