"""Backward passes that nest, fail, or run beside each other."""

import copy
import threading
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._dynamo import compiled_autograd
from torch.utils.checkpoint import checkpoint

import gradlens
from gradlens.errors import NothingCapturedError
from tests.capture.helpers import grads, same


class Fails(torch.autograd.Function):
    """The identity; its backward raises as long as it is told to."""

    error: BaseException | None = None

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if Fails.error is not None:
            raise Fails.error
        return g


@pytest.fixture(autouse=True)
def nothing_fails():
    Fails.error = None
    yield
    Fails.error = None


def net(layers=2):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))


def failing(model, error):
    """A backward in which the last layer gets its gradient and the first does not."""
    Fails.error = error
    with pytest.raises(type(error)):
        model[1](Fails.apply(model[0](torch.ones(4, 3)))).pow(2).sum().backward()
    Fails.error = None


# --- nested ---------------------------------------------------------------------------------------------------------


@pytest.mark.situation("activation checkpointing, nested in itself, kinds mixed", stages={"backward": "yes"})
@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_nested_checkpoints_are_one_backward(watched, outer, inner):
    """A checkpoint inside a checkpoint, of either kind, is part of one backward, twice in a step too."""
    model = net(4)

    def block(x):
        return model[2](checkpoint(model[1], x, use_reentrant=inner))

    def run():
        x = model[0](torch.ones(2, 3))
        model[3](checkpoint(block, x, use_reentrant=outer)).pow(2).sum().backward()

    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    run()
    first = grads(model)
    run()
    assert bench.sink.keys("backward") == [(0, 0), (0, 1)]
    same(bench.sink.merged(0, 0, "backward"), first)
    same(bench.sink.merged(0, 1, "backward"), first)


@pytest.mark.situation(
    "activation checkpointing, reentrant, deeper than 60",
    stages={"backward": "yes: one record"},
    note="the engine goes on in another thread there",
)
@pytest.mark.parametrize("accumulate", [False, True])
def test_reentrant_checkpoints_deeper_than_the_engines_stack(watched, accumulate):
    """Beyond 60 levels the engine runs in a thread of its own; it is still one backward, and a reused layer one row."""
    model = net(1)
    outside = nn.Linear(3, 3)
    holder = nn.ModuleDict({"deep": model, "outside": outside})

    def nest(x, depth):
        return x if depth == 0 else checkpoint(lambda x: model[0](nest(x, depth - 1)) * 0.5, x, use_reentrant=True)

    def run():
        nest(outside(torch.ones(2, 3)), 75).sum().backward()

    bench = watched(holder, torch.optim.SGD(holder.parameters(), 0.1))
    run()
    first = grads(holder)
    assert bench.sink.keys("backward") == [(0, 0)]
    same(bench.sink.merged(0, 0, "backward"), first)
    if accumulate:
        run()
        assert bench.sink.keys("backward") == [(0, 0), (0, 1)]
        for name, partial in bench.sink.merged(0, 1, "backward").items():
            assert torch.allclose(partial, first[name], rtol=1e-4), name


@pytest.mark.trap(4)
@pytest.mark.parametrize("accumulate", [False, True])
def test_tied_in_reentrant_blocks_and_hooked_by_somebody(watched, accumulate):
    """A user's hook makes us read inside ours; of a parameter in two nested passes the row is still the sum."""
    tied, outside = nn.Linear(3, 3), nn.Linear(3, 3)
    model = nn.ModuleDict({"tied": tied, "outside": outside})
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: None)

    def run():
        x = outside(torch.ones(2, 3))
        for _ in range(2):
            x = checkpoint(tied, x, use_reentrant=True)
        x.pow(2).sum().backward()

    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    run()
    first = grads(model)
    for name, partial in bench.sink.merged(0, 0, "backward").items():
        assert torch.allclose(partial, first[name]), name
    if accumulate:
        run()
        assert bench.sink.keys("backward") == [(0, 0), (0, 1)]
        for name, partial in bench.sink.merged(0, 1, "backward").items():
            assert torch.allclose(partial, first[name]), name


@pytest.mark.situation("a backward inside a user's hook", stages={"backward": "yes: part of the outer one"})
def test_a_backward_inside_a_users_hook(watched):
    """A hook that runs a backward of its own adds to the gradients of the pass it is in, as reentrant blocks do."""
    model = net()

    def hook(g):
        with torch.enable_grad():
            (model[0].weight * 2.0).sum().backward()

    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    y = model[1](model[0](torch.ones(4, 3)))
    y.register_hook(hook)
    y.sum().backward()
    assert bench.sink.keys("backward") == [(0, 0)]
    same(bench.sink.merged(0, 0, "backward"), grads(model))


