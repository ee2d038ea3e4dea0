"""Many tables at once are what each is by itself."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens import fields, kernels
from gradlens.records import Parameters, Status
from gradlens.statistics.table import Piece, Table, UpdatePiece
from gradlens.statistics.unpacking import Arrival, likeness, unpack

PARAMETERS = Parameters(("a", "b", "c"), ((2, 3), (4,), ()), ("float32", "float32", "complex64"))
NOTES = [None, None, None, None, "stale", "gone", "elsewhere", *(str(status) for status in Status)]


def tensors(rng):
    """Three gradients or weights, some of them of zeros, of NaN, or all alike."""
    made = [
        torch.from_numpy(rng.normal(size=6).astype(np.float32)).reshape(2, 3),
        torch.from_numpy(rng.normal(size=4).astype(np.float32)),
        torch.from_numpy(rng.normal(size=1).astype(np.complex64)).reshape(()),
    ]
    for each in made:
        kind = rng.random()
        if kind < 0.1:
            each.zero_()
        elif kind < 0.15:
            each.fill_(float("nan"))
    return made


@st.composite
def trainings(draw):
    """Tables as a training gives them: backward and used, of all rows or some, clipped or not, and odd ones between.

    What the optimizer used may be noted otherwise than what backward left: another optimizer has the rest of the rows.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = draw(st.sampled_from([[0, 1, 2], [0, 2], [1]]))
    notes = draw(st.sampled_from([[], [None] * 3, rng.choice(NOTES, 3).tolist()]))
    used_notes = draw(st.sampled_from([notes, ["elsewhere"] * 3, rng.choice(NOTES, 3).tolist()]))
    clip = draw(st.sampled_from([1.0, 0.5, None]))
    made = []
    for step in range(draw(st.integers(1, 6))):
        odd = rng.random() < draw(st.sampled_from([0.0, 0.3]))
        g, w = tensors(rng), tensors(rng)
        piece = Piece(rows, kernels.summarize([g[i] for i in rows], [w[i] for i in rows], detail=bool(rng.random() < 0.7)))
        divisor = 2.0 if odd else 1.0
        made.append(Table(step, 0, "backward", PARAMETERS, float(step), divisor=divisor, notes=list(notes), pieces=[piece]))
        made.append(_used(step, g, w, rows, used_notes, piece, clip, bool(rng.random() < 0.9)))
    return made


def _used(step, g, w, rows, notes, piece, clip, moved):
    used = [each * clip if clip else torch.sgn(each) * each.abs().clamp(max=0.1) for each in g]
    after = [a - 0.1 * torch.ones_like(a) for a in w]
    samples = [Piece(rows, kernels.sample([each[i] for i in rows])) for each in (g, used)]
    numbers = kernels.compare([g[i] for i in rows], [w[i] for i in rows], [after[i] for i in rows])
    same = clip == 1.0
    updated = UpdatePiece(Piece(rows, numbers), [moved] * len(rows), False, False, *samples, same)
    own = piece if same else Piece(rows, kernels.summarize([used[i] for i in rows], [w[i] for i in rows]))
    return Table(step, 0, "used", PARAMETERS, step + 0.5, notes=list(notes), pieces=[own], updates=[updated])


@settings(max_examples=60, deadline=None)
@given(trainings())
def test_at_once_is_one_by_one(tables):
    """Every column, status, histogram and most sensitive weight, bit for bit."""
    seen = [block.snapshot(at) for block, at in unpack([Arrival(table, {"loss": 1.0}) for table in tables])]
    for table, got in zip(tables, seen, strict=True):
        expected = table.unpack([tensor.numpy() for tensor in table.pack()], {"loss": 1.0})
        assert (got.step, got.stage, got.names, got.time) == (expected.step, expected.stage, expected.names, expected.time)
        assert got.scalars == expected.scalars
        np.testing.assert_array_equal(got.status, expected.status)
        np.testing.assert_array_equal(got.scale, expected.scale)
        for name in (*fields.BY_NAME, *fields.QUANTILES):
            np.testing.assert_array_equal(got.columns[name], expected.columns[name], err_msg=name)
            assert got.columns[name].dtype == expected.columns[name].dtype
        if expected.histogram is None:
            assert got.histogram is None
        else:
            np.testing.assert_array_equal(got.histogram, expected.histogram)
        for name in ("index", "partial", "value"):
            np.testing.assert_array_equal(getattr(got.top, name), getattr(expected.top, name))


