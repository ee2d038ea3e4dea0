"""Why weights move against their gradient: planted causes are found, and steps that are not understood are not explained."""

import copy
import math

import pytest
import torch

from gradlens.statistics.attribution import CAUSES, alpha, attribute, kind_of


def snapshot(optimizer, p):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}


def run(make, gradients, w=None, dtype=torch.float64, clip=None):
    """Steps with the given gradients; the attribution of the last one."""
    start = torch.ones_like(torch.as_tensor(gradients[0], dtype=dtype)) if w is None else torch.as_tensor(w, dtype=dtype)
    p = torch.nn.Parameter(start.clone())
    optimizer = make([p])
    for g in gradients:
        p.grad = torch.as_tensor(g, dtype=dtype)
        loss = p.grad.clone()
        if clip:
            torch.nn.utils.clip_grad_norm_([p], clip)
        state, before, group = snapshot(optimizer, p), p.detach().clone(), copy.copy(optimizer.param_groups[0])
        optimizer.step()
    return attribute(kind_of(optimizer), p.grad, before, p.detach(), group, state, loss)


SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


@pytest.mark.parametrize(
    ("make", "clip"),
    [
        (lambda p: SGD(p, lr=0.1), None),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), None),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), None),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1), 0.5),
        (lambda p: ADAM(p, lr=0.01), None),
        (lambda p: ADAM(p, lr=0.01, weight_decay=0.5), 0.5),
        (lambda p: ADAM(p, lr=0.01, amsgrad=True), None),
        (lambda p: ADAMW(p, lr=0.01, weight_decay=0.5), 0.5),
        (lambda p: ADAMW(p, lr=torch.tensor(0.01, dtype=torch.float64), betas=(0.5, 0.9)), None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_step_is_reproduced_and_shares_add_up(make, clip, dtype):
    """For each known optimizer the recomputed step is the real one, and the causes add up to the share against."""
    random = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 300, generator=random)
    found = run(make, gradients, w=torch.randn(300, generator=random), dtype=dtype, clip=clip)
    assert found.error < (1e-12 if dtype == torch.float64 else 1e-4)
    assert found.moving == 300
    assert sum(found.causes.values()) == pytest.approx(found.against, rel=1e-12, abs=1e-15)
    assert found.unknown == 0


def test_plain_descent_never_moves_against_its_gradient():
    """SGD alone has nothing to explain."""
    found = run(lambda p: SGD(p, lr=0.1), [torch.randn(50)])
    assert found.against == 0
    assert not any(found.causes.values())


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, momentum=0.9), lambda p: ADAM(p, lr=0.1)])
def test_a_turned_gradient_is_blamed_on_momentum(make):
    """After a long run one way, a small gradient the other way is overruled by what was collected."""
    found = run(make, [[1.0, 1.0]] * 5 + [[-0.1, 1.0]])
    assert found.against == 0.5
    assert found.momentum == 0.5


@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.1, weight_decay=1.0), lambda p: ADAM(p, lr=0.1, weight_decay=1.0)])
def test_a_large_weight_is_blamed_on_weight_decay(make):
    """A weight of 5 with a gradient that asks for a little more is drawn to 0 instead."""
    found = run(make, [[-0.1, 0.1]], w=[5.0, 5.0])
    assert found.against == found.weight_decay == 0.5


def test_decoupled_decay_is_blamed_too():
    """AdamW moves a weight of 50 down by lr * decay * 50, whatever its gradient of unit effect asks."""
    found = run(lambda p: ADAMW(p, lr=0.1, weight_decay=0.1), [[-1.0, 1.0]], w=[50.0, 50.0])
    assert found.against == found.weight_decay == 0.5


def test_clipping_shares_the_blame_where_the_whole_gradient_would_have_won():
    """A gradient cut to a hundredth loses against weight decay: without either it would not have."""
    found = run(lambda p: SGD(p, lr=0.1, weight_decay=1.0), [[-10.0, 0.0]], w=[5.0, 0.0], clip=0.1)
    assert found.against == 1
    assert found.clipping == found.weight_decay == 0.5


def test_adaptive_scaling_is_blamed_where_one_scale_would_have_won():
    """A weight whose gradients used to be huge moves little by its own scale, and decay wins; by a common one it loses."""
    history = [[1000.0, 1e-3], [-1000.0, 1e-3]] * 3
    found = run(lambda p: ADAMW(p, lr=0.1, weight_decay=0.01, betas=(0.0, 0.999)), [*history, [-10.0, 1e-3]], w=[5.0, 0.0])
    assert found.against == 0.5
    assert found.adaptive == found.weight_decay == 0.25


def test_what_no_single_ingredient_explains_is_combined():
    """Where momentum and decay each suffice, neither alone is the cause."""
    found = run(lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=1.0), [[5.0]] * 5 + [[-0.1]], w=[50.0])
    assert found.combined == found.against == 1


class MyAdam(torch.optim.Adam):
    pass


@pytest.mark.parametrize(
    "make",
    [
        lambda p: MyAdam(p, lr=0.1, weight_decay=1.0),
        lambda p: torch.optim.RMSprop(p, lr=0.1, weight_decay=1.0),
        lambda p: SGD(p, lr=0.1, weight_decay=1.0, maximize=True),
    ],
)
def test_other_optimizers_are_unknown(make):
    """A subclass, another optimizer, and gradient ascent are not explained by these formulas."""
    found = run(make, [[-0.1, 0.1]], w=[5.0, 5.0])
    assert found.against > 0
    assert found.unknown == found.against


def test_a_step_that_is_not_reproduced_is_unknown():
    """If somebody else moved the weights too, nothing is blamed on a guess."""
    g, w = torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0])
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False}
    found = attribute("SGD", g, w, w + torch.tensor([0.5, -0.1]), group, {})
    assert found.against == found.unknown == 0.5
    assert found.error > 0.1


def test_weights_that_did_not_move_have_nothing_to_explain():
    """A parameter without moving weights has empty shares."""
    w = torch.ones(3)
    found = attribute("SGD", torch.zeros(3), w, w, {"lr": 0.1, "momentum": 0, "weight_decay": 0}, {})
    assert found.moving == 0
    assert math.isnan(found.against)
    assert all(math.isnan(found.causes[cause]) for cause in CAUSES)


@pytest.mark.parametrize(("end", "expected"), [(0.0, -1), (0.5, -0.5), (1.0, 0), (2.0, 1), (3.0, 2)])
def test_alpha_says_where_on_the_parabola_a_step_ended(end, expected):
    """On (x - 1)^2 from x = 0: at the start -1, at the minimum 0, as high on the other side 1."""
    dw = end or 1e-12
    assert alpha(-2 * dw, 2 * (end - 1) * dw) == pytest.approx(expected)
    assert math.isnan(alpha(0.1, 0.2))
