"""Ctrl-C at any moment leaves no trace: SIGINT is sent while a probe is at any of its bytecodes."""

import bisect
import dis
import functools
import os
import random
import signal
import sys
from collections import Counter
from types import CodeType

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
    "survey": lambda m, x, loss: gradlens.survey(m, lambda m, b: loss(m) * b.sum(), [x * k for k in range(1, 9)]),
    "nudge": lambda m, x, loss: gradlens.nudge(
        m,
        lambda m, b: loss(m) * b.sum(),
        _verdicts(m),
        [x, x + 1],
    ),
    "check_partials": lambda m, x, loss: gradlens.check_partials(m, loss, k=2),
    "check_symmetry": lambda m, x, loss: gradlens.check_symmetry(m, loss, k=1),
    "mixed_partials": lambda m, x, loss: gradlens.mixed_partials(m, loss, "normed.bias"),
    "curvature": lambda m, x, loss: gradlens.curvature(m, loss, samples=2, iterations=6),
    "hessian_product": lambda m, x, loss: gradlens.hessian_product(m, loss, {"normed.bias": torch.ones(2)}),
}


def _verdicts(model):
    import pandas as pd

    index = [(0,), (1,)]
    return pd.DataFrame({"parameter": "normed.bias", "index": index, "verdict": "increase", "partial": [-1.0, -2.0]})


#: A moment: a bytecode or line of a code object, and how many times it is met before the interrupt comes.
Site = tuple[CodeType, int, str]


def site(frame, event):
    return frame.f_code, frame.f_lasti, event


class Recording:
    """The sites of a run in the order in which they are met: of all code, or of ours, which is much faster."""

    def __init__(self, only=None):
        self.events, self._only = [], only

    def __call__(self, frame, event, arg):
        if self._only is not None and not self._only(frame.f_code):
            return None
        frame.f_trace_opcodes = True
        self.events.append(site(frame, event))
        return self


class Interrupt:
    """Sends SIGINT, or raises, when a site is met for the n-th time; other code runs untraced, and so at full speed."""

    def __init__(self, at, times, raised):
        self.code, self.at, self.left, self.raised = at[0], at, times, raised
        self.came = False

    def __call__(self, frame, event, arg):
        if frame.f_code is not self.code:
            return None
        frame.f_trace_opcodes = True
        if site(frame, event) == self.at:
            self.left -= 1
            if self.left == 0:
                self.came = True
                sys.settrace(None)
                if self.raised:
                    raise KeyboardInterrupt
                signal.raise_signal(signal.SIGINT)
        return self


def run(probe, tracer):
    """Run a probe on a fresh model with a trace function: what was before, and what is after."""
    model, x = made()
    before, closed = trace(model), nn.BatchNorm1d(2)
    outside = trace(closed)

    def loss(m):
        return closed(m(x)).pow(3).mean()

    sys.settrace(tracer)
    try:
        PROBES[probe](model, x, loss)
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    assert not OPEN.blocks
    return (before, outside), (trace(model), trace(closed))


def edges(code):
    """The bytecodes where protection begins or ends: at the bounds of what an exception table covers, and next to them."""
    offsets = [instruction.offset for instruction in dis.get_instructions(code)]
    bounds = [bound for entry in dis._parse_exception_table(code) for bound in (entry.start, entry.end, entry.target)]
    at = [bisect.bisect_left(offsets, bound) for bound in bounds]
    return {offsets[i] for bound in at for i in range(bound - 2, bound + 3) if 0 <= i < len(offsets)}


@functools.cache
def ours(code):
    return "gradlens" in code.co_filename and "tests" not in code.co_filename


class Moments:
    """Which moments are worth trying: 500,000 events are mostly the same few loops.

    An interrupt does harm where protection begins or ends, so all edges in gradlens' code are tried, each in one probe: at
    its first occurrence by a signal and at a random one by an exception, or the other way round. Then bytecodes that are
    met at all, in gradlens and in torch's Python, once each; and events at random, which find what goes wrong often.
    """

    def __init__(self):
        for probe in PROBES:
            run(probe, None)  # what is imported or compiled at the first use is no part of it
        self._recorded = {}
        rng, where = random.Random(0), {}
        for probe in PROBES:
            for one in dict.fromkeys(self._record(probe, Recording(ours))):
                where.setdefault(one, []).append(probe)
        bounds = {code: edges(code) for code, *_ in where}
        self.edges = {probe: [] for probe in PROBES}
        for one, probes in where.items():
            if one[2] == "opcode" and one[1] in bounds[one[0]]:
                self.edges[rng.choice(probes)].append((one, rng.random() < 0.5))

    def _record(self, probe, recording):
        before, after = run(probe, recording)
        assert before == after
        return recording.events

    def of(self, probe, raised, count):
        """(site, times) for a probe: the edges, then as many others as asked for."""
        if probe not in self._recorded:
            self._recorded[probe] = self._record(probe, Recording())
        events, rng = self._recorded[probe], random.Random(f"{probe} {raised}")
        counts = Counter(events)
        for one, first in self.edges[probe]:
            if first == raised:
                yield one, 1
            elif counts[one] > 1:
                yield one, rng.randrange(2, counts[one] + 1)
        sites = [one for one in counts if ours(one[0]) or "torch" in one[0].co_filename]
        for one in rng.sample(sites, min(count - count // 3, len(sites))):
            yield one, 1
        for _ in range(count // 3):
            at = rng.randrange(len(events))
            yield events[at], events[: at + 1].count(events[at])


@pytest.fixture(scope="module")
def moments():
    return Moments()


#: Moments of the fourteen tests together, beside the edges. GRADLENS_INTERRUPTS=2044 pytest tests/probes/test_interrupts.py
#: tries as many.
COUNT = int(os.environ.get("GRADLENS_INTERRUPTS", "420"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("raised", [False, True])
@pytest.mark.parametrize("probe", PROBES)
def test_an_interrupt_at_any_moment_leaves_no_trace(probe, raised, moments):
    """Wherever it comes, held back or not, tensors, hooks, gradients, defaults and random states are as before."""
    handler, came = signal.getsignal(signal.SIGINT), []
    for at, times in moments.of(probe, raised, COUNT // (2 * len(PROBES))):
        stop = Interrupt(at, times, raised)
        before, after = run(probe, stop)
        came.append(stop.came)
        told = f"interrupted at {at[2]} {at[1]} of {at[0].co_qualname} in {at[0].co_filename}, met {times} times"
        assert after == before, told
        assert signal.getsignal(signal.SIGINT) is handler, told
        assert torch.get_default_dtype() == torch.float32, told
        assert torch.is_grad_enabled(), told
        assert torch._C._len_torch_function_stack() == 0, told
        assert torch._C._is_torch_function_enabled(), told
    assert sum(came) > 0.95 * len(came)  # the same run meets the same sites, but for what is collected in between


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
