"""Mixed partials are equal, and a gradient whose mixed partials differ is found out."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from gradlens.errors import ArgumentError, ArgumentTypeError, ProbeError
from gradlens.probes.mixed_partials import mixed_partials
from tests.probes.helpers import Once

from .helpers import trace

numbers = st.floats(-10, 10, allow_nan=False)


class WrongBackward(torch.autograd.Function):
    """x -> x^3, whose backward claims 3x^2 + x_0: smooth, and the gradient of nothing."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (3 * x**2 + x.reshape(-1)[0])


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(6, 3)


@settings(deadline=None, max_examples=25)
@given(x=numbers, y=numbers)
def test_the_block_of_a_polynomial(x, y):
    """The Hessian of x^2 y + y^3 is [[2y, 2x], [2x, 6y]] and exactly symmetric at any point."""
    block = mixed_partials({"x": x, "y": y}, lambda v: v["x"] ** 2 * v["y"] + v["y"] ** 3, ["x", "y"])
    assert list(block.index) == list(block.columns) == ["x", "y"]
    np.testing.assert_allclose(block, [[2 * y, 2 * x], [2 * x, 6 * y]], rtol=1e-14)
    assert block.loc["x", "y"] == block.loc["y", "x"]


def test_the_block_of_a_model_equals_torchs_hessian():
    """Named weights of a model give the entries of torch.func.hessian, in float64, and the model is left alone."""
    model, x = mlp()
    before = trace(model)
    weights = [("0.weight", (0, 2)), "0.bias[1]", ("2.weight", (1, 3)), ("2.bias", 0)]
    block = mixed_partials(model, lambda m: m(x).square().mean(), weights)
    assert trace(model) == before
    labels = ["0.weight[0, 2]", "0.bias[1]", "2.weight[1, 3]", "2.bias[0]"]
    assert list(block.columns) == labels

    wide = {name: p.detach().double() for name, p in model.named_parameters()}
    loss = lambda p: torch.func.functional_call(model, p, x.double()).square().mean()  # noqa: E731
    full = torch.func.jacrev(torch.func.jacrev(loss))(wide)
    places = [("0.weight", (0, 2)), ("0.bias", (1,)), ("2.weight", (1, 3)), ("2.bias", (0,))]
    expected = [[full[a][b][i + j].item() for b, j in places] for a, i in places]
    np.testing.assert_allclose(block, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(block, block.T, rtol=1e-12, atol=1e-15)


def test_a_name_alone_stands_for_all_entries():
    """A tensor's name gives a row for each entry; no weights at all means all of them; one weight may stand alone."""
    model, x = mlp()
    loss = lambda m: m(x).square().mean()  # noqa: E731
    assert list(mixed_partials(model, loss, ["2.bias"]).index) == ["2.bias[0]", "2.bias[1]"]
    assert list(mixed_partials(model, loss, "2.bias").index) == ["2.bias[0]", "2.bias[1]"]
    assert list(mixed_partials(model, loss, ("2.bias", 1)).index) == ["2.bias[1]"]
    assert mixed_partials(model, loss).shape == (26, 26)


def test_a_linear_loss_has_mixed_partials_of_zero():
    """Where the gradient depends on no weight, the block is 0 and not an error."""
    assert not mixed_partials({"x": 1.0, "y": 2.0}, lambda v: 3 * v["x"] - v["y"]).to_numpy().any()


def test_a_wrong_backward_shows_as_asymmetry():
    """A backward that is the gradient of nothing gives a block that is not symmetric."""
    w = torch.tensor([2.0, 3.0], requires_grad=True)
    block = mixed_partials({"w": w}, lambda v: WrongBackward.apply(v["w"]).sum(), ["w"])
    assert block.iloc[0, 1] == 0
    assert block.iloc[1, 0] == 1


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (["2.wieght"], ArgumentError, "did you mean '2.weight'"),
        ([("2.weight", (2, 0))], ArgumentError, r"2.weight\[2, 0\] is outside of '2.weight', whose shape is \(2, 4\)"),
        ([("2.weight", (-1, 0))], ArgumentError, "outside"),
        ([("2.weight", 3)], ArgumentError, "outside"),
        (["2.bias", ("2.bias", 0)], ArgumentError, r"2.bias\[0\] is named twice"),
        ([], ArgumentError, "at least one weight"),
        ([3], ArgumentTypeError, "not 3"),
        ([("2.bias", 0.5)], ArgumentTypeError, "a weight is"),
    ],
)
def test_weights_that_are_none_are_explained(weights, error, message):
    """Misspelt names, indices outside and repeated weights are named."""
    model, x = mlp()
    with pytest.raises(error, match=message):
        mixed_partials(model, lambda m: m(x).sum(), weights)


def test_too_many_weights_are_refused_before_any_work():
    """A block of more than a thousand weights is an error that says what it would cost."""
    with pytest.raises(ArgumentError, match="2,500 weights"):
        mixed_partials(nn.Linear(50, 50, bias=False), lambda m: pytest.fail("was run"), "weight")


@pytest.mark.trap(42)
@pytest.mark.parametrize(
    ("loss", "operator"),
    [
        (lambda x: torch.cdist(x, x + 1).sum(), "_cdist_backward"),
        (
            lambda x: F.ctc_loss(x.log_softmax(1)[:, None], torch.tensor([[1, 2]]), torch.tensor([6]), torch.tensor([2])),
            "_ctc_loss_backward",
        ),
        (lambda x: Once.apply(x).sum(), "custom autograd.Function"),
    ],
)
def test_operators_without_a_second_derivative_are_named(loss, operator):
    """Where torch cannot differentiate twice, the error names the operator and a probe that works."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4), torch.randn(6, 3)
    before = trace(model)
    with pytest.raises(ProbeError, match=f"{operator}.*has no second derivative.*check_partials"):
        mixed_partials(model, lambda m: loss(m(x)), "bias")
    assert trace(model) == before


def test_a_complex_weight_is_named_by_its_part():
    """An index without the part is an error that says which number stands for which."""
    z = {"z": torch.tensor([1 + 2j, 3 - 1j])}
    loss = lambda v: (v["z"].abs() ** 2).sum()  # noqa: E731
    assert mixed_partials(z, loss, "z[1, 0]").to_numpy() == pytest.approx(2.0)
    with pytest.raises(ArgumentError, match="0 for the real part, 1 for the imaginary"):
        mixed_partials(z, loss, "z[1]")
