"""A loss that does not fall, and why."""

import numpy as np
import pytest

from gradlens import rules
from tests.analysis.rules.courses import falling, flat, graph, history_of, looks, rules_of, settings

SUPERVISED = graph("NllLoss", "LogSoftmax", "Addmm")


@pytest.mark.parametrize(
    ("loss", "ratio", "cosine", "found"),
    [
        (flat(), 1e-5, 0.6, True),
        (falling(), 1e-5, 0.6, False),
        (flat(), 2e-3, 0.6, False),
        (flat(), 1e-5, 0.05, False),
    ],
    ids=["creeps", "falls", "usual steps", "nothing to agree on"],
)
def test_steps_that_agree_and_are_tiny(loss, ratio, cosine, found):
    """Only of a flat loss, with both signs together."""
    assert rules_of(rules.TooSlow(), history_of(loss, ratio=ratio, cosine=cosine)) == [("too_slow", "warning")] * found


def test_a_warm_up_is_no_small_rate():
    """A rate that rises is not judged by its first value."""
    facts = settings(1e-5), settings(1e-3, step=100)
    assert rules_of(rules.TooSlow(), history_of(flat(), *facts, ratio=1e-5, cosine=0.6)) == []


@pytest.mark.parametrize(
    ("loss", "ratio", "cosine", "found"),
    [
        (np.linspace(1, 40, 200), 0.3, 0.0, True),
        (flat(), 0.01, -0.9, True),
        (falling(), 0.3, -0.9, False),
        (flat(), 0.003, 0.2, False),
    ],
    ids=["leaps", "bounces", "falls all the same", "usual"],
)
def test_steps_that_are_too_large(loss, ratio, cosine, found):
    """They leap, or undo each other, and the loss does not fall."""
    assert rules_of(rules.TooFast(), history_of(loss, ratio=ratio, cosine=cosine)) == [("too_fast", "warning")] * found


def noise(mean, steps=200):
    """Cosines around a mean, as those of batches are."""
    return mean + 0.2 * np.random.default_rng(3).standard_normal(steps)


@pytest.mark.parametrize(
    ("loss", "cosines", "spread", "found"),
    [
        (flat(), noise(0.02), 0.4, True),
        (flat(), noise(0.45), 0.4, False),
        (flat(), np.where(np.arange(200) < 100, noise(0.05), noise(0.35)), 0.4, False),  # it begins to learn
        (flat(), noise(0.02), 0.01, False),  # the inputs do not reach the last layer
        (falling(), noise(0.02), 0.4, False),
    ],
)
def test_batches_that_agree_on_nothing(loss, cosines, spread, found):
    """From the start to the end, with steps of a usual size, and where the inputs arrive."""
    history = history_of(loss, SUPERVISED, *looks([spread] * 4), ratio=3e-3, cosine=cosines)
    assert rules_of(rules.Disagreement(), history) == [("disagreement", "warning")] * found


def test_a_plateau_at_the_start_is_given_time():
    """A hundred steps say nothing yet."""
    facts = SUPERVISED, *looks([0.4] * 4)
    history = history_of(flat(steps=100), *facts, ratio=3e-3, cosine=noise(0.02, 100), steps=100)
    assert rules_of(rules.Disagreement(), history) == []


def test_a_loss_without_targets_is_not_asked_what_it_agrees_on():
    """A triplet's gradients agree on little in a healthy training."""
    history = history_of(flat(), graph("Mean", "Relu"), *looks([0.4] * 4), ratio=3e-3, cosine=noise(0.02))
    assert rules_of(rules.Disagreement(), history) == []
