"""NaN and infinite partials."""

import math

import pytest

from gradlens.analysis.history import History
from gradlens.analysis.rules import NonFinite
from gradlens.facts import Graph, Operation
from gradlens.records import Severity, Stage
from tests.analysis.made import asked, last, parameters_of, snapshot
from tests.analysis.rules.courses import graph, settings

NAMES = ("a.weight", "b.weight", "c.weight")


def bad(step, nan=(0, 0, 0), inf=(0, 0, 0), **options):
    return snapshot(step, NAMES, nan=list(nan), inf=list(inf), **options)


def test_one_nan_is_an_error_at_once():
    """The first bad partial is named with its count, and where to look."""
    (finding,) = last(NonFinite(), bad(7, nan=(0, 1, 0)))
    assert (finding.parameter, finding.severity, finding.step, finding.value) == ("b.weight", Severity.ERROR, 7, 1.0)
    assert finding.seen == "1 NaN of 100 partials"
    assert "right behind 'b.weight'" in finding.remedy
    assert "does not exist" in finding.causes[0]


def test_nan_and_infinite_are_counted_apart():
    """Both kinds stand in the text."""
    (finding,) = last(NonFinite(), bad(0, nan=(2, 0, 0), inf=(3, 0, 0)))
    assert finding.seen == "2 NaN and 3 infinite of 100 partials"
    assert finding.value == 5


def test_finite_gradients_are_silent():
    """However large."""
    assert last(NonFinite(), bad(0, abs_max=1e300)) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_points_at_the_forward_pass(loss):
    """Then the derivative is not to blame."""
    (finding,) = last(NonFinite(), bad(0, nan=(0, 0, 1), loss=loss))
    assert "forward pass" in finding.causes[0]
    assert "right behind" not in finding.remedy


def test_when_every_parameter_has_them_the_forward_pass_is_to_blame():
    """Where nobody knows the loss: backward cannot spoil the last layer's gradient, unless it is the loss's own."""
    findings = last(NonFinite(), bad(0, nan=(1, 1, 1)))
    assert parameters_of(findings) == list(NAMES)
    assert all("forward pass" in f.causes[0] and "in the loss itself" in f.causes[1] for f in findings)


def test_when_every_parameter_has_them_and_the_loss_is_finite_its_derivative_is_to_blame():
    """As of a root at 0 in the loss itself; the forward pass is well."""
    for finding in last(NonFinite(), bad(0, nan=(1, 1, 1), loss=1.5)):
        assert "in the loss itself" in finding.causes[0]
        assert not any("forward pass" in cause for cause in finding.causes)
        assert "the loss is 1.5" in finding.seen
        assert "names the operation" in finding.remedy


@pytest.mark.parametrize(("ratio", "found"), [(0.9, False), (7.0, True)])
def test_a_training_that_diverged_says_with_which_step(ratio, found):
    """A step larger than the weight, shortly before, comes first among the causes."""
    moved = {"update_numel": 100, "update_square_sum": [1e-6, ratio**2, 1e-6], "update_before_square_sum": 1.0}
    steps = [bad(3, stage=Stage.USED, **moved), bad(4, nan=(1, 1, 1), loss=math.nan)]
    causes = last(NonFinite(), *steps)[0].causes
    assert ("diverged" in causes[0]) is found
    assert ("step 3 moved b.weight by 7 times its own norm" in causes[0]) is found
    assert "forward pass" in causes[found]
    assert ("divide the learning rate" in last(NonFinite(), *steps)[0].remedy) is found


def test_a_step_that_the_scaler_skipped_wrote_nothing():
    """Once its scale has come down to 1, what is not finite is not the fault of the steps that were skipped."""
    findings = last(NonFinite(), bad(0, nan=(1, 1, 1), scale=2.0), bad(1, nan=(1, 1, 1), scale=1.0, loss=math.nan))
    assert "forward pass" in findings[0].causes[0]


def test_the_step_before_is_the_cause_where_it_had_them_already():
    """Weights that a non-finite step was written into make everything non-finite."""
    findings = last(NonFinite(), bad(4, nan=(0, 9, 0)), bad(5, nan=(1, 1, 1)))
    assert all("step 4 wrote non-finite partials (of b.weight)" in finding.causes[0] for finding in findings)
    assert all("look at the first" in finding.remedy for finding in findings)


@pytest.mark.parametrize(("scale", "found"), [(65536.0, False), (1.0, True), (math.nan, True)])
def test_under_a_known_scale_they_are_the_scalers_business(scale, found):
    """A scaler that gradlens knows skips the step; a scale that is unknown excuses nothing."""
    assert bool(last(NonFinite(), bad(0, inf=(1, 0, 0), scale=scale))) is found


