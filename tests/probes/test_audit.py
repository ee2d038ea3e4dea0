"""What the graph of one loss says: each mistake is named, and its healthy twin is left alone."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradlens
from gradlens.errors import ArgumentError, ArgumentTypeError
from gradlens.records import Severity

N, CLASSES = 6, 3


def net(out=CLASSES, *tail):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, out), *tail)


def data():
    return torch.randn(N, 4, generator=torch.Generator().manual_seed(1))


CLASS = torch.tensor([0, 1, 2, 0, 1, 2])
YES = torch.tensor([[0.0], [1.0], [0.0], [1.0], [0.0], [1.0]])
MULTI = torch.eye(CLASSES)[CLASS]


def loss_of(made, kind):
    """A loss of a model's output."""
    return {
        "cross_entropy": lambda: F.cross_entropy(made, CLASS),
        "soft_cross_entropy": lambda: F.cross_entropy(made, MULTI),
        "nll": lambda: F.nll_loss(made, CLASS),
        "nll_log_softmax": lambda: F.nll_loss(made.log_softmax(1), CLASS),
        "nll_over_batch": lambda: F.nll_loss(made.log_softmax(0), CLASS),
        "log_of_softmax_over_batch": lambda: -(MULTI * made.softmax(0).log()).sum(1).mean(),
        "log_of_softmax": lambda: -(MULTI * made.softmax(1).log()).sum(1).mean(),
        "bce_logits": lambda: F.binary_cross_entropy_with_logits(made, YES if made.shape[1] == 1 else MULTI),
        "bce": lambda: F.binary_cross_entropy(made, YES if made.shape[1] == 1 else MULTI),
        "softplus": lambda: F.softplus(-made).mean(),
        "mse": lambda: F.mse_loss(made, MULTI),
        "mse_flat": lambda: F.mse_loss(made, YES[:, 0]),
        "mse_right": lambda: F.mse_loss(made, YES),
        "l1_flat": lambda: F.l1_loss(made, YES[:, 0]),
        "smooth_flat": lambda: F.smooth_l1_loss(made, YES[:, 0]),
        "by_hand_flat": lambda: ((made - YES[:, 0]) ** 2).mean(),
        "by_hand_right": lambda: ((made - YES) ** 2).mean(),
        "by_hand_squeezed": lambda: ((made.squeeze(1) - YES) ** 2).mean(),
        "by_hand_pairs": lambda: ((made[:, None] - made[None]) ** 2).mean(),
        "to_prototypes": lambda: ((made[:, None] - torch.eye(CLASSES)[None]) ** 2).sum(2).min(1)[0].mean(),
        "one_class": lambda: F.cross_entropy(made, torch.zeros(N, dtype=torch.long)),
        "summed": lambda: F.mse_loss(made, MULTI, reduction="sum"),
        "unreduced": lambda: F.mse_loss(made, MULTI, reduction="none").sum(),
        "mean": lambda: F.mse_loss(made, MULTI, reduction="none").mean(),
        "mse_of_pixels": lambda: F.mse_loss(made, 255 * MULTI),
        "mse_of_pixels_summed": lambda: F.mse_loss(made, 255 * MULTI, reduction="sum"),
        "mse_to_the_ends": lambda: F.mse_loss(made, 1 - MULTI),
        "huber_of_pixels": lambda: F.huber_loss(made, 255 * MULTI),
        "l1_of_pixels": lambda: F.l1_loss(made, 255 * MULTI),
        "by_hand_of_pixels": lambda: ((made - 255 * MULTI) ** 2).mean(),
        "with_a_penalty": lambda: F.mse_loss(made, MULTI) + 100,
        "times_a_weight": lambda: 100 * F.mse_loss(made, MULTI),
        "log_of_relu": lambda: (made.relu().log()).mean(),
        "log_of_relu_and_more": lambda: (made.relu() + 1e-3).log().mean(),
        "by_relu": lambda: (1 + made / made.relu()).mean(),
        "relu_by": lambda: (made.relu() / (made.square() + 1)).mean(),
        "leaf_target": lambda: F.mse_loss(made, MULTI.clone().requires_grad_()),
        "sqrt_at_0": lambda: (made - made.detach()).square().sum(1).sqrt().mean(),
        "sqrt": lambda: ((made - made.detach()).square().sum(1) + 1e-8).sqrt().mean(),
        "norm_at_0": lambda: (made - made.detach()).norm(dim=1).mean(),
        "log_of_0": lambda: (made - made.detach()).log().mean(),
        "log": lambda: made.softmax(1).log().mean(),
        "arccos_at_1": lambda: (made / made.detach()).clamp(-1, 1).acos().mean(),
        "arccos": lambda: (made / made.detach()).mul(0.5).acos().mean(),
        "by_0": lambda: (1 / (made - made.detach())).mean(),
        "by_something": lambda: (1 / (made.square() + 1)).mean(),
        "root_at_0": lambda: (made - made.detach()).abs().pow(0.5).mean(),
        "square_at_0": lambda: (made - made.detach()).abs().pow(2).mean(),
        "masked": lambda: (
            made.masked_fill(torch.eye(N, CLASSES).bool().any(1, keepdim=True), -torch.inf).softmax(1)
        ).mean(),
        "masked_in_part": lambda: (made.masked_fill(torch.eye(N, CLASSES).bool(), -torch.inf).softmax(1)).mean(),
    }[kind]()


