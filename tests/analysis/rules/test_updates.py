"""Steps of the wrong size."""

import pytest

from gradlens.analysis.rules import RoundedAway, Shrunk, Unmoved, UpdateRatio
from gradlens.errors import ArgumentError
from gradlens.records import Parameters, Severity, Stage
from tests.analysis.made import asked, last, parameters_of, snapshot


def moved(step, ratio, before=1.0, **options):
    """A used gradient whose step moved each parameter by this ratio of its norm."""
    options.setdefault("stage", Stage.USED)
    return snapshot(
        step, update_numel=100, update_square_sum=(ratio * before) ** 2, update_before_square_sum=before**2, **options
    )


# --- UpdateRatio ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "found"), [(1.0, False), (1.001, True)])
def test_a_step_larger_than_the_weight_is_too_large(ratio, found):
    """Above `largest` at one step, of weights: a bias that often starts at 0 is left out."""
    assert parameters_of(last(UpdateRatio(), moved(0, ratio))) == (["a.weight"] if found else [])


def test_a_weight_that_began_at_zero_may_move_by_more_than_itself():
    """Within its first ten observed steps, and not after."""
    rule = UpdateRatio()
    start = snapshot(0, stage="used", update_numel=100, update_square_sum=1.0, update_before_square_sum=0.0)
    said = asked(rule, start, *(moved(step, 2.0) for step in range(1, 12)))
    assert [len(findings) for findings in said] == [0] * 10 + [1, 1]


@pytest.mark.parametrize(("next_loss", "found"), [(0.5, False), (1.0, True), (float("nan"), True)])
def test_a_leap_that_lowers_the_loss_is_bold_and_well(next_loss, found):
    """Where the loss is known the next step's decides; the finding is of the step that leapt."""
    findings = last(UpdateRatio(), moved(0, 4.0, loss=1.0), moved(1, 0.5, loss=next_loss))
    assert [(f.parameter, f.step) for f in findings] == ([("a.weight", 0)] if found else [])
    assert last(UpdateRatio(), moved(0, 4.0, loss=1.0)) == []


def test_a_model_that_never_moved_is_named_as_a_whole():
    """Twenty steps below `smallest`, with the fastest weight's ratio."""
    said = asked(UpdateRatio(), *(moved(step, 9e-6) for step in range(20)))
    assert [len(findings) for findings in said] == [0] * 19 + [1]
    (finding,) = said[-1]
    assert finding.parameter is None
    assert finding.value == pytest.approx(9e-6)
    assert "hardly moves" in finding.seen


def test_one_weight_that_moves_is_enough():
    """The fastest weight speaks for the model."""
    names = ("a.weight", "b.weight")
    steps = [
        snapshot(
            k, names, "used", update_numel=100, update_square_sum=[1e-12, 1e-8], update_before_square_sum=1.0
        )
        for k in range(25)
    ]  # fmt: skip
    assert last(UpdateRatio(), *steps) == []


def test_a_schedule_that_has_run_out_is_as_it_should_be():
    """A model that once moved ten times faster has been trained."""
    assert last(UpdateRatio(), moved(0, 2e-4), *(moved(step, 9e-6) for step in range(1, 30))) == []
    assert last(UpdateRatio(), moved(0, 9e-5), *(moved(step, 9e-6) for step in range(1, 30)))


def test_steps_without_a_gradient_are_not_judged():
    """Weight decay alone moves an absent parameter a little, and nothing is known of a model without updates."""
    assert last(UpdateRatio(), *(moved(step, 1e-6, status=["absent", "frozen"]) for step in range(25))) == []
    assert last(UpdateRatio(), *(snapshot(step, stage="used") for step in range(25))) == []
    assert last(UpdateRatio(), moved(0, 5.0, stage="backward")) == []


def test_the_two_edges_must_be_in_order():
    """A smallest ratio above the largest cannot be meant."""
    with pytest.raises(ArgumentError, match="must be below largest"):
        UpdateRatio(largest=1e-3, smallest=1e-2)


# --- RoundedAway ------------------------------------------------------------------------------------------------------


def half(names=("a.weight", "a.bias"), dtype="bfloat16"):
    return Parameters(names, ((10, 10), (100,)), (dtype,) * 2)


def stuck(step, count, dtype="bfloat16", **options):
    """So many of the 100 weights with a partial did not move."""
    model = half(dtype=dtype)
    return snapshot(step, model.names, "used", parameters=model, update_numel=100, update_stuck=count, **options)


