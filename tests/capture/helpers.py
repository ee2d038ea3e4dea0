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


class Rewriting(torch.optim.Optimizer):
    """Calls its closure, then rewrites each gradient and moves the weights, as `move` of a subclass does it."""

    def __init__(self, parameters, way):
        super().__init__(parameters, {"lr": 0.05})
        self.way = way

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        for p in self.param_groups[0]["params"]:
            self.move(p)


class Fails(torch.autograd.Function):
    """Its backward finds no memory."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("out of memory")
