"""A real step taken apart: causes, allocation of the change of the loss, and no trace on training."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import gradlens
from gradlens.errors import ArgumentTypeError, ProbeError
from gradlens.probes.dissect import NODES, SHARES, dissect
from gradlens.statistics.attribution import CAUSES, attribute

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


def net(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)


def loss_of(model, seed):
    x, y = batch(seed)
    return nn.functional.cross_entropy(model(x), y)


def taken_apart(make, steps=5, clip=0.5, inside=(), **given):
    """Train, and take the last step apart; `inside` names what happens within the block."""
    model = net()
    optimizer = make(model.parameters())
    for step in range(steps):
        last = step == steps - 1
        optimizer.zero_grad()
        if last and "backward" in inside:
            with dissect(model, optimizer, **given) as found:
                loss_of(model, step).backward()
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
            break
        loss_of(model, step).backward()
        if last:
            with dissect(model, optimizer, **given) as found:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
        else:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return model, optimizer, found


# --- no trace ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda p: SGD(p, 0.1, momentum=0.9), lambda p: ADAMW(p, 0.01), lambda p: ADAM(p, 0.01, fused=True)]
)
@pytest.mark.parametrize("fails", [False, True])
def test_training_is_bit_identical(make, fails):
    """Weights, buffers, optimizer state, gradients, hooks and random numbers are those of a training without it."""

    def loss_fn(model):
        if fails:
            raise RuntimeError("the user's loss fails")
        return loss_of(model, 0)

    def train(watched):
        model = net(dropout=0.3)
        optimizer = make(model.parameters())
        torch.manual_seed(3)
        for step in range(4):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            if watched:
                with dissect(model, optimizer, loss_fn):
                    optimizer.step()
            else:
                optimizer.step()
        assert {(p._post_accumulate_grad_hooks, p._backward_hooks) for p in model.parameters()} == {(None, None)}
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
        state = {k: v for s in optimizer.state.values() for k, v in s.items()}
        return model.state_dict(), state, [p.grad for p in model.parameters()], torch.get_rng_state()

    for a, b in zip(*map(_tensors, (train(False), train(True))), strict=True):
        assert torch.equal(a, b)


def _tensors(tree):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


# --- wish and deed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [(), ("backward",)])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        lambda p: ADAM(p, 0.01),
        lambda p: ADAMW(p, 0.01, weight_decay=0.5, amsgrad=True),
    ],
)
def test_the_causes_are_those_of_the_step_itself(make, inside):
    """By parameter they equal the attribution from copies made by hand, and add up to the share that moved against."""
    model, _, found = taken_apart(make, inside=inside)
    by_hand = net()
    optimizer = make(by_hand.parameters())
    for step in range(5):
        optimizer.zero_grad()
        loss_of(by_hand, step).backward()
        wish = [p.grad.clone() for p in by_hand.parameters()]
        nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
        state = [copy.deepcopy(optimizer.state[p]) for p in by_hand.parameters()]
        before = [p.detach().clone() for p in by_hand.parameters()]
        optimizer.step()
    kind, group = type(optimizer).__name__, optimizer.param_groups[0]
    table = found.table.set_index("parameter")
    for i, (name, p) in enumerate(by_hand.named_parameters()):
        expected = attribute(kind, p.grad, before[i], p.detach(), group, state[i], wish[i])
        assert table.loc[name, "optimizer"] == kind
        assert table.loc[name, "moving"] == expected.moving
        for cause in (*CAUSES, "against", "error"):
            assert table.loc[name, cause] == pytest.approx(getattr(expected, cause), nan_ok=True)
        np.testing.assert_allclose(found.weights(name)["partial"], wish[i].ravel())
        np.testing.assert_allclose(found.weights(name)["value"] + found.weights(name)["dw"], p.detach().ravel(), rtol=1e-6)
    assert found.against > 0
    assert sum(found.causes.values()) == pytest.approx(found.against)
    assert found.causes["unknown"] == 0
    frame = found.frame
    assert (frame["against"] == (frame["used"] * frame["dw"] > 0)).all()
    assert (frame["against"] == (frame["cause"] != "")).all()
    assert torch.equal(model[0].weight, by_hand[0].weight)


def test_it_agrees_with_what_a_lens_records():
    """The shares and the first-order change of the loss are the lens's columns of the same step."""
    model = net()
    optimizer = ADAM(model.parameters(), 0.01)
    with gradlens.watch(model, optimizer, rules=()) as lens:
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            with dissect(model, optimizer) as found:
                optimizer.step()
        table = lens.table(stage="used")
    np.testing.assert_allclose(found.table["against"], table["against_share"])
    np.testing.assert_allclose(found.table["loss_change"], table["loss_change"], rtol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_scaled_gradients_are_unscaled(fused, inside):
    """With `scaler=` the partials are those of the loss, whenever the block begins and whoever unscales."""

    def train(scaler):
        model = net()
        optimizer = ADAM(model.parameters(), 0.01, fused=fused)
        for step in range(2):
            optimizer.zero_grad()
            if inside:
                with dissect(model, optimizer, scaler=scaler) as found:
                    scaler.scale(loss_of(model, step)).backward()
                    scaler.step(optimizer)
            else:
                scaler.scale(loss_of(model, step)).backward()
                with dissect(model, optimizer, scaler=scaler) as found:
                    scaler.step(optimizer)
            scaler.update()
        return found

    scaled, plain = (train(torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=on)) for on in (True, False))
    for column in ("partial", "used", "dw"):
        np.testing.assert_allclose(scaled.frame[column], plain.frame[column], rtol=1e-4, atol=1e-9)
    assert scaled.table["against"].tolist() == plain.table["against"].tolist()
    assert scaled.causes == pytest.approx(plain.causes, abs=1e-12)


