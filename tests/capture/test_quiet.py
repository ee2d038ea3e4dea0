"""Steps that the schedule leaves out: nothing of them is seen but that they end."""

import contextlib
import warnings

import pytest
import torch
from torch import nn

import gradlens
from gradlens.testing import RecordingWriter
from tests.capture.helpers import data
from tests.capture.test_steady import assert_same


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        model(data(step)).square().mean().backward()
        optimizer.step()


@contextlib.contextmanager
def watched(model, optimizer, schedule=3, **options):
    """The lens, with the writer that it has."""
    writer = RecordingWriter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lens = gradlens.watch(model, optimizer, schedule=schedule, writers=[writer], rules=(), **options)
    del optimizer  # a test may let go of it
    lens.writer = writer
    with lens:
        yield lens


def recorded(lens):
    """The steps that were observed."""
    lens.flush()
    return sorted({snapshot.step for snapshot in lens.writer.snapshots})


def hooks(model):
    """How many hooks are on the parameters."""
    count = 0
    for p in model.parameters():
        count += len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ())
    return count


def test_no_hook_stays_on_a_parameter():
    """They are there in an observed step, and no sooner or later."""
    model = net()
    optimizer = sgd(model)
    with watched(model, optimizer) as lens:
        for step in range(9):
            assert hooks(model) == (8 if step % 3 == 0 else 0)
            assert all(p._backward_hooks is None for p in model.parameters()) == (step % 3 > 0)
            train(model, optimizer, 1, step)
        assert recorded(lens) == [0, 3, 6]
    assert hooks(model) == 0


def test_hooks_of_others_stay_and_are_seen():
    """A user's hooks that come or go between looks fire each time, and what they make of a gradient is told apart."""
    model = net()
    optimizer, own, posted = sgd(model), [], []
    with watched(model, optimizer) as lens:
        train(model, optimizer, 1)
        handles = [
            model[0].weight.register_hook(own.append),
            model[2].bias.register_post_accumulate_grad_hook(posted.append),
        ]
        train(model, optimizer, 6, 1)
        assert len(own) == len(posted) == 6
        handles.append(model[2].weight.register_hook(lambda g: 2 * g))
        train(model, optimizer, 3, 7)
        gradient = model[2].weight.grad.double().norm().item()
        row = lens.table(step=9, stage="used").set_index("parameter").loc["2.weight"]
        assert row["l2"] == pytest.approx(gradient, rel=1e-6)
        for handle in handles:
            handle.remove()
        train(model, optimizer, 3, 10)
        assert len(own) == len(posted) == 9
        assert recorded(lens) == [0, 3, 6, 9, 12]
        assert lens.findings() == []
    assert hooks(model) == 0


@pytest.mark.parametrize("change", ["replace", "swap", "add", "past torch", "unfreeze", "another optimizer"])
def test_a_change_in_a_quiet_stretch_is_seen_at_the_next_look(change):
    """Whatever happens to the parameters while nobody looks: the next observed step has every gradient."""
    model = net()
    optimizer = sgd(model)
    if change == "unfreeze":
        model[0].requires_grad_(False)
    with watched(model, optimizer, schedule=lambda step: step % 20 == 0) as lens:
        train(model, optimizer, 5)
        weight = model[0].weight
        if change == "replace":
            model[0].weight = nn.Parameter(weight.detach().clone())
            optimizer.param_groups[0]["params"][0] = model[0].weight
        elif change == "swap":
            torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().clone()))
        elif change == "add":
            model.append(nn.Linear(2, 3))
            optimizer.add_param_group({"params": list(model[3].parameters())})
        elif change == "past torch":
            model[0]._parameters["weight"] = nn.Parameter(weight.detach().clone())
            optimizer.param_groups[0]["params"][0] = model[0].weight
        elif change == "unfreeze":
            model[0].requires_grad_(True)
        else:
            optimizer = torch.optim.Adam(model.parameters(), 0.01)
        train(model, optimizer, 16, 5)
        seen = lens.table(step=20, stage="backward").set_index("parameter")
        assert list(seen.index) == [name for name, _ in model.named_parameters()]
        assert set(seen["status"]) == {"ok"}
        model.zero_grad()
        assert recorded(lens) == [0, 20]


def test_an_optimizer_that_steps_inside_backward_goes_on_counting():
    """No hook says when such a backward ends, so the engine is asked to; what is due is observed."""
    model = net()
    optimizer = sgd(model)
    first = next(iter(model.parameters()))
    first.register_post_accumulate_grad_hook(lambda p: optimizer.step())
    with watched(model, optimizer) as lens:
        for step in range(8):
            model(data(step)).square().mean().backward()
        assert lens._watcher.step.number == 8
        assert recorded(lens) == [0, 3, 6]


def test_a_step_for_each_parameter_inside_backward_goes_on_counting():
    """The same of an optimizer for each parameter, as where gradients are freed one by one."""
    model = net()
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

    def step_at_once(p):
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_at_once)
    with watched(model, list(optimizers.values())) as lens:
        for step in range(8):
            model(data(step)).square().mean().backward()
        assert lens._watcher.step.number == 8
        assert recorded(lens) == [0, 3, 6]


def test_a_subclass_that_calls_its_base_makes_one_step():
    """Its hooks fire twice a step, which counts once."""

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = net()
    optimizer = Twice(model.parameters(), 0.1)
    with watched(model, optimizer) as lens:
        train(model, optimizer, 10)
        assert lens._watcher.step.number == 10
        assert recorded(lens) == [0, 3, 6, 9]


