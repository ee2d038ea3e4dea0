"""Loops and wrappers, by what their methods named `step` do."""

import functools
import gc
import types
import weakref

import pytest
import torch
from torch import nn

import gradlens
from gradlens import kernels
from gradlens.capture.optimizers import call_stack
from gradlens.testing import RecordingWriter
from tests.capture.test_steady import RULES, assert_same

STEPS = 8


class Parts:
    """A model, its optimizer and data."""

    def __init__(self, kind=torch.optim.SGD):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
        self.optimizer = kind(self.model.parameters(), lr=0.1)
        self.batches = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(STEPS)]


def clamp(model):
    """What some loops move after the optimizer."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.75)


def plain(parts, batch):
    """The step of a loop in a function."""
    parts.optimizer.zero_grad()
    parts.model(batch).square().mean().backward()
    parts.optimizer.step()
    clamp(parts.model)


def by_closure(parts, batch):
    """The same, with a closure that the function makes."""

    def closure():
        parts.optimizer.zero_grad()
        loss = parts.model(batch).square().mean()
        loss.backward()
        return loss

    parts.optimizer.step(closure)
    clamp(parts.model)


class Loop:
    """Holds what a loop needs."""

    def __init__(self, parts):
        self.model, self.optimizer = parts.model, parts.optimizer
        self.criterion = lambda output: output.square().mean()


class Trainer(Loop):
    def step(self, batch):
        self.optimizer.zero_grad()
        self.criterion(self.model(batch)).backward()
        self.optimizer.step()
        clamp(self.model)


class InMethods(Loop):
    """Forward and backward in methods of its own, one of them put on the object."""

    def __init__(self, parts):
        super().__init__(parts)
        self.back = types.MethodType(lambda self, loss: loss.backward(), self)

    def step(self, batch):
        self.optimizer.zero_grad()
        self.back(self.forward(batch))
        self.optimizer.step()
        clamp(self.model)

    def forward(self, batch):
        return self.criterion(self.model(batch))


class GivenALoss(Loop):
    """What its method is given is called, and backward is not run there."""

    def step(self, batch, criterion=lambda output: output.square().mean(), *others, **more):
        self.optimizer.zero_grad()
        criterion(self.model(batch)).backward()
        self.optimizer.step()
        clamp(self.model)


class Module(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.inner = parts.model
        self.__dict__["optimizer"] = parts.optimizer

    def step(self, batch):
        self.optimizer.zero_grad()
        self.inner(batch).square().mean().backward()
        self.optimizer.step()
        clamp(self.inner)


class Derived(Trainer):
    """The step is the base's, and called by its own."""

    def step(self, batch):
        super().step(batch)


class Wrapped(Loop):
    """Its method is decorated."""

    @functools.wraps(Trainer.step)
    def step(self, *args):
        return Trainer.step(self, *args)


class Closures(Loop):
    """Its method makes a closure for the optimizer."""

    def step(self, batch):
        def closure():
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(batch))
            loss.backward()
            return loss

        self.optimizer.step(closure)
        clamp(self.model)


LOOPS = [Trainer, InMethods, GivenALoss, Module, Derived, Wrapped]


def recorded(parts, step):
    """The records of a training, and how many parts of its steps were steady."""
    writer = RecordingWriter()
    with gradlens.watch(parts.model, parts.optimizer, writers=[writer], rules=RULES) as lens:
        for batch in parts.batches:
            step(batch)
        steady = lens._watcher.steady.parts
    return writer, steady, [p.detach().clone() for p in parts.model.parameters()]


@pytest.mark.skipif(kernels._native() is None, reason="the native kernel was not built")
@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_in_a_method_is_a_loop(kind):
    """What a class does in its `step` goes by the book, and is recorded as the same code in a function is."""
    one, parts = Parts(), Parts()
    function = recorded(one, functools.partial(plain, one))
    method = recorded(parts, kind(parts).step)
    assert function[1] == method[1] == 3 * (STEPS - 1)
    assert_same(function[0], method[0])
    assert all(map(torch.equal, function[2], method[2]))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.LBFGS])
def test_a_loop_that_makes_a_closure_is_a_loop(kind):
    """What it moves after the optimizer's step is no part of the step, as in a function."""
    one, parts = Parts(kind), Parts(kind)
    function, method = recorded(one, functools.partial(by_closure, one)), recorded(parts, Closures(parts).step)
    assert_same(function[0], method[0])
    assert all(map(torch.equal, function[2], method[2]))


# --- wrappers -----------------------------------------------------------------------------------------------------------


class Around:
    """Moves the weights around the inner step, and is no optimizer."""

    def __init__(self, parts):
        self.model, self.inner = parts.model, parts.optimizer

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self.inner.step()
        clamp(self.model)
        return loss


class GivesOn(Around):
    """The closure is called by the inner step."""

    def step(self, closure=None):
        loss = self.inner.step(closure)
        clamp(self.model)
        return loss


class Graded(Around):
    """As SAM does: the closure is wrapped, and called with gradients on."""

    @torch.no_grad()
    def step(self, closure=None):
        closure = None if closure is None else torch.enable_grad()(closure)
        loss = None if closure is None else closure()
        self.inner.step()
        clamp(self.model)
        return loss


class Packed(Around):
    """The closure comes among others."""

    def step(self, *args, **kwargs):
        for each in (*args, *kwargs.values()):
            each()
        self.inner.step()
        clamp(self.model)