#: The model's last layers, its outputs, the loss; the rule that has to find it, "" for none.
CASES = [
    ([nn.Softmax(1)], 3, "cross_entropy", "softmax-twice"),
    ([nn.Softmax(1)], 3, "soft_cross_entropy", "softmax-twice"),
    ([nn.Softmax(1)], 3, "bce_logits", "softmax-twice"),
    ([], 3, "cross_entropy", ""),
    ([], 3, "soft_cross_entropy", ""),
    ([nn.LogSoftmax(1)], 3, "nll", ""),
    ([nn.LogSoftmax(1)], 3, "cross_entropy", ""),  # harmless: the logarithm of a softmax is its own log_softmax
    ([nn.Sigmoid()], 1, "bce_logits", "sigmoid-twice"),
    ([nn.Sigmoid()], 1, "bce", ""),
    ([], 1, "bce_logits", ""),
    ([nn.Sigmoid()], 3, "cross_entropy", "sigmoid-twice"),
    ([nn.Tanh()], 3, "cross_entropy", "sigmoid-twice"),
    ([nn.Sigmoid()], 1, "softplus", "sigmoid-twice"),
    ([], 1, "softplus", ""),
    ([nn.Softmax(1)], 3, "nll", "no-log"),
    ([], 3, "nll", "no-log"),
    ([], 3, "nll_log_softmax", ""),
    ([nn.ReLU()], 1, "bce_logits", "clamped-logits"),
    ([nn.ReLU()], 3, "cross_entropy", "clamped-logits"),
    ([nn.ReLU6()], 1, "bce_logits", "clamped-logits"),
    ([nn.Hardtanh(-30, 30)], 1, "bce_logits", ""),
    ([nn.ReLU(), nn.Linear(3, 3)], 3, "cross_entropy", ""),
    ([], 3, "nll_over_batch", "softmax-over-batch"),
    ([], 3, "log_of_softmax_over_batch", "softmax-over-batch"),
    ([], 3, "log_of_softmax", ""),
    ([], 1, "one_class", "softmax-of-one"),
    ([nn.Softmax(1)], 1, "bce", "softmax-of-one"),
    ([], 1, "mse_flat", "broadcast"),
    ([], 1, "l1_flat", "broadcast"),
    ([], 1, "smooth_flat", "broadcast"),
    ([], 1, "by_hand_flat", "broadcast"),
    ([], 1, "by_hand_squeezed", "broadcast"),
    ([], 1, "mse_right", ""),
    ([], 1, "by_hand_right", ""),
    ([], 3, "by_hand_pairs", ""),
    ([], 3, "to_prototypes", ""),
    ([], 3, "sqrt_at_0", "edge"),
    ([], 3, "sqrt", ""),
    ([], 3, "norm_at_0", ""),  # torch takes 0 for the derivative of a norm at 0
    ([], 3, "log_of_0", "edge"),
    ([], 3, "log", ""),
    ([], 3, "arccos_at_1", "edge"),
    ([], 3, "arccos", ""),
    ([], 3, "by_0", "edge"),
    ([], 3, "by_something", ""),
    ([], 3, "root_at_0", "edge"),
    ([], 3, "square_at_0", ""),
    ([], 3, "masked", "masked-row"),
    ([], 3, "masked_in_part", ""),
    ([], 3, "leaf_target", "target-with-gradient"),
    ([], 3, "mse", ""),
    ([], 3, "mean", ""),
    ([nn.Sigmoid()], 3, "mse_of_pixels", "out-of-range"),
    ([nn.Sigmoid()], 3, "mse_of_pixels_summed", "out-of-range"),
    ([nn.Sigmoid()], 3, "huber_of_pixels", "out-of-range"),
    ([nn.Sigmoid()], 3, "l1_of_pixels", "out-of-range"),
    ([nn.Tanh()], 3, "by_hand_of_pixels", "out-of-range"),
    ([nn.Softmax(1), nn.Flatten()], 3, "mse_of_pixels", "out-of-range"),
    ([], 3, "mse_of_pixels", ""),
    ([nn.Sigmoid()], 3, "mse_to_the_ends", ""),
    ([nn.Sigmoid()], 3, "with_a_penalty", ""),
    ([nn.Sigmoid()], 3, "times_a_weight", ""),
    ([nn.Sigmoid(), nn.Linear(3, 3)], 3, "mse_of_pixels", ""),
    ([], 3, "log_of_relu", "edge"),
    ([], 3, "by_relu", "edge"),
    ([], 3, "log_of_relu_and_more", ""),
    ([], 3, "relu_by", ""),
]


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    ("tail", "out", "kind", "rule"), CASES, ids=[f"{kind}-{len(tail)}-{i}" for i, (tail, _, kind, _) in enumerate(CASES)]
)
def test_a_mistake_in_the_graph_is_named_and_its_twin_is_not(tail, out, kind, rule):
    """The rule that fits is among the warnings; where nothing is wrong there is none."""
    model = net(out, *tail)
    audit = gradlens.audit(loss_of(model(data()), kind), model)
    loud = [finding.rule for finding in audit.findings if finding.severity != Severity.INFO]
    assert (rule in loud) if rule else loud == [], str(audit)
    assert audit.ok == (not rule)
    assert all(finding.causes and finding.remedy for finding in audit.findings)