def test_alike_steps_are_one_block():
    """A hundred steps of a training are two blocks, and the used rows share what backward's have."""
    tables = []
    rng = np.random.default_rng(0)
    for step in range(100):
        g, w = tensors(rng), tensors(rng)
        piece = Piece([0, 1, 2], kernels.summarize(g, w, detail=step % 10 == 0))
        tables.append(Table(step, 0, "backward", PARAMETERS, 0.0, pieces=[piece]))
        tables.append(_used(step, g, w, [0, 1, 2], [], piece, 1.0, True))
    moments = unpack([Arrival(table, {}) for table in tables])
    blocks = {id(block): block for block, _ in moments}
    assert sorted((block.stage, len(block)) for block in blocks.values()) == [("backward", 100), ("used", 100)]
    backward, used = (block for block, _ in moments[:2])
    assert used.columns["sum"] is backward.columns["sum"]
    assert [at for _, at in moments] == [i for i in range(100) for _ in range(2)]


@pytest.mark.parametrize("odd", [{"divisor": 2.0}, {"scale": torch.tensor(2.0)}, {"pieces": []}])
def test_what_is_odd_is_unpacked_by_itself(odd):
    """A scale, a scale that was on a device, no gradient at all."""
    assert likeness(Table(0, 0, "backward", PARAMETERS, 0.0, **odd)) is None


def test_a_step_of_one_of_two_optimizers_has_the_detail_of_its_own_rows():
    """`used` rests on the numbers of `backward` and leaves the other optimizer's rows out, of histograms and weights too."""
    torch.manual_seed(0)
    g = [torch.randn(2, 3), torch.randn(4)]
    piece = Piece([0, 1], kernels.summarize(g, g, detail=True))
    own = Piece([0, 1], piece.numbers)
    tables = [
        Table(0, 0, "backward", PARAMETERS, 0.0, notes=[None, None, None], pieces=[piece]),
        Table(0, 0, "used", PARAMETERS, 0.5, notes=[None, None, "elsewhere"], pieces=[own]),
    ]
    assert all(likeness(table) for table in tables)
    backward, used = (block.snapshot(at) for block, at in unpack([Arrival(table, {}) for table in tables]))
    assert (backward.names, used.names) == (("a", "b", "c"), ("a", "b"))
    assert len(used.histogram) == len(used.top.index) == 2
    np.testing.assert_array_equal(used.histogram, backward.histogram[:2])
    np.testing.assert_array_equal(used.top.index, backward.top.index[:2])


def test_what_is_large_of_one_moment_keeps_no_other_moment_alive():
    """A block whose other moments were lightened has the numbers of one table, not of all that came with it."""
    weights = [torch.randn(2, 3), torch.randn(4), torch.randn((), dtype=torch.complex64)]
    tables = [
        Table(step, 0, "backward", PARAMETERS, float(step), pieces=[Piece([0, 1, 2], kernels.summarize(weights, weights))])
        for step in range(5)
    ]
    numbers = [weakref.ref(table.pieces[0].numbers) for table in tables]
    block = unpack([Arrival(table, {}) for table in tables]).blocks[0]
    del tables
    for moment in range(4):
        block.lighten(moment)
    assert [ref() is None for ref in numbers] == [True, True, True, True, True]
    assert block.snapshot(4).top.index.shape == (3, fields.TOP)
