"""Partials checked against their definition: correct models pass, planted bugs are found."""

import math
import re

import pytest
import torch
from torch import nn

from gradlens.errors import ArgumentError, ProbeError
from gradlens.probes.finite_difference import check_partials

from .helpers import trace


class Scaled(torch.autograd.Function):
    """The identity, with a backward that is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.factor, None


class OneEntry(torch.autograd.Function):
    """The identity, with a backward that loses the last column."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        g = g.clone()
        g[..., -1] = 0
        return g


class OverwritesInput(torch.autograd.Function):
    """x^2, which overwrites what it saved for its backward, where autograd does not see it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        result = x**2
        x.data.mul_(3)
        return result

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Net(nn.Module):
    def __init__(self, fault=lambda h: h):
        super().__init__()
        self.first, self.second, self.fault = nn.Linear(4, 5), nn.Linear(5, 2), fault

    def forward(self, x):
        return self.second(self.fault(torch.tanh(self.first(x))))


def net(fault=lambda h: h):
    torch.manual_seed(0)
    return Net(fault), torch.randn(7, 4)


@pytest.mark.trap(41)
def test_a_correct_model_is_ok_and_left_alone():
    """The partials of a correct model are right, within the tolerance that each row states, and nothing is left behind."""
    model, x = net()
    model(x).sum().backward()
    before = trace(model)
    found = check_partials(model, lambda m: m(x).square().mean())
    assert trace(model) == before
    assert found.ok
    assert len(found.frame) == 32
    assert list(found.frame.columns) == [
        "parameter", "index", "value", "partial", "difference", "error", "tolerance", "result",
    ]  # fmt: skip
    assert (found.frame["error"] <= found.frame["tolerance"]).all()
    assert (found.frame["tolerance"] < 1e-3 * found.frame["partial"].abs().max()).all()
    assert found.weights == 37
    assert found.missed == found.narrow == ()
    first, expert = str(found).splitlines()
    assert first == "partials are right: 32 of 32 drawn agree with central differences (37 weights in all); nothing to do"
    assert re.fullmatch(r"  32 weights drawn by seed 0, moved by 1e-05 max\(1, \|w\|\); rounding .* loss by \de-\d+", expert)


def test_rows_say_value_and_partial_of_their_weight():
    """Each row's value and partial are those of the named weight, in float64."""
    model, x = net()
    frame = check_partials(model, lambda m: m(x).square().mean(), k=100).frame
    assert len(frame) == 37
    twin, _ = net()
    twin.double()(x.double()).square().mean().backward()
    named = dict(twin.named_parameters())
    for row in frame.itertuples(name=None):
        _, name, index, value, partial, difference, *_ = row
        assert value == named[name][index].item()
        assert partial == pytest.approx(named[name].grad[index].item(), rel=1e-12)
        assert difference == pytest.approx(partial, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    "fault",
    [
        lambda h: Scaled.apply(h, 2.0),
        lambda h: Scaled.apply(h, 1.001),
        lambda h: Scaled.apply(h, -1.0),
        lambda h: Scaled.apply(h, 0.0),
        OneEntry.apply,
        OverwritesInput.apply,
        lambda h: h * h.detach(),
        lambda h: h + h.data**2,
        lambda h: torch.stack([h[:, 0] * h[0, 0].item()] * 5, 1),
    ],
)
def test_planted_bugs_are_found(fault):
    """Wrong backwards, detached paths and hidden in-place writes are wrong, in the layer below the fault and only there."""
    model, x = net(fault)
    before = trace(model)
    found = check_partials(model, lambda m: m(x).square().mean(), k=37)
    assert not found.ok
    wrong = found.frame[found.frame["result"] == "wrong"]
    assert set(wrong["parameter"]) <= {"first.weight", "first.bias"}
    assert "partials are WRONG" in str(found)
    assert f"partial {wrong.sort_values('error')['partial'].iloc[-1]:.6g}" in str(found)
    assert trace(model) == before