@pytest.mark.parametrize("kind", ["sqrt_at_0", "log_of_0", "arccos_at_1", "by_0", "root_at_0"])
def test_what_is_called_an_edge_has_no_finite_gradient(kind):
    """Where the audit says that a derivative does not exist, backward gives NaN or infinity."""
    model = net()
    loss_of(model(data()), kind).backward()
    assert not all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["norm_at_0", "sqrt", "square_at_0", "log", "arccos"])
def test_what_is_not_called_an_edge_has_one(kind):
    """And elsewhere the gradient is finite."""
    model = net()
    loss_of(model(data()), kind).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["summed", "unreduced"])
def test_a_summed_loss_is_an_info(kind):
    """Sums are what some want: said, and no warning."""
    model = net()
    audit = gradlens.audit(loss_of(model(data()), kind), model)
    assert [(f.rule, f.severity) for f in audit.findings] == [("summed-loss", Severity.INFO)]
    assert audit.ok


def test_log_softmax_over_the_time_axis():
    """Classes on the last axis, log_softmax over the time axis, then flattened."""
    model = nn.Linear(4, 5)
    made = model(torch.randn(2, 7, 4))
    target = torch.zeros(14, dtype=torch.long)
    wrong = F.nll_loss(made.log_softmax(1).reshape(14, 5), target)
    right = F.nll_loss(made.log_softmax(2).reshape(14, 5), target)
    assert [f.rule for f in gradlens.audit(wrong, model).findings] == ["softmax-wrong-axis"]
    assert gradlens.audit(right, model).ok


@pytest.mark.parametrize(
    "cut",
    [
        lambda loss: loss.detach(),
        lambda loss: loss.detach().clone().requires_grad_(),
        lambda loss: torch.tensor(loss.item()),
    ],
)
def test_a_loss_that_is_cut_off(cut):
    """A detached or re-created loss reaches nothing: an error."""
    model = net()
    audit = gradlens.audit(cut(F.cross_entropy(model(data()), CLASS)), model)
    assert [(f.rule, f.severity) for f in audit.findings] == [("cut", Severity.ERROR)]


def test_a_part_that_is_cut_off():
    """Parameters behind a detach are named; a frozen part is not."""
    model = net()
    loss = model[2](model[:2](data()).detach()).sum()
    audit = gradlens.audit(loss, model)
    assert [f.rule for f in audit.findings] == ["unreached"]
    assert audit.findings[0].parameters == ("0.weight", "0.bias")
    model[0].requires_grad_(False)
    assert gradlens.audit(loss, model).ok


class Listed(nn.Module):
    """Layers in a Python list, or in a module list."""

    def __init__(self, registered):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        hidden = [nn.Linear(4, 4) for _ in range(2)]
        self.hidden = nn.ModuleList(hidden) if registered else hidden

    def forward(self, x):
        x = self.first(x)
        for layer in self.hidden:
            x = layer(x).relu()
        return self.last(x)


