"""check_symmetry fails on whatever is no gradient, and on nothing that is one."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradlens.errors import ArgumentError, ArgumentTypeError, ProbeError
from gradlens.probes.symmetry import check_symmetry
from tests.probes.helpers import Once

from .helpers import trace


def function(forward, backward):
    """An autograd.Function of one tensor; `backward(x, y, g)`."""

    class Made(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = forward(x)
            ctx.save_for_backward(x, y)
            return y

        @staticmethod
        def backward(ctx, g):
            return backward(*ctx.saved_tensors, g)

    return Made.apply


def detached_norm(h):
    return h / h.norm(dim=-1, keepdim=True).detach()


def hard_gumbel(h):
    soft = h.softmax(-1)
    hard = F.one_hot(soft.argmax(-1), h.shape[-1]).to(soft)
    return hard - soft.detach() + soft


#: What is no gradient of the loss: the thirteen of the cases, and some more.
BROKEN = {
    "scaled by 1.5": function(lambda x: x.clone(), lambda x, y, g: 1.5 * g),
    "sign flipped": function(lambda x: x.clone(), lambda x, y, g: -g),
    "tanh' = 1 - y": function(torch.tanh, lambda x, y, g: g * (1 - y)),
    "SiLU without its term": function(lambda x: x * x.sigmoid(), lambda x, y, g: g * x.sigmoid()),
    "softmax without its sum": function(lambda x: x.softmax(-1), lambda x, y, g: g * y),
    "detach": lambda h: h * h.detach(),
    ".data": lambda h: h + h.data**2,
    "a detached norm": detached_norm,
    "gradient reversal": function(lambda x: x.clone(), lambda x, y, g: -0.1 * g),
    "a clipped straight-through": function(torch.sign, lambda x, y, g: g * (x.abs() <= 1)),
    "a hard gumbel": hard_gumbel,
    "x^3 with a sum in it": function(lambda x: x**3, lambda x, y, g: g * (3 * x**2 + x.sum())),
    "one column lost": function(lambda x: x.clone(), lambda x, y, g: g * (torch.arange(x.shape[-1]) > 0)),
    "a clipped gradient": function(lambda x: x.clone(), lambda x, y, g: g.clamp(-1e-3, 1e-3)),
    "noise-free rounding": lambda h: h + (h.round() - h).detach(),
    "item()": lambda h: h * h.sum().item(),
    "no_grad": lambda h: h * stopped(h),
    "a mean that is not differentiated": lambda h: h - h.detach().mean(0),
    "off by a thousandth": function(lambda x: x.clone(), lambda x, y, g: 1.001 * g),
}


@torch.no_grad()
def stopped(h):
    return h.sigmoid()


class Net(nn.Module):
    def __init__(self, fault, activation=torch.tanh):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.fault, self.activation = fault, activation

    def forward(self, x):
        return self.third(self.activation(self.second(self.fault(self.activation(self.first(x))))))


def net(fault=lambda h: h, activation=torch.tanh, seed=0):
    torch.manual_seed(seed)
    model, x, y = Net(fault, activation), torch.randn(16, 4), torch.randint(3, (16,))
    return model, lambda m: F.cross_entropy(m(x), y)


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu, F.silu])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_gradient_is_found(kind, seed, activation):
    """Every kind of broken or cut off backward fails, in smooth nets and in ReLU ones, and leaves no trace."""
    model, loss = net(BROKEN[kind], activation, seed)
    before = trace(model)
    found = check_symmetry(model, loss, seed=seed)
    assert not found.ok, str(found)
    assert "NOT" in str(found).splitlines()[0]
    assert trace(model) == before


@pytest.mark.parametrize(
    "kind", sorted(set(BROKEN) - {"scaled by 1.5", "sign flipped", "gradient reversal", "off by a thousandth"})
)
def test_asymmetry_alone_tells_most_kinds(kind):
    """All but the backwards that are wrong by one factor for all that is below are asymmetric by a percent and more."""
    model, loss = net(BROKEN[kind])
    found = check_symmetry(model, loss)
    assert not found.symmetric
    assert found.asymmetry > 0.005


def test_a_factor_common_to_all_is_told_by_slopes():
    """Three times a gradient is symmetric, and not the gradient of the loss."""
    model, _ = net()
    x = torch.randn(8, 4)
    tripled = function(lambda v: v.clone(), lambda v, y, g: 3 * g)
    found = check_symmetry(model, lambda m: tripled(m(x).square().mean()))
    assert found.symmetric
    assert not found.slopes_right
    assert not found.ok
    assert "NOT that of this loss" in str(found)


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu, F.silu, F.gelu, F.leaky_relu, F.hardtanh])
@pytest.mark.parametrize("seed", range(8))
def test_correct_nets_pass(seed, activation):
    """No false alarm, with kinks or without, and power is stated."""
    model, loss = net(activation=activation, seed=seed)
    found = check_symmetry(model, loss, seed=seed)
    assert found.ok, str(found)
    assert found.detectable < 1e-3
    assert "mixed partials are equal" in str(found)


def test_kinks_at_zero_are_no_error():
    """Black borders under a convolution without bias give activations of exactly 0, where ReLU has two slopes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(3 * 9, 4))
    nn.init.zeros_(model[0].bias)
    x = torch.zeros(6, 1, 8, 8)
    x[:, :, 3:5, 3:5] = torch.randn(6, 1, 2, 2)
    found = check_symmetry(model, lambda m: m(x).square().mean())
    assert found.ok, str(found)


