"""What a watched step does, in counts: torch's operations on every thread, as its own profiler sees them; calls of our own
functions on the training thread; calls of the native kernel.
"""

import gc
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import gradlens
from gradlens import kernels
from gradlens.kernels import native


@pytest.fixture(autouse=True)
def native_kernel():
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


#: Operations that touch no entry: rooms of several steps are made at once, and cut apart.
VIEWS = {"unbind", "select", "narrow", "slice", "as_strided"}


@pytest.mark.parametrize("features", [(), ("flips",)])
def test_operations_do_not_grow_with_the_model(features):
    """However many parameters: room for the rows and for samples is made, and the kernel reads."""
    for layers in (5, 40):
        seen = added(layers, features=features)
        assert seen["empty"] <= 2
        assert seen.keys() <= {"empty"} | VIEWS


def test_rooms_are_made_for_several_steps_at_once():
    """A small model's rooms are made once for all steps that are profiled here."""
    lens, step = training(5)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(8):
            step()
    lens.close()
    made = Counter(event.name for event in seen.events())["aten::empty"]
    bare = operations(5)["empty"]
    assert made - 8 * bare <= 5


def test_by_default_the_kernel_copies_the_weights():
    """`updates` needs each parameter as it was before the optimizer moved it: the pass that reads it copies it."""
    for layers in (5, 40):
        seen = added(layers, schedule=1)
        assert seen["empty"] <= 3
        assert seen.keys() <= {"empty"} | VIEWS


def test_a_step_that_is_left_out_costs_no_operation():
    """Where the schedule looks away, torch does what it does without us."""
    assert not added(20, schedule=lambda step: step == 0)


def test_micro_batches_cost_no_operation_that_reads():
    """Accumulation: whatever the model, torch makes rooms, and the kernel reads."""
    for layers in (5, 40):
        seen = added(layers, micro=3, features=())
        assert seen["empty"] <= 6
        assert seen.keys() <= {"empty"} | VIEWS


def test_reading_inside_hooks_is_one_reading_a_parameter():
    """Other hooks may change what ends up in `.grad`: each parameter is read by itself, into a room made before."""
    for features in ((), ("updates", "flips")):
        few, many = (added(layers, hooks=True, features=features) for layers in (5, 40))
        assert (many - few).keys() <= {"empty", "copy_"} | VIEWS  # the weights before the step are copied
        assert many["empty"] - few["empty"] <= 2  # of many parameters


# --- calls of Python and of the kernel ----------------------------------------------------------------------------------


def training(layers, micro=1, clip=False, hooks=False, scaled=False, width=8, **watch):
    """A watched training that goes by the book: its lens, and one step of it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))), torch.randn(4, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters() if hooks else ():
        parameter.register_post_accumulate_grad_hook(lambda p: None)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    lens = gradlens.watch(model, optimizer, scaler=scaler if scaled else None, **watch)

    def step():
        optimizer.zero_grad()
        for _ in range(micro):
            scaler.scale(model(x).square().mean()).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(optimizer)
        scaler.update()

    for _ in range(23):  # the graph of the loss is looked at in the 22nd, and again in the 33rd; the model in each 16th
        step()
    return lens, step


#: Modules that measure time, whose answers differ.
MEASURING = {"overhead", "contention", "comparison", "budget", "stopwatch"}


def python_calls(layers, micro=1, clip=False, scaled=False, **watch):
    """Calls of gradlens' functions in one step, on this thread; but for those that measure time, whose answers differ."""
    return counted_calls(*training(layers, micro, clip, scaled=scaled, **watch))


def counted_calls(lens, step):
    """Those of one step."""
    package, seen = str(Path(gradlens.__file__).parent), Counter()

    def profiled(frame, event, argument):
        path = Path(frame.f_code.co_filename)
        if event == "call" and str(path).startswith(package) and path.stem not in MEASURING:
            seen[frame.f_code.co_name] += 1

    gc.collect()
    gc.disable()  # what other tests left would be finalized here
    sys.setprofile(profiled)
    step()
    sys.setprofile(None)
    gc.enable()
    lens.close()
    return seen


@pytest.mark.parametrize(("features", "most"), [((), 154), (("updates", "flips"), 171)])
def test_two_calls_a_parameter(features, most):
    """A parameter more is its two hooks more, which only note: all else is asked of all parameters in one call."""
    few, many = (python_calls(layers, features=features) for layers in (5, 40))
    assert many - few == {"on_gradient": 70, "on_accumulated": 70}
    assert not few - many
    assert sum(few.values()) - 20 <= most


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_is_left_out_costs_a_few_calls(scaled):
    """Whatever the model: the optimizer's two hooks, which count the step and ask the schedule about the next."""
    few, many = (python_calls(layers, scaled=scaled, schedule=lambda step: step < 3) for layers in (5, 40))
    assert few == many
    assert few.total() <= 15


