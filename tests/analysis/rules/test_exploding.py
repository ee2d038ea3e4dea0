"""Gradients far too large."""

import pytest

from gradlens.analysis.rules import Exploding, Spike
from gradlens.records import Stage
from tests.analysis.made import asked, last, parameters_of, snapshot

USED = Stage.USED


def large(step, norm, weight=1.0, **options):
    """A weight and a bias, each with a gradient of this norm."""
    return snapshot(step, square_sum=norm**2, weight_square_sum=weight**2, **options)


# --- Exploding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "weight", "found"),
    [(1000.0, 1.0, False), (1000.1, 1.0, True), (1000.1, 10.0, True), (1001.0, 10.02, False), (1001.0, 10.0, True)],
)
def test_both_measures_must_be_above_their_edges(norm, weight, found):
    """The norm above 1,000, and above 100 times the weights' norm, at two steps; a bias is left out."""
    said = last(Exploding(), large(0, norm, weight), large(1, norm, weight))
    assert parameters_of(said) == (["a.weight"] if found else [])


def test_the_numbers_are_in_the_text():
    """The gradient's norm, the weights' norm, and their ratio."""
    (finding,) = last(Exploding(steps=1), large(0, 5000.0, 2.0))
    assert finding.seen == "the gradient's norm is 5e+03, 2.5e+03 times the norm of the weights (2)"
    assert finding.value == pytest.approx(5000)
    assert "clip_grad_norm_" in finding.remedy


def test_one_step_is_not_enough():
    """A single large gradient is a spike, and no explosion."""
    assert asked(Exploding(), large(0, 1e6), large(1, 1.0), large(2, 1e6))[-1] == []


def test_what_is_clipped_before_the_optimizer_is_well():
    """Once `used` is read, backward's gradient does not count."""
    steps = [large(k, 1e6 if stage == "backward" else 1.0, stage=stage) for k in range(3) for stage in ("backward", "used")]
    assert [len(findings) for findings in asked(Exploding(steps=1), *steps)] == [1, 0, 0, 0, 0, 0]


def test_weights_that_start_at_zero_or_are_unknown_are_left_alone():
    """A ratio to nothing says nothing."""
    assert last(Exploding(steps=1), large(0, 1e6, 0.0)) == []
    assert last(Exploding(steps=1), large(0, 1e6, float("nan"))) == []


@pytest.mark.parametrize("status", ["frozen", "absent", "uncaptured", "excluded"])
def test_rows_without_a_gradient_of_their_own_are_silent(status):
    """Their numbers are not judged."""
    assert last(Exploding(steps=1), large(0, 1e6, status=[status, "ok"])) == []


# --- Spike ----------------------------------------------------------------------------------------------------------


def calm(n=20, norm=0.1):
    return [large(step, norm) for step in range(n)]


def test_a_hundred_times_the_median_is_a_spike():
    """Exactly 100 times is the edge; above it the whole model is spoken of, with the parameter that made it."""
    assert last(Spike(), *calm(), large(20, 10.0)) == []
    (finding,) = last(Spike(), *calm(), snapshot(20, square_sum=[1000.0, 1.0], weight_square_sum=1.0))
    assert finding.parameter is None
    assert "100% of its square is a.weight" in finding.seen
    assert "20 observed steps" in finding.seen


def test_a_past_that_was_nearly_as_large_makes_it_no_spike():
    """It must also be ten times the largest of the last steps."""
    assert last(Spike(), large(0, 2.0), *(large(k, 0.1) for k in range(1, 30)), large(30, 15.0)) == []
    assert last(Spike(), large(0, 1.0), *(large(k, 0.1) for k in range(1, 30)), large(30, 15.0))


def test_a_spike_that_is_small_beside_the_weights_does_no_harm():
    """Less than a tenth of the weights' norm is left alone."""
    past = [large(k, 1e-4) for k in range(20)]
    assert last(Spike(), *past, large(20, 0.09)) == []
    assert last(Spike(), *past, large(20, 0.11))


def test_it_needs_a_past():
    """With fewer than twenty steps there is no median to compare with, unless fewer were asked for."""
    assert last(Spike(), *calm(19), large(19, 1e3)) == []
    assert last(Spike(steps=5), *calm(5), large(5, 1e3))


def test_only_what_the_optimizer_gets_counts():
    """Clipping before the optimizer makes it harmless."""
    steps = [large(k, 0.1, stage=stage) for k in range(25) for stage in ("backward", "used")]
    assert last(Spike(), *steps, large(25, 1e3)) == []
    assert last(Spike(), *steps, large(25, 1e3), large(25, 1.0, stage=USED)) == []
    assert last(Spike(), *steps, large(25, 1e3), large(25, 1e3, stage=USED))
