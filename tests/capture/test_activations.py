"""What leaf modules make of each batch: the numbers, when they count, and that nobody notices."""

import copy
import io
import math
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradlens
from gradlens.capture.activations import ForwardWatch, _sum
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


def test_copies_and_pickles_are_not_watched():
    """A copy of a watched model, and one that was saved, work and record nothing."""
    model, x = net(), torch.randn(5, 4)
    lens = watch(model)
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
    for other in others:
        assert torch.equal(other(x), model(x).detach())
        assert b"gradlens" not in pickle.dumps(other)
    model(x).sum().backward()
    assert set(lens.activations()["calls"]) == {4}  # the model's own calls alone
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


@pytest.mark.parametrize("where", ["the hook", "_add", "pass_ended", "attach"])
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


def test_sums_of_two_calls_are_added_in_float64_whatever_is_the_default():
    """Numbers beyond float32 stay exact, and the user's default device plays no part."""
    torch.set_default_device("meta")
    try:
        found = _sum([16777217.0, 0.1], torch.zeros(2, dtype=torch.float64, device="cpu"))
    finally:
        torch.set_default_device(None)
    assert found.device.type == "cpu"
    assert found.tolist() == [16777217.0, 0.1]


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
