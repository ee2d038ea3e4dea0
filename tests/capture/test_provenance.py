"""Whose numbers may stand for whose: every combination of facts."""

import itertools

import pytest
import torch

from gradlens.capture.events import GradientFacts
from gradlens.capture.provenance import loss_gradient, may_copy
from gradlens.records import Source

FACTS = [GradientFacts(*facts) for facts in itertools.product((False, True), repeat=4)]
SCALES = [1.0, 1024.0, torch.tensor(1.0)]


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_used_copies_backward_only_where_nothing_can_have_changed(facts, scale):
    """One backward, or one that ranks have averaged; nobody else's hook, untouched, and a scale that is known to be 1."""
    unscaled = isinstance(scale, float) and scale == 1.0
    read = facts.single or facts.reduced
    assert may_copy(facts, scale) is (read and facts.own and facts.untouched and unscaled)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_whose_gradient_the_change_of_the_loss_rests_on(facts, scale, kept):
    """The used one if it is the loss's own; a copy of the step's only backward; else what clipping left of it."""
    unscaled = isinstance(scale, float) and scale == 1.0
    source = loss_gradient(facts, scale, kept=kept)
    if facts.own and facts.untouched and unscaled:
        assert source is Source.USED
    else:
        assert source is (Source.KEPT if kept and facts.single else Source.RATIO)