@pytest.mark.parametrize("registered", [False, True])
def test_layers_in_a_list(registered):
    """Parameters that the graph reaches and the model does not have."""
    model = Listed(registered)
    audit = gradlens.audit(F.cross_entropy(model(data()), CLASS), model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [f.rule for f in audit.findings] == ([] if registered else ["unregistered"])


def test_a_loss_network_that_is_not_frozen_is_an_info():
    """What stands nearer to the loss than all of the model only measures."""
    model, judge = net(4), nn.Linear(4, 1)
    audit = gradlens.audit(judge(model(data())).mean(), model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [(f.rule, f.severity) for f in audit.findings] == [("unregistered", Severity.INFO)]


def test_parameters_that_the_optimizer_does_not_have():
    """They are named; with all of them there is nothing to say."""
    model = net()
    loss = F.cross_entropy(model(data()), CLASS)
    audit = gradlens.audit(loss, model, torch.optim.SGD(model[2].parameters(), lr=0.1))
    assert [f.rule for f in audit.findings] == ["outside"]
    assert audit.findings[0].parameters == ("2.bias", "2.weight") or set(audit.findings[0].parameters) == {
        "0.weight",
        "0.bias",
    }
    assert gradlens.audit(loss, model, torch.optim.SGD(model.parameters(), lr=0.1)).ok


@pytest.mark.parametrize(("layer", "shape", "rule"), [
    (nn.BatchNorm2d(2), (1, 2, 3, 3), "batchnorm-of-one"),
    (nn.BatchNorm2d(2), (4, 2, 3, 3), ""),
    (nn.InstanceNorm2d(2, affine=True), (1, 2, 3, 3), ""),
    (nn.InstanceNorm2d(2, affine=True), (4, 2, 3, 3), ""),
    (nn.GroupNorm(1, 2), (1, 2, 3, 3), ""),
])  # fmt: skip
def test_batch_normalisation_over_one_example(layer, shape, rule):
    """Only what takes the batch's statistics; instance normalisation is computed by the same operation."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), layer)
    audit = gradlens.audit(model(torch.randn(shape)).square().mean(), model)
    assert [f.rule for f in audit.findings] == ([rule] if rule else [])


@pytest.mark.parametrize(("tail", "wrong"), [(nn.Dropout(0.5), True), (nn.BatchNorm1d(3), True), (nn.LayerNorm(3), False)])
def test_a_model_that_is_left_in_evaluation_mode(tail, wrong):
    """Dropout and batch normalisation do other things there; a layer normalisation does not."""
    model = net(3, tail).eval()
    audit = gradlens.audit(F.cross_entropy(model(data()), CLASS), model)
    assert [f.rule for f in audit.findings] == (["eval-mode"] if wrong else [])
    model.train()
    assert gradlens.audit(F.cross_entropy(model(data()), CLASS), model).ok


def test_a_bootstrapped_target():
    """r + gamma * max Q(s') that the gradient passes through; under no_grad it is right."""
    q = net()
    taken = q(data()).gather(1, CLASS[:, None])[:, 0]
    target = 1 + 0.9 * q(data()).max(1)[0]
    assert [f.rule for f in gradlens.audit(F.mse_loss(taken, target), q).findings] == ["target-with-gradient"]
    assert gradlens.audit(F.mse_loss(taken, target.detach()), q).ok


def test_the_result_is_text_a_frame_and_an_answer():
    """What was found as a table, as text, and as yes or no."""
    model = net(3, nn.Softmax(1))
    audit = gradlens.audit(F.cross_entropy(model(data()), CLASS), model)
    assert list(audit.frame["rule"]) == ["softmax-twice"]
    assert "softmax" in str(audit)
    assert "reaches 4 of the model's 4 parameters" in str(audit)
    with pytest.raises(AttributeError):
        audit.findings = ()


def test_after_backward_it_says_that_numbers_are_gone():
    """Names and edges are still read."""
    model = net(3, nn.Softmax(1))
    loss = F.cross_entropy(model(data()), CLASS)
    loss.backward()
    assert [f.rule for f in gradlens.audit(loss, model).findings] == ["softmax-twice"]


@pytest.mark.slow
def test_a_compiled_model_says_what_is_hidden():
    """The operations inside are one; what is around them is checked."""
    model = net(3, nn.Softmax(1))
    compiled = torch.compile(model, backend="aot_eager")
    audit = gradlens.audit(F.cross_entropy(compiled(data()), CLASS), model)
    assert "compiled" in str(audit)
    assert audit.ok


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((1.0,), ArgumentTypeError, "loss.item"),
        ((torch.ones(3),), ArgumentError, r"loss.mean\(\)"),
        ((torch.ones(()), torch.ones(2)), ArgumentTypeError, "Module"),
        ((torch.ones(()), None, 3), TypeError, "iterable"),
        ((torch.ones(()), None, [3]), ArgumentTypeError, "Optimizer"),
    ],
)
def test_wrong_arguments_say_what_to_give(arguments, error, words):
    """What was given, what was expected."""
    with pytest.raises(error, match=words):
        gradlens.audit(*arguments)


def test_the_model_is_left_as_it_was():
    """Gradients, mode and the loss's own graph: backward works afterwards, with the same numbers."""
    model, gradients = net(), []
    for look in (False, True):
        model.zero_grad()
        loss = F.cross_entropy(model(data()), CLASS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if look:
                gradlens.audit(loss, model)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(map(torch.equal, *gradients))
