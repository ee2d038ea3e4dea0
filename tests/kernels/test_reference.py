"""The reference says what it means: every number agrees with one entry at a time in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens import fields, kernels
from gradlens.errors import ArgumentError
from gradlens.kernels import reference
from tests.kernels.made import COMPLEX, FLOAT8, FLOATS, HOSTILE, check_row, check_update, reals, sparse, values


def check(g, w=None, p=None):
    rows = reference.summarize([g], [w], [p])
    check_row(rows[0], reals(g), None if w is None else reals(w), None if p is None else reals(p))
    return rows[0]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(FLOATS), st.lists(values, max_size=40))
def test_every_number_is_right(data, dtype, entries):
    """Counts, extremes, histogram and the largest are exact, sums are float64, whatever the entries."""
    n = len(entries)
    others = st.lists(values, min_size=n, max_size=n)
    g, w, p = (torch.tensor(x, dtype=torch.float64).to(dtype) for x in (entries, data.draw(others), data.draw(others)))
    check(g)
    check(g, w)
    check(g, w, p)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(FLOATS), st.lists(values, max_size=30))
def test_every_update_number_is_right(data, dtype, entries):
    """What an update did, from the weights before and after and the gradients, in float64."""
    n = len(entries)
    others = st.lists(values, min_size=n, max_size=n)
    before, after, used, loss = (
        torch.tensor(x, dtype=torch.float64).to(dtype) for x in (entries, *(data.draw(others) for _ in range(3)))
    )
    rows = reference.compare([used, None, used], [before] * 3, [after] * 3, [None, None, loss])
    lists = [reals(x) for x in (used, before, after, loss)]
    check_update(rows[0], *lists[:3])
    check_update(rows[1], None, *lists[1:3])
    check_update(rows[2], *lists)


@pytest.mark.trap(38, 39)
@pytest.mark.parametrize("dtype", FLOATS + FLOAT8 + COMPLEX, ids=str)
def test_every_type_is_read_as_it_is(dtype):
    """Low precision is read exactly and summed wide; complex counts as two reals."""
    g, w, p = (torch.randn(6, 5, dtype=dtype if dtype.is_complex else torch.float32).to(dtype) for _ in range(3))
    check(g, w, p)


@pytest.mark.trap(38)
def test_large_and_small_values_neither_overflow_nor_vanish():
    """1e20 and 1e-30 in float32 have squares, in float64."""
    row = check(torch.tensor([1e20, 1e-30, -1e20]))
    assert row[fields.AT["square_sum"]].item() == pytest.approx(2e40)
    row = check(torch.tensor([1e-30, -1e-30]))
    assert row[fields.AT["square_sum"]].item() == pytest.approx(2e-60)


def views():
    base = torch.randn(4, 6, 5, 3, dtype=torch.float32)
    wide = torch.randn(4, 6, dtype=torch.complex64)
    return {
        "transposed": base.transpose(0, 3),
        "sliced": base[::2, 1:, ::3],
        "expanded": base[:1, :, :1, :1].expand(4, 6, 5, 3),
        "a scalar expanded": torch.tensor(2.5).expand(7, 9),
        "channels last": base.to(memory_format=torch.channels_last),
        "an offset": base.view(-1)[3:],
        "flipped": base.flip(0),
        "conjugate": wide.conj(),
        "negative bit": wide.conj().imag,
        "conjugate and transposed": wide.conj().t(),
        "0-dim": torch.tensor(-3.0),
        "empty": torch.empty(0),
        "empty of two axes": torch.empty(3, 0),
        "one": torch.tensor([1.5]),
    }


@pytest.mark.trap(39)
@pytest.mark.parametrize("kind", views())
def test_every_layout_counts_in_logical_order(kind):
    """Strides, offsets and lazy bits change no number, and indices count logical order."""
    g = views()[kind]
    check(g, torch.randn_like(g), torch.randn_like(g.contiguous()))


@pytest.mark.parametrize("kind", views())
def test_pieces_add_up(kind, monkeypatch):
    """A tensor read piece by piece gives the same row as in one piece."""
    monkeypatch.setattr(reference, "PIECE", 7)
    monkeypatch.setattr(reference.pieces, "__defaults__", (7,))
    g = views()[kind]
    check(g, torch.randn_like(g), torch.randn_like(g.contiguous()))
    before, after = torch.randn_like(g), torch.randn_like(g)
    row = reference.compare([g], [before], [after], [g])[0]
    check_update(row, *(reals(t) for t in (g, before, after, g)))


def test_equal_values_are_told_apart_by_index():
    """Of equal magnitudes the first indices are kept, over the borders of pieces too."""
    g = torch.ones(3 * reference.PIECE)
    g[100::2] = -1.0
    g[-1] = 2.0
    row = reference.summarize([g])[0]
    assert row[fields.TOP_INDEX].tolist() == [len(g) - 1, *range(15)]


@pytest.mark.trap(38)
def test_sums_hold_over_many_entries():
    """Ten million float32 entries add up to 1e-12 of their size."""
    g = torch.full((10_000_000,), 0.1)
    row = reference.summarize([g])[0]
    assert row[fields.AT["sum"]].item() == pytest.approx(float(g[0]) * 1e7, rel=1e-12)


SPARSE = {
    "duplicates": sparse(50, [3, 1, 3], torch.randn(3, 3)),
    "the first rows": sparse(20, [0, 1, 2], torch.randn(3, 3)),
    "nothing touched": sparse(5, [], torch.randn(0, 3)),
    "all touched": sparse(2, [0, 1], torch.randn(2, 3)),
    "hostile values": sparse(9, [8, 2], torch.tensor([[math.nan, -0.0, math.inf], [1e20, -1e-30, 0.0]])),
    "few left": sparse(3, [1], torch.randn(1, 3)),
    "two axes": torch.sparse_coo_tensor(torch.tensor([[4, 0], [1, 6]]), torch.randn(2), (5, 7), check_invariants=True),
    "complex": sparse(9, [5, 5, 0], torch.randn(3, 3, dtype=torch.complex64)),
    "compressed rows": torch.eye(4).to_sparse_csr(),
}


@pytest.mark.trap(39)
@pytest.mark.parametrize("kind", SPARSE)
def test_a_sparse_gradient_is_its_dense_one(kind):
    """Duplicates add, untouched rows are zeros, and are candidates for the largest like any other."""
    g = SPARSE[kind]
    w = torch.randn(g.shape, dtype=g.dtype)
    check(g)
    check(g, w)
    check(g, w, torch.randn(g.shape, dtype=g.dtype))
    assert torch.equal(kernels.sample([g]).nan_to_num(7), kernels.sample([g.to_dense()]).nan_to_num(7))


@pytest.mark.parametrize("kind", SPARSE)
def test_an_update_by_a_sparse_gradient(kind):
    """The update counts all weights, its pairs with a sparse gradient those touched."""
    g = SPARSE[kind]
    before, after = torch.randn(g.shape, dtype=g.dtype), torch.randn(g.shape, dtype=g.dtype)
    after.view(-1)[::2] = before.view(-1)[::2]
    row = reference.compare([g], [before], [after], [g])[0]
    check_update(row, *(reals(t) for t in (g, before, after, g)))


def test_a_huge_embedding_is_not_made_dense():
    """A sparse gradient of a trillion entries is summarised from the rows it has."""
    g = torch.sparse_coo_tensor(torch.tensor([[10**9, 7]]), torch.ones(2, 1000), (2 * 10**9, 1000), check_invariants=True)
    row = reference.summarize([g])[0]
    assert row[fields.AT["numel"]].item() == 2e12
    assert row[fields.AT["zero"]].item() == 2e12 - 2000
    assert row[fields.TOP_INDEX].tolist() == list(range(7000, 7016))


def test_keep_takes_the_gradient_after_previous_was_read():
    """`keep` may be the tensor given as previous; it ends as a copy of the gradient, bit for bit."""
    g, last = torch.tensor([[1.0, math.nan], [-0.0, -2.0]]), torch.tensor([[-1.0, 1.0], [3.0, -2.0]])
    honest = last.clone()
    row = reference.summarize([g], None, [last], [last])[0]
    check_row(row, reals(g), None, reals(honest))
    assert torch.equal(last.view(torch.int32), g.view(torch.int32))


@pytest.mark.parametrize("kind", views())
def test_keep_takes_any_layout(kind):
    """The copy that is kept equals the gradient in logical order."""
    g = views()[kind]
    rooms = [torch.empty_like(g, memory_format=torch.preserve_format), torch.empty(g.shape, dtype=g.dtype)]
    reference.summarize([g, g], None, None, rooms)
    assert all(torch.equal(room, g) for room in rooms)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.sampled_from(FLOATS + COMPLEX))
def test_a_sample_has_both_ends_and_even_gaps(n, dtype):
    """Sixteen entries spread over the whole tensor; all of a small one, then zeros."""
    tensor = torch.arange(1, n + 1).to(dtype)
    flat = reals(tensor)
    row = kernels.sample([tensor])[0].tolist()
    at = [k * (len(flat) - 1) // 15 for k in range(16)] if len(flat) > 16 else range(len(flat))
    assert row == [flat[i] for i in at] + [0.0] * (16 - len(at))


@pytest.mark.parametrize("kind", views())
def test_a_sample_follows_logical_order(kind):
    """Layout changes no sample."""
    tensor = views()[kind]
    assert torch.equal(kernels.sample([tensor]), kernels.sample([tensor.clone().resolve_conj().contiguous()]))


@pytest.mark.trap(36, 37)
def test_surroundings_change_nothing():
    """Autocast, inference mode, defaults and a graph on the gradient leave every number as it is."""
    g, w, p = torch.randn(40, 3), torch.randn(40, 3), torch.randn(40, 3)
    expected = kernels.summarize([g], [w], [p])
    update = kernels.compare([g], [w], [p], [g])

    def agree(g=g, w=w, p=p):
        rows = kernels.summarize([g], [w], [p], [torch.empty_like(p)])
        assert torch.equal(rows, expected)
        assert not rows.requires_grad
        assert not rows.is_inference()
        assert torch.equal(kernels.compare([g], [w], [p], [g]), update)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        agree()
    with torch.inference_mode():
        agree()
        inside = [tensor.clone() for tensor in (g, w, p)]
        agree(*inside)
    agree(*inside)
    agree(g.clone().requires_grad_() * 1.0, torch.nn.Parameter(w))
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            agree()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        agree()
    finally:
        torch.use_deterministic_algorithms(False)


def test_room_made_in_inference_mode_can_be_written():
    """A buffer that was made in inference mode is no reason to fail outside of it."""
    with torch.inference_mode():
        room = torch.zeros(5)
    g = torch.randn(5)
    kernels.summarize([g], None, None, [room])
    assert torch.equal(room, g)


def test_tensor_classes_are_read_as_tensors():
    """A subclass with its own functions neither sees ours nor changes the result."""

    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            raise AssertionError("asked")

    plain = torch.arange(9.0)
    rows = kernels.summarize([plain.as_subclass(Loud), plain], [plain.as_subclass(Loud), plain])
    assert type(rows) is torch.Tensor
    assert torch.equal(rows[0].nan_to_num(7), rows[1].nan_to_num(7))


def test_no_tensors_give_no_rows():
    """An empty list gives empty tables of the right width."""
    assert kernels.summarize([]).shape == (0, fields.WIDTH)
    assert kernels.compare([], [], []).shape == (0, len(fields.UPDATES))
    assert kernels.sample([]).shape == (0, 16)


def test_many_tensors_keep_their_order():
    """Each row is that of its own tensor."""
    tensors = [torch.full((n,), float(n)) for n in (3, 1, 0, 2)]
    rows = kernels.summarize(tensors)
    assert rows[:, fields.AT["numel"]].tolist() == [3, 1, 0, 2]
    assert rows[:, fields.AT["sum"]].tolist() == [9, 1, 0, 4]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: kernels.summarize([x], [x[:2]]),
        lambda x: kernels.summarize([x], [x, x]),
        lambda x: kernels.summarize([x], None, [x.to(torch.complex64)]),
        lambda x: kernels.summarize([x], None, None, [x[:1]]),
        lambda x: kernels.compare([x], [x], [x[:1]]),
        lambda x: kernels.compare([x, x], [x], [x]),
        lambda x: kernels.compare([x], [x], [x], [x[:1]]),
    ],
)
def test_sizes_that_do_not_match_are_refused(call):
    """The error says what was given, what was expected and what to do."""
    with pytest.raises(ArgumentError, match="give"):
        call(torch.ones(3))


def test_hostile_values_are_counted_and_hide_nothing():
    """Non-finite entries are counted apart, and the finite ones keep their numbers."""
    check(torch.tensor(HOSTILE), torch.tensor(HOSTILE[::-1]), torch.tensor(HOSTILE[3:] + HOSTILE[:3]))