def test_an_unknown_optimizer_blames_nothing_on_a_guess():
    """RMSprop with momentum moves weights against their gradients, for unknown causes."""
    *_, found = taken_apart(lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9))
    assert found.against > 0
    assert found.causes["unknown"] == pytest.approx(found.against)
    assert set(found.kinds) == {"(RMSprop)"}
    assert "unknown" in str(found)


def test_several_optimizers_and_weights_that_none_has():
    """Each parameter is explained by its own optimizer; one that none moves has nothing to explain."""
    model = net()
    first, second = SGD(model[0].parameters(), 0.1), ADAM(model[4].parameters(), 0.1)
    loss_of(model, 0).backward()
    with dissect(model, [first, second]) as found:
        first.step()
        second.step()
    assert found.kinds == ("SGD", "SGD", "", "", "Adam", "Adam")
    assert (found.table["moving"] > 0).tolist() == [True, False, False, False, True, True]  # 0.bias: BatchNorm removes it
    assert found.causes["unknown"] == 0


def test_a_closure_hides_clipping():
    """What a closure does before the step is not seen: nothing is blamed on clipping, and the text says so."""
    model = net()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        return loss

    with dissect(model, optimizer) as found:
        optimizer.step(closure)
    assert found.causes["unknown"] == 0
    assert not found.clipping_known
    assert "clipping is blamed for nothing" in str(found)
    np.testing.assert_allclose(np.linalg.norm(found.used), 0.01, rtol=1e-4)


def test_two_steps_in_a_block_are_not_explained_as_one():
    """The move is of both, the recomputed one of the first: unknown."""
    model = net()
    optimizer = SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.5)
    loss_of(model, 0).backward()
    with dissect(model, optimizer) as found:
        optimizer.step()
        optimizer.step()
    assert found.steps == 2
    assert found.causes["unknown"] == pytest.approx(found.against)
    assert str(found).startswith("2 steps of SGD")


# --- what came of it --------------------------------------------------------------------------------------------------


def test_the_rule_integrates_degree_seven_exactly():
    """Gauss-Lobatto with five points: all powers up to seven, and not the eighth."""
    for power in range(8):
        assert sum(s * x**power for x, s in zip(NODES, SHARES, strict=True)) == pytest.approx(1 / (power + 1), rel=1e-14)
    assert sum(s * x**8 for x, s in zip(NODES, SHARES, strict=True)) != pytest.approx(1 / 9, rel=1e-6)