@pytest.mark.parametrize("status", ["frozen", "absent", "uncaptured"])
def test_rows_without_a_gradient_of_their_own_are_silent(status):
    """What is left in `.grad` of such a parameter is not this step's."""
    assert last(NonFinite(), bad(0, nan=(1, 0, 0), status=[status, "ok", "ok"])) == []


def test_used_gradients_are_judged_too():
    """What the optimizer consumes may become non-finite by clipping."""
    assert last(NonFinite(), bad(0), bad(0, nan=(0, 0, 1), stage=Stage.USED))


def test_a_scaler_that_is_not_known_is_among_the_causes_until_the_step():
    """It skips such steps; what the optimizer consumes all the same was not skipped."""
    (finding,) = last(NonFinite(), bad(0, inf=(1, 0, 0)))
    assert "GradScaler" in finding.causes[-1]
    (finding,) = last(NonFinite(), bad(0), bad(0, inf=(1, 0, 0), stage=Stage.USED))
    assert not any("GradScaler" in cause for cause in finding.causes)


# --- who wrote it first ---------------------------------------------------------------------------------------------

W, B = "a.weight", "a.bias"


def used(step=0, **columns):
    """What an optimizer got, and what it did with it."""
    return snapshot(step, stage=Stage.USED, update_numel=100, **columns)


def test_an_optimizer_that_writes_nan_from_finite_gradients_is_said_to():
    """With the settings that explain it."""
    history = History()
    history.append(used(update_nonfinite=[7, 0]))
    history.note(settings(kind="Adam", eps=1e-8, dtypes=("float16",)))
    (finding,) = NonFinite()(history)
    assert (finding.parameter, finding.step) == (W, 0)
    assert "the optimizer wrote 7 of 100 weights" in finding.seen
    assert "second moment" in finding.causes[-1]


def test_the_step_after_says_which_step_left_the_weights_so():
    """Its gradients were finite."""
    (finding, *_) = last(NonFinite(), used(0, update_nonfinite=[0, 3]), used(1, nan=5))
    assert "step 0 left weights that are not finite (of a.bias), from finite partials" in finding.causes[0]


def test_weights_that_were_nan_before_the_first_step():
    """No step that was seen wrote them."""
    (finding, *_) = last(NonFinite(), snapshot(0, nan=5, weight_nonfinite=[1, 0]))
    assert "before this step (of a.weight)" in finding.causes[0]


def test_clipping_that_spreads_one_nan_names_where_it_came_from():
    """F15: what was finite after backward is not the forward pass's fault."""
    _, said = asked(NonFinite(), snapshot(0, nan=[0, 1]), used(0, nan=[100, 100]))
    assert {finding.parameter for finding in said} == {W, B}
    assert all("clip_grad_norm_ multiplied all others" in finding.causes[0] and B in finding.causes[0] for finding in said)


def test_what_came_between_backward_and_the_step():
    """All that backward gave was finite."""
    _, said = asked(NonFinite(), snapshot(0), used(0, nan=[100, 100]))
    assert all("between backward and the step" in finding.causes[0] for finding in said)


def test_the_graph_names_the_operations_that_may_have_done_it():
    """Where the loss is finite and its derivative is not."""
    history = History()
    history.note(graph("Mean", "Sqrt", "Addmm"))
    history.append(snapshot(3, nan=5, loss=0.5))
    (finding, *_) = NonFinite()(history)
    assert "sqrt at 0" in finding.causes[0]


@pytest.mark.parametrize(
    ("first", "said"), [(0, "between 'b', whose input is finite, and 'c', whose input is not"), (3, "the input of 'b'")]
)
def test_the_graph_says_between_which_layers_it_came_up(first, said):
    """Read while the loss was not finite: layers behind the last one still have their inputs."""
    leaves = [Operation("Leaf", (), (4, 4), {}, f"{name}.weight") for name in "cb"]
    layers = [
        Operation("Addmm", (1, 2), (8, 4), {"nonfinite": 3}),
        leaves[0],
        Operation("Addmm", (3,), (8, 4), {"nonfinite": first}),
        leaves[1],
    ]
    history = History()
    history.note(Graph((*layers,), step=3, values=True))
    history.append(snapshot(3, nan=5, loss=float("nan")))
    (finding, *_) = NonFinite()(history)
    assert said in finding.causes[0]
