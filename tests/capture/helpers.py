"""What several tests of capture train on, and how they compare gradients."""

import torch


def data(step):
    """The batch of a step."""
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(step))


def grads(model):
    """A copy of each gradient that is there, by name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(seen, expected):
    """The same names, and of each the same numbers."""
    assert set(seen) == set(expected)
    for name in expected:
        assert torch.equal(seen[name], expected[name]), name