def test_a_quadratic_is_allocated_by_its_formula():
    """On w.A.w / 2 each weight's share is dw_i (g_i + (A dw)_i / 2), and they add up to the change."""
    random = torch.Generator().manual_seed(0)
    a = torch.randn(6, 6, dtype=torch.float64, generator=random)
    a = a @ a.t()
    w = torch.randn(6, dtype=torch.float64, generator=random, requires_grad=True)
    optimizer = SGD([w], lr=0.02)
    g = a @ w.detach()
    (w @ a @ w / 2).backward()
    with dissect({"w": w}, optimizer, lambda v: v["w"] @ a @ v["w"] / 2) as found:
        optimizer.step()
    dw = -0.02 * g
    np.testing.assert_allclose(found.share, dw * (g + a @ dw / 2), rtol=1e-12)
    assert found.actual == pytest.approx((g @ dw + dw @ a @ dw / 2).item(), rel=1e-12)
    assert found.loss_change == pytest.approx((g @ dw).item(), rel=1e-12)
    assert found.alpha == pytest.approx((-((g + a @ dw) @ dw) / (g @ dw)).item(), rel=1e-12)
    assert abs(found.path.missing) < 1e-12


@pytest.mark.parametrize(
    ("lr", "alpha", "words"),
    [(0.05, -0.5, "before the minimum"), (0.1, 0, "near"), (0.15, 0.5, "past"), (0.25, 1.5, "higher")],
)
def test_alpha_says_where_the_step_ended(lr, alpha, words):
    """On a parabola of curvature 10, a learning rate of 1/10 goes to the minimum."""
    w = torch.tensor(1.0, requires_grad=True)
    optimizer = SGD([w], lr=lr)
    (5 * w**2).backward()
    with dissect({"w": w}, optimizer, lambda v: 5 * v["w"] ** 2) as found:
        optimizer.step()
    assert found.alpha == pytest.approx(alpha, abs=1e-6)
    assert words in str(found)


def test_the_shares_of_a_network_add_up_to_the_change_of_the_loss():
    """By weight, by parameter and in all, with dropout and BatchNorm; to first order it is another number."""
    model = net(dropout=0.3)
    optimizer = ADAM(model.parameters(), 0.01)
    loss_of(model, 0).backward()
    with dissect(model, optimizer, lambda m: loss_of(m, 0)) as found:
        optimizer.step()
    assert found.actual < 0
    assert found.path.allocated.sum() == pytest.approx(found.actual, rel=1e-6)
    assert found.table["allocated"].sum() == pytest.approx(found.actual, rel=1e-6)
    sums = found.frame.groupby("parameter", sort=False)["allocated"].sum()
    np.testing.assert_allclose(sums, found.table["allocated"], rtol=1e-9, atol=1e-15)
    assert abs(found.path.slopes[0].sum() - found.actual) > 0.02 * abs(found.actual)
    assert "lowered it most" in str(found)
    top = found.weights(top=5)["allocated"].abs()
    assert top.is_monotonic_decreasing
    assert top.iloc[0] == np.abs(found.share).max()


def test_a_loss_that_is_not_finite_is_said():
    """After a step to a loss of infinity the text shows both losses, and says nothing of where on a parabola that is."""
    w = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = SGD([w], lr=1e3)
    w.grad = torch.ones(1)
    with dissect({"w": w}, optimizer, lambda v: v["w"].sum() + (v["w"] < 0).sum() / torch.zeros(())) as found:
        optimizer.step()
    assert math.isnan(found.actual) or math.isinf(found.actual)
    assert "there is no change to share out" in str(found)
    assert "alpha" not in str(found)


def test_a_part_of_the_weights_is_looked_at():
    """A sample spreads over all parameters; with select the change is that of the selected, the others being there."""
    make = lambda p: ADAM(p, 0.01)  # noqa: E731
    *_, whole = taken_apart(make, loss_fn=lambda m: loss_of(m, 4))
    *_, part = taken_apart(make, loss_fn=lambda m: loss_of(m, 4), sample=20)
    assert 15 < len(part.frame) < 30
    assert part.actual == whole.actual
    merged = part.frame.merge(whole.frame, on=["parameter", "index"], suffixes=("", "_whole"))
    for column in ("partial", "dw", "allocated"):
        np.testing.assert_array_equal(merged[column], merged[f"{column}_whole"])
    *_, some = taken_apart(make, loss_fn=lambda m: loss_of(m, 4), select="4.*")
    assert some.parameters.names == ("4.weight", "4.bias")
    assert some.actual == pytest.approx(some.path.allocated.sum(), rel=1e-6)
    assert some.actual > whole.actual


