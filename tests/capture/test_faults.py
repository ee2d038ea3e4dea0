"""Faults, ours and the user's: training goes on, bit for bit."""

import contextlib
import functools
import warnings

import pytest
import torch
from torch import nn

import gradlens
from gradlens import kernels
from gradlens.capture.attachment import Attachment
from gradlens.capture.engine import Engine
from gradlens.capture.guards import GUARDED
from gradlens.capture.moves import Moves
from gradlens.capture.passes import Passes
from gradlens.capture.readings import PassReader
from gradlens.capture.scaling import Scaling
from gradlens.capture.step import Step
from gradlens.capture.step_reader import StepReader
from gradlens.capture.steps import Steps
from gradlens.errors import GradlensWarning
from gradlens.statistics.buffers import Buffer
from gradlens.statistics.table import Table
from gradlens.watching.open_tables import OpenTables
from gradlens.watching.overhead import Meter
from gradlens.watching.tables import TableBuilder
from gradlens.watching.updates import UpdateMeter
from tests.capture.helpers import data


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))


def iterate(model, optimizer, steps, *, first=0, accumulate=2):
    """Losses of some steps with clipping."""
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        for k in range(accumulate):
            loss = model(data(2 * step + k)).pow(2).sum()
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def bits(model, optimizer):
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return [t.detach().clone() for t in (*model.state_dict().values(), *state, torch.get_rng_state())]