# --- failing --------------------------------------------------------------------------------------------------------


@pytest.mark.trap(15)
@pytest.mark.situation(
    "a backward that fails after gradients were read inside hooks", stages={"backward": "yes: it is taken back"}
)
@pytest.mark.parametrize("hooked", [False, True])
def test_what_was_read_of_a_failed_backward_is_taken_back(watched, hooked):
    """The pass after a failed one has its number, and nothing of what the failed one gave to parameters it reached."""
    model = net()
    if hooked:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: None)
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    failing(model, ValueError("a user's bug"))
    model.zero_grad()
    model[0](torch.ones(4, 3)).sum().backward()
    assert bench.sink.keys("backward") == [(0, 0)]
    same(bench.sink.merged(0, 0, "backward"), grads(model))
    assert bench.sink.notes(0, 0, "backward")["1.weight"] == "absent"


@pytest.mark.trap(15, 44)
@pytest.mark.parametrize("error", [ValueError("a user's bug"), KeyboardInterrupt()])
@pytest.mark.parametrize("accumulating", [False, True])
def test_failed_backwards_hold_nothing(watched, error, accumulating):
    """After each of many failed passes the next backward is as any, and of the failed ones nothing is kept."""
    model = net()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1), stages=("backward",))
    twin = copy.deepcopy(model)
    for _ in range(20):
        if not accumulating:
            model.zero_grad()
        failing(model, error)
    model.zero_grad()
    for m in (model, twin):
        m(torch.ones(4, 3)).pow(2).sum().backward()
    assert bench.sink.keys("backward") == [(0, 0)]
    same(bench.sink.merged(0, 0, "backward"), grads(twin))
    same(grads(model), grads(twin))
    assert bench.capture.engine.passes == []
    assert bench.capture.engine.by_task == {}


def test_many_autograd_grads_hold_nothing(watched):
    """torch.autograd.grad leaves no trace, also where it fails."""
    model = net()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    Fails.error = ValueError("a user's bug")
    for k in range(300):
        y = model(torch.ones(1, 3)).sum()
        if k % 3 == 0:
            with pytest.raises(ValueError, match="a user's bug"):
                torch.autograd.grad(model[1](Fails.apply(model[0](torch.ones(1, 3)))).sum(), list(model.parameters()))
        else:
            torch.autograd.grad(y, list(model.parameters()))
    assert len(bench.capture.engine.by_task) <= 101
    assert bench.capture.engine.passes == []
    assert bench.sink.events == []


# --- beside each other ----------------------------------------------------------------------------------------------


@pytest.mark.situation("backward on several threads, gradients read inside hooks", stages={"backward": "yes"})
def test_passes_of_two_threads_interleave(watched):
    """Two passes that take turns are two records, each with its own partials, read inside hooks or at the end."""
    models = nn.ModuleDict({"a": net(), "b": net()})
    for p in models.parameters():
        p.register_post_accumulate_grad_hook(lambda p: None)
    bench = watched(models, torch.optim.SGD(models.parameters(), 0.1), stages=("backward",))
    turns = {name: threading.Barrier(2, timeout=30) for name in ("begun", "ended")}

    def run(name):
        def wait(g):
            turns["begun"].wait()
            if name == "b":
                turns["ended"].wait()

        x = torch.ones(4, 3)
        y = models[name][0](x)
        y.register_hook(wait)  # the last layer has been read, the first has not
        models[name][1](y).pow(2).sum().backward()
        if name == "a":
            turns["ended"].wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert bench.sink.keys("backward") == [(0, 0), (0, 1)] or bench.sink.keys("backward") == [(0, 1), (0, 0)]
    parts = [bench.sink.merged(0, k, "backward") for k in (0, 1)]
    assert sorted(next(iter(p))[0] for p in parts) == ["a", "b"]
    for part in parts:
        name = next(iter(part))[0]
        same(part, {f"{name}.{n}": g for n, g in grads(models[name]).items()})