def two_nets(layers, **watch):
    """A watched training of two nets, each with an optimizer, where one makes what the other tells: its lens, and a step."""
    torch.manual_seed(0)
    maker, teller = (nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers))) for _ in range(2))
    of_maker, of_teller = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (maker, teller))
    x = torch.randn(4, 8)
    lens = gradlens.watch({"maker": maker, "teller": teller}, [of_teller, of_maker], **watch)

    def step():
        of_teller.zero_grad()
        teller(maker(x).detach()).square().mean().backward()
        of_teller.step()
        of_maker.zero_grad()
        teller(maker(x)).square().mean().backward()
        of_maker.step()

    for _ in range(23):
        step()
    return lens, step


@pytest.mark.parametrize("features", [(), ("updates", "flips")])
def test_two_calls_a_parameter_and_backward_of_several_optimizers(features):
    """The first backward reaches one net, the second both: a parameter more is its hooks more, whenever it is reached."""
    few, many = (counted_calls(*two_nets(layers, features=features)) for layers in (5, 20))
    assert many - few == {"on_gradient": 3 * 30, "on_accumulated": 3 * 30}
    assert not few - many
    assert few.total() - 2 * 3 * 10 <= 480


def test_a_left_out_step_of_several_optimizers_costs_a_few_calls():
    """Whatever the models: each optimizer's two hooks, which count its step."""
    few, many = (counted_calls(*two_nets(layers, schedule=lambda step: step < 3)) for layers in (5, 20))
    assert few == many
    assert few.total() <= 2 * 16


def test_hooks_are_put_on_and_off_again_by_two_calls_a_parameter():
    """Where steps are left out in between: of the few parameters more, no dictionary, handle or function is made again."""
    few, many = (python_calls(layers, schedule=lambda step: step % 2 == 0) for layers in (5, 40))
    slots = {"attach_again", "tensor", "detach", "_detach_together"}
    assert (many - few).keys() <= slots
    assert (many - few).total() <= 4 * 70


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_two_calls_a_parameter_and_backward(micro, clip, scaled):
    """The same where gradients are accumulated, clipped, and scaled."""
    few, many = (python_calls(layers, micro, clip, scaled) for layers in (5, 40))
    assert (many - few).keys() <= {"on_gradient", "on_accumulated"}
    assert (many - few).total() <= 2 * micro * 70


def test_a_parameter_that_is_read_in_its_hook_costs_a_call_of_the_kernel(monkeypatch):
    """One reading a parameter; and its samples with those of all others."""
    seen = native_calls(monkeypatch, hooks=True)
    assert seen["summarize"] + seen["summarize_light"] == 2 * 10 + 1  # and once what the optimizer is given
    assert seen["sample"] <= 3


class Counting:
    """A library whose calls are counted."""

    def __init__(self, library, counts):
        self._library, self._counts = library, counts

    def __getattr__(self, name):
        call = getattr(self._library, name)

        def counted(*arguments):
            self._counts[name.removeprefix("gradlens_")] += 1
            return call(*arguments)

        return counted


def native_calls(monkeypatch, micro=1, clip=False, hooks=False, scaled=False, width=8):
    """Of one step, not among the first."""
    counts, kernel = Counter(), kernels._native()
    asking = kernel.introspector

    def stayed(*arguments):
        counts["unchanged"] += 1
        return asking.stayed(*arguments)

    counting = replace(kernel, library=Counting(kernel.library, counts), holding=Counting(kernel.holding, counts))
    counting = replace(counting, introspector=asking and asking._replace(stayed=stayed))
    monkeypatch.setattr(kernels, "_native", lambda: counting)
    lens, step = training(10, micro, clip, hooks, scaled, width)
    counts.clear()
    step()
    lens.close()
    return counts


def test_four_native_calls_a_step(monkeypatch):
    """Gradients and weights are read once, and the weights once more when they have moved; the rest looks at samples."""
    assert native_calls(monkeypatch) == {"read": 1, "unchanged": 2, "compare": 1}


@pytest.mark.parametrize("threads", [3, 4])
def test_as_many_native_calls_where_the_kernel_has_threads(monkeypatch, threads):
    """Tensors that are cut between threads are as steady as others."""
    monkeypatch.setattr(native, "THREADED", 0)
    monkeypatch.setattr(native, "BRIEF", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert native_calls(monkeypatch, width=80) == {"read": 1, "unchanged": 2, "compare": 1}


@pytest.mark.parametrize(("clip", "scaled"), [(True, False), (False, True), (True, True)])
def test_a_gradient_that_was_written_is_read_once_more(monkeypatch, clip, scaled):
    """As backward left it, and as the optimizer gets it: clipped, unscaled, or both."""
    assert native_calls(monkeypatch, clip=clip, scaled=scaled) == {"read": 2, "unchanged": 2, "compare": 1}


@pytest.mark.parametrize("micro", [2, 5])
def test_each_micro_batch_is_read_once(monkeypatch, micro):
    """Each backward's own gradient, and at last what they add up to; what each left there is sampled."""
    expected = {"read": micro + 1, "sample": micro - 1, "unchanged": 2, "compare": 1}
    assert native_calls(monkeypatch, micro) == expected
