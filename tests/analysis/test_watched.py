"""Rules under a real lens, in trainings with a mistake in the loop, where made snapshots would prove little."""

import pytest
import torch
from torch import nn

import gradlens
from gradlens.records import Severity
from gradlens.testing import batch, classify, healthy


def findings_of(loop, *, steps=12, **options):
    """What the rules find while `loop(model, optimizer, loss, step)` trains the healthy perceptron."""
    case = healthy()
    case.optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01)
    with gradlens.watch(case.model, case.optimizer, **options) as lens:
        for step, data in enumerate(case.batches(steps)):
            loop(case.model, case.optimizer, case.loss(case.model, data), step)
    return lens.findings()


def plain(model, optimizer, loss, step):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_the_plain_loop_is_well():
    """What follows differs from this one in the mistake alone."""
    assert findings_of(plain) == []


# --- what is left in .grad ------------------------------------------------------------------------------------------


def test_a_missing_zero_grad_is_named_for_certain():
    """What came on top is what the step before used, to the last digits: no other cause is given."""

    def forgetful(model, optimizer, loss, step):
        loss.backward()
        optimizer.step()

    findings = findings_of(forgetful)
    assert {f.rule for f in findings} == {"stale"}
    assert {f.parameter for f in findings} == {f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert all(f.severity == Severity.WARNING and "zero_grad() is missing" in f.causes[0] for f in findings)
    assert all(len(f.causes) == 1 for f in findings)


def test_a_missing_zero_grad_is_known_under_clipping_too():
    """Clipping works on `.grad` itself, so what is left is what was used."""

    def forgetful(model, optimizer, loss, step):
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()

    findings = findings_of(forgetful)
    assert findings
    assert all(f.rule == "stale" and f.severity == Severity.WARNING and len(f.causes) == 1 for f in findings)


def test_a_missing_zero_grad_is_known_where_clipping_hides_the_length():
    """What is used is never longer than what backward gave: the sums tell, at the fourth step."""

    def forgetful(model, optimizer, loss, step):
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()

    findings = findings_of(forgetful)
    assert {f.parameter for f in findings} == {f"{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")}
    assert {(f.rule, f.step, f.severity) for f in findings} == {("stale", 3, Severity.WARNING)}
    assert all("zero_grad() is missing" in f.causes[0] and len(f.causes) == 1 for f in findings)


@pytest.mark.parametrize("forgets", [False, True])
def test_what_the_other_turn_left_is_a_missing_zero_grad(forgets):
    """The generator's backward runs through the critic, whose gradients stay unless somebody empties them."""
    torch.manual_seed(0)
    generator, critic = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    ours, theirs = (torch.optim.SGD(part.parameters(), lr=0.01) for part in (generator, critic))
    with gradlens.watch({"G": generator, "D": critic}, [theirs, ours]) as lens:
        for step in range(6):
            fake = generator(torch.randn(16, 4, generator=torch.Generator().manual_seed(step)))
            if not forgets:
                theirs.zero_grad()
            (critic(fake.detach()).mean() - critic(torch.ones(16, 8)).mean()).backward()
            theirs.step()
            ours.zero_grad()
            (-critic(fake).mean()).backward()
            ours.step()
    stale = [f for f in lens.findings() if f.rule == "stale"]
    assert bool(stale) is forgets
    assert all(f.parameter.startswith("D.") and "zero_grad() is missing" in f.causes[0] for f in stale)


@pytest.mark.parametrize("to_none", [False, True])
def test_zero_grad_in_the_wrong_place_is_named(to_none):
    """Between backward and step: one finding, and neither a dead layer nor a small learning rate."""

    def late(model, optimizer, loss, step):
        loss.backward()
        optimizer.zero_grad(set_to_none=to_none)
        optimizer.step()

    (finding,) = findings_of(late, steps=25)
    assert (finding.rule, finding.step, len(finding.parameters)) == ("lost", 2, 6)


def test_a_step_that_nobody_takes_is_named():
    """After a hundred backward passes."""

    def idle(model, optimizer, loss, step):
        optimizer.zero_grad()
        loss.backward()

    (finding,) = findings_of(idle, steps=105)
    assert finding.rule == "unstepped"


