"""Every module of torch.nn but one gives right partials: each is named here, with an input that is itself a weight."""

import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradlens.probes.finite_difference import check_partials
from gradlens.probes.symmetry import check_symmetry

from .helpers import trace

WORDS = torch.tensor([[0, 3], [1, 1], [4, 2]])
CLASSES = torch.tensor([0, 2, 1, 3])
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0])

#: By shape of the input: modules that take it as it is; a lambda where they need arguments.
PLAIN = {
    (4, 6): [
        nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.Identity,
        nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.PReLU, nn.RReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid,
        nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.AlphaDropout, nn.Dropout, nn.Flatten,
        lambda: nn.Threshold(0.1, 2.0), lambda: nn.Softmax(1), lambda: nn.LogSoftmax(1), lambda: nn.Softmin(1),
        lambda: nn.Linear(6, 3), lambda: nn.LazyLinear(3), lambda: nn.BatchNorm1d(6), nn.LazyBatchNorm1d,
        lambda: nn.LayerNorm(6), lambda: nn.RMSNorm(6), lambda: nn.GroupNorm(2, 6), lambda: nn.Unflatten(1, (2, 3)),
        lambda: nn.Sequential(nn.Linear(6, 2), nn.Tanh()), lambda: nn.GRUCell(6, 3), lambda: nn.RNNCell(6, 3),
    ],
    (2, 4, 7): [
        lambda: nn.Conv1d(4, 3, 3), lambda: nn.ConvTranspose1d(4, 3, 3), lambda: nn.LazyConv1d(3, 3),
        lambda: nn.LazyConvTranspose1d(3, 3), lambda: nn.InstanceNorm1d(4, affine=True), nn.LazyInstanceNorm1d,
        lambda: nn.MaxPool1d(2), lambda: nn.AvgPool1d(2), lambda: nn.LPPool1d(2, 2), lambda: nn.AdaptiveMaxPool1d(2),
        lambda: nn.AdaptiveAvgPool1d(2), lambda: nn.CircularPad1d(1), lambda: nn.ConstantPad1d(1, 2.0),
        lambda: nn.ReflectionPad1d(1), lambda: nn.ReplicationPad1d(1), lambda: nn.ZeroPad1d(1), nn.Dropout1d,
        lambda: nn.Upsample(scale_factor=2, mode="linear"),
    ],
    (2, 4, 6, 6): [
        lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), lambda: nn.ConvTranspose2d(4, 3, 3, dilation=2),
        lambda: nn.LazyConv2d(3, 3), lambda: nn.LazyConvTranspose2d(3, 3), lambda: nn.BatchNorm2d(4), nn.LazyBatchNorm2d,
        lambda: nn.InstanceNorm2d(4), nn.LazyInstanceNorm2d, lambda: nn.SyncBatchNorm(4).eval(), lambda: nn.MaxPool2d(2),
        lambda: nn.AvgPool2d(2), lambda: nn.LPPool2d(2, 2), lambda: nn.AdaptiveMaxPool2d(2), lambda: nn.AdaptiveAvgPool2d(2),
        lambda: nn.FractionalMaxPool2d(2, output_size=3), lambda: nn.CircularPad2d(1), lambda: nn.ConstantPad2d(1, 2.0),
        lambda: nn.ReflectionPad2d(1), lambda: nn.ReplicationPad2d(1), lambda: nn.ZeroPad2d(1), nn.Dropout2d,
        nn.FeatureAlphaDropout, nn.Softmax2d, lambda: nn.ChannelShuffle(2), lambda: nn.PixelShuffle(2),
        lambda: nn.PixelUnshuffle(2), lambda: nn.LocalResponseNorm(2), lambda: nn.Unfold(3),
        lambda: nn.UpsamplingBilinear2d(scale_factor=2), lambda: nn.UpsamplingNearest2d(scale_factor=2),
        lambda: nn.Conv2d(4, 2, 3).to(memory_format=torch.channels_last),
    ],
    (1, 2, 4, 4, 4): [
        lambda: nn.Conv3d(2, 2, 2), lambda: nn.ConvTranspose3d(2, 2, 2), lambda: nn.LazyConv3d(2, 2),
        lambda: nn.LazyConvTranspose3d(2, 2), lambda: nn.BatchNorm3d(2), nn.LazyBatchNorm3d, lambda: nn.InstanceNorm3d(2),
        nn.LazyInstanceNorm3d, lambda: nn.MaxPool3d(2), lambda: nn.AvgPool3d(2), lambda: nn.LPPool3d(2, 2),
        lambda: nn.AdaptiveMaxPool3d(2), lambda: nn.AdaptiveAvgPool3d(2), lambda: nn.FractionalMaxPool3d(2, output_size=2),
        lambda: nn.CircularPad3d(1), lambda: nn.ConstantPad3d(1, 2.0), lambda: nn.ReflectionPad3d(1),
        lambda: nn.ReplicationPad3d(1), lambda: nn.ZeroPad3d(1), nn.Dropout3d,
    ],
    (2, 4, 6): [lambda: nn.Fold((3, 4), 2)],
    (5, 2, 8): [
        lambda: nn.TransformerEncoderLayer(8, 2, 12),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 1, enable_nested_tensor=False),
    ],
}  # fmt: skip
#: A module, the shape of its input, and how it is run.
RUN = [
    (lambda: nn.Bilinear(6, 6, 3), (4, 6), lambda m, x: m(x, x.flip(0))),
    (lambda: nn.CosineSimilarity(), (4, 6), lambda m, x: m(x, x.flip(0) + 1)),
    (lambda: nn.PairwiseDistance(), (4, 6), lambda m, x: m(x, x.flip(0) + 1)),
    (lambda: nn.Embedding(7, 3, padding_idx=0), (3,), lambda m, x: m(WORDS) * x),
    (lambda: nn.Embedding(7, 3, sparse=True, scale_grad_by_freq=False), (3,), lambda m, x: m(WORDS) * x),
    (lambda: nn.EmbeddingBag(7, 3), (3,), lambda m, x: m(WORDS) * x),
    (lambda: nn.EmbeddingBag(7, 3, mode="max", padding_idx=1), (3,), lambda m, x: m(WORDS) * x),
    (lambda: nn.RNN(6, 4, 2), (3, 2, 6), lambda m, x: m(x)[0]),
    (lambda: nn.LSTM(6, 4, bidirectional=True, proj_size=2), (3, 2, 6), lambda m, x: m(x)[0]),
    (lambda: nn.GRU(6, 4, 2, dropout=0.5), (3, 2, 6), lambda m, x: m(x)[0]),
    (lambda: nn.LSTMCell(6, 3), (4, 6), lambda m, x: m(x)[0]),
    (lambda: nn.MultiheadAttention(8, 2), (5, 2, 8), lambda m, x: m(x, x, x)[0]),
    (lambda: nn.MultiheadAttention(8, 2, kdim=3, vdim=4), (5, 2, 8), lambda m, x: m(x, x[..., :3], x[..., :4])[0]),
    (lambda: nn.TransformerDecoderLayer(8, 2, 12), (5, 2, 8), lambda m, x: m(x, x.flip(0))),
    (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 12), 1), (5, 2, 8), lambda m, x: m(x, x.flip(0))),
    (lambda: nn.Transformer(8, 2, 1, 1, 12), (5, 2, 8), lambda m, x: m(x, x.flip(0))),
    (lambda: nn.MaxUnpool1d(2), (2, 2, 6), lambda m, x: m(*F.max_pool1d(x, 2, return_indices=True))),
    (lambda: nn.MaxUnpool2d(2), (2, 2, 4, 4), lambda m, x: m(*F.max_pool2d(x, 2, return_indices=True))),
    (lambda: nn.MaxUnpool3d(2), (1, 2, 4, 4, 4), lambda m, x: m(*F.max_pool3d(x, 2, return_indices=True))),
    (lambda: nn.ModuleList([nn.Linear(6, 2)]), (4, 6), lambda m, x: m[0](x)),
    (lambda: nn.ModuleDict({"a": nn.Linear(6, 2)}), (4, 6), lambda m, x: m["a"](x)),
    (lambda: nn.ParameterList([nn.Parameter(torch.ones(6))]), (4, 6), lambda m, x: m[0] ** 2 * x),
    (lambda: nn.ParameterDict({"a": nn.Parameter(torch.ones(6))}), (4, 6), lambda m, x: m["a"] ** 2 * x),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 2)), (4, 6), lambda m, x: m(x)),
    (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 2)).eval(), (4, 6), lambda m, x: m(x)),
    (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(6, 6)), (4, 6), lambda m, x: m(x)),
    (lambda: nn.Linear(6, 2, dtype=torch.bfloat16), (4, 6), lambda m, x: m(x.bfloat16())),
    (lambda: nn.Linear(6, 2, dtype=torch.float16), (4, 6), lambda m, x: m(x.half())),
    (lambda: nn.Linear(6, 2, dtype=torch.complex64), (4, 6), lambda m, x: torch.view_as_real(m(x + 1j))),
    # losses
    (lambda: nn.AdaptiveLogSoftmaxWithLoss(6, 5, [2]), (4, 6), lambda m, x: m(x, CLASSES).loss),
    (lambda: nn.BCELoss(), (4,), lambda m, x: m(x.sigmoid(), (SIGNS + 1) / 2)),
    (lambda: nn.BCEWithLogitsLoss(), (4,), lambda m, x: m(x, (SIGNS + 1) / 2)),
    (lambda: nn.CTCLoss(), (6, 4), lambda m, x: m(x.log_softmax(1), CLASSES[1:3], torch.tensor(6), torch.tensor(2))),
    (lambda: nn.CosineEmbeddingLoss(), (4, 6), lambda m, x: m(x, x.flip(0) + 1, SIGNS)),
    (lambda: nn.CrossEntropyLoss(label_smoothing=0.1), (4, 6), lambda m, x: m(x, CLASSES)),
    (lambda: nn.GaussianNLLLoss(), (4,), lambda m, x: m(x, SIGNS, 1 + x**2)),
    (lambda: nn.HingeEmbeddingLoss(), (4,), lambda m, x: m(x, SIGNS)),
    (lambda: nn.HuberLoss(), (4,), lambda m, x: m(x, SIGNS)),
    (lambda: nn.KLDivLoss(reduction="batchmean"), (4, 6), lambda m, x: m(x.log_softmax(1), torch.ones(4, 6) / 6)),
    (lambda: nn.L1Loss(), (4,), lambda m, x: m(x, SIGNS)),
    (lambda: nn.MSELoss(), (4,), lambda m, x: m(x, SIGNS)),
    (lambda: nn.MarginRankingLoss(), (4,), lambda m, x: m(x, x.flip(0) + 1, SIGNS)),
    (lambda: nn.MultiLabelMarginLoss(), (4,), lambda m, x: m(x, torch.tensor([1, 2, -1, -1]))),
    (lambda: nn.MultiLabelSoftMarginLoss(), (4, 6), lambda m, x: m(x, torch.ones(4, 6))),
    (lambda: nn.MultiMarginLoss(), (4, 6), lambda m, x: m(x, CLASSES)),
    (lambda: nn.NLLLoss(), (4, 6), lambda m, x: m(x.log_softmax(1), CLASSES)),
    (lambda: nn.PoissonNLLLoss(), (4,), lambda m, x: m(x, SIGNS + 1)),
    (lambda: nn.SmoothL1Loss(), (4,), lambda m, x: m(x, SIGNS)),
    (lambda: nn.SoftMarginLoss(), (4,), lambda m, x: m(x, SIGNS)),
    (lambda: nn.TripletMarginLoss(), (4, 6), lambda m, x: m(x, x.flip(0) + 1, x.roll(1, 0) + 1)),
    (lambda: nn.TripletMarginWithDistanceLoss(), (4, 6), lambda m, x: m(x, x.flip(0) + 1, x.roll(1, 0) + 1)),
]
if hasattr(nn, "LinearCrossEntropyLoss"):  # newer torch
    RUN.append((lambda: nn.LinearCrossEntropyLoss(6, 5), (4, 6), lambda m, x: m(x, CLASSES)))
