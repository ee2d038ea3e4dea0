"""A probe leaves no trace, whatever it runs."""

import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from gradlens.errors import ArgumentError, ArgumentTypeError, ProbeError
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.symmetry import check_symmetry

from .helpers import trace


class Everything(nn.Module):
    """What a probe might disturb: BatchNorm, dropout, tied weights, an RNN, pruning, counters and plain tensors."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.inner.weight
        self.rnn = nn.LSTM(4, 3, batch_first=True)
        self.spectral = parametrizations.spectral_norm(nn.Linear(3, 3))
        self.pruned = prune.l1_unstructured(nn.Linear(3, 2), "weight", amount=0.5)
        self.calls, self.log, self.scale = 0, [], torch.ones(2)

    def forward(self, x):
        self.calls += 1
        self.log.append(self.calls)
        self.scale.add_(1)
        self.fresh = x
        x = nn.functional.dropout(self.norm(self.tied(self.inner(x))), 0.5, self.training)
        return self.pruned(self.spectral(self.rnn(x[:, None])[0][:, 0]))


def used():
    torch.manual_seed(0)
    model = Everything()
    x = torch.randn(8, 4)
    model(x).sum().backward()  # leaves gradients, running statistics and non-leaf attributes behind
    return model, x


def everything():
    model, x = used()
    model.inner.weight.register_hook(lambda g: pytest.fail("a hook on a live parameter saw a probe"))
    model.inner.weight.register_post_accumulate_grad_hook(lambda p: pytest.fail("a hook on a live parameter saw a probe"))
    return model, x


def noisy(model, x):
    model.norm.eval()
    random.random()
    np.random.rand()
    return model(x).square().mean() + torch.rand(())


@pytest.mark.parametrize("wide", [False, True])
def test_nothing_is_left_behind(wide):
    """Weights, buffers, gradients, modes, attributes, hooks and random states are bit-identical after a gradient."""
    model, x = everything()
    before = trace(model)
    with IsolatedLoss(model, lambda m: noisy(m, x), wide=wide) as isolated:
        loss, partials = isolated.gradient()
        isolated.gradient()
    assert trace(model) == before
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    assert all(torch.isfinite(g).all() for g in partials)


@pytest.mark.parametrize("wide", [False, True])
def test_nothing_is_left_behind_when_the_loss_raises(wide):
    """A loss that raises halfway leaves no more behind than one that returns."""
    model, x = everything()
    before = trace(model)

    def failing(m):
        noisy(m, x)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), IsolatedLoss(model, failing, wide=wide) as isolated:
        isolated.gradient()
    assert trace(model) == before


def test_the_gradient_is_that_of_a_plain_backward():
    """The partials are bit-identical to those of loss.backward() on the model itself, tied weights and dropout included."""
    model, x = everything()
    twin, _ = used()
    twin.zero_grad()
    torch.manual_seed(5)
    noisy(twin, x).backward()
    torch.manual_seed(5)
    with IsolatedLoss(model, lambda m: noisy(m, x)) as isolated:
        _, partials = isolated.gradient()
        names = isolated.parameters.names
    assert names == tuple(name for name, _ in model.named_parameters())
    for name, g, p in zip(names, partials, twin.parameters(), strict=True):
        assert torch.equal(g, p.grad), name


def test_evaluations_start_from_the_same_state():
    """Buffers and attributes that one evaluation changes are back for the next; rewind() replays the random numbers."""
    model, x = everything()
    with IsolatedLoss(model, lambda m: noisy(m, x)) as isolated:
        first = isolated.loss()
        assert isolated.loss() != first
        isolated.draws.rewind()
        assert isolated.loss() == first


class Keeps(nn.Module):
    """State in containers, and in containers within them: caches, logs, counters."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.shared = torch.zeros(3)
        self.cache, self.named, self.recent = [torch.zeros(3), self.shared], {"k": (torch.zeros(2),)}, deque([1], maxlen=2)
        self.nested = {"log": [[0]], "seen": {1}}

    def forward(self, x):
        assert self.cache[1] is self.shared
        self.cache[0].add_(1)
        self.shared.add_(1)
        self.named["k"][0].add_(1)
        self.cache.append(x)
        self.recent.append(2)
        self.nested["log"][0].append(1)
        self.nested["seen"].add(2)
        return self.linear(x) * self.cache[0] * self.named["k"][0][0]


