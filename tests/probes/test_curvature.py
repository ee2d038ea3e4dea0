"""Curvature of losses whose Hessian is known."""

import numpy as np
import pytest
import torch
from torch import nn

from gradlens.errors import ArgumentError, ProbeError
from gradlens.probes.curvature import curvature, hessian_product
from gradlens.probes.mixed_partials import mixed_partials

from .helpers import trace


def quadratic(seed=0, n=12):
    """w -> w.A.w / 2 + b.w with a random symmetric A, in float64."""
    random = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, dtype=torch.float64, generator=random)
    a, b = (a + a.t()) / 2, torch.randn(n, dtype=torch.float64, generator=random)
    w = torch.randn(n, dtype=torch.float64, generator=random, requires_grad=True)
    return a, b, {"w": w}, lambda v: v["w"] @ a @ v["w"] / 2 + b @ v["w"]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2)), torch.randn(6, 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_extreme_eigenvalues_of_a_quadratic(seed):
    """Top and bottom are those of the matrix, the top within its residual."""
    a, _, weights, loss = quadratic(seed)
    values = torch.linalg.eigvalsh(a)
    found = curvature(weights, loss, samples=2)
    assert found.top == pytest.approx(values[-1].item(), abs=found.residual + 1e-9)
    assert found.residual <= 1e-3 * values.abs().max()
    assert found.bottom == pytest.approx(values[0].item(), rel=0.05)


def test_a_diagonal_hessian_is_exact():
    """Without off-diagonal entries one sample is exact, and the Newton move of each weight goes to its minimum."""
    d = torch.tensor([1.0, 4, 0.5, 9], dtype=torch.float64)
    centre = torch.tensor([3.0, -1, 2, 0], dtype=torch.float64)
    weights = {"w": torch.tensor([1.0, 1, 1, 1], dtype=torch.float64, requires_grad=True)}
    found = curvature(weights, lambda v: (d * (v["w"] - centre) ** 2).sum() / 2, samples=2)
    np.testing.assert_allclose(found.curvature, d, rtol=1e-14)
    np.testing.assert_allclose(found.noise, 0, atol=1e-14)
    np.testing.assert_allclose(found.value + found.newton, centre, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(found.partial, d * (1 - centre), rtol=1e-14)


def test_the_diagonal_is_unbiased_and_its_noise_is_right():
    """With off-diagonal entries the estimate is off by about its standard error, which falls with the root of samples."""
    a, _, weights, loss = quadratic(n=40)
    few, many = (curvature(weights, loss, samples=n) for n in (20, 500))
    off = (many.curvature - a.diagonal().numpy()) / many.noise
    assert 0.7 < np.sqrt(np.mean(off**2)) < 1.4
    assert np.median(few.noise / many.noise) == pytest.approx(5, rel=0.2)
    exact = ((a - torch.diag(a.diagonal())).square().sum(1) / 500).sqrt()
    np.testing.assert_allclose(many.noise, exact, rtol=0.15)


def test_where_curvature_is_not_clearly_positive_there_is_no_newton_move():
    """A weight on a ridge, and one that is lost in noise, have no minimum to move to."""
    weights = {"w": torch.tensor([1.0, 1.0], requires_grad=True)}
    found = curvature(weights, lambda v: v["w"][0] ** 2 - v["w"][1] ** 2)
    np.testing.assert_array_equal(np.isnan(found.newton), [False, True])
    *_, weights, loss = quadratic(n=40)
    found = curvature(weights, loss, samples=4)
    assert np.isnan(found.newton[found.curvature < 2 * found.noise]).all()


def test_a_product_equals_the_columns_of_mixed_partials():
    """H e_i is the i-th column of the block that mixed_partials computes, and costs no random numbers."""
    model, x = mlp()
    loss = lambda m: m(x).square().mean()  # noqa: E731
    before = trace(model.eval())
    block = mixed_partials(model, loss)
    unit = torch.zeros(4, 3)
    unit[2, 1] = 1
    found = hessian_product(model, loss, {"0.weight": unit})
    column = torch.cat([found[name].reshape(-1) for name, _ in model.named_parameters()])
    np.testing.assert_allclose(column, block["0.weight[2, 1]"], rtol=1e-4, atol=1e-7)
    assert trace(model) == before


def test_a_network_is_left_alone_and_described():
    """The probe leaves no trace; the text compares the top eigenvalue with 2 / lr, and the frame names the weights."""
    model, x = mlp()
    before = trace(model)
    found = curvature(model, lambda m: m(x).square().mean(), lr=1.0)
    assert trace(model) == before
    assert found.limit == 2.0
    assert found.stable == (found.top < 2)
    assert "2 / lr = 2 at lr = 1" in str(found)
    assert list(found.frame.columns) == ["parameter", "index", "value", "partial", "curvature", "noise", "newton"]
    assert len(found.frame) == 26
    assert found.weights(top=3)["curvature"].abs().is_monotonic_decreasing
    full = np.linalg.eigvalsh(mixed_partials(model.eval(), lambda m: m(x).square().mean()).to_numpy())
    evaluated = curvature(model, lambda m: m(x).square().mean())
    assert evaluated.top == pytest.approx(full[-1], rel=2e-3)
    assert evaluated.stable is None


@pytest.mark.parametrize(("lr", "stable"), [(0.19, True), (0.21, False)])
def test_the_limit_separates_descent_from_divergence(lr, stable):
    """Plain gradient descent on a parabola of curvature 10 goes down below 2 / lr = 10, and diverges above."""
    weights = {"w": torch.tensor(1.0, requires_grad=True)}
    assert curvature(weights, lambda v: 5 * v["w"] ** 2, lr=lr).stable == stable
    w = 1.0
    for _ in range(50):
        w -= lr * 10 * w
    assert (abs(w) < 1) == stable


def test_attention_is_differentiated_twice():
    """The default attention kernel has no second derivative, so the plain one is taken."""
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 5, 8)
    assert curvature(model, lambda m: m(x).square().mean(), samples=2).top > 0


def test_a_flat_loss_has_no_curvature():
    """A linear loss has eigenvalues 0 and no Newton move."""
    found = curvature(nn.Linear(2, 1), lambda m: m(torch.ones(2)).sum())
    assert found.top == found.bottom == 0
    assert np.isnan(found.newton).all()


def test_a_block_is_the_hessian_of_the_selected_parameters():
    """select restricts diagonal and eigenvalues to a block."""
    weights = {"a": torch.tensor(1.0, requires_grad=True), "b": torch.tensor(1.0, requires_grad=True)}
    found = curvature(weights, lambda v: v["a"] ** 2 + 50 * v["b"] ** 2, select="a")
    assert found.top == pytest.approx(2)
    assert found.parameters.names == ("a",)


def test_what_cannot_be_is_explained():
    """Too few samples, a learning rate of 0, unknown names and operators without second derivative are named."""
    model, x = mlp()
    with pytest.raises(ArgumentError, match="at least 2"):
        curvature(model, lambda m: m(x).sum(), samples=1)
    with pytest.raises(ArgumentError, match="above 0"):
        curvature(model, lambda m: m(x).sum(), lr=0)
    with pytest.raises(ArgumentError, match=r"did you mean '0\.weight'"):
        hessian_product(model, lambda m: m(x).sum(), {"0.wieght": torch.ones(4, 3)})
    with pytest.raises(ProbeError, match="_cdist_backward has no second derivative"):
        curvature(model, lambda m: torch.cdist(m(x), m(x) + 1).sum())
