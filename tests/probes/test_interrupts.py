"""Ctrl-C at any moment leaves no trace: SIGINT is sent while a probe is at any of its bytecodes."""

import random
import signal
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import gradlens
from gradlens.probes.interrupts import OPEN, uninterrupted

from .helpers import trace


class Trunk(nn.Module):
    """One trunk that is registered twice, tied heads, a parametrization, running statistics, dropout and an attribute."""

    def __init__(self):
        super().__init__()
        trunk = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2))
        self.actor, self.critic = nn.Sequential(trunk, nn.Linear(4, 4)), nn.Sequential(trunk, nn.Linear(4, 4))
        self.critic[1].weight = self.actor[1].weight
        self.normed = parametrizations.spectral_norm(nn.Linear(4, 2))
        self.scale, self.log = torch.ones(2), []

    def forward(self, x):
        self.log.append(1)
        self.scale.mul_(1.01)
        return self.normed(self.actor(x) + self.critic(x)) * self.scale


def made():
    torch.manual_seed(0)
    model, x = Trunk(), torch.randn(5, 3)
    model(x).sum().backward()
    return model, x


PROBES = {
    "survey": lambda m, x, loss: gradlens.survey(m, lambda m, b: loss(m) * b.sum(), [x * k for k in range(1, 10)]),
    "nudge": lambda m, x, loss: gradlens.nudge(
        m,
        lambda m, b: loss(m) * b.sum(),
        _verdicts(m),
        [x, x + 1],
    ),
    "check_partials": lambda m, x, loss: gradlens.check_partials(m, loss, k=3),
    "check_symmetry": lambda m, x, loss: gradlens.check_symmetry(m, loss, k=2),
    "mixed_partials": lambda m, x, loss: gradlens.mixed_partials(m, loss, "normed.bias"),
    "curvature": lambda m, x, loss: gradlens.curvature(m, loss, samples=3),
    "hessian_product": lambda m, x, loss: gradlens.hessian_product(m, loss, {"normed.bias": torch.ones(2)}),
}


def _verdicts(model):
    import pandas as pd

    index = [(0,), (1,)]
    return pd.DataFrame({"parameter": "normed.bias", "index": index, "verdict": "increase", "partial": [-1.0, -2.0]})


class Interrupt:
    """Sends SIGINT, or raises, at the n-th event of a trace: a line or a bytecode of Python, in whatever code runs."""

    def __init__(self, at, raised):
        self.at, self.raised, self.seen = at, raised, 0

    def __call__(self, frame, event, arg):
        frame.f_trace_opcodes = True
        self.seen += 1
        if self.seen == self.at:
            sys.settrace(None)
            if self.raised:
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)
        return self


def interrupted(probe, at, raised=False):
    """Run a probe on a fresh model, stopped at an event: the number of events, and what was and is."""
    model, x = made()
    before, closed = trace(model), nn.BatchNorm1d(2)
    outside = trace(closed)
    stop = Interrupt(at, raised)

    def loss(m):
        return closed(m(x)).pow(3).mean()

    sys.settrace(stop)
    try:
        PROBES[probe](model, x, loss)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    assert not OPEN.blocks
    return stop.seen, (before, outside), (trace(model), trace(closed))


MOMENTS = 146  #: for each of the seven probes, by a signal and raised where it stands: 2,044 in all


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("raised", [False, True])
@pytest.mark.parametrize("probe", PROBES)
def test_an_interrupt_at_any_moment_leaves_no_trace(probe, raised):
    """Wherever it comes, held back or not, tensors, hooks, gradients, defaults and random states are as before."""
    for name in PROBES:  # what is imported or compiled at the first use is no part of it
        interrupted(name, 0)
    events, before, after = interrupted(probe, 0)
    assert before == after
    rng = random.Random(f"{probe} {raised}")
    for _ in range(MOMENTS):
        at = rng.randrange(1, events)
        handler = signal.getsignal(signal.SIGINT)
        _, before, after = interrupted(probe, at, raised)
        assert after == before, f"interrupted at event {at} of {events}"
        assert signal.getsignal(signal.SIGINT) is handler
        assert torch.get_default_dtype() == torch.float32
        assert torch.is_grad_enabled()
        assert torch._C._len_torch_function_stack() == 0
        assert torch._C._is_torch_function_enabled()


def test_what_puts_things_back_is_run_to_its_end():
    """Interrupts that come meanwhile are held, and raised once it is done."""
    done = []

    def put_back():
        done.append("begun")
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        done.append("ended")

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(put_back)
    assert done == ["begun", "ended"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_of_the_user_stays_that_error():
    """The exception of the loss comes out as it is, after everything was put back."""
    model, x = made()
    before = trace(model)

    def failing(m):
        m(x)
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        gradlens.check_partials(model, failing)
    assert trace(model) == before
