"""Assertions for users' own suites: each passes on a healthy training and says what is wrong with an ill one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradlens
from gradlens import testing

pytest_plugins = ["gradlens.integrations.pytest"]


def trained(model, optimizer, steps=3, x=None, **options):
    """A lens on a short training."""
    lens = gradlens.watch(model, optimizer, **options)
    x = torch.randn(8, 4) if x is None else x
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    lens.close()
    return lens


def two():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


def test_all_trained_passes_on_a_plain_training():
    """Of a lens and of the run that it recorded."""
    model = two()
    testing.assert_all_trained(trained(model, torch.optim.SGD(model.parameters(), lr=0.1)))


def test_all_trained_names_what_the_loss_does_not_reach(tmp_path):
    """And what no optimizer moves; `but` excuses some; a run answers as the lens does."""
    model = nn.ModuleDict({"used": nn.Linear(4, 2), "unused": nn.Linear(4, 2)})
    model.forward = lambda x: model["used"](x)
    lens = trained(model, torch.optim.SGD(model.parameters(), lr=0.1), run=tmp_path / "run")
    for watched in (lens, gradlens.open_run(tmp_path / "run")):
        with pytest.raises(AssertionError, match=r"2 parameters were not trained:\nunused.weight never had a gradient"):
            testing.assert_all_trained(watched)
        testing.assert_all_trained(watched, but="unused.*")
    model = two()
    lens = trained(model, torch.optim.SGD(model[1].parameters(), lr=0.1))
    with pytest.raises(AssertionError, match=r"0\.weight had a gradient, and no optimizer moved it"):
        testing.assert_all_trained(lens)


def test_all_trained_wants_an_optimizer():
    """Without a step there is nothing to say."""
    model = two()
    with gradlens.watch(model, torch.optim.SGD(model.parameters(), lr=0.1)) as lens:
        model(torch.randn(2, 4)).sum().backward()
        with pytest.raises(AssertionError, match="no optimizer stepped"):
            testing.assert_all_trained(lens)


def test_finite_names_the_first_that_is_not():
    """The parameter, the step, and how many."""
    model = two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    testing.assert_finite(trained(model, optimizer))
    with pytest.raises(AssertionError, match="at step 0"):
        testing.assert_finite(trained(model, optimizer, x=torch.full((8, 4), torch.inf)))


def test_healthy_passes_and_fails_with_the_diagnosis():
    """A diagnosis, or what can be asked for one."""
    case = testing.healthy()
    lens = gradlens.watch(case.model, case.optimizer)
    case.train(30)
    lens.close()
    testing.assert_healthy(lens.diagnosis())
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lens = gradlens.watch(model, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 4)), torch.zeros(8, dtype=torch.long)).backward()
        optimizer.step()
    lens.close()
    with pytest.raises(AssertionError, match="softmax"):
        testing.assert_healthy(lens)


def test_the_fixture_watches_for_one_test(watched):
    """Its lens is open in the test."""
    model = two()
    lens = watched(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert not lens.closed
