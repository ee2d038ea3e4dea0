"""Each backward's own partials, whatever happens around them."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradlens
from tests.capture.helpers import same


def linear(**kwargs):
    torch.manual_seed(0)
    return nn.Linear(3, 2, **kwargs)


def run(model, x=None, k=1.0):
    x = torch.ones(4, 3) if x is None else x
    loss = (model(x) * k).pow(2).sum()
    loss.backward()
    return loss


def own(model, x=None, k=1.0):
    """The exact partials of one backward, on a copy."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    run(twin, x, k)
    return {name: p.grad for name, p in twin.named_parameters()}


@pytest.mark.situation("one backward a step", stages={"backward": "yes"})
def test_one_backward_is_read_as_it_is(watched):
    """After backward() the reading holds `.grad`, bit for bit."""
    model = linear()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    run(model)
    same(bench.sink.merged(0, 0, "backward"), {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.trap(1)
@pytest.mark.situation("accumulation: several backwards a step", stages={"backward": "yes"})
def test_accumulation_gives_each_backward_its_own(watched):
    """The second micro-batch's partials are its own, not the running sum, and not a difference of sums."""
    model = linear()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    expected = [own(model, k=1e4), own(model, k=1e-3)]
    run(model, k=1e4)
    run(model, k=1e-3)
    for i in (0, 1):
        same(bench.sink.merged(0, i, "backward"), expected[i])


def test_held_gradients_are_read_in_batches_of_bounded_size(watched, monkeypatch):
    """Under accumulation no more than the bound is held; the rest is read inside the hooks, with the same numbers."""
    monkeypatch.setattr("gradlens.capture.hooks.HELD_BYTES", 1)
    model = nn.Sequential(linear(), nn.Linear(2, 3))
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    run(model)
    expected = own(model, k=0.5)
    run(model, k=0.5)
    same(bench.sink.merged(0, 1, "backward"), expected)
    assert sum(r.key == (0, 1, "backward") for r in bench.sink.readings) == 5


@pytest.mark.trap(2)
@pytest.mark.situation("`retain_graph=True`", stages={"backward": "yes"})
def test_retain_graph_twice(watched):
    """Two backwards through one graph are two records with the same partials."""
    model = linear()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    loss = model(torch.ones(1, 3)).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    same(bench.sink.merged(0, 0, "backward"), bench.sink.merged(0, 1, "backward"))


@pytest.mark.trap(3)
@pytest.mark.situation("tied and reused parameters", stages={"backward": "yes: one row with the total"})
def test_tied_and_reused_parameters_are_read_once_with_the_total(watched):
    """A parameter that is used five times, under two names, has one row with the sum of its uses."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, bias=False)
            self.b = nn.Linear(3, 3, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            for _ in range(5):
                x = self.b(self.a(x)) if _ == 0 else self.a(x)
            return x

    model = Tied()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    run(model)
    same(bench.sink.merged(0, 0, "backward"), {"a.weight": model.a.weight.grad})
    assert bench.capture.attachment.aliases == {"b.weight": "a.weight"}


@pytest.mark.trap(35)
@pytest.mark.situation("`create_graph=True`", stages={"backward": "yes"})
def test_create_graph_keeps_no_graph(watched):
    """Under create_graph the reading is right and accumulates out of place."""
    model = linear()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    expected = own(model)
    for _ in range(2):
        model(torch.ones(4, 3)).pow(2).sum().backward(create_graph=True)
    same(bench.sink.merged(0, 1, "backward"), expected)
    for p in model.parameters():
        p.grad = None


@pytest.mark.trap(35)
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("backwards", [1, 2])
def test_the_graph_of_a_gradient_is_freed(backwards):
    """What create_graph made of the gradients goes with the gradients, though everything that a lens can keep is kept."""
    model = linear()
    with gradlens.watch(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        stage=("backward", "accumulated", "used"),
        features=("updates", "flips", "evidence"),
    ) as lens:
        activations = []
        for _ in range(backwards):
            y = model(torch.ones(4, 3))
            activations.append(weakref.ref(y.untyped_storage()))
            y.pow(2).sum().backward(create_graph=True)
        penalty = sum(p.grad.pow(2).sum() for p in model.parameters())
        penalty.backward(retain_graph=True)
        norms = {n: p.grad.double().norm().item() for n, p in model.named_parameters()}
        history = lens.history()  # no query(), which keeps the frame that it is called from
        assert dict(history[history["stage"] == "accumulated"].groupby("parameter")["l2"].last()) == pytest.approx(norms)
        gc.disable()
        try:
            del y, penalty
            for p in model.parameters():
                p.grad = None
            assert [ref() for ref in activations] == [None] * backwards
        finally:
            gc.enable()


@pytest.mark.trap(6)
@pytest.mark.situation("a backward that returns None", stages={"backward": "marked: status `undefined`, partials 0"})
def test_undefined_gradient_is_not_a_stale_one(watched):
    """A backward that returns None leaves the old `.grad` in place; it is noted `undefined`, not read again."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    model = linear(bias=False)
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    model.weight.grad = torch.full((2, 3), 7.0)
    other = torch.ones((), requires_grad=True)
    (Nothing.apply(model.weight).sum() * other).backward()
    assert bench.sink.merged(0, 0, "backward") == {}
    assert bench.sink.notes(0, 0, "backward") == {"weight": "undefined"}


@pytest.mark.trap(7)
@pytest.mark.situation(
    "a parameter that the loss does not depend on", stages={"backward": "marked: status `absent`, partials 0"}
)
@pytest.mark.parametrize("stale", ["none", "zeros", "old"])
def test_absent_parameters_are_noted_and_never_read(watched, stale):
    """What the loss does not depend on is `absent`, whatever lies in its `.grad`."""
    model = nn.ModuleDict({"used": linear(), "unused": linear()})
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    if stale != "none":
        for p in model["unused"].parameters():
            p.grad = torch.full_like(p, 0.0 if stale == "zeros" else 5.0)
        bench.capture._steps.open_marks()
    run(model["used"])
    assert set(bench.sink.merged(0, 0, "backward")) == {"used.weight", "used.bias"}
    notes = bench.sink.notes(0, 0, "backward")
    assert {n for n, note in notes.items() if note == "absent"} == {"unused.weight", "unused.bias"}


@pytest.mark.situation("partials that are all 0", stages={"backward": "yes: status `zero`"})
def test_zero_gradient_is_read_as_zeros(watched):
    """A parameter in the graph with partials 0 is read: that is not absence."""
    model = linear(bias=False)
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    (0 * model.weight).sum().backward()
    same(bench.sink.merged(0, 0, "backward"), {"weight": torch.zeros(2, 3)})


@pytest.mark.trap(8)
@pytest.mark.situation("`torch.autograd.grad`", stages={"backward": "no: it writes no `.grad`, so it is no backward pass"})
def test_autograd_grad_leaves_no_record_and_still_works(watched):
    """torch.autograd.grad on watched parameters runs our tensor hooks, makes no record and counts no backward."""
    model = linear()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    grads = torch.autograd.grad(model(torch.ones(1, 3)).sum(), list(model.parameters()))
    assert len(grads) == 2
    assert bench.sink.readings == []
    run(model)
    assert bench.sink.keys("backward") == [(0, 0)]


@pytest.mark.trap(9)
@pytest.mark.situation("MAML: inner `autograd.grad`, outer backward", stages={"backward": "yes: of the outer loop"})
def test_maml_inner_gradients_are_not_backwards(watched):
    """An inner loop of autograd.grad with create_graph and one outer backward make one record."""
    model = linear(bias=False)
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    (inner,) = torch.autograd.grad(model(torch.ones(1, 3)).pow(2).sum(), [model.weight], create_graph=True)
    nn.functional.linear(torch.ones(1, 3), model.weight - 0.1 * inner).sum().backward()
    same(bench.sink.merged(0, 0, "backward"), {"weight": model.weight.grad})


@pytest.mark.situation("`backward(inputs=...)`", stages={"backward": "marked: the others are `excluded`"})
def test_backward_inputs_excludes_the_others(watched):
    """backward(inputs=[a]) reads a and notes the rest as `excluded`."""
    model = linear()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    model(torch.ones(1, 3)).sum().backward(inputs=[model.weight])
    assert set(bench.sink.merged(0, 0, "backward")) == {"weight"}
    assert bench.sink.notes(0, 0, "backward")["bias"] == "excluded"


@pytest.mark.situation("activation checkpointing, both kinds", stages={"backward": "yes"})
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_is_one_backward(watched, reentrant):
    """Blocks under activation checkpointing, of both kinds, are one backward with the same partials."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
            self.first = nn.Linear(3, 3)

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    model = Net()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    run(model)
    assert bench.sink.keys("backward") == [(0, 0)]
    same(bench.sink.merged(0, 0, "backward"), {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.trap(4)
@pytest.mark.situation("activation checkpointing, a parameter in several reentrant blocks", stages={"backward": "yes"})
@pytest.mark.parametrize("accumulate", [False, True])
def test_tied_across_reentrant_checkpoints_is_summed(watched, accumulate):
    """A parameter in two reentrant blocks gets the sum of both, also onto an older `.grad`."""
    model = nn.Linear(3, 3)
    holder = nn.ModuleDict({"tied": model, "outside": nn.Linear(3, 3)})
    bench = watched(holder, torch.optim.SGD(holder.parameters(), 0.1))

    def forward():
        x = holder["outside"](torch.ones(2, 3))
        for _ in range(2):
            x = checkpoint(model, x, use_reentrant=True)
        return x.sum()

    forward().backward()
    expected = {n: p.grad.clone() for n, p in holder.named_parameters()}
    same(bench.sink.merged(0, 0, "backward"), expected)
    if accumulate:
        forward().backward()
        for name, partial in bench.sink.merged(0, 1, "backward").items():
            assert torch.allclose(partial, expected[name]), name


@pytest.mark.trap(5)
@pytest.mark.situation(
    "activation checkpointing, everything in reentrant blocks", stages={"backward": "yes: read at the step"}
)
def test_everything_inside_reentrant_checkpoints_is_one_record(watched):
    """With no parameter outside the blocks no end is called; the optimizer's step finishes the record."""
    model = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    x = torch.ones(2, 3, requires_grad=True)
    for block in model:
        x = checkpoint(block, x, use_reentrant=True)
    x.sum().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert bench.sink.keys("backward") == [(0, 0)]
    same(bench.sink.merged(0, 0, "backward"), expected)


@pytest.mark.situation(
    "activation checkpointing, everything in reentrant blocks", stages={"backward": "yes: read at the step"}
)
def test_everything_reentrant_twice_without_a_step(watched):
    """Two such passes in one step are two records, each with its own partials."""
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    for k in (1.0, 3.0):
        x = torch.ones(2, 3, requires_grad=True)
        (k * checkpoint(model, x, use_reentrant=True)).sum().backward()
    optimizer.step()
    assert bench.sink.keys("backward") == [(0, 0), (0, 1)]
    assert torch.equal(bench.sink.merged(0, 1, "backward")["weight"], 3 * bench.sink.merged(0, 0, "backward")["weight"])


@pytest.mark.trap(15)
@pytest.mark.situation("a backward that fails, then a good one", stages={"backward": "yes"})
def test_a_failed_backward_leaves_no_trace(watched):
    """After a backward that raised, the next one is a full record of its own, with the same number."""

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ValueError("a user's bug")

    model = nn.Sequential(linear(), nn.Linear(2, 2))
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    with pytest.raises(ValueError, match="a user's bug"):
        model[1](Fails.apply(model[0](torch.ones(4, 3)))).sum().backward()
    model.zero_grad()
    run(model)
    assert bench.sink.keys("backward") == [(0, 0)]
    same(bench.sink.merged(0, 0, "backward"), {n: p.grad for n, p in model.named_parameters()})


@pytest.mark.trap(44)
def test_keyboard_interrupt_passes_through(watched):
    """Ctrl-C inside backward reaches the user, and the next backward is read."""
    model = linear()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))

    def interrupt(g):
        raise KeyboardInterrupt

    handle = model.weight.register_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    handle.remove()
    model.zero_grad()
    run(model)
    same(bench.sink.merged(0, 0, "backward"), {n: p.grad for n, p in model.named_parameters()})