@pytest.mark.parametrize("wide", [False, True])
def test_state_within_containers_is_left_alone(wide):
    """Tensors, lists and sets within lists, tuples, dicts and deques are as they were, and the same for each evaluation."""
    model, x = Keeps(), torch.randn(2, 3)
    before = trace(model)
    with IsolatedLoss(model, lambda m: m(x).square().sum(), wide=wide) as isolated:
        assert isolated.loss() == isolated.loss() > 0
        isolated.gradient()
    assert trace(model) == before


def test_weights_that_the_forward_writes_into_stay_where_they_are():
    """An embedding that renormalises its rows in the forward changes neither the model nor the private weights."""
    model = nn.Embedding(5, 3, max_norm=0.1)
    before = trace(model)
    with IsolatedLoss(model, lambda m: m(torch.arange(5)).sum()) as isolated:
        isolated.gradient()
        assert torch.equal(isolated.weights[0], model.weight)
    assert trace(model) == before


def test_wide_computes_in_float64_whatever_the_inputs_are():
    """float32 inputs, targets, constants, casts and plain tensors take part in float64, recurrent layers included."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out, self.offset = nn.GRU(3, 4), nn.Linear(4, 1).bfloat16(), torch.tensor(0.1)

        def forward(self, x):
            h = self.rnn(x)[0].bfloat16()
            assert h.dtype == torch.float64
            return self.out(h).float() + self.offset + torch.zeros(1, dtype=torch.float16) + torch.ones(1)

    model, x, y = Mixed(), torch.randn(5, 2, 3), torch.randn(5, 2, 1)
    with IsolatedLoss(model, lambda m: nn.functional.mse_loss(m(x), y), wide=True) as isolated:
        loss, partials = isolated.gradient()
        assert isolated.narrow == ()
    assert loss.dtype == torch.float64
    assert {g.dtype for g in partials} == {torch.float64}
    assert torch.get_default_dtype() == torch.float32


def test_wide_names_what_stays_narrow():
    """An operation that cannot be brought to compute in float64 is named."""

    class Narrow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.from_numpy(x.numpy().astype(np.float32))

        @staticmethod
        def backward(ctx, g):
            return g.double()

    with IsolatedLoss(
        nn.Linear(2, 2), lambda m: Narrow.apply(m.weight.type("torch.FloatTensor")).sum(), wide=True
    ) as isolated:
        isolated.gradient()
        assert isolated.narrow == ("NarrowBackward", "type")


@pytest.mark.parametrize("wide", [False, True])
def test_checkpointed_blocks_compute_again_with_the_private_weights(wide):
    """A checkpointed block, which runs its forward again during backward, gives the gradients of a plain one."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
    x = torch.randn(6, 4)
    before = trace(block)
    found = []
    for run in (lambda m: m(x), lambda m: checkpoint(m, x, use_reentrant=False)):
        with IsolatedLoss(block, lambda m, run=run: run(m).square().mean(), wide=wide) as isolated:
            found.append(isolated.gradient()[1])
    assert trace(block) == before
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)


def test_reentrant_checkpoints_are_explained():
    """A reentrant checkpoint gives gradients to live parameters only, and the error says what to use."""
    block, x = nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    with (
        IsolatedLoss(block, lambda m: checkpoint(m, x, use_reentrant=True).sum()) as isolated,
        pytest.raises(ProbeError, match="use_reentrant=False"),
    ):
        isolated.gradient()


def test_mappings_of_modules_and_tensors():
    """A mapping gives the loss the same mapping, and names are prefixed by its keys."""
    g, d, w = nn.Linear(2, 2), nn.Linear(2, 1), torch.tensor([1.0, 2.0], requires_grad=True)
    with IsolatedLoss({"G": g, "D": d, "w": w}, lambda m: (m["D"](m["G"](torch.ones(2))) * m["w"]).sum()) as isolated:
        _, partials = isolated.gradient()
        assert isolated.parameters.names == ("G.weight", "G.bias", "D.weight", "D.bias", "w")
    assert torch.equal(partials[-1], d(g(torch.ones(2))).detach().expand(2))
    assert w.grad is None


