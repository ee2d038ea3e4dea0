"""Sparse tables stay sparse: the probes make nothing as large as the table but the copies that they say."""

import functools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gradlens
from gradlens.probes import stand_ins
from gradlens.probes.rows import Rows

ROWS, WIDTH = 5_000, 4


class Bag(nn.Module):
    def __init__(self, sparse=True):
        super().__init__()
        self.table, self.out = nn.Embedding(ROWS, WIDTH, sparse=sparse, padding_idx=0), nn.Linear(WIDTH, 3)

    def forward(self, words):
        return self.out(self.table(words).tanh().sum(1))


def made(sparse=True):
    torch.manual_seed(0)
    return Bag(sparse), torch.tensor([[1, 7, 7], [0, 4_000, 9]]), torch.tensor([0, 2])


def loss_of(words, labels):
    return lambda m: F.cross_entropy(m(words), labels)


class Large(TorchDispatchMode):
    """Counts the operations that make a new tensor as large as the table."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor) and x.layout == torch.strided}
        out = func(*args, **(kwargs or {}))
        strided = isinstance(out, torch.Tensor) and out.layout == torch.strided
        if strided and out.numel() >= ROWS * WIDTH and out.untyped_storage().data_ptr() not in known:
            self.made.append(func.__name__)
        return out


PROBES = {
    "check_partials": (lambda m, loss: gradlens.check_partials(m, loss, k=9), 1),
    "check_symmetry": (lambda m, loss: gradlens.check_symmetry(m, loss), 1),
    "curvature": (lambda m, loss: gradlens.curvature(m, loss, samples=4), 2),
}


@pytest.mark.parametrize("probe", PROBES)
def test_no_probe_makes_a_dense_gradient_of_a_sparse_one(probe, monkeypatch):
    """Nothing of the table's size is made but its float64 copies, one for each time that the loss is isolated."""
    monkeypatch.setattr(stand_ins, "CHUNK", 1 << 10)  # of the comparison with the live table
    model, words, labels = made()
    call, copies = PROBES[probe]
    with Large() as large:
        call(model, loss_of(words, labels))
    assert len(large.made) <= copies, large.made


def test_a_sparse_table_has_the_curvature_of_a_dense_one():
    """In the rows that are looked up; the others are left out, and counted."""
    model, words, labels = made()
    dense, _, _ = made(sparse=False)
    found = gradlens.curvature(model, loss_of(words, labels), samples=4)
    other = gradlens.curvature(dense, loss_of(words, labels), samples=4)
    assert found.top == pytest.approx(other.top, rel=1e-3)
    assert found.untouched == (ROWS - 4) * WIDTH  # the padding row has no gradient
    assert f"{found.untouched:,} weights are left out" in str(found)
    assert len(found.weights("table.weight[7, 1]")) == 1
    assert {i[0] for i in found.weights("table.weight")["index"]} == {1, 7, 9, 4_000}
    assert other.untouched == 0


def test_a_product_with_a_sparse_table_is_that_of_a_dense_one():
    """Given and returned in the parameter's shape."""
    model, words, labels = made()
    dense, _, _ = made(sparse=False)
    vector = {"table.weight": torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))}
    with pytest.warns(gradlens.GradlensWarning, match="sparse gradient has no second derivative"):
        found = gradlens.hessian_product(model, loss_of(words, labels), vector)
    other = gradlens.hessian_product(dense, loss_of(words, labels), vector)
    for name in found:
        torch.testing.assert_close(found[name], other[name], rtol=1e-4, atol=1e-6)


def test_half_of_the_weights_checked_lie_in_rows_that_are_looked_up():
    """Of 5,000 rows the batch looks up four, and a draw among all of them would test nothing."""
    model, words, labels = made()
    frame = gradlens.check_partials(model, loss_of(words, labels), k=30).frame
    rows = [index[0] for index in frame[frame["parameter"] == "table.weight"]["index"]]
    assert 0 not in rows
    assert sum(row in {1, 7, 9, 4_000} for row in rows) >= len(rows) / 2 - 1


def test_a_wrong_backward_into_a_sparse_table_is_found():
    """The rows are no hiding place."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0]  # half of what it is

    model, words, labels = made()
    wrong = lambda m: F.cross_entropy(m.out(Scaled.apply(m.table(words)).sum(1)), labels)  # noqa: E731
    assert not gradlens.check_partials(model, wrong).ok
    assert not gradlens.check_symmetry(model, wrong).ok


def test_rows_that_another_gradient_lacks_are_zeros():
    """Compact gradients of one table line up, whichever rows each of them has."""
    sparse = functools.partial(torch.sparse_coo_tensor, size=(6, 2), check_invariants=True)
    weight = torch.zeros(6, 2)
    rows = Rows.of(sparse([[4, 1]], torch.ones(2, 2)), weight)
    assert rows.index.tolist() == [1, 4]
    other = sparse([[4, 5]], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    np.testing.assert_array_equal(rows.gradient(other, weight), [[0, 0], [1, 2]])
    assert rows.entry(rows.gradient(other, weight), 4 * 2 + 1) == 2
    assert rows.entry(rows.gradient(other, weight), 5 * 2) == 0
    np.testing.assert_array_equal(rows.flat(), [2, 3, 8, 9])
