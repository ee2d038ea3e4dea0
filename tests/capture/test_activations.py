"""What leaf modules make of each batch: the numbers, when they count, and that nobody notices."""

import math
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradlens
from gradlens.capture.activations import ForwardWatch
from gradlens.capture.guards import GUARDED
from gradlens.errors import ArgumentError

FEATURES = ("updates", "flips", "activations")


def watch(target, optimizer=None, **settings):
    return gradlens.watch(target, optimizer, features=FEATURES, **settings)


def seeded(*modules):
    torch.manual_seed(0)
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, 0, 0.5)
    return modules[0] if len(modules) == 1 else modules


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 3))


def row(lens, name, step=0):
    frame = lens.activations()
    found = frame[(frame["module"] == name) & (frame["step"] == step)]
    assert len(found) == 1, frame[["step", "module"]].to_string()
    return found.iloc[0]


def by_hand(made, low=-math.inf, high=math.inf):
    """The columns, from their words."""
    made = made.detach().double().reshape(len(made), -1)
    rms = made.square().mean().sqrt()
    return {
        "rms": float(rms),
        "spread": float(made.std(0, correction=0).square().mean().sqrt() / rms),
        "dead": float((made == 0).all(0).double().mean()),
        "saturated": float(((made <= low) | (made >= high)).double().mean()) if high < math.inf else math.nan,
    }


def agrees(found, made, *ends):
    for name, value in by_hand(made, *ends).items():
        assert found[name] == pytest.approx(value, rel=1e-9, nan_ok=True), name


def test_every_module_has_the_numbers_that_torch_gives():
    """Each output of a forward pass has its row, in the order of the calls, exact."""
    model = net()
    model[0].bias.data[0] = -1e6  # a unit that is never on
    x = 400 * torch.randn(16, 4)
    made, h = [], x
    for module in model:
        h = module(h)
        made.append(h)
    lens = watch(model)
    model(x).sum().backward()
    assert list(lens.activations()["module"]) == ["0", "1", "2", "3", "4"]
    assert list(lens.activations()["type"]) == ["Linear", "ReLU", "Linear", "Sigmoid", "Linear"]
    for i, h in enumerate(made):
        agrees(row(lens, str(i)), h, *((0.01, 0.99) if i == 3 else ()))
    assert row(lens, "1")["dead"] >= 1 / 8
    assert 0 < row(lens, "3")["saturated"] < 1
    lens.close()


def test_conv_images_and_channels_last():
    """A unit is a place of a channel; the order of memory is of no account."""
    conv = seeded(nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last))
    x = torch.randn(6, 3, 7, 7).to(memory_format=torch.channels_last)
    made = conv(x)
    assert not made.is_contiguous()
    lens = watch({"conv": conv})
    conv(x).sum().backward()
    agrees(row(lens, "conv"), made)
    assert row(lens, "conv")["entries"] == made.numel()
    lens.close()


def test_an_lstm_gives_tuples_and_has_its_batch_second():
    """Nested outputs have rows of their own, and the axis of the batch is the module's."""
    lstm = nn.LSTM(3, 4, num_layers=2)
    x = torch.randn(7, 5, 3)
    out, (h, c) = lstm(x)
    lens = watch({"lstm": lstm})
    lstm(x)[0].sum().backward()
    for name, made in (("lstm[0]", out), ("lstm[1][0]", h), ("lstm[1][1]", c)):
        agrees(row(lens, name), made.transpose(0, 1))
    lens.close()