def test_numbers_and_tensors_without_requires_grad_are_variables():
    """Where nothing in a mapping says that it requires a gradient, everything real does."""
    with IsolatedLoss(
        {"x": 2.0, "y": torch.tensor(3.0), "n": torch.tensor(2)}, lambda v: v["x"] ** v["n"] * v["y"]
    ) as isolated:
        assert isolated.parameters.names == ("x", "y")
        assert [float(g) for g in isolated.gradient()[1]] == [12.0, 4.0]


def test_complex_weights_are_two_reals():
    """The partials of |z|^2 by the real and the imaginary part are 2a and 2b."""
    z = torch.tensor([3 + 4j], requires_grad=True)
    with IsolatedLoss({"z": z}, lambda v: (v["z"].abs() ** 2).sum()) as isolated:
        assert isolated.parameters.shapes == ((1, 2),)
        torch.testing.assert_close(isolated.gradient()[1][0], torch.tensor([[6.0, 8.0]]))


def test_wrappers_are_looked_through():
    """Names carry no wrapper's prefix, and the wrapped model is what the loss gets."""
    inner = nn.Linear(2, 1)
    with IsolatedLoss(nn.DataParallel(inner), lambda m: m(torch.ones(2)).sum()) as isolated:
        isolated.gradient()
        assert isolated.parameters.names == ("weight", "bias")
    compiled = torch.compile(nn.Sequential(inner), backend="eager")
    with IsolatedLoss(compiled, lambda m: m(torch.ones(2)).sum()) as isolated:
        isolated.gradient()
        assert isolated.parameters.names == ("0.weight", "0.bias")


def test_compiled_parts_run_eagerly():
    """A model with compiled submodules is differentiated as if they were not, twice if need be, and they stay compiled."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    model = nn.Sequential(torch.compile(plain[0], backend="aot_eager"), plain[1])
    model[1].compile(backend="aot_eager")
    x = torch.randn(4, 3)
    with IsolatedLoss(model, lambda m: m(x).square().mean()) as isolated:
        found = isolated.gradient()[1]
        assert isolated.parameters.names == ("0.weight", "0.bias", "1.weight", "1.bias")
    with IsolatedLoss(plain, lambda m: m(x).square().mean()) as isolated:
        for a, b in zip(found, isolated.gradient()[1], strict=True):
            assert torch.equal(a, b)
    assert check_symmetry(model, lambda m: m(x).pow(4).mean()).ok
    assert model[1]._compiled_call_impl is not None


def test_a_chosen_part_is_differentiated_and_frozen_parameters_are_not():
    """`select` takes the patterns of watch(); what requires no gradient is no weight of a probe."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model[0].weight.requires_grad_(False)
    with IsolatedLoss(model, lambda m: m(torch.ones(2)).sum(), select="!*.weight") as isolated:
        assert isolated.parameters.names == ("0.bias", "1.bias")
    with IsolatedLoss(model, lambda m: m(torch.ones(2)).sum()) as isolated:
        assert isolated.parameters.names == ("0.bias", "1.weight", "1.bias")
    with pytest.raises(ArgumentError, match=r"'wieght' matches no parameter"):
        IsolatedLoss(model, lambda m: 0, select="wieght")


def test_works_under_inference_mode():
    """Gradients are taken also where the caller has them off."""
    model = nn.Linear(2, 1)
    with torch.inference_mode(), IsolatedLoss(model, lambda m: m(torch.ones(1, 2)).sum()) as isolated:
        assert torch.equal(isolated.gradient()[1][0], torch.ones(1, 2))


