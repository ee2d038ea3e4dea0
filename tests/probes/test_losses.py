"""Losses as people write them: each is probed rightly, or refused with a sentence that says what to do."""

import random as python_random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gradlens.errors import GradlensWarning, ProbeError
from gradlens.probes.curvature import curvature
from gradlens.probes.finite_difference import check_partials
from gradlens.probes.mixed_partials import mixed_partials
from gradlens.probes.nudge import nudge
from gradlens.probes.survey import survey
from gradlens.probes.symmetry import check_symmetry

from .helpers import trace


def net(width=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, width))


X = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))


def gradient_penalty(m):
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    return m(X).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()


def physics(m):
    x = X.clone().requires_grad_()
    u = m(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    return (first[:, 1] - 0.1 * second[:, 0]).square().mean()


def inner_loop(m):
    """One step of MAML."""
    weights = dict(m.named_parameters())
    loss = torch.func.functional_call(m, weights, X).square().mean()
    slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    moved = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
    return torch.func.functional_call(m, moved, X + 1).square().mean()


def functorch(m):
    weights = dict(m.named_parameters())
    slopes = torch.func.grad(lambda w: torch.func.functional_call(m, w, X).square().mean())(weights)
    return sum(g.square().sum() for g in slopes.values())


LOSSES = {"WGAN-GP": gradient_penalty, "PINN": physics, "MAML": inner_loop, "torch.func": functorch}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_differentiate_within(name):
    """Gradient penalties, physics-informed losses and inner loops are right, can be nudged, and leave no trace."""
    model, loss = net(), LOSSES[name]
    before = trace(model)
    assert check_partials(model, loss, k=12).ok
    assert check_symmetry(model, loss, k=2).ok
    found = survey(model, lambda m, b: loss(m) * b.mean(), [torch.ones(4) + 0.01 * k for k in range(8)])
    moved = nudge(model, lambda m, b: loss(m) * b.mean(), found, [torch.ones(4)], size=1e-3)
    assert moved.actual == pytest.approx(moved.predicted, rel=0.05)
    assert trace(model) == before


def test_an_optimizer_within_the_loss_moves_private_weights():
    """An inner loop that trains in place is undone after each evaluation."""
    model = net()
    before = trace(model)

    def loss(m):
        inner = torch.optim.SGD(m.parameters(), lr=0.1)
        inner.zero_grad()
        m(X).square().mean().backward()
        inner.step()
        return m(X + 1).square().mean()

    first = check_partials(model, loss, k=2)
    assert trace(model) == before
    assert len(first.frame) == 2


@pytest.mark.parametrize("wide", ["check_partials", "mixed_partials"])
def test_results_are_written_where_out_says(wide):
    """`torch.mul(x, 3, out=buf)` gives the float64 probes the user's own loss, and the buffer stays as it was."""
    buf, view = torch.full((4,), 7.0), None
    view = buf[1:3]

    def loss(v):
        with torch.no_grad():
            torch.mul(v["c"], 3, out=buf)
        return (v["x"] * view).square().sum() * buf.sum()

    point = {"x": torch.tensor([0.5, 2.0], requires_grad=True), "c": torch.arange(4.0)}
    if wide == "check_partials":
        found = check_partials(point, loss)
        assert found.ok
        np.testing.assert_allclose(found.frame["partial"], [2 * 0.5 * 9 * 18, 2 * 2 * 36 * 18])
    else:
        block = mixed_partials(point, loss)
        np.testing.assert_allclose(np.diag(block), [2 * 9 * 18, 2 * 36 * 18])
    assert buf.tolist() == [7.0] * 4


def test_modules_beside_the_model_are_left_alone():
    """A discriminator with spectral_norm and BatchNorm, a criterion with a moving average, a teacher: none is touched."""
    model = net(2)
    discriminator = nn.Sequential(parametrizations.spectral_norm(nn.Linear(2, 3)), nn.BatchNorm1d(3), nn.Linear(3, 1))

    class Criterion(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("average", torch.zeros(2))
            self.seen = 0

        def forward(self, x):
            self.average.mul_(0.9).add_(0.1 * x.detach().mean(0))
            self.seen += 1
            return (x - self.average).square().mean()

    class Trainer:
        def __init__(self):
            self.criterion, self.teacher = Criterion(), net(2)

        def loss(self, m):
            with torch.no_grad():
                target = self.teacher.train()(X)
            return self.criterion(m(X)) + F.softplus(-discriminator(m(X))).mean() + F.mse_loss(m(X), target)

    trainer = Trainer()
    beside = [model, discriminator, trainer.criterion, trainer.teacher]
    before = [trace(module) for module in beside]
    assert check_partials(model, trainer.loss, k=4, allow="detach").ok
    assert curvature(model, trainer.loss, samples=2).top > 0
    survey(model, lambda m, b: trainer.loss(m) * b.mean(), [torch.ones(2) * k for k in range(1, 9)])
    assert [trace(module) for module in beside] == before


def test_generators_and_small_tensors_of_a_closure_are_put_back():
    """Generators of torch, numpy and Python are set back before each evaluation and at the end; scratch tensors too."""
    model, scratch = net(), torch.zeros(3)
    ours = torch.Generator().manual_seed(3), np.random.default_rng(3), python_random.Random(3)
    states = ours[0].get_state(), ours[1].bit_generator.state, ours[2].getstate()

    def loss(m):
        scratch.add_(1)
        x = X + torch.randn(X.shape, generator=ours[0]) + float(ours[1].normal()) + ours[2].random()
        return m(x).square().mean() * scratch[0]

    assert check_partials(model, loss).ok
    assert torch.equal(ours[0].get_state(), states[0])
    assert (ours[1].bit_generator.state, ours[2].getstate()) == states[1:]
    assert scratch.tolist() == [0, 0, 0]


def test_a_large_tensor_of_a_closure_that_is_written_is_named():
    """What is found and too large to be kept is named, once, where the loss writes into it."""
    model, memory = net(), torch.zeros(1 << 19)

    def loss(m, b):
        memory[0] += 1
        return m(X).square().mean() * b.mean()

    with pytest.warns(GradlensWarning, match="memory.*does not put back"):
        survey(model, loss, [torch.ones(2) * k for k in range(1, 9)])


def test_operations_without_float64_are_computed_in_less():
    """An operation that refuses float64 is named, tolerances are wider, and a wrong backward is still found."""

    def picky(x):
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(picky, (x,), x)
        if x.dtype == torch.float64:
            raise RuntimeError("\"picky_cpu\" not implemented for 'Double'")
        return torch.tanh(x)

    model = net()
    right = check_partials(model, lambda m: picky(m[0](X)).square().mean(), k=8)
    assert right.ok, str(right)
    assert right.coarse == ("picky",)
    assert "does not exist in float64" in str(right)
    wrong = check_partials(model, lambda m: (picky(m[0](X)) * picky(m[0](X)).detach()).mean(), k=8)
    assert not wrong.ok
    assert check_symmetry(model, lambda m: picky(m[0](X)).square().mean()).ok
    assert not check_symmetry(model, lambda m: (picky(m[0](X)) * picky(m[0](X)).detach()).mean()).ok


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m: (m(X).mean(), m(X)), r"tuple of 2, not a tensor; return the loss alone.*\[0\]"),
        (lambda m: print(m(X).sum(), end=""), "None, not a tensor; end it with return"),
        (lambda m: {"loss": m(X).mean()}, 'return its entry "loss"'),
        (lambda m: m(X).mean().item(), r"without \.item\(\)"),
        (lambda m: m(X).mean().detach().numpy(), "numpy"),
        (lambda m: "text" if m(X) is not None else "", "one real number as a tensor"),
    ],
)
def test_what_is_no_loss_is_told_what_to_return(loss, message):
    """Tuples, None, dicts, floats and arrays each get their own advice."""
    for probe in (check_partials, check_symmetry, curvature):
        with pytest.raises(ProbeError, match=message):
            probe(net(), loss)