def test_a_penalty_added_by_hand_is_an_info():
    """Its gradient is not the step before's."""

    def penalised(model, optimizer, loss, step):
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            p.grad.add_(p.detach())
        optimizer.step()

    findings = findings_of(penalised)
    assert findings
    assert all((f.rule, f.severity) == ("stale", Severity.INFO) for f in findings)
    assert all("by hand" in f.causes[0] and "if it is meant" in f.remedy for f in findings)


# --- scales ---------------------------------------------------------------------------------------------------------


def test_a_scaler_that_was_not_given_is_found():
    """Its first step shows it on the stack: it is used from then on, one info says so, and no rule sees scaled numbers."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def scaled(model, optimizer, loss, step):
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    (finding,) = findings_of(scaled)
    assert (finding.rule, finding.severity, finding.step) == ("scaler-found", "info", 0)
    assert findings_of(scaled, scaler=scaler) == []


@pytest.mark.parametrize("divisor", [2, 4, 8])
def test_dividing_by_hand_is_no_scale(divisor):
    """As by the number of ranks."""

    def divided(model, optimizer, loss, step):
        optimizer.zero_grad()
        loss.backward()
        for p in model.parameters():
            p.grad.div_(divisor)
        optimizer.step()

    assert findings_of(divided) == []


def test_the_first_steps_of_an_unknown_scaler_name_it():
    """They overflow on purpose: the error says that it may be that."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    def scaled(model, optimizer, loss, step):
        optimizer.zero_grad()
        scaler.scale(1000 * loss).backward()
        scaler.step(optimizer)
        scaler.update()

    errors = [f for f in findings_of(scaled, steps=3) if f.rule == "nonfinite"]
    assert errors
    assert all("GradScaler" in f.causes[-1] for f in errors)


# --- what the optimizer does ----------------------------------------------------------------------------------------


def test_a_layer_that_no_optimizer_got_is_named():
    """With a gradient at each step and no update; that zero_grad() passes it by is no illness of its own."""
    model = healthy().model
    optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if not name.startswith("2.")], lr=0.01)
    with gradlens.watch(model, optimizer) as lens:
        for step in range(6):
            plain(model, optimizer, classify(model, batch(step)), step)
    findings = lens.findings()
    assert [(f.rule, f.parameter, f.step) for f in findings] == [("unmoved", "2.weight", 2), ("unmoved", "2.bias", 2)]


def test_two_optimizers_that_step_in_turn_leave_nothing_unmoved():
    """Discriminator and generator: each has its own, though both have gradients at every backward."""
    generator, critic = nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    ours, theirs = (torch.optim.SGD(part.parameters(), lr=0.01) for part in (generator, critic))
    with gradlens.watch({"G": generator, "D": critic}, [theirs, ours]) as lens:
        for step in range(8):
            noise = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            if step % 2 == 0:
                theirs.zero_grad()
                critic(generator(noise)).mean().backward()
                theirs.step()
            ours.zero_grad()
            (-critic(generator(noise)).mean()).backward()
            ours.step()
    assert [f for f in lens.findings() if f.rule == "unmoved"] == []


def test_sixteen_bits_that_swallow_the_step_are_named():
    """A learning rate under which bfloat16 cannot move."""
    case = healthy()
    case.model.bfloat16()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=1e-4)
    with gradlens.watch(case.model, optimizer) as lens:
        for step in range(12):
            x, y = batch(step)
            plain(case.model, optimizer, nn.functional.cross_entropy(case.model(x.bfloat16()).float(), y), step)
    lost = [f for f in lens.findings() if f.rule == "rounded_away"]
    assert {f.parameter for f in lost} == {"0.weight", "2.weight", "4.weight"}
    assert all("bfloat16" in f.seen and f.value > 0.5 for f in lost)


def test_a_learning_rate_that_is_too_small_or_too_large_is_named():
    """By how far the weights move beside their own size."""

    def at(rate):
        case = healthy()
        optimizer = torch.optim.Adam(case.model.parameters(), lr=rate)
        with gradlens.watch(case.model, optimizer) as lens:
            for step in range(24):
                plain(case.model, optimizer, classify(case.model, batch(step)), step)
        return [f for f in lens.findings() if f.rule == "update_ratio"]

    (small,) = at(1e-8)
    assert (small.parameter, small.step) == (None, 19)
    assert {f.parameter for f in at(3.0)} == {"0.weight", "2.weight", "4.weight"}
    assert at(1e-3) == []
