"""Gradients that no optimizer uses."""

import math

import pytest

from gradlens.analysis.rules import Dead, Lost, Unstepped, UpdateRatio
from gradlens.records import Severity, Stage
from tests.analysis.made import asked, last, snapshot
from tests.analysis.rules.courses import in_order

STILL = {"update_numel": 100, "update_square_sum": 0.0, "update_before_square_sum": 1.0}


def gone(k, **options):
    """A step whose gradients were None when the optimizer came: what backward gave stands in for them."""
    return [snapshot(k), snapshot(k, stage=Stage.USED, **STILL | {"update_used_square_sum": math.nan} | options)]


def zeroed(k, status=("zero", "zero")):
    """A step whose gradients were 0 when the optimizer came."""
    zero = [100 if word == "zero" else 0 for word in status]
    used = snapshot(k, stage=Stage.USED, status=status, zero=zero, **STILL | {"update_used_square_sum": 0.0})
    return [snapshot(k), used]


@pytest.mark.parametrize("step", [gone, zeroed])
def test_a_gradient_that_was_gone_is_named_after_three_steps(step):
    """As one finding on the model, whose only cause is zero_grad() in the wrong place."""
    said = asked(Lost(), *in_order(step(k) for k in range(3)))
    assert [len(findings) for findings in said] == [0, 0, 0, 0, 0, 1]
    (finding,) = said[-1]
    assert (finding.parameter, finding.parameters) == (None, ("a.weight", "a.bias"))
    assert finding.severity == Severity.WARNING
    assert "between backward() and step()" in finding.causes[0]


@pytest.mark.parametrize("rule", [Dead(), UpdateRatio()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("step", [gone, zeroed])
def test_nothing_else_is_said_of_it(rule, step):
    """No rectifier is dead, and no learning rate too small."""
    assert not any(asked(rule, *in_order(step(k) for k in range(25))))


def test_some_parameters_are_set_to_zero_by_hand():
    """An info, which names them."""
    (finding,) = last(Lost(), *in_order(zeroed(k, ("zero", "ok")) for k in range(3)))
    assert (finding.severity, finding.parameter) == (Severity.INFO, "a.weight")
    assert "by hand" in finding.causes[0]


def test_a_learning_rate_of_zero_loses_nothing():
    """The optimizer saw a gradient, and did not move."""
    assert last(Lost(), *in_order(gone(k, update_used_square_sum=0.01) for k in range(5))) == []


def test_an_optimizer_that_frees_what_it_used_lost_nothing():
    """It moved the weights."""
    assert last(Lost(), *in_order(gone(k, update_square_sum=1e-6) for k in range(5))) == []


def test_what_backward_did_not_give_is_not_lost():
    """Zeros before and after are the business of `Dead`."""
    steps = [[snapshot(k, status=["zero"] * 2, zero=100), zeroed(k)[1]] for k in range(12)]
    assert last(Lost(), *in_order(steps)) == []
    assert len(last(Dead(), *in_order(steps))) == 2


def test_backwards_without_a_step_are_named():
    """From the hundredth on, and not once some optimizer has stepped."""
    said = asked(Unstepped(), *(snapshot(0, backward=k) for k in range(101)))
    assert [len(findings) for findings in said] == [0] * 99 + [1, 1]
    assert "optimizer.step() is missing" in said[-1][0].causes[0]
    stepped = [snapshot(0, stage=Stage.USED), *(snapshot(1, backward=k) for k in range(120))]
    assert last(Unstepped(), *stepped) == []


def test_steps_of_one_backward_are_steps():
    """As where no optimizer was given, and each backward is a step."""
    assert last(Unstepped(backwards=3), *(snapshot(k) for k in range(10))) == []
