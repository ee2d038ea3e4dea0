"""The optimizer's settings, and the modules' mode."""

import math

import pytest

from gradlens import rules
from tests.analysis.rules.courses import falling, flat, graph, history_of, modes, rules_of, settings


@pytest.mark.parametrize(
    ("rates", "found"),
    [
        ([(0, 0.1), (50, 1e-6)], True),
        ([(0, 0.1), (195, 1e-6)], False),  # a schedule that ends where the training does
        ([(0, 0.1), (50, 1e-3)], False),
        ([(0, 1e-6), (50, 0.1)], False),  # a warm-up
    ],
)
def test_a_learning_rate_that_is_gone(rates, found):
    """Far below its peak, for a good part of the run."""
    history = history_of(flat(), *[settings(rate, step) for step, rate in rates])
    assert rules_of(rules.LearningRateGone(), history) == [("lr_gone", "warning")] * found


@pytest.mark.parametrize(
    ("eps", "dtype", "found"), [(1e-8, "float16", True), (1e-4, "float16", False), (1e-8, "float32", False)]
)
def test_an_eps_that_is_zero(eps, dtype, found):
    """In the type of the weights."""
    history = history_of(flat(), settings(eps=eps, dtypes=(dtype,)))
    assert rules_of(rules.Epsilon(), history) == [("eps", "warning")] * found


def test_the_mode_of_a_training():
    """Evaluation of all is a warning that says since when; of some modules an info; training is silent."""
    (finding,) = rules.EvalMode()(history_of(flat(), modes(True, (), step=40), modes(False, step=60)))
    assert (str(finding.severity), "until a step between 40 and 60" in finding.seen) == ("warning", True)
    assert rules_of(rules.EvalMode(), history_of(flat(), modes(True))) == [("eval_mode", "info")]
    assert rules_of(rules.EvalMode(), history_of(flat(), modes(True, ()))) == []


@pytest.mark.parametrize(
    ("loss", "decay", "weight", "found"),
    [(flat(), 0.1, 0.1, True), (flat(), 5e-4, 0.1, False), (falling(), 0.1, 0.1, False), (flat(), 0.1, 0.95, False)],
    ids=["wins", "usual", "falls", "weights stay"],
)
def test_weight_decay_that_wins(loss, decay, weight, found):
    """It pulls as hard as the gradient, the weights shrink, and the loss does not fall."""
    norms = falling(10.0, 10.0 * weight)
    history = history_of(loss, settings(weight_decay=decay), weight=norms, norm=0.5, ratio=1e-2)
    assert rules_of(rules.WeightDecay(), history) == [("weight_decay", "warning")] * found


@pytest.mark.parametrize("decay", [5.0, 0.01])
def test_decoupled_decay_is_compared_with_the_step(decay):
    """AdamW takes lr * wd of the weight, whatever the gradient is."""
    facts = settings(1e-2, kind="AdamW", decoupled=True, weight_decay=decay)
    history = history_of(flat(), facts, weight=falling(10.0, 1.0), norm=0.5, ratio=5e-2)
    assert rules_of(rules.WeightDecay(), history) == [("weight_decay", "warning")] * (decay > 1)


def test_a_graph_that_is_well_says_nothing():
    """And a mistake in it is said once, however often it was seen."""
    well = graph("NllLoss", "LogSoftmax", "Addmm")
    assert rules_of(rules.GraphAudit(), history_of(flat(), well)) == []
    twice = [graph("NllLoss", "LogSoftmax", "Softmax", "Addmm", step=step) for step in (0, 1, 2)]
    assert rules_of(rules.GraphAudit(), history_of(flat(), *twice)) == [("softmax-twice", "warning")]


@pytest.mark.parametrize(
    ("loss", "chain", "said"),
    [
        (flat(), ("Mean", "Log", "Relu", "Addmm"), [("edge", "warning")]),
        (falling(), ("Mean", "Log", "Relu", "Addmm"), [("edge", "info")]),
        (flat(), ("Mean", "Log", "Add", "Relu"), []),
        (flat(), ("Mean", "Div", "Relu"), []),  # which is divided, and does not divide
    ],
)
def test_a_relu_where_something_above_0_is_needed(loss, chain, said):
    """The logarithm of a ReLU is an info in a training that learns, and a cause where it does not."""
    assert rules_of(rules.GraphAudit(), history_of(loss, graph(*chain))) == said


@pytest.mark.parametrize(("loss", "said"), [(1.01, True), (0.99, False), (math.nan, False), (None, False)])
def test_targets_beyond_the_output_are_known_by_the_size_of_the_loss(loss, said):
    """A sigmoid is at most 1 from any target that it can say."""
    found = rules_of(rules.GraphAudit(), history_of(falling(), graph("MseLoss", "Sigmoid", "Addmm", loss=loss)))
    assert found == [("out-of-range", "warning")] * said