def test_a_fault_of_ours_does_not_reach_training(watched):
    """A sink that raises is counted, and backward and `.grad` are as without us."""
    model = linear()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    bench.sink.on_Reading = lambda reading: 1 / 0
    expected = own(model)
    run(model)
    same({n: p.grad for n, p in model.named_parameters()}, expected)
    assert [type(error) for _, error in bench.faults] == [ZeroDivisionError]
    bench.faults.clear()


@pytest.mark.situation(
    "a user's hook that replaces gradients",
    stages={"backward": "yes: as computed, if it was put on after `watch()`", "used": "yes: as replaced"},
)
def test_a_users_hook_that_replaces_the_gradient(watched):
    """`backward` has the partials as they were computed, also when a later hook replaces them; `used` has the replaced."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    expected = own(model)
    for p in model.parameters():
        p.register_hook(lambda g: 10 * g)
    run(model)
    same(bench.sink.merged(0, 0, "backward"), expected)
    optimizer.step()
    same(bench.sink.merged(0, 0, "used"), {name: 10 * g for name, g in expected.items()})


def test_optimizer_in_backward_is_read_before_the_gradient_is_freed(watched):
    """A post hook that steps and frees `.grad`, put on before ours, does not hide the partials."""
    model = linear()
    expected = own(model)

    def step_now(p):
        p.data.add_(p.grad, alpha=-0.1)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    bench = watched(model)
    run(model)
    same(bench.sink.merged(0, 0, "backward"), expected)


@pytest.mark.trap(40)
def test_records_do_not_alias_the_gradient(watched):
    """Clipping after backward does not change what was read before."""
    model = linear()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    expected = own(model)
    run(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    same(bench.sink.merged(0, 0, "backward"), expected)


@pytest.mark.situation("backward on several threads", stages={"backward": "yes"})
def test_backward_on_another_thread(watched):
    """Passes on several threads do not mix."""
    import threading

    models = nn.ModuleDict({str(i): linear() for i in range(3)})
    bench = watched(models, torch.optim.SGD(models.parameters(), 0.1), stages=("backward",))
    threads = [threading.Thread(target=run, args=(models[str(i)],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = [r for r in bench.sink.readings if r.key[2] == "backward"]
    assert sorted(next(iter(r.partials))[0] for r in seen) == ["0", "1", "2"]
    assert all(len(r.partials) == 2 for r in seen)
    assert sorted(r.key[1] for r in seen) == [0, 1, 2]


@pytest.mark.situation("accumulation: several backwards a step", stages={"accumulated": "yes"})
def test_accumulated_stage_is_grad_after_each_backward(watched):
    """`accumulated` has the running sum."""
    model = linear()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1), stages=("backward", "accumulated"))
    run(model)
    run(model, k=2.0)
    same(bench.sink.merged(0, 1, "accumulated"), {n: p.grad for n, p in model.named_parameters()})


def test_the_model_is_freed_and_left_as_it_was():
    """Hooks keep no parameter alive, and detaching leaves the hook dictionaries as they were."""
    from tests.capture.conftest import Bench

    model = linear()
    bench = Bench(model, torch.optim.SGD(model.parameters(), 0.1))
    run(model)
    bench.capture.detach()
    for p in model.parameters():
        assert p._backward_hooks is None
        assert p._post_accumulate_grad_hooks is None
    bench = Bench(model)
    run(model)
    bench.sink.readings.clear()
    bench.sink.kept.clear()
    gone = [weakref.ref(model)]
    params = [weakref.ref(p) for p in model.parameters()]
    del model, p
    gc.collect()
    assert all(ref() is None for ref in gone + params)
    bench.capture.detach()  # or it would listen to the optimizers of other tests


def test_copies_are_not_watched(watched):
    """deepcopy and pickle of a watched model work, and their backwards leave no record."""
    model = linear()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        run(twin)
    assert bench.sink.readings == []


def test_two_captures_on_one_model(watched):
    """Both see the same, and neither takes the other for somebody who changes gradients."""
    model = linear()
    first, second = watched(model), watched(model)
    run(model)
    expected = {n: p.grad for n, p in model.named_parameters()}
    same(first.sink.merged(0, 0, "backward"), expected)
    same(second.sink.merged(0, 0, "backward"), expected)
    assert len([r for r in first.sink.readings if r.key[2] == "backward"]) == 1
