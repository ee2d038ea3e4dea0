"""The optimizer's step inside backward: each gradient is used and freed before the next one is there."""

import contextlib
import math
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.profiler import ProfilerActivity, profile

import gradlens
from gradlens.kernels import native

WIDTH, LAYERS = 256, 6
GRADIENT = WIDTH * WIDTH * 4  # bytes


def net():
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    return nn.Sequential(*layers)


def data(step):
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(step))


def by_hand(model):
    """A user's own hooks: step and free."""
    optimizers = {p: torch.optim.AdamW([p], 0.001) for p in model.parameters()}

    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    return list(optimizers.values())


def by_torch(model):
    """What torch offers for it."""
    _apply_optimizer_in_backward(torch.optim.AdamW, list(model.parameters()), {"lr": 0.001})
    return [optimizer for p in model.parameters() for optimizer in p._in_backward_optimizers]


WAYS = {"hooks": by_hand, "_apply_optimizer_in_backward": by_torch}


def norms(gradient_of):
    return {name: g.double().norm().item() for name, g in gradient_of.items()}


def train(way, first, features=(), steps=3):
    """The weights, the lens, and the norms of each step's gradients; `first`: who hooks first, "us", "user", "nobody"."""
    model, lens, gradients = net(), None, []
    if first == "us":
        lens = gradlens.watch(model, features=features)
        WAYS[way](model)
    else:
        optimizers = WAYS[way](model)
        if first == "user":
            lens = gradlens.watch(model, optimizers, features=features)
    for step in range(steps):
        twin = net()  # nobody's: no hook is on it
        twin.load_state_dict(model.state_dict())
        twin(data(step)).pow(2).sum().backward()
        gradients.append(norms({name: p.grad for name, p in twin.named_parameters()}))
        model(data(step)).pow(2).sum().backward()
        assert all(p.grad is None for p in model.parameters())
    return model, lens, gradients


@pytest.mark.trap(27, 34)
@pytest.mark.situation(
    "an optimizer inside backward",
    stages={"backward": "yes", "used": "yes", "updates": "yes"},
    note="put on before `watch()`",
)
@pytest.mark.parametrize("way", WAYS)
def test_the_step_inside_backward_is_read_as_it_happens(way):
    """Each pass is a step: its partials, the used ones, and the weights' moves are exact; training has the same bits."""
    plain, _, _ = train(way, "nobody")
    model, lens, gradients = train(way, "user", features=("updates",))
    with contextlib.closing(lens):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        history = lens.history().set_index(["stage", "step", "parameter"])
        assert len(history) == 2 * 3 * LAYERS
        before = dict(net().named_parameters())
        for step in range(3):
            for name, norm in gradients[step].items():
                assert history.loc[("backward", step, name), "l2"] == pytest.approx(norm, rel=1e-6)
                assert history.loc[("used", step, name), "l2"] == pytest.approx(norm, rel=1e-6)
                assert history.loc[("used", step, name), "status"] == "ok"
        moved = history.loc["used"].groupby("parameter")["update_l2"].sum()
        for name, p in model.named_parameters():
            assert 0 < (p - before[name]).norm().item() <= moved[name] * (1 + 1e-5)
        assert lens.findings() == []


@pytest.mark.trap(27)
@pytest.mark.situation(
    "an optimizer inside backward, put on after `watch()`", stages={"backward": "yes"}, note="each backward is a step"
)
@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_that_comes_after_us(way):
    """A lens that knows of no optimizer has each pass's partials, also where later hooks use and free them."""
    plain, _, _ = train(way, "nobody")
    model, lens, gradients = train(way, "us")
    with contextlib.closing(lens):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
        history = lens.history().set_index(["stage", "step", "parameter"])
        for step in range(3):
            for name, norm in gradients[step].items():
                assert history.loc[("backward", step, name), "l2"] == pytest.approx(norm, rel=1e-6)


@pytest.mark.trap(27)
@pytest.mark.situation(
    "a hook on a gradient's node that uses and frees it, without an optimizer",
    stages={"backward": "marked: `uncaptured` in its first backward; then yes"},
)
def test_a_gradient_that_is_freed_before_we_can_read_it():
    """Nothing tells of it the first time, and the row says so, not 0; from then on it is read inside the hook."""
    model, nodes = net(), []
    lens = gradlens.watch(model)

    def on(p):
        def step(*_):
            p.data.add_(p.grad, alpha=-1e-4)
            p.grad = None

        nodes.append(p.view_as(p).grad_fn.next_functions[0][0])
        nodes[-1].register_hook(step)

    on(model[1].weight)
    with contextlib.closing(lens):
        for step in range(2):
            twin = net()
            twin.load_state_dict(model.state_dict())
            for m in (twin, model):
                m(data(step)).pow(2).sum().backward()
            model[0].weight.grad = None
        history = lens.history().set_index(["stage", "step", "parameter"])
        assert history.loc[("backward", 0, "1.weight"), "status"] == "uncaptured"
        assert math.isnan(history.loc[("backward", 0, "1.weight"), "l2"])
        assert history.loc[("backward", 0, "0.weight"), "status"] == "ok"
        row = history.loc[("backward", 1, "1.weight")]
        assert row["status"] == "ok"
        assert row["l2"] == pytest.approx(twin[1].weight.grad.double().norm().item(), rel=1e-6)
        (finding,) = [f for f in lens.findings() if f.rule == "uncaptured"]
        assert finding.parameter == "1.weight"


def allocated(run):
    """The bytes that the run has allocated at most, beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = peak = 0
    for event in sorted(_events(profiler), key=lambda event: event.start_time_ns):
        now += event.extra_fields.alloc_size
        peak = max(peak, now)
    return peak


def _events(profiler):
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event


def peak_of(way, watched):
    """Bytes that one pass allocates at most, and how many gradients were alive at once."""
    model = net()
    optimizers = WAYS[way](model)
    gradients, alive = [], []

    def count(p):
        gradients.append(weakref.ref(p.grad.untyped_storage()))
        alive.append(sum(ref() is not None for ref in gradients))

    count.gradlens = True  # as a lens' own hooks are: it is nobody who may change gradients
    lens = gradlens.watch(model, optimizers, features=(), rules=()) if watched else None
    model(data(0)).pow(2).sum().backward()  # the optimizers make their state
    for p in model.parameters():
        others = list((p._post_accumulate_grad_hooks or {}).items())
        if others:
            p._post_accumulate_grad_hooks.clear()
        p.register_post_accumulate_grad_hook(count)  # before the gradient is used
        p._post_accumulate_grad_hooks.update(others)
    x = data(1)
    peak = allocated(lambda: model(x).pow(2).sum().backward())
    if lens is not None:
        lens.close()
    assert len(gradients) == LAYERS
    return peak, max(alive)


@pytest.mark.trap(27)
@pytest.mark.parametrize("way", WAYS)
def test_the_peak_of_memory_is_not_raised(way):
    """No gradient outlives its use: one is alive at a time, and a watched pass allocates less than one gradient more."""
    (plain, one), (watched, still_one) = peak_of(way, False), peak_of(way, True)
    assert one == still_one == 1
    assert GRADIENT < plain < 4 * GRADIENT
    if native.LIBRARY.exists():  # the reference, which stands in for it, makes copies of one parameter at a time
        assert watched < plain + GRADIENT
