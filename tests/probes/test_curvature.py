"""Curvature of losses whose Hessian is known."""

import numpy as np
import pytest
import torch
from torch import nn

from gradlens.errors import ArgumentError, ArgumentTypeError, GradlensWarning, ProbeError
from gradlens.probes.curvature import curvature, hessian_product
from gradlens.probes.mixed_partials import mixed_partials

from .helpers import trace
from .trained import MODELS, trained


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


@pytest.mark.parametrize("name", MODELS)
def test_against_the_full_hessian(name):
    """Of ten trained models: both ends, the trace, the diagonal and its verdicts are those of the matrix."""
    model, loss, full = trained(name)
    values, diagonal = np.linalg.eigvalsh(full), np.diag(full)
    spread = values[-1] - values[0]
    found = curvature(model, loss, layers=True)
    assert found.converged, str(found)
    assert found.agreement.ok, str(found.agreement)
    for end, value in ((found.spectrum.top, values[-1]), (found.spectrum.bottom, values[0])):
        assert abs(end.value - value) <= end.residual + 1e-6 * spread, str(found)
    assert abs(found.trace - diagonal.sum()) < 4 * found.trace_noise
    off = (found.curvature - diagonal) / np.where(found.noise > 0, found.noise, np.inf)
    assert 0.6 < np.sqrt(np.mean(off**2)) < 1.5
    decided = found.bends > 0
    wrong = decided & (np.where(found.bends == 1, diagonal, -diagonal) <= 0)
    assert wrong.sum() <= 1 + 0.1 * decided.sum()
    start, sizes = 0, {name: p.numel() for name, p in model.named_parameters()}
    for row in found.layers.itertuples():
        n = sum(size for key, size in sizes.items() if (key.rpartition(".")[0] or key) == row.layer)
        assert row.weights == n
    if name == "tanh MLP":
        for layer, top in zip(found.layers["layer"], found.layers["top"], strict=True):
            n = sum(size for key, size in sizes.items() if key.startswith(f"{layer}."))
            block = full[start : start + n, start : start + n]
            assert top == pytest.approx(np.linalg.eigvalsh(block)[-1], rel=0.01)
            start += n


def test_newton_moves_are_not_too_short():
    """Over all trained models the moves given are about the true ones; unshrunken they are about half as long."""
    ratios, raw = [], []
    for name in MODELS:
        model, loss, full = trained(name)
        found = curvature(model, loss)
        given = np.isfinite(found.newton)
        if given.sum() >= 3:
            true = -found.partial[given] / np.diag(full)[given]
            ratios.append(np.median(found.newton[given] / true))
            raw.append(np.median(-found.partial[given] / found.curvature[given] / true))
    assert len(ratios) >= 6
    assert 0.8 < np.median(ratios) < 1.25
    assert np.median(raw) < 0.7


@pytest.mark.parametrize("samples", [4, 32])
def test_noise_alone_bends_nothing(samples):
    """On a saddle whose diagonal is 0 hardly any weight is said to bend, and none gets a Newton move on most draws."""
    random = torch.Generator().manual_seed(0)
    a = torch.randn(100, 100, dtype=torch.float64, generator=random)
    w = {"u": torch.randn(100, dtype=torch.float64, generator=random, requires_grad=True)}
    w["v"] = torch.randn(100, dtype=torch.float64, generator=random, requires_grad=True)
    decided = [
        (curvature(w, lambda v: v["u"] @ a @ v["v"], samples=samples, seed=seed, iterations=4).bends > 0).any()
        for seed in range(10)
    ]
    assert np.mean(decided) <= 0.3  # at q = 0.1, one draw in ten


@pytest.mark.parametrize("seed", range(5))
def test_the_extreme_eigenvalues_of_a_quadratic(seed):
    """Top and bottom are those of the matrix, each within its residual."""
    a, _, weights, loss = quadratic(seed)
    values = torch.linalg.eigvalsh(a)
    found = curvature(weights, loss, samples=2)
    assert found.top == pytest.approx(values[-1].item(), abs=found.residual + 1e-9)
    assert found.bottom == pytest.approx(values[0].item(), abs=found.spectrum.bottom.residual + 1e-9)
    assert found.converged


