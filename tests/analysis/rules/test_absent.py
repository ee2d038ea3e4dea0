"""Parameters that the training does not reach."""

import pytest

from gradlens.analysis.rules import Absent, Uncaptured
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