class Pair(nn.Module):
    """Answers with a mapping that has a tuple and something that is no tensor in it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return {"a": x * self.weight, "b": (x.relu() * self.weight, "text", None, torch.arange(3))}


def test_a_mapping_is_read_by_its_keys():
    """What is no floating tensor is passed over."""
    pair, x = Pair(), torch.randn(4, 3)
    lens = watch({"pair": pair})
    (pair(x)["a"].sum() + pair(x)["b"][0].sum()).backward()
    assert set(lens.activations()["module"]) == {"pair[a]", "pair[b][0]"}
    lens.close()


def test_calls_of_one_module_add_up():
    """A module that is called three times in a pass has one row, over all entries."""
    layer = seeded(nn.Linear(3, 3))
    xs = [torch.randn(4, 3) for _ in range(3)]
    made = [layer(x).detach() for x in xs]
    lens = watch({"layer": layer})
    sum(layer(x).sum() for x in xs).backward()
    found = row(lens, "layer")
    assert (found["calls"], found["entries"]) == (3, 36)
    assert found["rms"] == pytest.approx(float(torch.cat(made).double().square().mean().sqrt()), rel=1e-9)
    deviation = sum(float((m.double() - m.double().mean(0)).square().sum()) for m in made)
    square = sum(float(m.double().square().sum()) for m in made)
    assert found["spread"] == pytest.approx(math.sqrt(deviation / square), rel=1e-9)
    lens.close()


def test_what_follows_may_overwrite_an_output():
    """An in-place ReLU changes the layer's output: each row has what its own module made."""
    model = seeded(nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)))
    x = torch.randn(9, 4)
    before = model[0](x).detach().clone()
    lens = watch(model)
    model(x).sum().backward()
    agrees(row(lens, "0"), before)
    agrees(row(lens, "1"), before.relu())
    lens.close()


def test_only_forward_passes_of_training_count():
    """Without a gradient, or on a step that is not observed, nothing is read."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lens = watch(model, optimizer, schedule=2)
    for _ in range(4):
        with torch.no_grad():
            model(100 + torch.randn(50, 4))
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    frame = lens.activations()
    assert sorted(set(frame["step"])) == [0, 2]
    assert set(frame["entries"]) == {8 * 8, 8 * 3}
    lens.close()


def test_each_backward_has_its_forward():
    """Micro-batches are told apart by the number of their backward."""
    model = seeded(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lens = watch({"m": model}, optimizer)
    sizes = [3, 5, 7]
    for _ in range(3):
        for size in sizes:
            model(torch.randn(size, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    frame = lens.activations()
    assert list(frame["step"]) == [0] * 3 + [1] * 3 + [2] * 3
    assert list(frame["backward"]) == [0, 1, 2] * 3
    assert list(frame["entries"]) == [2 * size for size in sizes] * 3
    lens.close()


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.first, self.inner, self.last = seeded(
            nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)
        )

    def forward(self, x):
        h = self.first(x)
        h = checkpoint(self.inner, h, use_reentrant=self.reentrant)
        return self.last(h)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_counts_once(reentrant):
    """Modules that are called again inside the backward pass have been counted, or are counted then, once."""
    model, x = Checkpointed(reentrant=reentrant), torch.randn(6, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    lens = watch(model, optimizer)
    for _ in range(3):
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    frame = lens.activations()
    assert set(frame["calls"]) == {1}
    assert len(frame) == 3 * 4
    agrees(row(lens, "inner.0", 2), model.inner[0](model.first(x)))
    lens.close()


class Halves(nn.Module):
    """A sigmoid inside a checkpoint that ends far from its range, and layers behind it."""

    def __init__(self, *, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.last, self.gate, self.first, self.inner = seeded(
            nn.Linear(4, 2), nn.Sigmoid(), nn.Linear(3, 4), nn.Linear(4, 4)
        )

    def forward(self, x):
        h = checkpoint(lambda h: self.gate(self.inner(h)), self.first(x), use_reentrant=self.reentrant)
        return self.last(h)


@pytest.mark.parametrize("reentrant", [False, True])
def test_modules_are_in_the_order_of_the_forward_pass(reentrant):
    """Whatever a checkpoint runs again, and in whatever order the model names its modules."""
    model, x = Halves(reentrant=reentrant), torch.randn(6, 3)
    lens = watch(model)
    with torch.no_grad():
        model(x)  # a validation before it changes nothing
    model(x).sum().backward()
    assert list(lens.activations()["module"]) == ["first", "inner", "gate", "last"]
    lens.close()


@pytest.mark.parametrize("reentrant", [False, True])
def test_nested_checkpoints_count_once_in_order(reentrant):
    """A checkpoint in a checkpoint, of either kind in the other."""
    model, x = seeded(nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))), torch.randn(5, 3)

    def inner(h):
        return model[1](checkpoint(model[2], h, use_reentrant=not reentrant))

    lens = watch(model)
    h = checkpoint(inner, model[3](x), use_reentrant=reentrant)
    model[0](h).sum().backward()
    frame = lens.activations()
    assert list(frame["module"]) == ["3", "2", "1", "0"]
    assert set(frame["calls"]) == {1}
    lens.close()


def test_a_graph_that_is_gone_through_twice_counts_once():
    """The second backward over one graph runs the checkpoint again, and has no forward pass of its own."""
    model, x = Checkpointed(reentrant=False), torch.randn(6, 3)
    lens = watch(model, torch.optim.SGD(model.parameters(), 0.1))
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    frame = lens.activations()
    assert list(frame["module"]) == ["first", "inner.0", "inner.1", "last"]
    assert set(frame["calls"]) == {1}
    assert set(frame["backward"]) == {0}
    lens.close()


class OwnCheckpoint(torch.autograd.Function):
    """Somebody's own checkpoint."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            made = ctx.module(x)
        torch.autograd.backward(made, gradient)
        return None, x.grad