class Kept(Around):
    """The closure is set beforehand."""

    closure = None

    def step(self, closure=None):
        self.closure = closure
        self.run()

    def run(self):
        if self.closure is not None:
            self.closure()
        self.inner.step()
        clamp(self.model)


class Optimizer(torch.optim.Optimizer):
    """One that has an inner one, and runs backward itself where it is told the loss."""

    def __init__(self, parts):
        super().__init__(parts.optimizer.param_groups, {})
        self.model, self.inner = parts.model, parts.optimizer

    step = Around.step


class Told(Around):
    """Has the parameters in groups, as an optimizer has, and runs backward itself."""

    @property
    def param_groups(self):
        return self.inner.param_groups

    def step(self, closure=None):
        if closure is not None:
            self.inner.zero_grad()
            self.model(self.batch).square().mean().backward()
        self.inner.step()
        clamp(self.model)


class Averaging(Around):
    """As a running average that takes the weights' place."""

    def __init__(self, parts):
        super().__init__(parts)
        self.average = [p.detach().clone() for p in self.model.parameters()]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step(*([] if closure is None else [closure]))
        for p, average in zip(self.model.parameters(), self.average, strict=True):
            average.lerp_(p, 0.5)
            p.copy_(average)


WRAPPERS = [Around, GivesOn, Graded, Packed, Kept, Optimizer, Told, Averaging]


@pytest.mark.parametrize("closure", ["none", "function", "method", "partial", "object"])
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_is_a_wrapper(kind, closure):
    """Whatever moves the weights around the inner step: the move is the whole one."""
    parts = Parts()
    wrapper, moved = kind(parts), []

    def backward(batch):
        parts.optimizer.zero_grad()
        parts.model(batch).square().mean().backward()

    class Closure:
        def __init__(self, batch):
            self.batch = batch

        def __call__(self):
            backward(self.batch)

    def given(batch):
        made = {"function": lambda: backward(batch), "partial": functools.partial(backward, batch)}
        return made.get(closure) or (Closure(batch) if closure == "object" else Closure(batch).__call__)

    with gradlens.watch(parts.model, parts.optimizer, rules=()) as lens:
        for batch in parts.batches:
            wrapper.batch, before = batch, [p.detach().clone() for p in parts.model.parameters()]
            if closure == "none":
                backward(batch)
                wrapper.step()
            else:
                wrapper.step(given(batch))
            moved.append([(p.detach() - w).norm().item() for p, w in zip(parts.model.parameters(), before, strict=True)])
        rows = lens.history()
    rows = rows[rows["stage"] == "used"]
    seen = rows.pivot(index="step", columns="parameter", values="update_l2")[[n for n, _ in parts.model.named_parameters()]]
    assert seen.shape == (STEPS, 4)
    assert seen.to_numpy() == pytest.approx(torch.tensor(moved).numpy(), rel=1e-5)


def test_a_backward_of_somebody_elses_makes_a_wrapper():
    """Of two backwards one came before the method was called: what it moves may be part of the step."""
    parts = Parts()
    loop, moved = Trainer(parts), []
    parts.optimizer.zero_grad = lambda: None
    with gradlens.watch(parts.model, parts.optimizer, rules=()) as lens:
        for batch in parts.batches:
            parts.model.zero_grad()
            parts.model(-batch).square().mean().backward()
            before = parts.model[0].weight.detach().clone()
            loop.step(batch)
            moved.append((parts.model[0].weight.detach() - before).norm().item())
        rows = lens.history()
    rows = rows[(rows["stage"] == "used") & (rows["parameter"] == "0.weight")]
    assert rows["update_l2"].to_numpy() == pytest.approx(moved, rel=1e-5)


class Twice(torch.optim.SGD):
    """An optimizer whose hooks fire twice."""

    def step(self, closure=None):
        return super().step(closure)


def test_the_hook_after_a_step_knows_the_stack_of_the_hook_before():
    """Each call's is found once, the outer one's not taken for the inner one's."""
    parts, before, after = Parts(Twice), [], []
    handles = [
        parts.optimizer.register_step_pre_hook(lambda o, *_: before.append(call_stack(o))),
        parts.optimizer.register_step_post_hook(lambda o, *_: after.extend(call_stack(o, known) for known in before)),
    ]
    plain(parts, parts.batches[0])
    assert [stack.calls for stack in before] == [1, 2]
    outer, inner = before
    assert after[0] is not outer
    assert after[0].calls == 2  # seen from the inner one
    assert after[1] is inner
    assert after[2] is outer
    assert after[3] is not inner
    for handle in handles:
        handle.remove()


def test_a_step_that_raises_keeps_no_object_around_it_alive():
    """What was seen of its caller is told by ids: the loop, with the model, is freed as ever."""

    class Loop:
        def __init__(self, parts):
            self.parts, self.optimizer = parts, parts.optimizer

        def step(self, batch):
            plain(self.parts, batch)

    class Failing(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("as a user's may")

    loop = Loop(Parts(Failing))
    lens = gradlens.watch(loop.parts.model, loop.optimizer)
    with pytest.raises(RuntimeError, match="as a user's may"):
        loop.step(loop.parts.batches[0])
    alive = weakref.ref(loop)
    del loop
    gc.collect()
    assert alive() is None
    lens.close()