def test_a_bug_in_one_small_parameter_is_found_with_the_default_k():
    """Each parameter's most sensitive weight is among those drawn, so that a bias beside a large weight is not missed."""

    class Big(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(300, 300) / 17), nn.Parameter(torch.randn(300))

        def forward(self, x):
            return x @ self.weight + Scaled.apply(self.bias, 0.5)

    torch.manual_seed(0)
    model, x = Big(), torch.randn(4, 300)
    wrong = check_partials(model, lambda m: m(x).square().mean()).frame.query("result == 'wrong'")
    assert set(wrong["parameter"]) == {"bias"}


def test_a_loss_cut_off_from_all_weights_is_wrong():
    """A loss that changes with the weights but was detached has partials of 0, and they are wrong."""
    model, x = net()
    assert not check_partials(model, lambda m: m(x).detach().square().mean()).ok


def test_loud_in_place_errors_are_explained():
    """An in-place write that autograd does notice is an error that says so."""
    model, x = net(lambda h: torch.exp(h).add_(1))
    with pytest.raises(ProbeError, match="changed in place"):
        check_partials(model, lambda m: m(x).square().mean())


@pytest.mark.trap(41)
def test_tied_weights_are_moved_together():
    """A weight that is used twice is right by its total partial."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    found = check_partials(model, lambda m: m(torch.ones(2, 3)).square().sum())
    assert found.ok
    assert set(found.frame["parameter"]) == {"0.weight", "0.bias", "2.bias"}


@pytest.mark.trap(41)
@pytest.mark.parametrize("at", [0.0, 3e-7, -4e-6])
def test_at_a_kink_any_partial_between_the_slopes_is_right(at):
    """At |x| and next to it the two slopes differ, and a partial between them is no error."""
    found = check_partials({"x": at, "y": 1.0}, lambda v: v["x"].abs() + v["y"] ** 2)
    assert found.ok
    assert found.frame["result"][0] in ("kink", "right")
    assert found.frame["result"][1] == "right"
    if at == 0:
        assert "1 at a kink" in str(check_partials({"x": at}, lambda v: torch.relu(v["x"]) + 2 * v["x"]))


def test_a_partial_outside_of_the_slopes_of_a_kink_is_wrong():
    """A kink excuses only what lies between its slopes."""
    assert not check_partials({"x": 0.0}, lambda v: Scaled.apply(v["x"], 5.0).abs() + Scaled.apply(v["x"], 5.0)).ok


def test_straight_through_estimators_are_reported():
    """A gradient that is not that of the loss is wrong, meant or not, and the text says how to say that it is meant."""
    loss = lambda v: (v["x"] + (v["x"].round() - v["x"]).detach()) ** 2  # noqa: E731
    found = check_partials({"x": 1.3}, loss)
    assert not found.ok
    assert str(found).startswith("partials are WRONG: 1 of 1 drawn do not agree")
    assert "allow='detach'" in str(found)
    allowed = check_partials({"x": 1.3}, loss, allow="detach")
    assert allowed.ok
    assert allowed.frame["result"][0] == "right"


def a2c(m):
    value, advantage = m(torch.ones(3, 4)).unbind(1)
    return (value - 1).square().mean() - (advantage * (1 - value).detach()).mean()


def bootstrapped(m):
    with torch.no_grad():
        target = 1 + 0.9 * m(torch.ones(3, 4)).max(1).values
    return (m(torch.zeros(3, 4))[:, 0] - target).square().mean()


def no_data(m):
    h = m(torch.ones(3, 4))
    return (h * h.data).sum()


@pytest.mark.parametrize("loss", [a2c, bootstrapped, no_data])
def test_what_is_cut_off_on_purpose_is_held(loss):
    """Stopped gradients of A2C, of a bootstrapped target and of .data are right with what they cut off held."""
    model, _ = net()
    before = trace(model)
    assert not check_partials(model, loss, k=37).ok
    assert check_partials(model, loss, k=37, allow="detach").ok
    assert trace(model) == before


def test_a_wrong_backward_is_found_beside_what_is_allowed():
    """Held values hide nothing else; parameters that may differ are named as such, others are not excused."""
    model, _ = net(lambda h: Scaled.apply(h, 2.0))
    assert not check_partials(model, a2c, k=37, allow="detach").ok
    found = check_partials(model, a2c, k=37, allow=["detach", "first.*"])
    assert found.ok
    assert set(found.frame.query("result == 'allowed'")["parameter"]) == {"first.weight", "first.bias"}
    assert "allowed to differ" in str(found)
    assert not check_partials(model, a2c, k=37, allow=["detach", "second.*"]).ok
    with pytest.raises(ArgumentError, match="matches no parameter"):
        check_partials(model, a2c, allow="frist.*")


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_the_tolerance_follows_the_scale_of_the_loss(scale, factor):
    """The same bug is found, and the same correct model passes, however the loss is scaled."""
    model, x = net(lambda h: Scaled.apply(h, factor))
    assert check_partials(model, lambda m: scale * m(x).square().mean()).ok == (factor == 1.0)


def test_partials_that_rounding_hides_are_counted():
    """Beside a constant of 1e12 no partial can be seen, wrong or right, and the text says so."""
    model, x = net(lambda h: Scaled.apply(h, 2.0))
    found = check_partials(model, lambda m: m(x).square().mean() + 1e12)
    assert found.ok
    assert "32 of them are too small beside the loss to be told from its rounding" in str(found)
    assert "too small" not in str(check_partials(model, lambda m: m(x).square().mean()))
    before_norm = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh())  # a bias that it takes out again
    assert "too small" not in str(check_partials(before_norm, lambda m: m(x).square().mean()))


def test_a_partial_that_is_not_a_number_is_wrong():
    """sqrt at 0 times 0 is the classic NaN gradient of a finite loss."""
    found = check_partials({"x": 0.0}, lambda v: torch.where(v["x"] > 0, v["x"].sqrt(), v["x"]))
    assert not found.ok
    assert math.isnan(found.frame["partial"][0])


def test_losses_that_differ_from_call_to_call_are_refused():
    """A loss that takes a new batch at each call cannot be compared with itself."""
    model, _ = net()
    batches = iter(torch.randn(100, 7, 4))
    with pytest.raises(ProbeError, match="no next"):
        check_partials(model, lambda m: m(next(batches)).square().mean())


def test_a_loss_that_ignores_its_argument_is_refused():
    """Closing over the model is an error that says how to write the loss."""
    model, x = net()
    with pytest.raises(ProbeError, match="ignores the model it is given"):
        check_partials(model, lambda m: model(x).square().mean())


def test_a_loss_that_is_not_finite_is_refused():
    """There is nothing to compare at a loss of NaN."""
    with pytest.raises(ProbeError, match="the loss is nan"):
        check_partials({"x": -1.0}, lambda v: v["x"].sqrt())


def test_few_weights_say_what_was_missed():
    """With fewer draws than parameters the text names what was left out, and k = 0 is refused."""
    model, x = net()
    found = check_partials(model, lambda m: m(x).square().mean(), k=1)
    assert len(found.frame) == 1
    assert len(found.missed) == 3
    assert "raise k" in str(found)
    with pytest.raises(ArgumentError, match="at least 1"):
        check_partials(model, lambda m: m(x).mean(), k=0)


def test_progress_is_shown_on_request(capsys):
    """With progress=True a bar runs on standard error; by default nothing is written where that is no terminal."""
    model, x = net()
    check_partials(model, lambda m: m(x).square().mean(), k=3)
    assert capsys.readouterr().err == ""
    check_partials(model, lambda m: m(x).square().mean(), k=3, progress=True)
    assert "checking partials" in capsys.readouterr().err