def test_a_checkpoint_of_the_users_own_counts_once_in_order():
    """Modules that run with a gradient for the first time inside the backward pass are counted there."""
    model, x = seeded(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))), torch.randn(6, 3)
    lens = watch(model)
    model[2](OwnCheckpoint.apply(model[1], model[0](x))).sum().backward()
    frame = lens.activations()
    assert list(frame["module"]) == ["0", "1", "2"]
    assert set(frame["calls"]) == {1}
    lens.close()


# --- forward passes without a backward ------------------------------------------------------------------------------


def train_once(model, x, optimizer=None):
    loss = model(x).square().mean()
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss


@pytest.mark.parametrize("kept", [False, True])
def test_a_forward_pass_that_no_backward_follows_is_left_out(kept):
    """A metric in train mode, with gradients on, is in no row, whether its output is kept or not."""
    model, x = net(), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lens, outputs = watch(model, optimizer), []
    for _ in range(3):
        for _ in range(4):
            made = model(100 * torch.randn(50, 4))
            outputs += [made] * kept
        train_once(model, x, optimizer)
        model(100 * torch.randn(50, 4)).mean().item()
    frame = lens.activations()
    assert set(frame["calls"]) == {1}
    assert set(frame["entries"]) == {8 * 8, 8 * 3}
    assert len(frame) == 3 * 5
    lens.close()


def test_a_thousand_metric_passes_take_no_memory():
    """What no backward will reach is forgotten with its graph."""
    model = net()
    lens = watch(model)
    watched = lens._watcher.activations
    for _ in range(1000):
        model(torch.randn(2, 4))
    assert len(watched._waiting) <= 1001
    assert not any(ref() for ref in watched._waiting)
    assert not watched._loose
    train_once(model, torch.randn(8, 4))
    assert set(lens.activations()["entries"]) == {64, 24}
    lens.close()


def test_each_backward_has_its_own_forward_whatever_the_order():
    """Two forward passes before their two backwards, the second first: each row has its own batch."""
    model = net()
    lens = watch(model, torch.optim.SGD(model.parameters(), 0.1))
    first, second = (model(torch.randn(n, 4)).sum() for n in (3, 7))
    second.backward()
    first.backward()
    frame = lens.activations()
    assert list(frame[frame["module"] == "0"]["entries"]) == [7 * 8, 3 * 8]
    assert set(frame["calls"]) == {1}
    lens.close()


def test_two_forward_passes_of_one_loss_add_up():
    """Pairs that are compared belong to one backward."""
    model = net()
    lens = watch(model)
    (model(torch.randn(3, 4)) - model(torch.randn(3, 4))).square().mean().backward()
    assert set(lens.activations()["calls"]) == {2}
    lens.close()