CASES = [(make, shape, lambda m, x: m(x)) for shape, makes in PLAIN.items() for make in makes] + RUN
#: Bases that compute nothing, an alias, and a wrapper that a probe looks through.
NO_LAYERS = {"Module", "Container", "RNNBase", "RNNCellBase", "NLLLoss2d", "DataParallel"}
WRONG = {"CrossMapLRN2d"}


class Held(nn.Module):
    """A module, and its input as a parameter."""

    def __init__(self, layer, shape, run):
        super().__init__()
        self.layer, self.run = layer, run
        self.input = nn.Parameter(torch.randn(shape))

    def forward(self):
        return self.run(self.layer, self.input)


def made(case):
    torch.manual_seed(1)
    make, shape, run = case
    model = Held(make(), shape, run)
    with torch.no_grad():
        model()  # a lazy module gets its shape
    return model


def name(case):
    with warnings.catch_warnings(action="ignore"):
        return type(case[0]()).__name__


def weighed(model):
    torch.manual_seed(2)
    out = model()
    return (out * torch.randn(out.shape)).square().mean() + out.sum()


@pytest.mark.filterwarnings("ignore:.*(nested|Complex|RNN|Lazy|non-contiguous|MultiheadAttention).*")
@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_standard_module_is_right(case):
    """Its partials and those by its input agree with central differences, and the check leaves no trace."""
    model = made(case)
    before = trace(model)
    found = check_partials(model, weighed, k=8)
    assert trace(model) == before
    assert found.ok, str(found)
    assert (found.frame["result"] == "right").all(), str(found)
    assert found.frame["partial"].any()
    assert found.narrow == ()


