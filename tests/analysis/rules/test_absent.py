"""Parameters that the training does not reach."""

import pytest

from gradlens.analysis.rules import Absent, Frozen, Uncaptured
from gradlens.records import Severity
from tests.analysis.made import asked, last, parameters_of, snapshot

OK_ABSENT = ["ok", "absent"]


def test_a_parameter_is_named_once_it_was_absent_so_often():
    """Nine steps are silent, the tenth names the parameter that was absent all the time."""
    said = asked(Absent(), *(snapshot(step, status=OK_ABSENT) for step in range(10)))
    assert [len(findings) for findings in said] == [0] * 9 + [1]
    (finding,) = said[-1]
    assert (finding.parameter, finding.step, finding.severity) == ("a.bias", 9, Severity.WARNING)
    assert "10 observed steps" in finding.seen
    assert "forward()" in finding.causes[0]
    assert "requires_grad_(False)" in finding.remedy


@pytest.mark.parametrize("status", ["frozen", "excluded", "zero", "ok", "uncaptured", "nonfinite"])
def test_another_status_is_not_absence(status):
    """Frozen, left out and dead parameters are no business of this rule."""
    assert last(Absent(steps=2), *(snapshot(step, status=["ok", status]) for step in range(5))) == []


def test_one_step_in_the_loss_is_enough():
    """A parameter that the loss depended on within the last steps is well, as an expert that is chosen at times."""
    steps = [snapshot(step, status=["ok", "ok" if step == 3 else "absent"]) for step in range(14)]
    assert [len(findings) for findings in asked(Absent(), *steps)] == [0] * 13 + [1]


def test_one_backward_of_the_step_is_enough():
    """Two losses with a backward each: absent from one is not absent."""
    steps = [snapshot(k // 2, backward=k % 2, status=["ok", "absent" if k % 2 else "ok"]) for k in range(20)]
    assert last(Absent(steps=2), *steps) == []


def test_a_backward_that_returns_none_has_its_own_cause():
    """The function that gives no gradient is to blame, and not the loss."""
    (finding,) = last(Absent(steps=2), *(snapshot(step, status=["ok", "undefined"]) for step in range(2)))
    assert "returned None" in finding.seen
    assert "autograd.Function" in finding.causes[0]


def test_uncaptured_is_said_at_once():
    """A row that shows `.grad` instead of this backward's own partials is named at the first step."""
    (finding,) = last(Uncaptured(), snapshot(3, status=["uncaptured", "ok"]))
    assert (finding.parameter, finding.step) == ("a.weight", 3)
    assert "did not fire" in finding.seen
    assert last(Uncaptured(), snapshot(3, status=["absent", "ok"])) == []


def test_parameters_keep_model_order():
    """Several are named in the order of the model."""
    names = ("c", "a", "b")
    said = last(Absent(steps=1), snapshot(0, names, status=["absent", "ok", "absent"]))
    assert parameters_of(said) == ["c", "b"]


def held(step, status, **options):
    """A used gradient of two parameters that the optimizer has."""
    return snapshot(step, stage="used", status=status, **{"update_numel": 100} | options)


def test_what_is_frozen_and_with_the_optimizer_is_an_info():
    """At once, with its share of the weights; and nothing of what the optimizer does not have."""
    (finding,) = last(Frozen(), held(0, ["frozen", "ok"]))
    assert (finding.severity, finding.parameter, finding.parameters) == (Severity.INFO, "a.weight", ())
    assert finding.seen == "1 parameter (a.weight; 50% of the weights) with requires_grad=False, though the optimizer has it"
    assert last(Frozen(), held(0, ["frozen", "ok"], update_numel=[0, 100])) == []
    assert last(Frozen(), held(0, ["ok", "absent"])) == []


def test_what_learnt_until_now_is_said_to():
    """Of several at once there is one finding that names them all."""
    (finding,) = last(Frozen(), held(0, ["ok", "ok"]), held(1, ["frozen", "frozen"]))
    assert (finding.parameter, finding.parameters) == (None, ("a.weight", "a.bias"))
    assert finding.seen.startswith("2 parameters (a.weight, a.bias; 100% of the weights)")
    assert finding.seen.endswith("they had a gradient at step 0")
