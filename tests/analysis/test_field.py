"""Findings that were wrong, or missing, when public bug reports were replayed: each kind under a real lens."""

import itertools
import warnings

import pytest
import torch
from torch import nn

import gradlens
from gradlens.records import Severity
from tests.scaled import clipped


def mlp(*sizes):
    torch.manual_seed(0)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def loud(lens):
    """Rules that warned, and of which parameters."""
    return [(f.rule, f.parameter) for f in lens.findings() if f.severity != Severity.INFO]


def trained(model, optimizer, loss, steps=30, between=lambda step: None, **options):
    """The closed lens of the usual loop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = gradlens.watch(model, optimizer, **options)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss(step).backward()
        between(step)
        optimizer.step()
    lens.close()
    return lens


def test_an_optimizer_that_writes_infinite_weights_is_named_at_that_step():
    """F5: Adam's eps is 0 in float16; the first step has finite gradients, and is the culprit."""
    model = mlp(16, 32, 4).half()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-8)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(1)).relu().half()
    lens = trained(model, optimizer, lambda step: model(x).float().square().mean() * 1e-3, steps=6)
    first = min((f for f in lens.findings() if f.rule == "nonfinite"), key=lambda f: f.step)
    assert first.step == 0
    assert "the optimizer wrote" in first.seen
    assert "eps is 0 in float16" in first.causes[0]
    table = lens.table(0, stage="used")
    assert table["update_nonfinite"].sum() > 0
    assert table["nan"].sum() == table["weight_nonfinite"].sum() == 0
    assert lens.diagnosis().origin.rule == "eps"


@pytest.mark.parametrize("together", [True, False])
def test_a_healthy_wasserstein_critic_hears_nothing(together):
    """F14: +1 and -1 cancel in the output's bias, in one backward or in two; that is neither dead nor lost."""
    critic = mlp(4, 16, 16, 1)
    optimizer = torch.optim.RMSprop(critic.parameters(), lr=1e-3)
    lens = gradlens.watch(critic, optimizer)
    for _ in range(40):
        optimizer.zero_grad()
        losses = -critic(torch.randn(32, 4) + 1).mean(), critic(torch.randn(32, 4)).mean()
        if together:
            sum(losses).backward()
        else:
            for loss in losses:
                loss.backward()
        optimizer.step()
    lens.close()
    assert loud(lens) == []


def test_clipping_that_spreads_one_nan_is_told_from_the_forward_pass():
    """F15: parameters that were finite after backward are told which one was not."""
    model = mlp(8, 8, 3)

    now = [0]

    def loss(step):
        now[0] = step
        return model(torch.randn(16, 8)).square().mean()

    hook = model[0].bias.register_hook(lambda g: g.masked_fill(torch.arange(8) == 2, float("nan")) if now[0] == 5 else g)
    lens = trained(
        model,
        torch.optim.SGD(model.parameters(), 0.01),
        loss,
        steps=7,
        between=lambda step: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    )
    hook.remove()
    at_five = [f for f in lens.findings() if f.rule == "nonfinite" and f.step == 5]
    spread = [f for f in at_five if f.stage == "used" and f.parameter != "0.bias"]
    assert {f.parameter for f in spread} == {"0.weight", "2.weight", "2.bias"}
    assert all("clip_grad_norm_ multiplied" in f.causes[0] and "'0.bias'" in f.causes[0] for f in spread)
    assert all("forward pass" not in " ".join(f.causes) for f in spread)


def test_classic_fine_tuning_of_the_head_alone_hears_nothing():
    """F16: the body's gradients grow unread; the head's step is no stale one."""
    model = mlp(8, 16, 16, 3)
    x, y = torch.randn(256, 8), torch.randint(3, (256,))
    optimizer = torch.optim.Adam(model[-1].parameters(), lr=1e-2)
    lens = trained(model, optimizer, lambda step: nn.functional.cross_entropy(model(x), y), steps=40)
    assert loud(lens) == []


def test_a_parameter_that_is_used_rarely_is_said_once_as_an_info():
    """F18: an initial state that each fifteenth step needs is not absent again and again."""
    model = mlp(4, 8, 2)
    model.register_parameter("start", nn.Parameter(torch.zeros(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def loss(step):
        x = torch.randn(32, 4)
        x = x + model.start if step % 15 == 0 else x
        return (model(x) - x[:, :2]).square().mean()

    lens = trained(model, optimizer, loss, steps=120)
    found = [f for f in lens.findings() if f.rule == "absent"]
    assert len(found) <= 2
    assert {f.severity for f in found} <= {Severity.INFO}


def test_a_part_that_has_finished_is_no_warning():
    """F25: forward-forward trains a layer, and then the next one."""
    model = mlp(4, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def loss(step):
        x = torch.randn(32, 4)
        first = torch.relu(model[0](x))
        return (first.mean() - 1).square() if step < 40 else (model[2](first.detach()).mean() - 1).square()

    lens = trained(model, optimizer, loss, steps=80)
    assert ("absent", "0.weight") not in loud(lens)
    assert ("absent", "0.bias") not in loud(lens)


def test_a_bias_that_can_have_no_effect_is_not_dead():
    """F25: softmax does not change when one number is added to all its inputs, so the last bias's gradient may cancel."""
    model = mlp(8, 16, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    def loss(step):
        x = torch.randn(32, 8)
        better, worse = model(x), model(x.flip(0))
        return nn.functional.softplus(worse - better).mean() + (better - worse).square().mean() * 0.1

    assert "dead" not in {rule for rule, _ in loud(trained(model, optimizer, loss, steps=40))}


def test_large_gradients_of_a_summed_loss_under_adam_are_no_warning():
    """F25: a VAE's loss is summed over pixels; Adam's steps are small and the loss falls."""
    model = mlp(64, 32, 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = 20 * torch.rand(256, 64, generator=torch.Generator().manual_seed(3))
    lens = trained(model, optimizer, lambda step: (model(x) - x).square().sum(), steps=60)
    assert loud(lens) == []


def test_an_optimizer_that_iterates_may_go_far():
    """F25: LBFGS takes twenty steps in one."""
    model = mlp(2, 8, 1)
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(4))
    y = x.prod(1, keepdim=True)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=20)
    lens = gradlens.watch(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    for _ in range(8):
        optimizer.step(closure)
    lens.close()
    assert "update_ratio" not in {rule for rule, _ in loud(lens)}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("right", [True, False])
def test_clipping_beside_a_scaler_that_watch_was_not_given(given, right):
    """F6: the right order is silent, the wrong one is named, whether gradlens was told of the scaler or not."""
    model = mlp(8, 16, 3)
    x, y = torch.randn(64, 8), torch.randint(3, (64,))
    lens = clipped(model, x, y, steps=20, given=given, right=right)
    rules = {rule for rule, _ in loud(lens)}
    assert "loss_scaled" not in rules
    assert ("clipped_scaled" in rules) == (not right)
