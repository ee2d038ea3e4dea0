"""The loss of each backward, from its root, and to which step an observed loss belongs."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradlens
from gradlens.capture.losses import Roots, loss_of
from gradlens.records import Stage

X, Y = torch.randn(8, 4), torch.randint(0, 3, (8,))


def trained(steps, body, **options):
    """A short training; `body(model, optimizer, lens, k)` does a step. Gives the lens, closed."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lens = gradlens.watch(model, optimizer, **options)
    for k in range(steps):
        body(model, optimizer, lens, k)
    lens.close()
    return lens


def losses(lens, stage=Stage.BACKWARD):
    return [(s.step, s.backward, s.loss) for s in lens._recorder.history if s.stage == stage]


def test_the_loss_needs_no_third_line():
    """Each backward's table has the loss that backward was called on, bit for bit."""
    seen = []

    def step(model, optimizer, lens, k):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        seen.append(float(loss.detach()))
        loss.backward()
        optimizer.step()

    lens = trained(4, step)
    assert losses(lens) == [(k, 0, value) for k, value in enumerate(seen)]
    assert [loss for _, _, loss in losses(lens, Stage.USED)] == seen
    assert "loss" in lens.report()


def test_each_micro_batch_has_its_own():
    """Several backwards of a step, each with its loss."""

    def step(model, optimizer, lens, k):
        optimizer.zero_grad()
        for part in range(3):
            (model(X).sum() * 0 + part).backward()
        optimizer.step()

    assert losses(trained(2, step)) == [(k, part, float(part)) for k in range(2) for part in range(3)]


def test_a_scaled_loss_is_unscaled():
    """Under a GradScaler the root is the loss times the scale."""
    scaler, seen = torch.amp.GradScaler("cpu", init_scale=1024.0), []

    def step(model, optimizer, lens, k):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        seen.append(float(loss.detach()))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    found = losses(trained(3, step, scaler=scaler))
    assert [loss for _, _, loss in found] == pytest.approx(seen, rel=1e-6)


def test_an_observed_loss_wins():
    """Before backward, for the step that comes."""

    def step(model, optimizer, lens, k):
        optimizer.zero_grad()
        lens.observe(loss=100.0 + k)
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()

    assert [loss for _, _, loss in losses(trained(3, step))] == [100.0, 101.0, 102.0]


@pytest.mark.parametrize("how", [lambda loss: loss, lambda loss: loss.item()])
def test_a_loss_that_is_observed_after_the_step_belongs_to_its_backward(how):
    """As most loops log: the tensor, or its number, and never one step late."""
    seen = []

    def step(model, optimizer, lens, k):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X), Y)
        seen.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        lens.observe(loss=how(loss))

    assert [loss for _, _, loss in losses(trained(4, step))] == seen


@pytest.mark.parametrize(
    ("roots", "loss"),
    [
        ((torch.tensor(2.0),), 2.0),
        ((torch.tensor([2.0]),), 2.0),
        ((torch.tensor(6.0, dtype=torch.bfloat16),), 6.0),
        ((torch.ones(3),), None),
        ((torch.tensor(1), ), None),
        ((torch.tensor(1.0), torch.tensor(2.0)), None),
        ((), None),
        ((nn.Parameter(torch.tensor(1.0)),), None),
        ((torch.tensor(1.0, device="meta"),), None),
    ],
)  # fmt: skip
def test_only_one_real_number_is_a_loss(roots, loss):
    """Several roots, several entries, integers and tensors without numbers are none."""
    assert loss_of(roots) == loss


def test_a_device_scale_keeps_the_loss_on_the_device():
    """Nothing is waited for: a tensor, which the host reads later."""
    loss = loss_of((torch.tensor(8.0),), torch.tensor(4.0))
    assert isinstance(loss, torch.Tensor)
    assert float(loss) == 2.0


def test_roots_are_not_kept_alive():
    """A root that is gone is no root, and its number still is."""
    roots, root = Roots(), torch.tensor(3.0)
    roots.add(weakref.ref(root), 7, 3.0)
    assert roots.step_of(root) == 7
    del root
    assert roots.step_of(3.0) == 7
    assert roots.step_of(torch.tensor(3.0)) is None
    assert roots.step_of(4.0) is None


def test_training_is_the_same_bit_for_bit():
    """With the loss, the graph, features and settings read, and without."""
    weights = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        lens = gradlens.watch(model, optimizer) if watched else None
        for _ in range(8):
            optimizer.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            optimizer.step()
        if lens is not None:
            lens.close()
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *weights))
