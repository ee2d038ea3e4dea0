"""Every probe leaves the model and the process as they were: when it ends, and wherever in its midst it is stopped."""

import numpy as np
import pytest
import torch
from torch import nn

import gradlens

from .helpers import trace
from .test_isolated_loss import everything, noisy


class Fails(torch.autograd.Function):
    """The identity, whose backward draws a random number and raises."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        torch.rand(1)
        raise KeyError("in backward")


def batches(k=9):
    return list(torch.randn(k, 8, 4, generator=torch.Generator().manual_seed(0)))


def nudged(model, loss):
    surveyed = gradlens.survey(model, noisy, batches())
    return gradlens.nudge(model, loss, surveyed, batches())


PROBES = {
    "survey": lambda model, loss: gradlens.survey(model, loss, batches()),
    "survey of a sample": lambda model, loss: gradlens.survey(model, loss, batches(), sample=5),
    "survey of the most sensitive": lambda model, loss: gradlens.survey(model, loss, batches(), top=5),
    "nudge": nudged,
    "check_partials": lambda model, loss: gradlens.check_partials(model, lambda m: loss(m, batches()[0]), k=4),
    "check_symmetry": lambda model, loss: gradlens.check_symmetry(model, lambda m: loss(m, batches()[0]), k=1),
    "mixed_partials": lambda model, loss: gradlens.mixed_partials(
        model, lambda m: loss(m, batches()[0]), [("inner.bias", 0), ("inner.bias", 1)]
    ),
    "curvature": lambda model, loss: gradlens.curvature(model, lambda m: loss(m, batches()[0]), samples=2),
}


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_that_ends(probe):
    """Parameters, buffers, gradients, modes, attributes, hooks and random states are bit-identical."""
    model, _ = everything()
    before = trace(model)
    PROBES[probe](model, noisy)
    assert trace(model) == before


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
@pytest.mark.parametrize("calls", [1, 2, 6])
@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_whose_loss_raises(probe, calls, error):
    """So they are when the loss raises, at its first evaluation or a later one, after it has changed what it could."""
    model, _ = everything()
    before = trace(model)
    made = []

    def loss(m, x):
        value = noisy(m, x)
        made.append(0)
        if len(made) == calls:
            m.fresh = m.inner.weight = nn.Parameter(torch.zeros(4, 4))
            m.train(not m.training)
            m.inner.register_forward_hook(lambda *args: None)
            np.random.seed(5)
            raise error("in the loss")
        return value

    def run():
        PROBES[probe](model, loss)
        if len(made) < calls:  # it evaluates the loss less often
            raise error

    with pytest.raises(error):
        run()
    assert trace(model) == before


@pytest.mark.parametrize("probe", sorted(set(PROBES) - {"nudge"}))
def test_a_probe_whose_backward_raises(probe):
    """And when a backward does."""
    model, _ = everything()
    before = trace(model)
    with pytest.raises(KeyError, match="in backward"):
        PROBES[probe](model, lambda m, x: noisy(m, Fails.apply(m.inner(x))))
    assert trace(model) == before
