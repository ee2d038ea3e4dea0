"""Partials checked against their definition: correct models pass, planted bugs are found."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradlens.errors import ArgumentError, ProbeError
from gradlens.probes.finite_difference import check_partials

from .traces import trace


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
    assert str(found) == "partials are right: 32 of 32 drawn agree with central differences (37 weights in all)"


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


LAYERS = {
    "bilinear": (lambda: nn.Bilinear(3, 3, 4), lambda m: m(torch.randn(5, 3), torch.randn(5, 3))),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), lambda m: m(torch.randn(2, 2, 6))),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, stride=2, groups=2), lambda m: m(torch.randn(2, 2, 7, 7))),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), lambda m: m(torch.randn(2, 1, 3, 3, 3))),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, dilation=2), lambda m: m(torch.randn(2, 2, 4, 4))),
    "batchnorm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), lambda m: m(torch.randn(6, 3))),
    "batchnorm eval": (lambda: nn.BatchNorm2d(3).eval(), lambda m: m(torch.randn(2, 3, 4, 4))),
    "groupnorm": (lambda: nn.GroupNorm(2, 4), lambda m: m(torch.randn(2, 4, 5))),
    "instancenorm": (lambda: nn.InstanceNorm1d(3, affine=True), lambda m: m(torch.randn(2, 3, 6))),
    "layernorm": (lambda: nn.LayerNorm(5), lambda m: m(torch.randn(4, 5))),
    "rmsnorm": (lambda: nn.RMSNorm(5), lambda m: m(torch.randn(4, 5))),
    "embedding": (lambda: nn.Embedding(7, 3, padding_idx=0), lambda m: m(torch.tensor([0, 1, 1, 5]))),
    "sparse embedding": (lambda: nn.Embedding(7, 3, sparse=True), lambda m: m(torch.tensor([0, 1, 1, 5]))),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 3), lambda m: m(torch.tensor([[0, 1], [1, 5]]))),
    "rnn": (lambda: nn.RNN(3, 4, 2), lambda m: m(torch.randn(5, 2, 3))[0]),
    "lstm": (lambda: nn.LSTM(3, 4, bidirectional=True, proj_size=2), lambda m: m(torch.randn(5, 2, 3))[0]),
    "gru": (lambda: nn.GRU(3, 4, 2, dropout=0.5), lambda m: m(torch.randn(5, 2, 3))[0]),
    "lstm cell": (lambda: nn.LSTMCell(3, 4), lambda m: m(torch.randn(2, 3))[0]),
    "attention": (lambda: nn.MultiheadAttention(8, 2), lambda m: m(*[torch.randn(5, 2, 8)] * 3)[0]),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 12), lambda m: m(torch.randn(5, 2, 8))),
    "decoder": (lambda: nn.TransformerDecoderLayer(8, 2, 12), lambda m: m(torch.randn(5, 2, 8), torch.randn(3, 2, 8))),
    "prelu": (lambda: nn.PReLU(3), lambda m: m(torch.randn(4, 3))),
    "weight norm": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        lambda m: m(torch.randn(4, 3)),
    ),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).eval(),
        lambda m: m(torch.randn(4, 3)),
    ),
    "orthogonal": (
        lambda: nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
        lambda m: m(torch.randn(4, 3)),
    ),
    "bfloat16": (lambda: nn.Linear(3, 2, dtype=torch.bfloat16), lambda m: m(torch.randn(4, 3, dtype=torch.bfloat16))),
    "complex": (lambda: nn.Linear(3, 2, dtype=torch.complex64), lambda m: torch.view_as_real(m(torch.randn(4, 3) + 1j))),
    "channels last": (
        lambda: nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last),
        lambda m: m(torch.randn(2, 3, 4, 4)),
    ),
}
ACTIVATIONS = [
    nn.ReLU(), nn.LeakyReLU(), nn.ELU(), nn.GELU(), nn.SiLU(), nn.Mish(), nn.Softplus(), nn.Hardswish(), nn.Hardtanh(),
    nn.Softmax(1), nn.LogSoftmax(1), nn.GLU(), nn.Softshrink(), nn.Tanhshrink(), nn.Softsign(), nn.CELU(), nn.SELU(),
    nn.Sigmoid(), nn.Dropout(0.4), nn.AlphaDropout(0.4), nn.RReLU(), nn.MaxPool1d(2), nn.AvgPool1d(2), nn.LPPool1d(2, 2),
    nn.AdaptiveMaxPool1d(2), nn.Sequential(nn.Unflatten(1, (4, 2)), nn.LocalResponseNorm(2)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*(nested tensor|Complex|RNN).*")
@pytest.mark.parametrize("layer", LAYERS)
def test_every_standard_layer_is_right(layer):
    """A correct layer's partials are right in train mode, dropout, running statistics and narrow types included."""
    make, run = LAYERS[layer]
    torch.manual_seed(1)
    model = make()
    before = trace(model)

    def loss(m):
        torch.manual_seed(2)
        out = run(m)
        return (out * torch.randn(out.shape)).square().mean() + out.sum()

    found = check_partials(model, loss, k=12)
    assert found.ok, str(found)
    assert (found.frame["result"] == "right").all(), str(found)
    assert found.frame["partial"].any()
    assert trace(model) == before


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_every_standard_activation_is_right(activation):
    """Nonlinearities, pools and dropout between two layers leave the partials right."""
    torch.manual_seed(1)
    x = torch.randn(6, 5)
    model = nn.Sequential(nn.Linear(5, 8), activation)
    found = check_partials(model, lambda m: m[1](m[0](x)).square().sum(), k=16)
    assert found.ok, str(found)
    assert found.frame["partial"].any()


LOSSES = {
    "cross entropy": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "nll": lambda z, y: F.nll_loss(z.log_softmax(1), y),
    "bce": lambda z, y: F.binary_cross_entropy_with_logits(z[:, 0], (y > 1).float()),
    "mse": lambda z, y: F.mse_loss(z[:, 0], y.float()),
    "huber": lambda z, y: F.huber_loss(z[:, 0], y.float()),
    "kl": lambda z, y: F.kl_div(z.log_softmax(1), F.one_hot(y, 4).float(), reduction="batchmean"),
    "margin": lambda z, y: F.multi_margin_loss(z, y),
    "cosine": lambda z, y: F.cosine_embedding_loss(z, z.flip(0) + 1, torch.ones(6)),
    "ctc": lambda z, y: F.ctc_loss(z.log_softmax(1)[:, None], torch.tensor([[1, 2]]), torch.tensor([6]), torch.tensor([2])),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_standard_loss_is_right(name):
    """float32 targets take part in float64, and each loss's partials are right."""
    torch.manual_seed(3)
    model, x, y = nn.Linear(5, 4), torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 1, 2])
    found = check_partials(model, lambda m: LOSSES[name](m(x), y), k=16)
    assert found.ok, str(found)


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
    """A gradient that is not that of the loss is wrong, meant or not, and the text says that it may be meant."""
    found = check_partials({"x": 1.3}, lambda v: (v["x"] + (v["x"].round() - v["x"]).detach()) ** 2)
    assert not found.ok
    assert "straight-through" in str(found)


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_the_tolerance_follows_the_scale_of_the_loss(scale, factor):
    """The same bug is found, and the same correct model passes, however the loss is scaled."""
    model, x = net(lambda h: Scaled.apply(h, factor))
    assert check_partials(model, lambda m: scale * m(x).square().mean()).ok == (factor == 1.0)


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