@pytest.mark.filterwarnings("ignore:.*(nested|Complex|RNN|Lazy|non-contiguous|MultiheadAttention).*")
@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_standard_module_is_symmetric(case):
    """Its mixed partials are equal and its slopes right, with the power to find a percent of asymmetry."""
    model = made(case)
    before = trace(model)
    found = check_symmetry(model, weighed, k=2)
    assert trace(model) == before
    assert found.ok, str(found)
    assert found.flat or found.detectable < 0.01, str(found)


def test_the_one_whose_backward_torch_has_wrong_is_found():
    """CrossMapLRN2d, kept for old Lua models, fails here as it fails torch's own check; LocalResponseNorm is right."""
    x = torch.randn(2, 6, 3, 3, dtype=torch.float64, requires_grad=True)
    for layer, right in ((nn.CrossMapLRN2d(3, alpha=0.1), False), (nn.LocalResponseNorm(3, alpha=0.1), True)):
        assert torch.autograd.gradcheck(layer, (x,), raise_exception=False) == right
        assert check_partials({"x": x}, lambda v, layer=layer: layer(v["x"]).square().sum()).ok == right


@pytest.mark.filterwarnings("ignore:.*(nested|Lazy).*")
def test_no_standard_module_is_left_out():
    """Every class of torch.nn that is a module stands in the list above, or is named as one that is no layer."""
    public = {name: of for name, of in vars(nn).items() if inspect.isclass(of) and issubclass(of, nn.Module)}
    tried = {type(module) for case in CASES for module in case[0]().modules()} | {type(made(case).layer) for case in CASES}
    lazy = {name for name in public if name.startswith("Lazy")}
    assert {name for name in lazy if public[name.removeprefix("Lazy")] in tried} == lazy
    missing = {name for name, of in public.items() if of not in tried} - NO_LAYERS - WRONG
    assert missing == set()
