"""Moments of sparse gradients are those of the same gradients made dense."""

import pytest
import torch

from gradlens.probes.table_moments import TableMoments
from gradlens.statistics.evidence import Moments

ROWS, WIDTH = 13, 3


def gradients(kinds, seed=0):
    """Of a table and of a bias, some of them sparse, one with a row twice, one without a row, one that is None."""
    random = torch.Generator().manual_seed(seed)
    for kind in kinds:
        rows = torch.randint(ROWS, (0 if kind == "empty" else 4,), generator=random)
        values = torch.randn(len(rows), WIDTH, generator=random, dtype=torch.float64)
        table = torch.sparse_coo_tensor(rows[None], values, (ROWS, WIDTH), check_invariants=True)
        table = None if kind == "none" else table.to_dense() if kind == "dense" else table
        yield [table, torch.randn(5, generator=random, dtype=torch.float64)]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    "kinds", ["sparse " * 9, "dense sparse empty sparse none dense sparse", "empty empty", "none sparse"]
)
def test_sparse_and_dense_agree(kinds, sampled):
    """Mean, squares and counts of signs, also of a sample, whatever kinds of gradients come in what order and weight."""
    like = [torch.zeros(ROWS, WIDTH), torch.zeros(5)]
    index = [torch.tensor([0, 4, 5, 17, 38]), None] if sampled else None
    dense = Moments(like, index)
    lazy = TableMoments(Moments(like, index), like)
    for k, gradient in enumerate(gradients(kinds.split())):
        weight = float(1 + k % 3)
        lazy.update(gradient, weight)
        dense.update([g.to_dense() if g is not None and g.is_sparse else g for g in gradient], weight)
    for _ in range(2):  # to settle again changes nothing
        found = lazy.settle()
    assert (found.count, found.weight) == (dense.count, dense.weight)
    for name in ("mean", "squares", "positive", "negative"):
        for a, b in zip(getattr(found, name), getattr(dense, name), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_a_partial_that_is_not_finite_stays_so():
    """NaN in one row marks its weights, and no other."""
    like = [torch.zeros(ROWS, WIDTH)]
    lazy = TableMoments(Moments(like), like)
    for row in (2, 3, 2):
        value = torch.full((1, WIDTH), torch.nan if row == 3 else 1.0)
        lazy.update([torch.sparse_coo_tensor([[row]], value, (ROWS, WIDTH), check_invariants=True)], 1.0)
    mean = lazy.settle().mean[0].view(ROWS, WIDTH)
    assert mean[3].isnan().all()
    assert mean[[*range(3), *range(4, ROWS)]].isfinite().all()