@pytest.mark.parametrize("inside", [nn.Flatten, nn.Identity])
def test_outputs_without_a_graph_go_with_what_follows(inside):
    """Layers on data and frozen ones have no node: they count where the next layer does, and not where it does not."""
    model = seeded(nn.Sequential(inside(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    model[1].requires_grad_(False)
    lens = watch(model)
    model(torch.randn(50, 4))
    train_once(model, torch.randn(8, 4))
    frame = lens.activations()
    assert list(frame["module"]) == ["0", "1", "2", "3"]
    assert set(frame["calls"]) == {1}
    assert set(frame["entries"] % 8) == {0}
    lens.close()


def test_a_view_that_is_overwritten_still_counts():
    """An in-place ReLU on a layer of three axes, or on a flattened image, takes the view's node out of the graph."""
    model = seeded(
        nn.Sequential(nn.Linear(4, 6), nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(18, 2), nn.ReLU(inplace=True))
    )
    lens = watch(model)
    train_once(model, torch.randn(8, 3, 4))
    assert list(lens.activations()["module"]) == ["0", "1", "2", "3", "4"]
    lens.close()


def test_a_generator_and_its_critic_have_the_rows_of_their_own_passes():
    """What the critic's loss was cut from is not in its row; the generator's has both."""
    g, d = seeded(nn.Linear(2, 3)), seeded(nn.Linear(3, 1))
    optimizers = [torch.optim.SGD(each.parameters(), 0.01) for each in (d, g)]
    lens = gradlens.watch({"g": g, "d": d}, optimizers, features="activations")
    fake = g(torch.randn(5, 2))
    (d(fake.detach()).mean() - d(torch.randn(5, 3)).mean()).backward()
    optimizers[0].step()
    d(fake).mean().backward()
    optimizers[1].step()
    rows = lens.activations().groupby("backward")["module"].agg(list)
    assert list(rows) == [["d"], ["g", "d"]]
    assert list(lens.activations()["calls"]) == [2, 1, 1]
    lens.close()


def test_a_backward_that_breaks_off_has_no_row():
    """Nor are its calls in the row of the next."""
    model, x = net(), torch.randn(8, 4)
    lens = watch(model, torch.optim.SGD(model.parameters(), 0.1))

    def breaks(gradient):
        raise ValueError("mine")

    made = model[2](model[1](model[0](x)))
    made.register_hook(breaks)
    with pytest.raises(ValueError, match="mine"):
        model[4](model[3](made)).sum().backward()
    train_once(model, x)
    frame = lens.activations()
    assert set(frame["calls"]) == {1}
    assert len(frame) == 5
    lens.close()


def test_gradients_by_autograd_grad_have_no_rows_and_it_is_said():
    """Where an optimizer steps after forward passes and no backward pass ever comes, one finding says why there is none."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lens = watch(model, optimizer)
    optimizer.step()  # before any forward pass: nothing to say
    for _ in range(3):
        loss = model(torch.randn(8, 4)).sum()
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.grad = g
        optimizer.step()
    assert not len(lens.activations())
    (found,) = [f for f in lens.findings() if f.rule == "activations-unavailable"]
    assert "without a backward pass" in found.seen
    assert found.step == 1
    lens.close()


# --- the user's own torch -------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Questions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(getattr(func, "__qualname__", str(func)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Operations, Questions])
@pytest.mark.parametrize("strided", [False, True])
def test_modes_of_the_user_see_nothing(mode, strided):
    """Operations and questions are those of a model that nobody watches, whichever way an output is read."""

    def seen(watched):
        model, shared = net(), nn.Sequential(nn.Linear(3, 6), nn.Unflatten(1, (2, 3)))
        lens = watch({"net": model, "shared": shared}) if watched else None
        with mode() as here:
            made = model(torch.ones(8, 4))
            made = shared(made) + shared(made * 2) if not strided else shared(made).transpose(0, 1)[:, ::2]
            loss = made.square().mean()
        loss.backward()
        if lens is not None:
            assert len(lens.activations()) == 7
            assert "gradlens-fault" not in {f.rule for f in lens.findings()}
            lens.close()
        return here.seen

    assert seen(True) == seen(False)


def test_an_interrupt_leaves_torch_as_it_was(monkeypatch):
    """Ctrl-C while an output is read: subclasses and modes are asked again afterwards, and the next pass is read."""
    from gradlens.watching import outputs_read

    model = net()
    lens = watch(model)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(outputs_read.kernels, "output_sums", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(torch.ones(8, 4))
    monkeypatch.undo()
    with Questions() as here:
        torch.ones(2).sum()
    assert [name.rpartition(".")[2] for name in here.seen] == ["ones", "sum"]
    train_once(model, torch.ones(8, 4))
    assert len(lens.activations()) == 5
    lens.close()


@pytest.mark.parametrize("size", [1e200, 1e-200, 1e300])
def test_sizes_beyond_the_squares_of_float64(size):
    """An output near 1e200 has a size and a spread, over several calls too."""
    layer = seeded(nn.Linear(3, 4, bias=False)).double()
    x = torch.randn(6, 3, dtype=torch.float64) * size
    made = torch.cat([layer(x), layer(2 * x)]).detach() / size
    lens = watch({"layer": layer})
    ((layer(x) + layer(2 * x)) / size).sum().backward()
    found = row(lens, "layer")
    assert found["rms"] == pytest.approx(float(made.square().mean().sqrt()) * size, rel=1e-12)
    assert 0.1 < found["spread"] < 1
    lens.close()


def test_autocast_is_read_as_it_is():
    """What a module makes in bfloat16 is read in bfloat16, and statistics are wide."""
    model = seeded(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))
    x = torch.randn(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        made = model[0](x)
    assert made.dtype == torch.bfloat16
    lens = watch(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().sum().backward()
    agrees(row(lens, "0"), made)
    lens.close()


def test_what_is_not_finite_is_counted():
    """The rest has its size; how much examples differ means nothing then."""
    layer = seeded(nn.Linear(3, 3))
    x = torch.randn(4, 3)
    x[1] = math.nan
    lens = watch({"layer": layer})
    layer(x).sum().backward()
    found = row(lens, "layer")
    assert found["nonfinite"] == 3
    assert math.isnan(found["spread"])
    assert math.isfinite(found["rms"])
    lens.close()


def train(features, steps=12):
    """The bits of a training with dropout, BatchNorm, an in-place ReLU and a checkpoint."""
    torch.manual_seed(3)
    inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.ReLU(inplace=True))
    first, last = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), nn.Linear(8, 2)
    model = nn.ModuleDict({"first": first, "inner": inner, "last": last})
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    lens = gradlens.watch(model, optimizer, features=features) if features else None
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = last(checkpoint(inner, first(torch.randn(8, 4)), use_reentrant=False)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if lens is not None:
        lens.close()
    return losses, [t.clone() for t in model.state_dict().values()], torch.get_rng_state()


def test_training_is_bit_identical():
    """Losses, weights, buffers and the generator are those of a training that nobody watches."""
    (a, weights, state), (b, others, other) = train(()), train(FEATURES)
    assert a == b
    assert torch.equal(state, other)
    assert all(map(torch.equal, weights, others))


def test_the_graph_does_not_live_longer():
    """What a module made is freed when the loop lets go of it."""
    model, refs = net(), []
    lens = watch(model)
    for module in model:
        module.register_forward_hook(lambda module, args, output: refs.append(weakref.ref(output)))
    made = model(torch.randn(4, 4))
    made.sum().backward()
    del made
    assert [ref() for ref in refs] == [None] * 5
    assert len(lens.activations()) == 5
    lens.close()


def test_close_leaves_the_modules_as_they_were():
    """No hook of ours stays, and those of others do."""
    model = net()
    own = model[0].register_forward_hook(lambda *args: None)
    lens = watch(model)
    assert all(module._forward_hooks for module in model)
    lens.close()
    assert [len(module._forward_hooks) for module in model] == [1, 0, 0, 0, 0]
    own.remove()


def test_without_the_feature_there_is_no_hook():
    """Modules are left alone, and the question says how to ask for it."""
    model = net()
    lens = gradlens.watch(model)
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ArgumentError, match="activations"):
        lens.activations()
    lens.close()


def compiled(model):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    return torch.compile(model, backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("when", ["before", "elsewhere", "after"])
def test_compiled_models_are_left_alone(when):
    """Neither a break, nor a graph more, whichever came first; and that there are no activations is said."""
    torch._dynamo.reset()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lens = watch(model, optimizer) if when == "after" else None
    fast, counter = compiled(model)
    if lens is None:
        lens = watch(fast if when == "before" else model, optimizer)
    for _ in range(4):
        fast(torch.randn(6, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1
    assert not len(lens.activations())
    (found,) = [f for f in lens.findings() if f.rule == "activations-unavailable"]
    assert ("compiled modules" in found.seen) == (when != "after")
    lens.close()


def test_a_compiled_part_is_skipped_and_the_rest_is_read():
    """What is compiled within a model costs only its own rows."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    model[1].compile(backend="eager")
    lens = watch(model)
    model(torch.randn(3, 4)).sum().backward()
    assert list(lens.activations()["module"]) == ["0", "2"]
    assert [f.parameters for f in lens.findings() if f.rule == "activations-unavailable"] == [()]
    lens.close()


def test_a_layer_that_is_added_is_seen():
    """Modules that come later have rows from the next step on."""
    model = nn.Sequential(nn.Linear(3, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lens = watch(model, optimizer)
    for step in range(3):
        if step == 1:
            model.append(nn.Tanh())
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    frame = lens.activations()
    assert "1" in set(frame[frame["step"] == 2]["module"])
    lens.close()


def test_transforms_and_traces_are_passed_over():
    """vmap, torch.func.grad and jit.trace give no rows, and work."""
    model, x = seeded(nn.Linear(3, 2)), torch.randn(4, 3)
    lens = watch({"m": model})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.vmap(model)(x)
        torch.func.grad(lambda x: model(x).sum())(x)
    torch.jit.trace(model, x)
    model(x).sum().backward()
    assert row(lens, "m")["calls"] == 1
    lens.close()


@pytest.mark.parametrize("where", ["the hook", "_keep", "pass_begins", "pass_ended", "attach"])
def test_a_fault_of_ours_costs_the_rows_alone(monkeypatch, where):
    """Training goes on bit for bit, gradients are recorded as ever, and it is said once."""

    def fails(self, *args):
        raise RuntimeError("ours")

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = watch(model, optimizer)
        if where == "the hook":
            monkeypatch.setattr(GUARDED["a module's output"], "call", fails)
        else:
            monkeypatch.setattr(ForwardWatch, where, fails)
        for step in range(3):
            if where == "attach" and step == 1:
                model.append(nn.Identity())  # the model is scanned again
            model(torch.randn(4, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        lens.flush()
        assert len(lens.history()["step"].unique()) == 3
        assert bool(len(lens.activations())) == (where == "attach")
        assert [f.rule for f in lens.findings()].count("gradlens-fault") == 1
        lens.close()


def test_the_records_have_the_same_numbers(tmp_path):
    """`open_run` gives what the lens gave, from tails and from parts."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lens = watch(model, optimizer, run=tmp_path)
    for _ in range(5):
        model(torch.randn(8, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    mine = lens.activations()
    lens.flush()
    tails = gradlens.open_run(tmp_path).activations()
    lens.close()
    run = gradlens.open_run(tmp_path)
    assert not list((tmp_path / "activations").glob("*.tail"))
    for theirs in (tails, run.activations()):
        assert list(theirs.columns) == list(mine.columns)
        for name in mine.columns:
            left, right = mine[name].to_numpy(), theirs[name].to_numpy()
            assert left.dtype == right.dtype, name
            if left.dtype == float:
                np.testing.assert_array_equal(left, right)
            else:
                assert list(left) == list(right)
    only = run.activations(modules="1", steps=range(2, 4))
    assert list(zip(only["step"], only["module"], strict=True)) == [(2, "1"), (3, "1")]
    assert not len(run.activations(modules="nothing"))


def test_nested_outputs_are_passed_over():
    """They have no batch of one shape: no row, and no fault."""

    class Ragged(nn.Module):
        def forward(self, x):
            return torch.nested.nested_tensor([x[0].detach(), x[1, :2].detach()])

    model, ragged = nn.Linear(4, 2), Ragged()
    both = nn.ModuleDict({"model": model, "ragged": ragged})
    lens = gradlens.watch(both, features="activations", writers=[], rules=())
    x = torch.randn(8, 4)
    ragged(x)
    model(x).sum().backward()
    assert lens.activations()["module"].tolist() == ["model"]
    assert "gradlens-fault" not in [finding.rule for finding in lens.findings()]
    lens.close()
