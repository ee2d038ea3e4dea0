"""Compiled models, optimizers and training steps."""

import contextlib
import functools
import logging
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import gradlens
from tests.capture.helpers import data

pytestmark = pytest.mark.slow  # Dynamo takes seconds
STEPS = 10  # more than the 8 compilations of one function after which Dynamo warns and gives up


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


class Loop:
    """A training loop of which one part is compiled; `watch` says when: "never", "before" or "after" compiling."""

    def __init__(self, part, watch, backend="inductor"):
        torch._dynamo.reset()
        counters.clear()
        self.model = net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
        self.lens = None
        if watch == "before":
            self.lens = gradlens.watch(self.model, self.optimizer)
        call, step, whole = self.model, self.optimizer.step, self._step
        if part == "model":
            call = torch.compile(self.model, backend=backend, fullgraph=True)
        elif part == "optimizer":
            step = torch.compile(self.optimizer.step, backend=backend)
        elif part == "step":
            whole = torch.compile(self._step, backend=backend)
        self._call, self._optimize, self._whole = call, step, whole
        if watch == "after":
            self.lens = gradlens.watch(call, self.optimizer)

    def _step(self, x):
        self.optimizer.zero_grad()
        loss = self._call(x).pow(2).sum()
        loss.backward()
        self._optimize()
        return loss

    def run(self, steps=STEPS):
        """Losses, and what torch warned of, by its warnings and its loggers."""
        with warnings.catch_warnings(record=True) as caught, logged() as lines:
            warnings.simplefilter("always")
            losses = [self._whole(data(step)).item() for step in range(steps)]
        return losses, {str(w.message) for w in caught} | set(lines)

    def counts(self):
        """What Dynamo counted: graphs and the operations in them, and what was compiled again."""
        return {**counters["stats"], **counters["recompiles"], "autograd": counters["aot_autograd"]["total"]}


@contextlib.contextmanager
def logged():
    """The lines that torch logs as warnings or worse."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("torch").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("torch").removeHandler(handler)


@contextlib.contextmanager
def loop(*args, **kwargs):
    made = Loop(*args, **kwargs)
    try:
        yield made
    finally:
        if made.lens is not None:
            made.lens.close()


def state(loop):
    return [p.detach().clone() for p in loop.model.parameters()]


@functools.cache
def plain(part, backend="inductor"):
    """The loop without us: its counts, what was warned of, losses and weights."""
    with loop(part, "never", backend) as made:
        losses, told = made.run()
        return made.counts(), told, losses, state(made)


@pytest.mark.trap(28, 34)
@pytest.mark.situation(
    "torch.compile: the model, the optimizer's step, or the whole training step",
    stages={"backward": "yes", "used": "yes", "updates": "yes"},
    note="watched before or after compiling: as many graphs, nothing compiled again, no new warning, the same bits",
)
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor calls g++")
@pytest.mark.parametrize("watch", ["before", "after"])
@pytest.mark.parametrize("part", ["model", "optimizer", "step"])
def test_compiled_training_is_compiled_as_if_not_watched(part, watch):
    """Dynamo makes the same graphs with us as without and compiles nothing again, and training has the same bits."""
    counts, told, losses, weights = plain(part)
    with loop(part, watch) as watched:
        seen_losses, seen_told = watched.run()
        assert watched.counts() == counts
        assert seen_told <= told
        assert seen_losses == losses
        assert all(torch.equal(a, b) for a, b in zip(state(watched), weights, strict=True))
        assert watched.lens.names() == [n for n, _ in watched.model.named_parameters()]
        history = watched.lens.history().set_index(["step", "stage", "parameter"])
        assert len(history) == STEPS * 2 * 4
        for name, p in watched.model.named_parameters():
            assert history.loc[(STEPS - 1, "backward", name), "l2"] == pytest.approx(p.grad.double().norm().item(), rel=1e-6)
            assert history.loc[(STEPS - 1, "used", name), "update_l2"] > 0
        assert watched.lens.findings() == []


@pytest.mark.situation("torch.compile: a schedule that puts hooks on and off", stages={"backward": "yes"})
def test_a_schedule_does_not_compile_anything_again():
    """Every third step is looked at: hooks come and go, and a compiled training step does not notice."""
    counts, told, _, weights = plain("step", "aot_eager")
    with loop("step", "never", backend="aot_eager") as scheduled:
        scheduled.lens = gradlens.watch(scheduled.model, scheduled.optimizer, schedule=3)
        _, seen_told = scheduled.run()
        assert scheduled.counts() == counts
        assert seen_told <= told
        assert all(torch.equal(a, b) for a, b in zip(state(scheduled), weights, strict=True))
        assert sorted(scheduled.lens.history()["step"].unique()) == [0, 3, 6, 9]


@pytest.mark.trap(29)
@pytest.mark.situation(
    "compiled autograd",
    stages={"backward": "yes: read at the step, or when the next backward begins", "used": "yes"},
)
def test_a_step_under_compiled_autograd():
    """With compiled autograd configured each step is one record of the right numbers, and training has the same bits."""
    results = []
    for watch in ("never", "before"):
        with torch._dynamo.config.patch(compiled_autograd=True), loop("step", watch, backend="aot_eager") as made:
            made.run(3)
            results.append(state(made))
            if made.lens is not None:
                history = made.lens.history().set_index(["step", "stage", "parameter"])
                assert len(history) == 3 * 2 * 4
                for name, p in made.model.named_parameters():
                    row = history.loc[(2, "backward", name)]
                    assert row["l2"] == pytest.approx(p.grad.double().norm().item(), rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.situation("torch.compile: the numbers are those of eager training", stages={"backward": "yes"})
def test_compiled_and_checkpointed():
    """A compiled block under activation checkpointing is one backward with the gradients that the parameters have."""
    from torch.utils.checkpoint import checkpoint

    torch._dynamo.reset()
    model = net()
    first = torch.compile(model[0], backend="aot_eager")
    with gradlens.watch(model, torch.optim.SGD(model.parameters(), 0.1)) as lens:
        for _ in range(2):
            model[2](model[1](checkpoint(first, data(0), use_reentrant=False))).pow(2).sum().backward()
        table = lens.history().query("backward == 1").set_index("parameter")
        for name, p in model.named_parameters():
            assert table.loc[name, "l2"] == pytest.approx(p.grad.double().norm().item() / 2, rel=1e-6)
