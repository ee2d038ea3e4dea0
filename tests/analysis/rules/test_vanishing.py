"""Gradients that do not reach a layer."""

import numpy as np
import pytest

from gradlens.analysis.rules import Vanishing
from gradlens.records import Severity, Stage
from tests.analysis.made import asked, last, parameters_of, snapshot


def depth(step, *rms, **options):
    """Layers `0`, `1`, ... of weight and bias, whose partials have this rms in the weight, and half of it in the bias."""
    names = tuple(f"{i}.{kind}" for i in range(len(rms)) for kind in ("weight", "bias"))
    square = np.repeat(np.square(rms), 2) * 100 * np.tile([1.0, 0.25], len(rms))
    return snapshot(step, names, square_sum=square, **options)


@pytest.mark.parametrize(("weak", "found"), [(1.01e-4, False), (0.99e-4, True)])
def test_the_ratio_to_the_strongest_layer_decides(weak, found):
    """Below 1e-4 of it at ten steps, the first layers; one weight stands for a layer."""
    said = asked(Vanishing(), *(depth(step, weak * 0.1, 0.01, 0.1) for step in range(10)))
    assert [len(findings) for findings in said] == [0] * 9 + [int(found)]
    if found:
        (finding,) = said[-1]
        assert (finding.parameter, finding.severity) == ("0.weight", Severity.WARNING)
        assert finding.value == pytest.approx(weak)
        assert "that of 2.weight is 0.1" in finding.seen


def test_weak_layers_in_the_middle_must_be_three_in_a_row():
    """Queries and keys of young attention are weak too, and alone."""
    assert last(Vanishing(steps=1), depth(0, 0.1, 1e-7, 1e-7, 0.1, 1e-7, 0.1)) == []
    three = last(Vanishing(steps=1), depth(0, 0.1, 1e-7, 1e-7, 1e-7, 0.1))
    assert parameters_of(three) == ["1.weight", "2.weight", "3.weight"]


def test_a_weak_end_alone_is_what_the_layer_does():
    """Only a run that begins at the first layer counts when it is short."""
    assert last(Vanishing(steps=1), depth(0, 0.1, 0.1, 1e-7)) == []
    assert parameters_of(last(Vanishing(steps=1), depth(0, 1e-7, 1e-7, 0.1))) == ["0.weight", "1.weight"]


def test_a_layer_that_explodes_is_no_measure():
    """Beside a layer at 1e4 one at 0.01 is well: strength counts up to 1."""
    assert last(Vanishing(steps=1), depth(0, 0.01, 0.1, 1e4)) == []
    assert last(Vanishing(steps=1), depth(0, 0.9e-4, 0.1, 1e4))


def test_the_strongest_parameter_stands_for_its_layer():
    """A bias without gradient before a normalisation does not make its layer weak."""
    names = ("0.weight", "0.bias", "1.weight", "1.bias")
    assert last(Vanishing(steps=1), snapshot(0, names, square_sum=[1.0, 1e-30, 1.0, 1e-30])) == []
    assert last(Vanishing(steps=1), snapshot(0, names, square_sum=[1e-30, 1.0, 1e-30, 1.0])) == []


def test_partials_that_are_zero_do_not_dilute_the_rest():
    """An embedding has a gradient for the words of the batch, and its rms is over those."""
    names = ("embedding.weight", "head.weight")
    counts = {"numel": [10**6, 100], "zero": [10**6 - 10, 0], "positive": [5, 50], "negative": [5, 50]}
    assert last(Vanishing(steps=1), snapshot(0, names, square_sum=[10 * 0.001**2, 1.0], **counts)) == []


def test_scales_and_lone_biases_do_not_stand_in_the_row():
    """Normalisations have no weight with two axes; they neither count as weak nor break a run."""
    names = ("a.weight", "norm.weight", "b.weight", "c.weight", "d.weight")
    shapes = [(10, 10), (100,), (10, 10), (10, 10), (10, 10)]
    weak = [1.0, 1.0, 1e-16, 1e-16, 1e-16]
    findings = last(Vanishing(steps=1), snapshot(0, names, shapes=shapes, square_sum=weak))
    assert parameters_of(findings) == ["b.weight", "c.weight", "d.weight"]
    assert last(Vanishing(steps=1), snapshot(0, names, shapes=shapes, square_sum=[1.0, 1e-16, 1.0, 1.0, 1.0])) == []


@pytest.mark.parametrize("status", ["frozen", "absent", "zero", "excluded", "uncaptured", "nonfinite"])
def test_layers_without_a_gradient_are_silent(status):
    """What is absent, frozen or dead has other rules, and is no first layer that would make a short run count."""
    both = [status, status, "ok", "ok", "ok", "ok"]
    findings = last(Vanishing(steps=1), depth(0, 1e-9, 0.1, 0.1, status=both))
    assert findings == []
    assert last(Vanishing(steps=1), depth(0, 1e-9, 1e-9, 0.1, status=both)) == []


def test_it_must_last_on_the_same_layer():
    """One step at which the layer had a gradient begins the count anew."""
    steps = [depth(step, 1e-7 if step != 5 else 0.1, 0.1, 0.1) for step in range(16)]
    assert [len(findings) for findings in asked(Vanishing(), *steps)] == [0] * 15 + [1]


@pytest.mark.parametrize(("strongest", "found"), [(1.01e-8, False), (0.99e-8, True)])
def test_the_whole_gradient_has_vanished_below_the_floor(strongest, found):
    """Then the model is named, and no layer."""
    findings = last(Vanishing(), *(depth(step, strongest, 1e-13) for step in range(10)))
    assert [(f.parameter, f.severity) for f in findings] == ([(None, Severity.WARNING)] if found else [])


def test_a_gradient_that_vanished_in_training_has_converged():
    """If it was larger once, the end is as it should be: an info."""
    steps = [depth(0, 0.1, 0.1), *(depth(step, 1e-10, 1e-10) for step in range(1, 12))]
    (finding,) = last(Vanishing(), *steps)
    assert finding.severity == Severity.INFO
    assert finding.causes == ("the training has converged",)


def test_stages_have_counts_of_their_own():
    """Ten steps are ten steps of one stage."""
    steps = [depth(k, 1e-9, 0.1, stage=stage) for k in range(5) for stage in (Stage.BACKWARD, Stage.USED)]
    assert last(Vanishing(steps=6), *steps) == []
    assert len(last(Vanishing(steps=5), *steps)) == 1


def test_scaling_the_loss_changes_nothing():
    """The ratio of layers is free of the loss's units, up to strengths of 1."""
    for factor in (1e-3, 1.0, 10.0):
        assert parameters_of(last(Vanishing(steps=1), depth(0, 1e-7 * factor, 0.05 * factor))) == ["0.weight"]
