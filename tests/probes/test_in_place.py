"""Inputs that hold float64 in their own places: the same answers as by the mode, and no trace."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradlens.errors import ProbeError
from gradlens.probes.finite_difference import check_partials
from gradlens.probes.float64 import Float64
from gradlens.probes.isolated_loss import IsolatedLoss
from gradlens.probes.symmetry import check_symmetry

from .helpers import bits


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


ALL = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
X, Y = ALL[:16], torch.randint(3, (16,), generator=torch.Generator().manual_seed(2))  # X is a view, which is kept
ROWS, ROOM = torch.arange(0, 64, 4), torch.zeros(16, 4)

PLAIN = {
    "inputs": lambda m: F.cross_entropy(m(X), Y),
    "chosen from a larger tensor": lambda m: F.cross_entropy(m(ALL[ROWS]), Y),
    "a view and its base": lambda m: F.cross_entropy(m(X), Y) + m(ALL).square().mean(),
    "asked for their type": lambda m: (m(X) * (1.0 if X.dtype == torch.float64 else 3.0)).square().mean(),
    "integers alone": lambda m: m[0].weight[Y].square().mean(),
}
NOT_PLAIN = {
    "a cast": lambda m: m(X).float().square().mean(),
    "a dtype": lambda m: m(X.to(torch.float32)).square().mean(),
    "made anew": lambda m: m(torch.from_numpy(X.numpy())).square().mean(),
    "written into": lambda m: m(X.clone().mul_(2)).square().mean() + torch.mul(X, 2, out=ROOM).sum(),
    "torch.func": lambda m: torch.func.vmap(lambda x: m(x).square().sum())(X).mean(),
    "in numpy": lambda m: m(torch.tensor(X.numpy().mean(0, keepdims=True))).square().mean(),
}


@pytest.mark.parametrize("name", [*PLAIN, *NOT_PLAIN])
def test_answers_and_inputs_stay_the_same(name, monkeypatch):
    """Checks pass, and say the same numbers as with the mode alone; inputs keep identity, storage, type and version."""
    loss = {**PLAIN, **NOT_PLAIN}[name]
    before = [(bits(x), x.data_ptr(), x._version, x.storage_offset(), x.stride(), x._base is None) for x in (X, ALL)]
    found = check_partials(net(), loss, k=20), check_symmetry(net(), loss, k=2)
    assert [(bits(x), x.data_ptr(), x._version, x.storage_offset(), x.stride(), x._base is None) for x in (X, ALL)] == before
    monkeypatch.setattr(Float64, "inputs", lambda self, held: None)
    alone = check_partials(net(), loss, k=20), check_symmetry(net(), loss, k=2)
    assert found[0].ok
    assert found[1].ok
    assert found[0].rows == alone[0].rows
    assert (found[1].asymmetry, found[1].tolerance) == (alone[1].asymmetry, alone[1].tolerance)


@pytest.mark.parametrize("name", [*PLAIN, *NOT_PLAIN])
def test_the_mode_is_left_out_only_where_inputs_are_all_there_is(name):
    """Plain losses go without it; casts, dtypes, writes and transforms keep it."""
    loss = {**PLAIN, **NOT_PLAIN}[name]
    with IsolatedLoss(net(), loss, wide=True) as isolated:
        first = isolated.gradient()[0].item()
        isolated.loss_again(first)
        without = isolated.watch_operations()
    if name in PLAIN:
        assert without
    elif name in ("a cast", "a dtype", "written into"):
        assert not without


def test_a_loss_that_takes_another_way_later_is_judged_with_the_mode():
    """What looks wrong without the mode is looked at with it before it is said."""
    calls = []

    def loss(m):
        calls.append(1)
        out = m(X)
        if len(calls) > 4:  # from the noise measurement on
            out = out.to(torch.float32)
        return out.square().mean()

    assert check_partials(net(), loss, k=12).ok


def test_an_error_of_the_second_call_comes_out():
    """And the inputs are as they were."""
    before, calls = bits(X), []

    def loss(m):
        calls.append(1)
        if len(calls) == 3:  # the first asks whether the argument is used
            raise LookupError("mine")
        return m(X).square().mean()

    with pytest.raises((LookupError, ProbeError)):
        check_partials(net(), loss, k=4)
    assert bits(X) == before


def branches(kind):
    """A loss that on one side of where it starts does what its first evaluation did not."""
    torch.manual_seed(0)
    model, x, y, narrow = nn.Linear(3, 1), torch.randn(6, 3), torch.randn(6, 1), torch.randn(1, 1)
    start = float((model(x) - y).double().square().mean().detach())

    def loss(m):
        found = (m(x) - y).square().mean()
        if found > start + 1e-7:
            if kind == "writes":
                y.clamp_(-0.5, 0.5)
            else:
                found = found + 0 * (m(x) @ torch.from_numpy(narrow.numpy())).mean()
        return found

    return model, loss, (x, y, narrow)


@pytest.mark.parametrize("kind", ["writes", "brings a narrow tensor"])
def test_a_branch_that_comes_later_is_computed_as_by_the_mode(kind, monkeypatch):
    """With the mode at each operation the same numbers; and the inputs are as they were."""
    model, loss, inputs = branches(kind)
    before = [t.clone() for t in inputs]
    found = check_partials(model, loss)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    monkeypatch.setattr(Float64, "inputs", lambda self, held: None)
    model, loss, _ = branches(kind)
    by_mode = check_partials(model, loss)
    assert str(found) == str(by_mode)
    assert "4 of 4" in str(by_mode)
