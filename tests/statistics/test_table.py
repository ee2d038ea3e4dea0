"""From rows to a snapshot."""

import math

import numpy as np
import pytest
import torch

from gradlens import fields, kernels
from gradlens.records import Parameters, Status
from gradlens.statistics.table import Piece, Table, UpdatePiece, _uniform_ratio
from gradlens.statistics.transfer import Transfer

PARAMETERS = Parameters(("a", "b", "c"), ((2, 3), (4,), ()), ("float32", "float32", "complex64"))


def table(**kwargs):
    return Table(step=3, backward=1, stage="backward", parameters=PARAMETERS, time=0.0, notes=[None] * 3, **kwargs)


def snapshot(table, **scalars):
    return table.unpack(Transfer(table.pack()).wait(), scalars)


def gradients():
    torch.manual_seed(0)
    return [torch.randn(2, 3), torch.randn(4), torch.randn((), dtype=torch.complex64)]


def test_a_row_that_nothing_reached_is_zeros():
    """An absent parameter has zero = numel, sums 0, and its status; a complex one counts two reals."""
    made = table()
    made.notes = [Status.ABSENT, Status.FROZEN, Status.UNDEFINED]
    seen = snapshot(made)
    assert seen.column("zero").tolist() == seen.column("numel").tolist() == [6, 4, 2]
    assert seen.column("l2").tolist() == [0, 0, 0]
    assert seen.status.tolist() == ["absent", "frozen", "undefined"]


def test_pieces_fill_their_rows_and_no_others():
    """Pieces in any order give the rows of their parameters."""
    g = gradients()
    made = table()
    made.pieces = [
        Piece([2, 0], kernels.summarize([g[2], g[0]], [g[2], g[0]])),
        Piece([1], kernels.summarize([g[1]], [g[1]])),
    ]
    seen = snapshot(made, loss=2.5)
    for i, tensor in enumerate(g):
        reals = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        assert seen.column("l2")[i] == pytest.approx(reals.double().norm().item(), rel=1e-12)
        assert seen.histogram[i].sum() == reals.numel()
        assert seen.top.index[i, 0] == reals.abs().flatten().argmax()
    assert seen.loss == 2.5
    assert seen.status.tolist() == ["ok", "ok", "ok"]


@pytest.mark.parametrize("scale", [1024.0, 65536.0])
def test_scaled_rows_are_unscaled(scale):
    """Rows of scale * g, divided, are the rows of g: moments, histogram, quantiles, top."""
    g = gradients()
    plain, scaled = table(), table(scale=scale, divisor=scale)
    plain.pieces = [Piece([0, 1, 2], kernels.summarize(g, g))]
    scaled.pieces = [Piece([0, 1, 2], kernels.summarize([scale * x for x in g], g))]
    a, b = snapshot(plain), snapshot(scaled)
    for name in fields.VALUES:
        np.testing.assert_allclose(a.column(name), b.column(name), rtol=1e-12, err_msg=name)
    np.testing.assert_array_equal(a.histogram, b.histogram)
    np.testing.assert_allclose(a.top.partial, b.top.partial)
    assert b.column("scale").tolist() == [scale] * 3


def test_scales_may_arrive_as_tensors():
    """A scale that lives on a device travels with the rows."""
    g = gradients()
    made = table(scale=torch.tensor(2.0), divisor=torch.tensor(2.0))
    made.pieces = [Piece([0, 1, 2], kernels.summarize([2 * x for x in g], g), torch.tensor(0.0))]
    assert snapshot(made).status.tolist() == ["ok"] * 3
    assert snapshot(made).column("sum")[0] == pytest.approx(g[0].double().sum().item(), rel=1e-6)


def test_a_skipped_step_is_nonfinite_where_there_was_a_gradient():
    """Every captured row of a skipped step says so; an absent one, and one of another optimizer that stepped, do not."""
    made = table()
    made.notes = [None, None, Status.ABSENT]
    made.pieces = [Piece([0], kernels.summarize(gradients()[:1]), True), Piece([1], kernels.summarize(gradients()[1:2]))]
    assert snapshot(made).status.tolist() == ["nonfinite", "ok", "absent"]
    made.pieces = [Piece([0, 1], kernels.summarize(gradients()[:2]), torch.tensor(1.0))]
    assert snapshot(made).status.tolist() == ["nonfinite", "nonfinite", "absent"]


def test_statuses_come_from_the_numbers():
    """NaN is nonfinite, all zeros is zero; what was stale and is zero is absent; uncaptured zeros are absent too."""
    made = table()
    made.pieces = [Piece([0, 1], kernels.summarize([torch.tensor([math.nan] * 6), torch.zeros(4)]))]
    assert snapshot(made).status.tolist()[:2] == ["nonfinite", "zero"]
    made.notes = [Status.UNCAPTURED, "stale", Status.UNCAPTURED]
    assert snapshot(made).status.tolist() == ["uncaptured", "absent", "absent"]


