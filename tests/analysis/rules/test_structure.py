"""What the gradients' pattern says of how a model was made: equal weights, huge inputs, a signal that fades over depth."""

import numpy as np
import pytest

from gradlens import rules
from gradlens.records import Stage
from tests.analysis.made import last, snapshot
from tests.analysis.rules.courses import falling, flat, history_of, looks, rules_of

LAYERS = tuple(f"{i}.{kind}" for i in range(6) for kind in ("weight", "bias"))


def used(step, **columns):
    return snapshot(step, stage=Stage.USED, **columns)


def same(step, number=0.02, **more):
    """Partials of `a.weight` that are one number, and those of `a.bias` that are not."""
    return used(step, sum=[100 * number, 0.5], square_sum=[100 * number**2, 0.01], **more)


# --- Identical ------------------------------------------------------------------------------------------------------


def test_partials_that_are_one_number_on_three_steps():
    """Two are not enough; the bias, whose partials may be what they like, is not named."""
    assert last(rules.Identical(), same(0), same(1)) == []
    (finding,) = last(rules.Identical(), same(0), same(1), same(2))
    assert finding.parameter == "a.weight"
    assert "all 100 partials are the same number (0.02)" in finding.seen


@pytest.mark.parametrize(
    "columns",
    [{"square_sum": [100 * 0.02**2 * (1 + 1e-6), 0.01]}, {"zero": [1, 0]}, {"numel": [3, 100]}, {"square_sum": [0.0, 0.01]}],
    ids=["they differ by a thousandth", "one is 0", "three are few", "all are 0"],
)
def test_partials_that_only_look_so(columns):
    """What differs, has zeros, is small or is nothing at all has its symmetry broken, or another rule."""
    base = {"sum": [2.0, 0.5], "square_sum": [0.04, 0.01]} | columns
    assert last(rules.Identical(), *(used(step, **base) for step in range(3))) == []


def test_weights_that_begin_with_one_size():
    """At the first step, of two weights or more, all of them constant: one finding names them together."""
    names = ("a.weight", "b.weight", "c.weight")
    begin = snapshot(0, names, Stage.USED, weight_square_sum=1.0, weight_abs_max=0.1)  # 100 entries of 0.1
    (finding,) = last(rules.Identical(), begin)
    assert finding.parameters == names
    assert "begin with entries of one and the same size" in finding.seen


@pytest.mark.parametrize(
    ("sizes", "largest", "named"),
    [
        ([1.0, 0.5, 0.5], [0.1, 0.2, 0.2], []),
        ([0.5, 0.5, 0.5], [0.2, 0.2, 0.2], []),
        ([0.0, 0.5, 0.5], [0.0, 0.3, 0.3], []),
        ([0.0, 1.0, 0.5], [0.0, 0.1, 0.3], ["a.weight", "b.weight"]),
    ],
    ids=["one alone may be a scale", "none", "an adapter begins at 0", "most of the model"],
)
def test_weights_that_begin_with_one_size_are_most_of_the_model(sizes, largest, named):
    """Entries of one size are no illness of a single weight, nor where the others break the symmetry."""
    names = ("a.weight", "b.weight", "c.weight")
    begin = snapshot(0, names, Stage.USED, weight_square_sum=sizes, weight_abs_max=largest)
    found = last(rules.Identical(), begin)
    assert [name for finding in found for name in finding.parameters] == named


def test_only_the_first_step_is_asked_for_constant_weights():
    """Weights that come to one size later were trained there."""
    names = ("a.weight", "b.weight")
    well = snapshot(0, names, Stage.USED, weight_square_sum=0.5, weight_abs_max=0.2)
    assert last(rules.Identical(), well, snapshot(1, names, Stage.USED, weight_square_sum=1.0, weight_abs_max=0.1)) == []


# --- InputScale -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "rms", "ratio", "said"),
    [
        (flat(), 100.0, 0.01, "warning"),
        (falling(), 100.0, 0.01, "info"),
        (falling(), 100.0, 0.6, "warning"),
        (flat(), 15.0, 0.01, None),
    ],
)
def test_inputs_of_another_size(loss, rms, ratio, said):
    """Loud where the loss does not fall or a step leapt; an info where a small learning rate makes up for it."""
    history = history_of(loss, *looks([1.0] * 3, layer="input:net.0", rms=rms), ratio=ratio)
    assert rules_of(rules.InputScale(), history) == [("input_scale", said)] * (said is not None)


def test_the_size_of_the_inputs_is_said():
    """With the layer that gets them."""
    (finding,) = rules.InputScale()(history_of(flat(), *looks([1.0] * 3, layer="input:net.0", rms=128.0)))
    assert "the inputs of 'net.0' have an rms of 128" in finding.seen
    assert finding.value == 128.0


def test_what_the_last_layer_gets_is_no_input():
    """Large features are not large inputs."""
    assert rules_of(rules.InputScale(), history_of(flat(), *looks([1.0] * 3, layer="net.4", rms=1000.0))) == []


# --- Fading ---------------------------------------------------------------------------------------------------------


def deep(factor, *, wobble=0.0, step=199):
    """A gradient that is `factor` times larger from layer to layer towards the loss."""
    rms = np.repeat(1e-3 * float(factor) ** np.arange(6), 2) * (1 + wobble * (-1.0) ** np.arange(12))
    return snapshot(step, LAYERS, Stage.USED, square_sum=100 * rms**2)


@pytest.mark.parametrize(
    ("newest", "loss", "spread", "said"),
    [
        (deep(4), flat(), 0.01, "fades by a factor of 4.0"),
        (deep(1 / 4), flat(), 0.01, "grows by a factor of 4.0"),
        (deep(4), falling(), 0.01, None),
        (deep(1.5), flat(), 0.01, None),
        (deep(4), flat(), 0.5, None),
    ],
    ids=["fades", "grows", "the loss falls", "a little", "examples still differ"],
)
def test_a_steady_factor_from_layer_to_layer(newest, loss, spread, said):
    """With a flat loss, and where little of the inputs reaches the last layer."""
    history = history_of(loss, *looks([spread] * 4), newest=newest)
    found = list(rules.Fading()(history))
    assert len(found) == (said is not None)
    if found:
        assert said in found[0].seen
        assert "1.02e+03 over 6 layers" in found[0].seen


def test_a_jump_is_no_steady_factor():
    """One layer a thousand times weaker than all others is another illness."""
    rms = np.full(12, 1e-1)
    rms[:2] = 1e-4
    newest = snapshot(199, LAYERS, Stage.USED, square_sum=100 * rms**2)
    assert rules_of(rules.Fading(), history_of(flat(), *looks([0.01] * 4), newest=newest)) == []


def test_a_shallow_model_has_no_depth_to_fade_over():
    """Three layers are too few."""
    names = LAYERS[:6]
    rms = np.repeat(1e-3 * 10.0 ** np.arange(3), 2)
    newest = snapshot(199, names, Stage.USED, square_sum=100 * rms**2)
    assert rules_of(rules.Fading(), history_of(flat(), *looks([0.01] * 4), newest=newest)) == []