def test_nan_is_refused_or_named():
    """A loss of NaN has nothing to check; a survey names the batch that gave it."""
    model = net()
    for probe in (check_partials, check_symmetry, curvature):
        with pytest.raises(ProbeError, match="the loss is nan"):
            probe(model, lambda m: m(X).mean() * float("nan"))
    given = [torch.ones(2) * (k if k != 3 else float("nan")) for k in range(1, 10)]
    with pytest.warns(GradlensWarning, match="batch 2 gave a loss"):
        assert survey(model, lambda m, b: m(X).square().mean() * b.mean(), given).spoiled == (2,)


def test_modules_that_are_registered_twice_are_one():
    """Actor and critic over one trunk: the trunk's weights are moved once, and stay its own."""
    trunk = nn.Linear(2, 3)
    model = nn.ModuleDict({"actor": nn.Sequential(trunk, nn.Linear(3, 1)), "critic": nn.Sequential(trunk, nn.Linear(3, 1))})
    before = trace(model)
    assert check_partials(model, lambda m: (m["actor"](X) * m["critic"](X)).square().mean(), k=40).ok
    assert trace(model) == before
    assert model["actor"][0] is model["critic"][0] is trunk


def _backward(m):
    loss = m(X).square().mean()
    loss.backward()
    return loss


with torch.inference_mode():
    MADE_IN_INFERENCE = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (_backward, r"without backward\(\) and step\(\)"),
        (lambda m: m(MADE_IN_INFERENCE).square().mean(), r"x\.clone\(\)"),
        (lambda m: {"loss": m(X).mean()}, 'its entry "loss"'),
    ],
    ids=["backward", "inference", "dict"],
)
def test_what_a_loss_may_not_do_is_said_with_what_to_do(loss, message):
    """Instead of torch's words there is a sentence, and no trace."""
    model = net()
    before = trace(model)
    with pytest.raises(ProbeError, match=message):
        curvature(model, loss, samples=2)
    with pytest.raises(ProbeError, match=message):
        survey(model, lambda m, b: loss(m), [torch.ones(2)] * 8)
    assert trace(model) == before