def test_rows_of_another_optimizer_are_left_out():
    """A row that is read elsewhere is not in this snapshot."""
    made = table()
    made.notes = [None, "elsewhere", "elsewhere"]
    made.pieces = [Piece([0], kernels.summarize(gradients()[:1]))]
    assert snapshot(made).names == ("a",)


def test_a_uniform_ratio_is_found_and_another_is_not():
    """after = c * before for all entries gives c; anything else gives NaN."""
    before = np.random.default_rng(0).normal(size=(5, 16))
    eps = 1.2e-7
    assert _uniform_ratio(before, 0.25 * before, eps) == 0.25
    assert math.isnan(_uniform_ratio(before, np.clip(before, -0.5, 0.5), eps))
    assert math.isnan(_uniform_ratio(before, before + 0.1, eps))
    assert math.isnan(_uniform_ratio(np.zeros((2, 16)), np.zeros((2, 16)), eps))
    assert math.isnan(_uniform_ratio(before, -before, eps))


def update(table, g, used, *, same=False, kept=None, scale=1.0):
    before = [torch.zeros_like(x) for x in used]
    after = [-0.1 * x for x in used]
    rows = [0, 1]
    return UpdatePiece(
        Piece(rows, kernels.compare(used, before, after, kept)),
        moved=[True, True],
        skipped=False,
        kept=kept is not None,
        ended=Piece(rows, kernels.sample(g)),
        used=Piece(rows, kernels.sample(used)),
        same=same,
        scale=scale,
    )


@pytest.mark.parametrize(
    ("way", "exact"), [("same", True), ("kept", True), ("inferred", False), ("unknown", False), ("touched", False)]
)
def test_loss_change_and_whether_it_is_exact(way, exact):
    """g.dw: exact where g was kept or equals the used one, inferred from a uniform ratio, else empty."""
    g = [x.double() for x in gradients()[:2]]
    used = {"same": g, "unknown": [x.clamp(-0.1, 0.1) for x in g]}.get(way, [0.5 * x for x in g])
    made = table()
    made.pieces = [Piece([0, 1], kernels.summarize(used))]
    made.updates = [update(made, g, used, same=way in ("same", "touched"), kept=g if way == "kept" else None)]
    seen = snapshot(made)
    expected = [(-0.1 * (a * b).sum()).item() for a, b in zip(g, used, strict=True)]
    if way == "unknown":
        assert np.isnan(seen.column("loss_change")[:2]).all()
    else:
        np.testing.assert_allclose(seen.column("loss_change")[:2], expected, rtol=1e-9)
    assert seen.column("loss_change_exact")[:2].tolist() == [exact, exact]
    assert not seen.column("loss_change_exact")[2]


def test_a_kept_gradient_is_unscaled():
    """A kept gradient still carries the loss scale; the dot product is divided by it."""
    g = [x.double() for x in gradients()[:2]]
    made = table()
    made.pieces = [Piece([0, 1], kernels.summarize(g))]
    made.updates = [update(made, [8 * x for x in g], g, kept=[8 * x for x in g], scale=8.0)]
    expected = [(-0.1 * (x * x).sum()).item() for x in g]
    np.testing.assert_allclose(snapshot(made).column("loss_change")[:2], expected, rtol=1e-9)


def test_an_update_of_a_skipped_step_is_empty():
    """Where the fused kernel did nothing, there is no update to speak of."""
    g = gradients()[:2]
    made = table()
    made.pieces = [Piece([0, 1], kernels.summarize(g))]
    piece = update(made, g, g, same=True)
    piece.skipped = torch.tensor(1.0)
    made.updates = [piece]
    assert np.isnan(snapshot(made).column("update_l2")).all()


def test_what_rests_on_the_same_pieces_is_taken_from_the_snapshot_before():
    """The same numbers as read anew, with updates of its own; the other snapshot has none of them."""
    g = gradients()
    first, second = table(), table()
    first.pieces = [Piece([0, 1, 2], kernels.summarize(g, g))]
    second.pieces, second.notes = list(first.pieces), [None, None, Status.ABSENT]
    second.updates = [update(second, g[:2], g[:2], same=True)]
    before = snapshot(first)
    taken = second.unpack(Transfer(second.pack()).wait(), {}, (first, before))
    read = snapshot(second)
    for name in fields.VALUES:
        np.testing.assert_array_equal(taken.column(name), read.column(name), err_msg=name)
    assert taken.status.tolist() == read.status.tolist() == ["ok", "ok", "absent"]
    assert taken.histogram is before.histogram
    assert np.isnan(before.column("update_ratio")).all()


def test_another_divisor_or_other_pieces_are_read():
    """Only the very same numbers are taken over."""
    g = gradients()
    first, second = table(), table(scale=4.0, divisor=4.0)
    first.pieces = [Piece([0, 1, 2], kernels.summarize(g, g))]
    second.pieces = list(first.pieces)
    for other in (second, table()):
        taken = other.unpack(Transfer(other.pack()).wait(), {}, (first, snapshot(first)))
        np.testing.assert_array_equal(taken.column("l2"), snapshot(other).column("l2"))