@pytest.mark.parametrize(("count", "found"), [(50, False), (51, True)])
def test_more_than_half_rounded_away_at_each_step_is_named(count, found):
    """Ten steps in a row, of weights in sixteen bits; biases are left out."""
    said = asked(RoundedAway(), *(stuck(step, count) for step in range(10)))
    assert [len(findings) for findings in said] == [0] * 9 + [int(found)]
    if found:
        (finding,) = said[-1]
        assert (finding.parameter, finding.value) == ("a.weight", 0.51)
        assert "rounded away in bfloat16" in finding.seen


@pytest.mark.parametrize(("count", "severity"), [(90, Severity.INFO), (91, Severity.WARNING)])
def test_what_still_moves_may_be_enough(count, severity):
    """Up to nine in ten it is an info."""
    (finding,) = last(RoundedAway(), *(stuck(step, count) for step in range(10)))
    assert finding.severity == severity


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_wide_types_are_not_asked(dtype):
    """What they swallow is too small to matter."""
    assert last(RoundedAway(steps=1), stuck(0, 100, dtype)) == []


def test_nothing_is_said_where_nothing_is_known():
    """Without updates, or without a gradient, there is no share."""
    model = half()
    assert last(RoundedAway(steps=1), snapshot(0, model.names, "used", parameters=model)) == []
    assert last(RoundedAway(steps=1), stuck(0, 100, status=["absent", "ok"])) == []
    assert last(RoundedAway(steps=1), stuck(0, 100, positive=0, negative=0, zero=100, status=["zero", "ok"])) == []


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "complex32"])
def test_every_narrow_type_is_asked(dtype):
    """All of sixteen bits or fewer."""
    assert last(RoundedAway(steps=1), stuck(0, 100, dtype))


# --- Shrunk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "found"), [(0.051, False), (0.049, True)])
def test_a_weight_that_lost_nearly_all_of_its_norm_is_named(norm, found):
    """Beside what it was when it was first seen; a bias is left out."""
    steps = [moved(0, 1e-3), moved(9, 1e-3, weight_square_sum=norm**2)]
    findings = last(Shrunk(), *steps)
    assert parameters_of(findings) == (["a.weight"] if found else [])
    assert all("weight decay" in f.causes[0] and f.value == pytest.approx(norm) for f in findings)


def test_weights_that_were_0_or_not_read_have_lost_nothing():
    """Nor is another model's first norm a measure."""
    assert last(Shrunk(), moved(0, 1e-3, weight_square_sum=0.0), moved(1, 1e-3, weight_square_sum=0.0)) == []
    assert last(Shrunk(), moved(0, 1e-3), moved(1, 1e-3, weight_square_sum=float("nan"))) == []
    other = snapshot(0, ("b.weight",), "used", weight_square_sum=1e9)
    assert last(Shrunk(), other, moved(1, 1e-3)) == []


# --- Unmoved --------------------------------------------------------------------------------------------------------


def partly(step, measured, **options):
    """A used gradient of two parameters, of which so many entries each were measured before and after the step."""
    options.setdefault("stage", Stage.USED)
    return snapshot(step, update_numel=measured, **options)


def test_a_parameter_that_no_optimizer_has_is_named():
    """On three steps with a gradient, beside one that is moved."""
    said = asked(Unmoved(), *(partly(step, [100, 0]) for step in range(3)))
    assert [parameters_of(findings) for findings in said] == [[], [], ["a.bias"]]
    assert "no optimizer that gradlens watches moved it" in said[-1][0].seen
    assert "add_param_group" in said[-1][0].remedy


@pytest.mark.parametrize("status", ["absent", "frozen", "zero", "excluded"])
def test_without_a_gradient_there_is_nothing_to_move(status):
    """It has other rules, or none."""
    assert last(Unmoved(), *(partly(step, [100, 0], status=["ok", status]) for step in range(3))) == []


def test_where_updates_are_not_measured_nothing_is_known():
    """Without the feature, or at a step that the scaler skipped, and of an empty shard."""
    assert last(Unmoved(), *(partly(step, [0, 0]) for step in range(3))) == []
    assert last(Unmoved(), partly(0, [100, 0]), partly(1, [0, 0]), partly(2, [100, 0])) == []
    assert last(Unmoved(), *(partly(step, [100, 0], numel=[100, 0]) for step in range(3))) == []
    assert last(Unmoved(), *(partly(step, [100, 0], stage="backward") for step in range(3))) == []