def test_complex_weights_are_pairs():
    """A complex weight is two reals, and moves as they do."""
    w = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True)
    optimizer = ADAM([w], lr=0.1)
    (w.abs() ** 2).sum().backward()
    with dissect({"w": w}, optimizer, lambda v: (v["w"].abs() ** 2).sum()) as found:
        optimizer.step()
    assert found.frame["index"].tolist() == [(0, 0), (0, 1), (1, 0), (1, 1)]
    np.testing.assert_allclose(found.partial, [2, 4, 6, -2])
    assert found.causes["unknown"] == 0
    assert found.path.allocated.sum() == pytest.approx(found.actual, rel=1e-6)


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_nothing_to_show_says_why():
    """Asked too soon, without a step, after an error in the block, and where the loss fails."""
    model = net()
    optimizer = SGD(model.parameters(), 0.1)
    with pytest.raises(ProbeError, match="not been run"):
        print(dissect(model, optimizer))
    with dissect(model, optimizer) as found:
        pass
    with pytest.raises(ProbeError, match=r"no optimizer's step\(\)"):
        found.table  # noqa: B018
    with pytest.raises(ZeroDivisionError), dissect(model, optimizer) as found:
        1 / 0  # noqa: B018
    with pytest.raises(ProbeError, match="raised ZeroDivisionError"):
        str(found)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_loss_that_fails_leaves_the_causes():
    """What does not need the loss function is there; the text says what failed."""

    def broken(m):
        m(batch(0)[0])
        raise ValueError("not this one")

    *_, whole = taken_apart(lambda p: SGD(p, 0.1, momentum=0.9))
    *_, found = taken_apart(lambda p: SGD(p, 0.1, momentum=0.9), loss_fn=broken)
    assert found.causes == whole.causes
    assert found.against > 0
    assert math.isnan(found.alpha)
    assert found.table["allocated"].isna().all()
    assert "loss_fn failed (ValueError: not this one)" in str(found)


def test_a_gradient_that_is_cut_off_on_purpose_is_no_kink():
    """A2C's detached advantage is named as such where shares do not add up; a kink is still called one."""
    model = net()
    optimizer = SGD(model.parameters(), 0.5)

    def a2c(m):
        out = m.eval()(batch(0)[0])
        return (out[:, 0] * (1 - out[:, 1]).detach()).mean() + (out[:, 1] - 1).square().mean()

    a2c(model).backward()
    with dissect(model, optimizer, a2c) as found:
        optimizer.step()
    assert "cuts something off" in str(found)
    assert "kinks" not in str(found)
    w = nn.Parameter(torch.tensor([0.31]))
    optimizer = SGD([w], 1.0)
    bent = lambda v: v["w"].abs().sum() + v["w"].sum() * 0.1  # noqa: E731
    bent({"w": w}).backward()
    with dissect({"w": w}, optimizer, bent) as found:
        optimizer.step()
    assert "the loss has kinks along the way" in str(found)


def test_accelerates_optimizer_is_looked_into():
    """A wrapper that is no initialised optimizer gives the step of the one inside."""
    from accelerate import Accelerator

    model = net()
    plain = ADAM(model.parameters(), 0.01)
    wrapped = Accelerator(cpu=True).prepare_optimizer(plain)
    loss_of(model, 0).backward()
    with dissect(model, wrapped) as found:
        wrapped.step()
    assert set(found.kinds) == {"Adam"}
    assert found.moving > 0


def test_what_is_no_optimizer_is_refused():
    """A model in its place is named."""
    with pytest.raises(ArgumentTypeError, match="not Sequential"):
        dissect(net(), net())


def test_without_a_loss_function_the_first_order_is_all():
    """No path, no alpha; the text says how to get them."""
    *_, found = taken_apart(lambda p: SGD(p, 0.1))
    assert math.isnan(found.actual)
    assert math.isnan(found.alpha)
    assert found.table["allocated"].isna().all()
    assert "give loss_fn" in str(found)
    assert found.against == 0