def test_a_small_negative_end_is_found_beside_a_large_positive_one():
    """The spectrum {-1.2, [0, 1], 5, 50} ends at -1.2, and not where the iteration for the top one stopped."""
    values = torch.cat([torch.tensor([-1.2]), torch.linspace(0, 1, 300), torch.tensor([5.0, 50.0])]).double()
    q, _ = torch.linalg.qr(torch.randn(303, 303, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    a = q @ torch.diag(values) @ q.T
    weights = {"w": torch.zeros(303, dtype=torch.float64, requires_grad=True)}
    found = curvature(weights, lambda v: v["w"] @ a @ v["w"] / 2 + v["w"].sum(), samples=2)
    assert found.bottom == pytest.approx(-1.2, abs=1e-3)
    assert found.top == pytest.approx(50, abs=1e-3)
    assert "saddle" in str(found).splitlines()[0]


def test_weight_decay_does_not_hide_the_top():
    """Where nearly all eigenvalues are 0.1, one of 0.1157 in 100,000 is found, by a measure of the spread."""
    n = 100_000
    d = torch.full((n,), 0.1)
    d[1234] = 0.1157
    weights = {"w": torch.ones(n, requires_grad=True)}
    found = curvature(weights, lambda v: (d * v["w"] ** 2).sum() / 2, samples=2)
    assert found.top == pytest.approx(0.1157, rel=1e-3)


def test_what_has_not_converged_says_so():
    """Two iterations are too few, and the first line says which end is not known."""
    model, loss, _ = trained("tanh MLP")
    found = curvature(model, loss, iterations=3)
    assert not found.converged
    assert "NOT CONVERGED" in str(found).splitlines()[0]
    assert found.spectrum.bottom.residual > abs(found.bottom) or not found.spectrum.top.converged


class SavesDetached(torch.autograd.Function):
    """tanh, right once, whose backward uses a value that no second derivative sees."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.y = y.detach()
        return y

    @staticmethod
    def backward(ctx, g):
        return g * (1 - ctx.y**2)


def tanh_net(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    return model, lambda m: m[1](activation(m[0](x))).pow(3).mean()


def test_a_second_derivative_that_is_wrong_is_noticed():
    """Where autograd's own disagrees, differences of the gradient are used, and the result says so."""
    model, right = tanh_net(torch.tanh)
    _, wrong = tanh_net(SavesDetached.apply)
    a, b = curvature(model, right), curvature(model, wrong)
    assert a.agreement.ok
    assert not b.agreement.ok
    assert "autograd's own second derivative is WRONG" in str(b)
    assert b.top == pytest.approx(a.top, rel=1e-5)
    assert b.bottom == pytest.approx(a.bottom, rel=1e-5)
    np.testing.assert_allclose(b.curvature, a.curvature, rtol=1e-4, atol=1e-8)
    v = {"0.weight": torch.ones(4, 3)}
    with pytest.warns(GradlensWarning, match="second derivative is WRONG"):
        found = hessian_product(model, wrong, v)
    for name, x in hessian_product(model, right, v).items():
        torch.testing.assert_close(found[name], x, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("compiled", ["function", "module"])
def test_compiled_pieces_of_a_loss_run_eagerly(compiled):
    """A function or a module that was compiled has the curvature of its original."""
    torch.manual_seed(0)
    model, head, x = nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 1)), torch.randn(6, 3)
    plain = lambda h: torch.tanh(h).pow(3).sum(1)  # noqa: E731
    made = torch.compile(plain if compiled == "function" else head, backend="aot_eager")
    piece = plain if compiled == "function" else head
    a = curvature(model, lambda m: piece(m(x)).square().mean())
    made(model(x)).sum().backward()  # compiled by now
    model.zero_grad()
    b = curvature(model, lambda m: made(m(x)).square().mean())
    assert b.top == pytest.approx(a.top, rel=1e-6)
    assert b.agreement.ok


@pytest.mark.parametrize("spoil", [lambda v: v * float("nan"), lambda v: v / 0, lambda v: v.detach()])
def test_losses_without_curvature_are_refused(spoil):
    """NaN, infinity and a detached loss are errors that say so."""
    model, x = mlp()
    for probe in (curvature, lambda m, f: hessian_product(m, f, {})):
        with pytest.raises(ProbeError, match=r"the loss is|depends on none"):
            probe(model, lambda m: spoil(m(x).square().mean()))


def test_operations_without_a_second_derivative_are_had_by_differences():
    """cdist cannot be differentiated twice; its curvature is that of the same distance written out, and it is said how."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4).double(), torch.randn(6, 3).double(), torch.randn(5, 4).double()
    found = curvature(model, lambda m: torch.cdist(m(x), y).sum())
    plain = curvature(model, lambda m: (m(x)[:, None] - y).square().sum(-1).sqrt().sum())
    assert "_cdist_backward has no second derivative" in str(found)
    assert found.top == pytest.approx(plain.top, rel=1e-4)
    assert plain.agreement.ok


def test_a_diagonal_hessian_is_exact():
    """Without off-diagonal entries each sample is exact, and the Newton move of each weight goes to its minimum."""
    d = torch.tensor([1.0, 4, 0.5, 9], dtype=torch.float64)
    centre = torch.tensor([3.0, -1, 2, 0], dtype=torch.float64)
    weights = {"w": torch.tensor([1.0, 1, 1, 1], dtype=torch.float64, requires_grad=True)}
    found = curvature(weights, lambda v: (d * (v["w"] - centre) ** 2).sum() / 2, samples=16)
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
    assert list(found.frame["bends"]) == ["up", "down"]
    np.testing.assert_array_equal(np.isnan(found.newton), [False, True])
    *_, weights, loss = quadratic(n=40)
    found = curvature(weights, loss, samples=4)
    assert np.isnan(found.newton[found.bends != 1]).all()


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
    assert "2 / lr = 2 at lr = 1" in str(found).splitlines()[0]
    assert len(found.table) == 4
    assert found.table["trace"].sum() == pytest.approx(found.trace)
    assert list(found.frame.columns) == [
        "parameter", "index", "value", "partial", "curvature", "noise", "t", "p", "q", "bends", "newton",
    ]  # fmt: skip
    assert len(found.frame) == 26
    assert found.weights(top=3)["t"].abs().is_monotonic_decreasing
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
    """Too few samples or iterations, a learning rate of 0, and unknown names are named."""
    model, x = mlp()
    with pytest.raises(ArgumentError, match="at least 2"):
        curvature(model, lambda m: m(x).sum(), samples=1)
    with pytest.raises(ArgumentError, match="above 0"):
        curvature(model, lambda m: m(x).sum(), lr=0)
    with pytest.raises(ArgumentError, match=r"did you mean '0\.weight'"):
        hessian_product(model, lambda m: m(x).sum(), {"0.wieght": torch.ones(4, 3)})


@pytest.mark.parametrize(
    ("vector", "error", "message"),
    [
        ({"0.weight": torch.ones(3, 4)}, ArgumentError, r"shape \(3, 4\).*has \(4, 3\); it looks transposed"),
        ({"0.weight": torch.ones(12)}, ArgumentError, r"shape \(12,\)"),
        ({"0.bias": 1.0}, ArgumentError, r"shape \(\)"),
        ({"0.bias": torch.ones(4) * 1j}, ArgumentTypeError, "complex"),
        ({"0.bias": ["a", "b", "c", "d"]}, ArgumentTypeError, "no tensor of numbers"),
        ({3: torch.ones(4)}, ArgumentError, "no parameter"),
        ([torch.ones(4)], ArgumentTypeError, "mapping"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(vector, error, message):
    """A transposed, flat, complex or unnamed entry is an error that says what was expected."""
    model, x = mlp()
    with pytest.raises(error, match=message):
        hessian_product(model, lambda m: m(x).square().mean(), vector)


def test_vectors_may_be_arrays_of_a_wrapped_model():
    """numpy arrays, lists and other dtypes are taken, and names of compiled and parallel models."""
    model, x = mlp()
    model.eval()
    loss = lambda m: m(x).square().mean()  # noqa: E731
    plain = hessian_product(model, loss, {"0.bias": torch.tensor([1.0, 2, 3, 4])})
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    for vector in (
        {"0.bias": np.array([1, 2, 3, 4])},
        {"0.bias": [1.0, 2.0, 3.0, 4.0]},
        {"module.0.bias": torch.tensor([1, 2, 3, 4])},
        {"_orig_mod.module.0.bias": torch.tensor([1.0, 2, 3, 4], dtype=torch.float64)},
    ):
        found = hessian_product(wrapped, loss, vector)
        assert list(found) == list(plain)
        assert all(torch.equal(found[name], plain[name]) for name in plain)
        assert found["0.bias"].dtype == torch.float32


def test_complex_weights_have_complex_products():
    """For |z|^2 / 2 the product is the vector itself, given as complex or as pairs of reals."""
    z = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True)
    v = torch.tensor([0.5 - 1j, 2j])
    loss = lambda p: (p["z"].abs() ** 2).sum() / 2  # noqa: E731
    torch.testing.assert_close(hessian_product({"z": z}, loss, {"z": v})["z"], v)
    torch.testing.assert_close(hessian_product({"z": z}, loss, {"z": torch.view_as_real(v)})["z"], v)