def same_bits(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def training():
    model = net()
    return model, torch.optim.AdamW(model.parameters(), 0.01)


@functools.cache
def never_watched(steps):
    model, optimizer = training()
    losses = iterate(model, optimizer, steps)
    return losses, bits(model, optimizer)


@contextlib.contextmanager
def faults_allowed():
    """Our warning that something of ours failed is expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradlensWarning)
        yield


FEATURES = ("updates", "flips", "activations")

#: What is guarded, and called in special trainings only.
SPECIAL = ("a parameter's replacement", "a closure's return", "whole partials", "a module's output")

#: And this where a schedule leaves out steps that end inside a backward.
UNSEEN = "end of a backward that is not observed"

#: And this over ranks, where it is made to fail too.
AVERAGED = "gradients before they are averaged"

#: What torch calls of ours and is guarded: each may fail as a whole.
HOOKS = {where: (entry, "call") for where, entry in GUARDED.items() if where not in (*SPECIAL, UNSEEN, AVERAGED)}

#: What else may fail: functions of ours that something in a training step calls.
WITHIN = {
    "a pass begins": (Passes, "pass_begins"),
    "callbacks are queued": (Engine, "_queue_end"),
    "a pass ends": (Passes, "pass_ended"),
    "a pass is read": (PassReader, "read_pass"),
    "a pass ends, optimizer": (Passes, "_after_pass"),
    "a pass is left": (Engine, "forget"),
    "hooks are put on": (Attachment, "hook_all"),
    "the model is scanned": (Attachment, "rescan"),
    "names are read": (Attachment, "refresh"),
    "scale": (Scaling, "scale"),
    "a step begins": (Moves, "step_begins"),
    "a step has ended": (Moves, "_read_after"),
    "the used gradients": (StepReader, "read_used"),
    "passes are finished": (Steps, "finish_passes"),
    "the next step opens": (Steps, "_prepare"),
    "marks are set": (Steps, "open_marks"),
    "the schedule is followed": (Steps, "follow_schedule"),
    "a step is made": (Step, "begin"),
    "the meter": (Meter, "step_ended"),
    "the sink": (TableBuilder, "_read"),
    "updates": (TableBuilder, "_update"),
    "samples": (UpdateMeter, "pass_ended"),
    "a step is sent": (OpenTables, "release"),
    "weights are kept": (Buffer, "keep"),
    "statistics": (kernels, "summarize"),
    "a table is handed over": (Table, "on_host"),
}
OURS = HOOKS | WITHIN


@pytest.mark.trap(14)
@pytest.mark.situation(
    "an error inside our own hooks",
    stages={
        "backward": "marked: a warning and a finding name it, once",
        "used": "marked: a warning and a finding name it, once",
    },
    note="training has the same bits, and what fails again and again is left out",
)
@pytest.mark.parametrize("when", ["once", "always"])
@pytest.mark.parametrize("where", OURS)
def test_whatever_of_ours_fails_training_has_the_same_bits(monkeypatch, where, when):
    """Each function of ours that runs in a step is made to raise: losses, weights, optimizer state, RNG are as without."""
    losses, expected = never_watched(6)
    model, optimizer = training()
    owner, name = OURS[where]
    real, calls, broken = getattr(owner, name), [0], [False]

    def fails(*args, **kwargs):
        calls[0] += broken[0]
        if broken[0] and (when == "always" or calls[0] == 3):
            raise RuntimeError("made to fail")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, fails)
    monkeypatch.setattr("gradlens.capture.steps.SCAN_EVERY", 2)
    lens = gradlens.watch(model, optimizer)
    with faults_allowed():
        broken[0] = True
        seen = iterate(model, optimizer, 4)
        broken[0] = False
        seen += iterate(model, optimizer, 2, first=4)
        assert calls[0] > 0, "this test does not reach what it makes fail"
        lens.close()
    same_bits(bits(model, optimizer), expected)
    assert seen == losses
    assert "gradlens-fault" in [f.rule for f in lens.findings()] or when == "once"
    assert all(p._backward_hooks is None and p._post_accumulate_grad_hooks is None for p in model.parameters())
    if when == "once":
        unseen = where == "after the optimizer's step"  # nothing else says that the optimizer has stepped
        assert set(lens.table()["step"]) == {5 - unseen}


def special(model, optimizer, steps):
    """A closure in each step, and a parameter that is replaced before each."""
    losses = []
    for step in range(steps):
        model[4].bias = nn.Parameter(model[4].bias.detach().clone())

        def closure(step=step):
            optimizer.zero_grad()
            loss = model(data(step)).pow(2).sum()
            loss.backward()
            return loss

        losses.append(float(optimizer.step(closure)))
    return losses


def test_the_end_of_a_backward_that_is_not_observed_may_fail_too(monkeypatch):
    """The optimizer steps inside backward, in steps that are left out: the same bits, a finding, and the steps go on."""

    def inside(model, optimizer, steps):
        model[0].weight.register_post_accumulate_grad_hook(lambda p: optimizer.step())
        for step in range(steps):
            model(data(step)).pow(2).sum().backward()
            optimizer.zero_grad()

    model, optimizer = training()
    inside(model, optimizer, 7)
    expected = bits(model, optimizer)
    model, optimizer = training()
    real, calls = GUARDED[UNSEEN].call, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("made to fail")
        return real(*args)

    monkeypatch.setattr(GUARDED[UNSEEN], "call", fails)
    with faults_allowed(), gradlens.watch(model, optimizer, schedule=lambda step: step in (0, 5)) as lens:
        inside(model, optimizer, 7)
        assert len(calls) > 2
        assert set(lens.history()["step"]) == {0, 5}
        assert "gradlens-fault" in [finding.rule for finding in lens.findings()]
    same_bits(bits(model, optimizer), expected)


@pytest.mark.parametrize("where", SPECIAL)
def test_what_few_trainings_call_may_fail_too(monkeypatch, where, tmp_path):
    """A parameter's replacement, a closure's return, kept partials, a module's output: the same bits, and a finding."""
    model, optimizer = training()
    losses = special(model, optimizer, 3)
    expected = bits(model, optimizer)
    model, optimizer = training()
    calls = []

    def fails(*args):
        calls.append(args)
        raise RuntimeError("made to fail")

    monkeypatch.setattr(GUARDED[where], "call", fails)
    with faults_allowed(), gradlens.watch(model, optimizer, run=tmp_path, keep="0.weight", features=FEATURES) as lens:
        assert special(model, optimizer, 3) == losses
    same_bits(bits(model, optimizer), expected)
    assert calls
    (fault,) = [finding for finding in lens.findings() if finding.rule == "gradlens-fault"]
    assert where in fault.seen


def test_a_warning_that_is_made_an_error_does_not_reach_training(monkeypatch):
    """Under `-W error` our own warning of a fault would raise in a hook: it does not."""
    _, expected = never_watched(3)
    model, optimizer = training()
    monkeypatch.setattr(kernels, "summarize", lambda *a, **k: 1 / 0)
    lens = gradlens.watch(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iterate(model, optimizer, 3)
        lens.close()
    same_bits(bits(model, optimizer), expected)
    assert [f.rule for f in lens.findings()] == ["gradlens-fault"]


class Interrupted(nn.Module):
    """The identity; its backward raises when it is told to, between one layer's gradient and the next one's."""

    def __init__(self):
        super().__init__()
        self.error = None

    def forward(self, x):
        if x.requires_grad:
            x.register_hook(self._hook)
        return x

    def _hook(self, g):
        error, self.error = self.error, None
        if error is not None:
            raise error


def interrupted():
    torch.manual_seed(0)
    stop = Interrupted()
    model = nn.Sequential(nn.Linear(4, 8), stop, nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 3))
    return stop, model, torch.optim.AdamW(model.parameters(), 0.01)


def fail_now_and_then(kind, watched, accumulate):
    """Six steps; steps 2 and 4 fail in the last of their backwards, are caught, and are made again."""
    stop, model, optimizer = interrupted()
    lens = gradlens.watch(model, optimizer) if watched else None
    losses = []
    for step in range(6):
        if step in (2, 4):
            optimizer.zero_grad()
            for k in range(accumulate):
                stop.error = kind("the user's") if k == accumulate - 1 else None
                with contextlib.suppress(kind):
                    model(data(step)).pow(2).sum().backward()
        losses += iterate(model, optimizer, 1, first=step, accumulate=accumulate)
    if lens is not None:
        lens.close()
    return losses, bits(model, optimizer), lens


@pytest.mark.trap(15, 44)
@pytest.mark.situation(
    "a user's hook that raises, KeyboardInterrupt in backward, then a good step",
    stages={"backward": "yes", "used": "yes"},
)
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_the_user_raises_comes_through_and_the_next_step_is_right(kind, accumulate):
    """The user's exception arrives as it was raised; training has the same bits, and each good step its own rows."""
    losses, expected, _ = fail_now_and_then(kind, False, accumulate)
    seen, state, lens = fail_now_and_then(kind, True, accumulate)
    assert seen == losses
    same_bits(state, expected)
    history = lens.history()
    assert sorted(history["step"].unique()) == list(range(6))
    used = history[history["stage"] == "used"]
    assert len(used) == 6 * 4
    assert set(used["status"]) == {"ok"}
    assert lens.findings() == []


@pytest.mark.trap(44)
@pytest.mark.situation(
    "KeyboardInterrupt inside our own hooks", stages={"backward": "yes: from the step after the next", "used": "yes"}
)
@pytest.mark.parametrize("where", [where for where in OURS if where != "a table is handed over"])  # on a thread of its own
def test_an_interrupt_inside_our_own_code(monkeypatch, where):
    """Ctrl-C may come while we are at work: it reaches the user, who trains on; soon the records are as they should be."""
    model, optimizer = training()
    owner, name = OURS[where]
    real, armed = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        if armed:
            armed.pop()
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with gradlens.watch(model, optimizer) as lens:
        iterate(model, optimizer, 2)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            armed.append(True)
            try:
                iterate(model, optimizer, 1, first=2)
                came = False
            except KeyboardInterrupt:
                came = True
            assert came != bool(armed), "an interrupt is not swallowed"
        iterate(model, optimizer, 1, first=3)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        iterate(model, optimizer, 1, first=4)
        last = lens.history()
        last = last[last["step"] == last["step"].max()].set_index(["stage", "backward", "parameter"])
        assert len(last) == 3 * len(before)
        for n, p in model.named_parameters():
            row = last.loc[("used", 1, n)]
            assert row["status"] == "ok"
            assert row["l2"] == pytest.approx(p.grad.double().norm().item(), rel=1e-6)
            assert row["update_l2"] == pytest.approx((p.detach() - before[n]).double().norm().item(), rel=1e-5)
        assert lens.findings() == []


class Broken:
    """A writer whose disk is full."""

    def write(self, record):
        raise OSError("no space left on device")

    def flush(self):
        raise OSError("no space left on device")

    def close(self):
        raise OSError("no space left on device")


def raising(*args):
    raise ValueError("the user's")


@pytest.mark.parametrize(
    "given",
    [
        {"writers": [Broken()]},
        {"rules": [raising]},
        {"on_finding": raising, "rules": [lambda history: [gradlens.Finding("mine", 0, gradlens.Severity.INFO, "always")]]},
        {"schedule": lambda step: raising() if step == 1 else True},
    ],
    ids=["writer", "rule", "on_finding", "schedule"],
)
def test_what_the_user_gave_us_may_fail(given):
    """A writer, rule, callback or schedule of the user that raises is named once; training has the same bits."""
    losses, expected = never_watched(4)
    model, optimizer = training()
    lens = gradlens.watch(model, optimizer, **given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        seen = iterate(model, optimizer, 4)
        lens.close()
    assert seen == losses
    same_bits(bits(model, optimizer), expected)
    assert len([w for w in caught if issubclass(w.category, GradlensWarning)]) == 1, [str(w.message) for w in caught]
    assert set(lens.table()["step"]) == {3}
