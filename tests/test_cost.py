"""What a watched step makes torch do, in counts: torch's own profiler sees every operation, on every thread of ours too."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import gradlens
from gradlens import kernels


@pytest.fixture(autouse=True)
def native():
    if kernels._native() is None:
        pytest.skip("the native kernel was not built")


def operations(layers, micro=1, hooks=False, **watch):
    """Of one step, not among the first; bare without arguments for `watch`."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))), torch.randn(4, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if hooks:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: None)
    lens = gradlens.watch(model, optimizer, **watch) if watch else None

    def step():
        optimizer.zero_grad()
        for _ in range(micro):
            model(x).square().mean().backward()
        optimizer.step()

    for _ in range(10):  # the graph of the loss is looked at in the first four, the sixth, the ninth and the fourteenth
        step()
    if lens is not None:
        lens.flush()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
        if lens is not None:
            lens.flush()
    if lens is not None:
        lens.close()
    return Counter(event.name.removeprefix("aten::") for event in seen.events() if event.name.startswith("aten::"))


def added(layers, *, micro=1, hooks=False, **watch):
    """What watching adds, beside the reading of each backward's loss, which is one number."""
    loss = Counter({"detach": micro, "item": micro, "_local_scalar_dense": micro})
    return operations(layers, micro, hooks, **watch) - operations(layers, micro, hooks) - loss


@pytest.mark.parametrize("features", [(), ("flips",)])
def test_operations_do_not_grow_with_the_model(features):
    """However many parameters: under twenty operations a step, none of which does arithmetic: the kernel reads."""
    few, many = (added(layers, features=features) for layers in (5, 40))
    assert few == many
    assert sum(few.values()) < 20
    assert few.keys() <= {"empty", "view", "detach", "to", "resolve_conj", "resolve_neg", "equal", "is_same_size"}


def test_by_default_each_weight_is_copied_once():
    """`updates` copies each parameter before the optimizer moves it, in one call; nothing else grows."""
    few, many = (added(layers, schedule=1) for layers in (5, 40))
    assert few.pop("copy_") == 10
    assert many.pop("copy_") == 80
    assert few == many
    assert many["_foreach_copy_"] == 1
    assert sum(many.values()) < 40


def test_a_step_that_is_left_out_costs_no_operation():
    """Where the schedule looks away, torch does what it does without us."""
    assert not added(20, schedule=lambda step: step == 0)


def test_each_micro_batch_is_read_once():
    """Accumulation: a micro-batch more is two outputs of the kernel more, its rows and a sample, whatever the model."""
    few, many = (added(layers, micro=3, features=()) for layers in (5, 40))
    assert few == many
    assert added(5, micro=4, features=())["empty"] - few["empty"] == 2


def test_reading_inside_hooks_is_one_reading_a_parameter():
    """Somebody else's hooks may change what ends up in `.grad`: then each parameter is read on its own."""
    few, many = (added(layers, hooks=True, features=())["empty"] for layers in (5, 40))
    assert many - few == 2 * 35
