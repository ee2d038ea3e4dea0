"""The operation in which NaN or infinity is born, forward and backward, with its module and the user's line."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradlens


class Rooted(nn.Module):
    """A layer, and the square root of its squares."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4, bias=False)

    def forward(self, x):
        return self.body(x).square().sum(1).sqrt()


def test_a_root_at_0_is_named_in_the_backward_pass():
    """The loss is finite, and the derivative of sqrt at 0 is not: the operation, its module, the line, the row."""
    model, x = Rooted(), torch.randn(5, 3)
    x[2] = 0
    trace = gradlens.trace_nonfinite(model, lambda m, batch: m(batch).mean(), x)
    birth = trace.origin
    assert (birth.phase, birth.operation, birth.what, birth.row, birth.count) == ("backward", "Sqrt", "infinity", 2, 1)
    assert ".sqrt()" in birth.line
    assert __file__ in birth.line
    assert not trace.ok
    assert "Sqrt" in str(trace)
    assert next(iter(trace.frame["operation"])) == "Sqrt"


@pytest.mark.parametrize(
    ("make", "operation", "what"),
    [
        (lambda h: (h - h.detach()).log().mean(), "log", "infinity"),
        (lambda h: ((h - h.detach()) / (h - h.detach())).mean(), "div", "NaN"),
        (lambda h: (h * 1e30).exp().mean(), "exp", "infinity"),
        (lambda h: h.masked_fill(torch.ones_like(h).bool(), -torch.inf).softmax(1).mean(), "_softmax", "NaN"),
        (lambda h: (-(h**2) - 1).sqrt().mean(), "sqrt", "NaN"),
    ],
)
def test_a_birth_in_the_forward_pass(make, operation, what):
    """The first operation that makes it of finite numbers; a mask of -inf is no birth."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4))
    birth = gradlens.trace_nonfinite(model, lambda m, batch: make(m(batch)), torch.randn(5, 3)).origin
    assert (birth.phase, birth.operation, birth.what) == ("forward", operation, what)
    assert birth.inputs


def test_the_module_is_named():
    """That whose forward ran the operation."""

    class Log(nn.Module):
        def forward(self, x):
            return (x * 0).log()

    model = nn.Sequential(nn.Linear(3, 4), Log())
    birth = gradlens.trace_nonfinite(model, lambda m, batch: m(batch).sum(), torch.randn(2, 3)).origin
    assert (birth.operation, birth.module) == ("log", "1")


def test_what_was_not_finite_to_begin_with():
    """NaN in the data or in the weights is no birth, and is named."""
    model, x = nn.Linear(3, 1), torch.randn(4, 3)
    x[1, 1] = torch.nan
    trace = gradlens.trace_nonfinite(model, lambda m, batch: m(batch).mean(), x)
    assert trace.given == ("input 0 of the batch",)
    assert trace.births == ()
    assert not trace.ok


def test_a_healthy_batch_has_none_and_the_model_is_as_it_was():
    """Nothing found, and weights, buffers, gradients and random state bit for bit the same."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    F.cross_entropy(model(x), y).backward()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    gradients, state = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    trace = gradlens.trace_nonfinite(model, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), (x, y))
    assert trace.ok
    assert "every number is finite" in str(trace)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.is_anomaly_enabled()