def test_a_scaler_is_found_in_a_quiet_stretch():
    """It calls the optimizer's step: gradients of the next observed step are unscaled."""
    model = net()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watched(model, optimizer, schedule=lambda step: step >= 4) as lens:
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(model(data(step)).square().mean()).backward()
            expected = model[0].weight.grad.double().norm().item() / 1024
            scaler.step(optimizer)
            scaler.update()
        row = lens.table(step=4, stage="backward").set_index("parameter").loc["0.weight"]
        assert row["l2"] == pytest.approx(expected, rel=1e-5)
        assert [finding.rule for finding in lens.findings()] == ["scaler-found"]


def test_a_scaler_that_is_known_leaves_steps_quiet():
    """Its hooks come off as without one, its skipped steps in a quiet stretch are no steps, and the next look unscales."""
    model = net()
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watched(model, optimizer, schedule=4, scaler=scaler) as lens:
        for iteration in range(10):
            assert hooks(model) == (8 if iteration in (0, 5, 9) else 0)
            optimizer.zero_grad()
            factor = float("inf") if iteration == 2 else 1.0
            scaler.scale(model(data(iteration)).square().mean() * factor).backward()
            scale, gradient = scaler.get_scale(), model[0].weight.grad.double().norm().item()
            scaler.step(optimizer)
            scaler.update()
            if iteration in (5, 9):
                row = lens.table(step={5: 4, 9: 8}[iteration], stage="backward").set_index("parameter").loc["0.weight"]
                assert row["l2"] == pytest.approx(gradient / scale, rel=1e-5)
        assert recorded(lens) == [0, 4, 8]
        assert lens.findings() == []


def test_what_is_observed_in_a_quiet_step_is_not_said_of_another():
    """A value that was attached to a step that is left out goes with it."""
    model = net()
    optimizer = sgd(model)
    with watched(model, optimizer) as lens:
        for step in range(7):
            lens.observe(number=step)
            train(model, optimizer, 1, step)
        assert recorded(lens) == [0, 3, 6]
        assert all(snapshot.scalars["number"] == snapshot.step for snapshot in lens.writer.snapshots)


def test_a_schedule_that_fails_in_a_quiet_step_is_named_once():
    """A user's schedule may raise whatever it likes: the step is observed, training goes on."""

    def schedule(step):
        if step in (5, 6):
            raise ValueError("no schedule today")
        return step == 0

    model = net()
    optimizer = sgd(model)
    with (
        pytest.warns(gradlens.errors.GradlensWarning, match="no schedule today"),
        watched(model, optimizer, schedule) as lens,
    ):
        warnings.simplefilter("always")
        train(model, optimizer, 10)
        assert recorded(lens) == [0, 5, 6]
        assert [finding.rule for finding in lens.findings()] == ["gradlens-fault"]


def several(steps, schedule, order=(0, 1), listed=(0, 1), times=(1, 1), general=False):
    """The records, the steps that were observed, with the backwards of each, and the ender's state, of two optimizers.

    `general`: no step is quiet.
    """
    torch.manual_seed(0)
    nets = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 2)])
    optimizers, alive = [torch.optim.SGD(net.parameters(), 0.1) for net in nets], []
    with watched(nets, [optimizers[i] for i in listed], schedule) as lens:
        if general:
            lens._watcher._steps._quiet = lambda: False
        for step in range(steps):
            for i in order:
                for _ in range(times[i](step) if callable(times[i]) else times[i]):
                    nets.zero_grad()
                    nets[1](nets[0](data(step))).square().mean().backward()
                    optimizers[i].step()
                    alive += [p.grad for p in nets.parameters()]  # no new one gets the id of one that was seen
        seen = recorded(lens)
        counted = [(s.step, s.backward, s.stage) for s in lens.writer.snapshots]
        ender = lens._watcher.optimizers.ender
        places = {each: place for place, each in enumerate(lens._watcher.optimizers.watched)}
        since = [{places[each]: n for each, n in found.items()} for found in (ender._since_current, ender._since_listed)]
        return lens.writer, (seen, counted, lens._watcher.step.number, places[ender.current], ender._most, since)


@pytest.mark.parametrize("schedule", [3, 7, lambda step: step in (0, 40)])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("listed", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    "times", [(1, 1), (3, 1), (1, 2), (1, 0), (lambda step: step < 20, 1), (1, lambda step: step < 12 or step > 34)]
)
def test_quiet_steps_of_several_optimizers_are_counted_as_others_are(schedule, order, listed, times):
    """Each steps once, some more often, or one is idle for a while: what is observed, and who ends steps, is the same.

    So is each number of what is observed.
    """
    quiet, general = (several(60, schedule, order, listed, times, general=general) for general in (False, True))
    assert quiet[1] == general[1]
    assert_same(quiet[0], general[0])


def test_an_optimizer_that_stands_in_for_another_does_so_in_a_quiet_stretch():
    """The one that it stands in for is gone: the steps that are observed are those of one that was there throughout."""
    seen = []
    for replaced in (False, True):
        torch.manual_seed(0)
        nets = nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 2)])
        optimizers = [sgd(net) for net in nets]
        with watched(nets, optimizers, 5) as lens:
            for step in range(23):
                if step == 7 and replaced:
                    optimizers[0] = sgd(nets[0])
                if step == 12 and replaced:
                    optimizers[1] = sgd(nets[1])
                nets.zero_grad()
                nets[1](nets[0](data(step))).square().mean().backward()
                for optimizer in optimizers:
                    optimizer.step()
            seen.append((recorded(lens), [(s.step, s.stage, len(s)) for s in lens.writer.snapshots]))
    assert seen[0] == seen[1]
    assert seen[0][0] == [0, 5, 10, 15, 20]