@pytest.mark.parametrize(
    "touch", [lambda m: m(1), lambda m: m.weight, lambda m: m["x"], lambda m: list(m), lambda m: bool(m)]
)
def test_any_use_of_the_argument_counts(touch):
    """A loss that uses its argument in whatever way is not taken to ignore it."""
    model = nn.Linear(2, 1)

    def loss(m):
        if not isinstance(m, nn.Module):
            touch(m)
        return model(torch.ones(2)).sum()

    with IsolatedLoss(model, loss) as isolated:
        assert isolated.gradient()[1][0] is not None


def test_a_loss_that_ignores_its_argument_is_refused_without_trace():
    """A loss that closes over the model instead of using its argument is named, and changes nothing."""
    model, x = everything()
    before = trace(model)
    with (
        pytest.raises(ProbeError, match="ignores the model it is given"),
        IsolatedLoss(model, lambda m: noisy(model, x)) as isolated,
    ):
        isolated.gradient()
    assert trace(model) == before


class Listed(nn.Module):
    """Its forward reads its weights from a plain list, which no exchange of parameters reaches."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
        self.held = [self.weight]

    def forward(self, x):
        return x @ self.held[0] + self.bias


@pytest.mark.parametrize("wide", [False, True])
def test_a_loss_that_reaches_live_weights_is_refused(wide):
    """Weights captured outside of the argument, or held in a list, would silently be constants: the error names them."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    captured = list(model.parameters())

    def decayed(m):
        return m(torch.ones(1, 2)).sum() + sum(p.square().sum() for p in captured[:2])

    before = trace(model)
    with (
        pytest.raises(ProbeError, match=r"2 parameters.*0\.weight.*0\.bias"),
        IsolatedLoss(model, decayed, wide=wide) as isolated,
    ):
        isolated.gradient()
    assert trace(model) == before
    listed = Listed()
    with (
        pytest.raises(ProbeError, match="weight"),
        IsolatedLoss(listed, lambda m: m(torch.ones(1, 2)).sum(), wide=wide) as isolated,
    ):
        isolated.gradient()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m: m(torch.ones(2)).sum().item(), "returned float"),
        (lambda m: m(torch.ones(3, 2)), r"shape \(3, 1\)"),
        (lambda m: m(torch.ones(2)).sum() > 0, "torch.bool"),
    ],
)
def test_losses_that_are_none_are_explained(loss, message):
    """A loss is one real number, as a tensor."""
    with IsolatedLoss(nn.Linear(2, 1), loss) as isolated, pytest.raises(ProbeError, match=message):
        isolated.gradient()


@pytest.mark.parametrize("criterion", [nn.CrossEntropyLoss(), nn.L1Loss(), nn.functional.cross_entropy])
def test_a_criterion_is_no_loss_function(criterion):
    """What takes predictions and targets is told from what takes the model, and the error writes the function out."""
    with pytest.raises(ArgumentTypeError, match=r"give lambda model, batch: criterion\(model\(batch\[0\]\), batch\[1\]\)"):
        IsolatedLoss(nn.Linear(2, 2), criterion, batched=True)
    with pytest.raises(ArgumentTypeError, match=r"give lambda model: criterion\(model\(x\), y\)"):
        IsolatedLoss(nn.Linear(2, 2), criterion)


def test_targets_that_cannot_be_probed_are_explained():
    """Each error says what was given and what to do."""
    loss = lambda m: m  # noqa: E731
    with pytest.raises(ArgumentTypeError, match="not Adam"):
        IsolatedLoss(torch.optim.Adam([nn.Parameter(torch.ones(1))]), loss)
    with pytest.raises(ArgumentTypeError, match="loss_fn is a function"):
        IsolatedLoss(nn.Linear(1, 1), 3)
    with pytest.raises(ArgumentTypeError, match="'x' is str"):
        IsolatedLoss({"x": "1"}, loss)
    with pytest.raises(ArgumentError, match="no parameter of the model requires"):
        IsolatedLoss(nn.ReLU(), loss)
    with pytest.raises(ProbeError, match="has no shape yet"):
        IsolatedLoss(nn.LazyLinear(2), loss)
    with pytest.raises(ProbeError, match="meta device"):
        IsolatedLoss(nn.Linear(2, 2, device="meta"), loss)
    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ProbeError, match="scripted module"):
        IsolatedLoss(scripted, loss)