@pytest.mark.parametrize("epsilon", [1e-1, 1e-2, 1e-5])
def test_the_power_that_is_stated_is_had(epsilon):
    """A field with a planted asymmetry is found at least as often as is said; far below what is detectable it is not."""
    hits, detectable = 0, []
    random = torch.Generator().manual_seed(0)
    for seed in range(20):
        a, b = (torch.randn(30, dtype=torch.float64, generator=random) for _ in range(2))
        s = torch.randn(30, 30, dtype=torch.float64, generator=random)
        s = s + s.T
        skew = torch.outer(a, b) - torch.outer(b, a)  # of rank two: the worst case
        skew *= epsilon * s.norm() / skew.norm()
        field = function(lambda w, s=s: w @ s @ w / 2, lambda w, y, g, s=s, k=skew: g * ((s + k) @ w))
        weights = {"w": torch.randn(30, dtype=torch.float64, generator=random, requires_grad=True)}
        found = check_symmetry(weights, lambda v, field=field: field(v["w"]), tolerance=1e-3, seed=seed)
        hits += not found.symmetric
        detectable.append(found.detectable)
    if epsilon >= 2**0.5 * np.median(detectable):
        assert hits == 20
    if epsilon == 1e-5:
        assert hits == 0


def test_allow_says_what_is_meant():
    """A straight-through estimator passes with its detached values held; a custom one with its parameters left out."""
    model, loss = net(lambda h: h + (h.round() - h).detach())
    assert not check_symmetry(model, loss).ok
    allowed = check_symmetry(model, loss, allow="detach")
    assert allowed.ok, str(allowed)
    assert "allowed: detach" in str(allowed)
    model, loss = net(BROKEN["a clipped straight-through"])
    assert not check_symmetry(model, loss, allow="detach").ok
    assert check_symmetry(model, loss, allow="first.*").ok
    with pytest.raises(ArgumentError, match="matches no parameter"):
        check_symmetry(model, loss, allow="frist.*")
    with pytest.raises(ArgumentTypeError, match="'detach'"):
        check_symmetry(model, loss, allow=3)


def test_allow_detach_still_finds_what_is_wrong():
    """What is cut off on purpose does not hide a backward that is wrong."""
    tripled = BROKEN["tanh' = 1 - y"]
    model, loss = net(lambda h: tripled(h + (h.round() - h).detach()))
    assert not check_symmetry(model, loss, allow="detach").ok


@pytest.mark.parametrize("spoil", [lambda v: v * float("nan"), lambda v: v / 0, lambda v: v.detach()])
def test_losses_without_derivatives_are_refused(spoil):
    """NaN, infinity and a detached loss are errors, and not a Hessian of 0."""
    model, loss = net()
    with pytest.raises(ProbeError, match=r"the loss is|depends on none"):
        check_symmetry(model, lambda m: spoil(loss(m)))


def test_a_hessian_of_zero_says_that_nothing_was_tested():
    """A loss without curvature is symmetric, and the text does not sell that as proof."""
    found = check_symmetry(nn.Linear(2, 1), lambda m: m(torch.ones(3, 2)).sum())
    assert found.ok
    assert found.flat
    assert "nothing was put to test" in str(found)


@pytest.mark.parametrize("loss", [lambda x: torch.cdist(x, x + 1).sum(), lambda x: Once.apply(x).sum()])
def test_operations_without_a_second_derivative_are_tested_all_the_same(loss):
    """Differences of the gradient need none."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), torch.randn(6, 3)
    assert check_symmetry(model, lambda m: loss(torch.tanh(m(x)))).ok


def test_a_loss_of_chance_is_refused():
    """One that is another at each call cannot be told from a wrong one."""
    model, _ = net()
    with pytest.raises(ProbeError, match="at the same weights"):
        check_symmetry(model, lambda m: m(torch.from_numpy(np.random.default_rng().normal(size=(4, 4)))).square().mean())


def test_no_directions_are_refused():
    """k = 0 would pass anything."""
    with pytest.raises(ArgumentError, match="at least 1"):
        check_symmetry(nn.Linear(1, 1), lambda m: m, k=0)


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "4"])
def test_a_number_of_directions_that_is_none_is_refused(k):
    """With a sentence, whatever its type."""
    with pytest.raises(ArgumentError, match="half the number of directions"):
        check_symmetry(nn.Linear(2, 1), lambda m: m(torch.ones(1, 2)).sum(), k=k)