def test_many_passes_on_many_threads(watched):
    """Four threads with 50 backwards each give 200 records with distinct numbers, and hooks are put on once.

    No thread reads another's `.grad`: that crashes.
    """
    models = nn.ModuleDict({str(i): net() for i in range(4)})
    bench = watched(models, torch.optim.SGD(models.parameters(), 0.1), stages=("backward", "accumulated"))
    start = threading.Barrier(4, timeout=30)

    def run(model):
        start.wait()
        for _ in range(50):
            model.zero_grad()
            model(torch.ones(4, 3)).pow(2).sum().backward()

    threads = [threading.Thread(target=run, args=(model,)) for model in models.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for stage in ("backward", "accumulated"):
        assert sorted(bench.sink.keys(stage)) == [(0, k) for k in range(200)]
    assert all(len(r.partials) == 4 for r in bench.sink.readings)
    assert all(len(p._post_accumulate_grad_hooks) == len(p._backward_hooks) == 1 for p in models.parameters())


def test_hooks_are_put_on_once_though_threads_begin_together(watched):
    """Parameters that were unfrozen are armed by whichever pass comes first, and by no other."""
    models = nn.ModuleDict({str(i): net() for i in range(4)})
    for model in models.values():
        model[1].requires_grad_(False)
    bench = watched(models, torch.optim.SGD(models.parameters(), 0.1), stages=("backward",))
    for model in models.values():
        model[1].requires_grad_(True)
    start = threading.Barrier(4, timeout=30)

    def run(model):
        start.wait()
        model(torch.ones(4, 3)).pow(2).sum().backward()

    threads = [threading.Thread(target=run, args=(model,)) for model in models.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(len(p._post_accumulate_grad_hooks) == len(p._backward_hooks) == 1 for p in models.parameters())
    assert len(bench.sink.keys("backward")) == 4


class Guarded(nn.Parameter):
    """A parameter that says which threads looked at its `.grad`."""

    seen: ClassVar[set[int]] = set()

    @property
    def grad(self):
        Guarded.seen.add(threading.get_ident())
        return torch.Tensor.grad.__get__(self)

    @grad.setter
    def grad(self, value):
        torch.Tensor.grad.__set__(self, value)


@pytest.mark.situation(
    "questions from another thread than the one that trains",
    stages={"backward": "yes: of the steps that are over", "used": "yes: of the steps that are over"},
    note="to read `.grad` there crashes now and then, in torch itself",
)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_question_from_another_thread_leaves_gradients_alone(scaled):
    """Between another thread's backward and step each question answers of the last step, or says whom to ask."""
    model = net()
    for layer in model:
        layer.weight = Guarded(layer.weight.detach())
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=scaled)
    lens = gradlens.watch(model, optimizer, scaler=scaler)
    turn = threading.Barrier(2, timeout=30)

    def train():
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(2, 3)).sum() * (float("inf") if scaled and step == 1 else 1)).backward()
            if step > 0:
                turn.wait()
                turn.wait()
            scaler.step(optimizer)
            scaler.update()
            if step == 1:
                turn.wait()  # a step that the scaler skipped is open now
                turn.wait()

    thread = threading.Thread(target=train)
    thread.start()
    Guarded.seen.clear()
    for step in (0, 0 if scaled else 1, 1):
        turn.wait()
        assert set(lens.table()["step"]) == {step}
        assert set(lens.history()["stage"]) == {"backward", "used"}
        assert lens.weights(top=2).attrs["step"] == step
        assert str(lens)
        assert lens.report()
        for question in (lens.gradient, lens.weights, lambda: lens.explain("0.weight", (0, 0))):
            with pytest.raises(NothingCapturedError, match="another thread trains this model"):
                question()
        turn.wait()
    thread.join(30)
    assert threading.get_ident() not in Guarded.seen
    assert set(lens.table()["step"]) == {2}  # nobody trains any more
    assert len(lens.gradient()) == 24
    lens.close()


# --- compiled autograd ----------------------------------------------------------------------------------------------


@pytest.mark.trap(29)
@pytest.mark.situation(
    "compiled autograd",
    stages={"backward": "yes: read at the step, or when the next backward begins", "used": "yes"},
    note="the engine's end of backward is dropped there",
)
@pytest.mark.parametrize("backwards", [1, 2])
def test_compiled_autograd_is_read_at_the_step(watched, backwards):
    """Callbacks are dropped in silence; each backward is still a record, with its own partials."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    own = []
    for k in range(backwards):
        twin = copy.deepcopy(model)
        twin.zero_grad()
        (twin(torch.ones(4, 3)) * (k + 1)).pow(2).sum().backward()
        own.append(grads(twin))
    with compiled_autograd._enable(lambda graph: graph):
        for k in range(backwards):
            (model(torch.ones(4, 3)) * (k + 1)).pow(2).sum().backward()
    used = grads(model)
    optimizer.step()
    assert bench.sink.keys("backward") == [(0, k) for k in range(backwards)]
    assert bench.sink.keys("used") == [(0, backwards - 1)]
    for k in range(backwards):
        same(bench.sink.merged(0, k, "backward"), own[k])
    same(bench.sink.merged(0, backwards - 1, "used"), used)
