"""`watch(keep=...)`: whole partials of chosen parameters, as the optimizer used them."""

import threading

import numpy as np
import pytest
import torch

import gradlens
from gradlens.errors import ArgumentError, ArgumentTypeError, GradlensWarning
from gradlens.store import partials as stored
from gradlens.testing import healthy
from gradlens.watching import partials as live


def test_what_is_kept_is_what_the_optimizer_used(tmp_path):
    """The partials and the weights before the step, bit for bit, at steps that spread over the run."""
    case, seen = healthy(), {}
    named = dict(case.model.named_parameters())

    def before(optimizer, args, kwargs):
        seen[len(seen)] = {name: (p.grad.clone(), p.detach().clone()) for name, p in named.items()}

    case.optimizer.register_step_pre_hook(before)
    with gradlens.watch(case.model, case.optimizer, run=tmp_path / "run", keep=["0.weight", "*.bias"]):
        case.train(40)
    run = gradlens.open_run(tmp_path / "run")
    kept = run.kept()
    assert set(kept) == {"0.weight", "0.bias", "2.bias", "4.bias"}
    assert kept["0.weight"] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 23, 26, 29, 32, 36]
    for name, steps in kept.items():
        for step in steps:
            found, (partial, value) = run.partials(name, step), seen[step][name]
            np.testing.assert_array_equal(found.partial, partial.numpy())
            np.testing.assert_array_equal(found.value, value.numpy())


def test_training_and_the_optimizer_are_as_without_it(tmp_path):
    """The same weights to the bit, and no hook stays behind."""
    case, twin = healthy(), healthy()
    hooks = dict(case.optimizer._optimizer_step_pre_hooks)
    with gradlens.watch(case.model, case.optimizer, run=tmp_path / "run", keep="*"):
        case.train(15)
    twin.train(15)
    for a, b in zip(case.model.parameters(), twin.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert dict(case.optimizer._optimizer_step_pre_hooks) == hooks


def test_scaled_gradients_are_kept_unscaled(tmp_path):
    """Under a GradScaler the partials are those of the loss itself."""
    case, plain = healthy(), healthy()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradlens.watch(case.model, case.optimizer, run=tmp_path / "run", scaler=scaler, keep="0.weight"):
        for data in case.batches(2):
            case.optimizer.zero_grad()
            scaler.scale(case.loss(case.model, data)).backward()
            scaler.step(case.optimizer)
            scaler.update()
    (data,) = plain.batches(1)
    plain.loss(plain.model, data).backward()
    found = gradlens.open_run(tmp_path / "run").partials("0.weight", 0)
    np.testing.assert_allclose(found.partial, plain.model[0].weight.grad.numpy(), rtol=1e-5)


def test_parameters_of_several_optimizers_are_kept(tmp_path):
    """Each optimizer's at its own call, under one step."""
    case = healthy()
    parts = [torch.optim.SGD(case.model[i].parameters(), lr=0.01) for i in (0, 2)]
    with gradlens.watch(case.model, parts, run=tmp_path / "run", keep=["0.weight", "2.weight"]):
        for data in case.batches(3):
            for each in parts:
                each.zero_grad()
            case.loss(case.model, data).backward()
            for each in parts:
                each.step()
    assert gradlens.open_run(tmp_path / "run").kept() == {"0.weight": [0, 1, 2], "2.weight": [0, 1, 2]}


def test_only_observed_steps_are_kept(tmp_path):
    """With `schedule=5` those, and no others: the other numbers of the step are there too."""
    case = healthy()
    with gradlens.watch(case.model, case.optimizer, run=tmp_path / "run", schedule=5, keep="0.bias"):
        case.train(20)
    assert gradlens.open_run(tmp_path / "run").kept() == {"0.bias": [0, 5, 10, 15]}


def test_a_resumed_training_keeps_on(tmp_path):
    """Steps that the second lens sees replace those of the first."""
    case = healthy()
    for first in (0, 4):
        with gradlens.watch(case.model, case.optimizer, run=tmp_path / "run", first_step=first, keep="0.bias"):
            case.train(6, first=first)
    assert gradlens.open_run(tmp_path / "run").kept() == {"0.bias": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": "0.wieght"}, ArgumentError, "0.weight"),
        ({"keep": []}, ArgumentTypeError, "name or glob pattern"),
        ({"keep": [3]}, ArgumentTypeError, "name or glob pattern"),
        ({"keep": "0.weight", "run": None}, ArgumentError, "give run="),
        ({"keep": "0.weight", "optimizer": None}, ArgumentError, "give watch\\(\\) the optimizer"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, options, error, message):
    """Before anything is attached; the model can be watched at once afterwards."""
    case = healthy()
    optimizer = options.pop("optimizer", case.optimizer)
    given = {"run": tmp_path / "run", **options}
    with pytest.raises(error, match=message):
        gradlens.watch(case.model, optimizer, **given)
    with gradlens.watch(case.model, case.optimizer, run=tmp_path / "run"):
        case.train(1)


def test_more_than_the_allowance_is_refused(tmp_path, monkeypatch):
    """With what it would take a step, and what there is."""
    monkeypatch.setattr(live, "ALLOWANCE", 1000)
    case = healthy()
    with pytest.raises(ArgumentError, match=r"allowance .* has to hold 4 steps"):
        gradlens.watch(case.model, case.optimizer, run=tmp_path / "run", keep="*")


def test_a_disk_that_fails_is_told_and_training_goes_on(tmp_path, monkeypatch):
    """One warning and one finding; the other records are whole."""

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(stored.PartialStore, "write", fail)
    case = healthy()
    with pytest.warns(GradlensWarning, match="no space left"):
        lens = gradlens.watch(case.model, case.optimizer, run=tmp_path / "run", keep="0.weight")
        case.train(12)
        lens.close()
    assert gradlens.open_run(tmp_path / "run").steps() == list(range(12))


def test_a_slow_disk_costs_steps_and_no_time(tmp_path, monkeypatch):
    """No more waits than allowed; training goes on at once, and steps that do not fit are left out."""
    slow, write = threading.Event(), stored.PartialStore.write

    def late(*args):
        slow.wait(20)
        write(*args)

    monkeypatch.setattr(stored.PartialStore, "write", late)
    monkeypatch.setattr(live, "WAITING", 3 * 2 * 4 * 256)
    case = healthy()
    with gradlens.watch(case.model, case.optimizer, run=tmp_path / "run", keep="0.weight"):
        case.train(10)
        slow.set()
    assert gradlens.open_run(tmp_path / "run").kept()["0.weight"] == [0, 1, 2]
