"""Asking about many tensors at once gives what asking about each gives, in as many operations as the bytes want."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens import fields
from gradlens.errors import ArgumentError
from gradlens.kernels import batched, reference
from tests.kernels.made import (
    COMPLEX,
    FLOAT8,
    FLOATS,
    HOSTILE,
    check_identical,
    check_loss_dots,
    check_row,
    reals,
    sparse,
    values,
)
from tests.launches import Launches


def summaries_agree(*lists):
    rows = batched.summarize(*lists)
    check_identical(rows, reference.summarize(*lists), fields.SUMMARY)
    return rows


def updates_agree(used, before, after, loss):
    lists = used, before, after, loss
    rows, honest = batched.compare(*lists), reference.compare(*lists)
    check_identical(rows, honest, fields.UPDATES)
    check_loss_dots(rows, honest, before, after, loss)


def samples_agree(tensors):
    rows = batched.sample(tensors)
    torch.testing.assert_close(rows, reference.sample(tensors), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(values, max_size=40), max_size=6), st.sampled_from(FLOATS), st.randoms(use_true_random=False))
def test_every_number_is_that_of_the_reference(lists, dtype, random):
    """Counts, extremes, histogram, the largest and samples exactly, sums to 1e-12, for lists of any lengths."""
    gradients = [torch.tensor(entries, dtype=torch.float64).to(dtype) for entries in lists]
    weights, previous = ([g[torch.tensor(random.sample(range(len(g)), len(g)), dtype=torch.int64)] for g in gradients],) * 2
    summaries_agree(gradients, weights, previous)
    updates_agree(gradients, weights, gradients, weights)
    samples_agree(gradients)


KINDS = {
    "half, single and double": [torch.randn(n).to(dtype) for n, dtype in zip((1, 50, 17, 33), FLOATS, strict=True)],
    "float8": [torch.randn(20).to(dtype) for dtype in FLOAT8],
    "complex": [torch.randn(6, 5, dtype=dtype) for dtype in COMPLEX],
    "lazy bits": [torch.randn(4, 6, dtype=torch.complex64).conj(), torch.randn(4, 6, dtype=torch.complex64).conj().imag],
    "strided": [torch.randn(9, 7, 5).transpose(0, 2), torch.tensor(2.5).expand(7, 9), torch.randn(40)[::2]],
    "channels last": [torch.randn(4, 6, 5, 3).to(memory_format=torch.channels_last)],
    "empty and 0-dim": [torch.empty(0), torch.empty(3, 0), torch.tensor(-3.0)],
    "only empty": [torch.empty(0)],
    "sparse among dense": [torch.randn(9, 3), sparse(9, [3, 1, 3], torch.randn(3, 3)), torch.randn(2)],
    "only sparse": [sparse(9, [3, 1, 3], torch.randn(3, 3))],
    "hostile": [torch.tensor(HOSTILE), torch.tensor(HOSTILE[::-1])],
    "none": [],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read(kind, monkeypatch):
    """Types, layouts and mixtures change no number, in one piece or in many."""
    gradients = KINDS[kind]
    weights = [torch.randn(g.shape, dtype=g.dtype if g.is_complex() else torch.float32) for g in gradients]
    for cut in (reference.PIECE, 7):
        monkeypatch.setattr(reference.pieces, "__defaults__", (cut,))
        monkeypatch.setitem(batched.ROOM, "cpu", cut)
        summaries_agree(gradients)
        summaries_agree(gradients, weights, [w.flip(0) if w.ndim else w for w in weights])
        updates_agree(gradients, weights, [w + 1 for w in weights], gradients)
        samples_agree(gradients)


def test_what_some_have_and_others_lack():
    """Each row has the columns of what it was given."""
    g, w = torch.randn(20), torch.randn(20)
    summaries_agree([g, g, g, g], [w, None, w, None], [None, None, w, w])
    updates_agree([g, None, g, None], [w] * 4, [g] * 4, [None, None, w, w])


def test_equal_values_are_told_apart_by_index_over_pieces():
    """Of equal magnitudes the first indices are kept, each tensor for itself."""
    ones = torch.ones(3 * reference.PIECE)
    ones[100::2] = -1.0
    ones[-1] = 2.0
    rows = summaries_agree([torch.ones(3), ones, -torch.ones(40)])
    assert rows[1, fields.TOP_INDEX].tolist() == [len(ones) - 1, *range(15)]


def test_kept_is_what_was_read():
    """The previous gradient is compared with before it is overwritten, in its own layout, bit for bit."""
    gradients = [torch.randn(30), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(4, 2)]
    rooms = [torch.randn(30), torch.randn_like(gradients[1]), torch.randn(8)]
    expected = reference.summarize(gradients, None, [room.clone() for room in rooms])
    rows = batched.summarize(gradients, None, rooms, rooms)
    check_identical(rows, expected, fields.SUMMARY)
    for g, room in zip(gradients, rooms, strict=True):
        assert torch.equal(room, g.reshape(room.shape))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: batched.summarize([x], [x[:2]]),
        lambda x: batched.summarize([x], [x, x]),
        lambda x: batched.summarize([x], None, [x.to(torch.complex64)]),
        lambda x: batched.summarize([x], None, None, [x[:1]]),
        lambda x: batched.compare([x], [x], [x[:1]]),
        lambda x: batched.compare([x, x], [x], [x]),
        lambda x: batched.compare([x], [x], [x], [x[:1]]),
    ],
)
def test_sizes_that_do_not_match_are_refused(call):
    """As the reference does."""
    with pytest.raises(ArgumentError, match="give"):
        call(torch.ones(3))


def test_surroundings_change_nothing():
    """Inference mode, defaults and a graph on the gradient leave every number as it is."""
    g, w = torch.randn(40), torch.nn.Parameter(torch.randn(40))
    with torch.inference_mode():
        rows = batched.summarize([g.clone()], [w])
    assert not rows.is_inference()
    check_row(rows[0], reals(g), reals(w))
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            rows = batched.summarize([g.requires_grad_() * 1.0], [w])
    finally:
        torch.set_default_dtype(torch.float32)
    assert not rows.requires_grad
    check_row(rows[0], reals(g), reals(w))


# --- what a device would notice ---------------------------------------------------------------------------------------


def launches(call):
    with Launches() as mode:
        call()
    return sum(mode.counts.values())


def test_tiny_tensors_share_their_operations():
    """A thousand tensors take the operations of ten, but for one look at each when it is sampled."""
    lists = [[[torch.randn(5 + i % 3) for i in range(n)] for _ in range(3)] for n in (10, 1000)]
    few, many = (launches(lambda g=g: batched.summarize(*g)) for g in lists)
    assert many == few < 400
    few, many = (launches(lambda g=g: batched.compare(*g)) for g in lists)
    assert many == few < 200
    few, many = (launches(lambda g=g: batched.sample(g[0])) for g in lists)
    assert many - few <= 2 * 990


@pytest.mark.parametrize("backend", [reference, batched], ids=lambda backend: backend.__name__.rsplit(".", 1)[-1])
def test_no_value_is_asked_for(backend):
    """On a device that has no values whoever asks for one fails: nothing here makes the host wait for the device."""
    shapes = [(5,), (0,), (9, 7), (), (2**17 + 3,), (3, 4, 5)]
    there = [torch.empty(shape, device="meta") for shape in shapes]
    there += [torch.empty(6, 8, device="meta").t(), torch.empty(6, dtype=torch.complex64, device="meta")]
    others = [torch.empty_like(tensor) for tensor in there]
    with Launches() as mode:
        assert backend.summarize(there, others, others, others).device.type == "meta"
        assert backend.compare(there, others, others, there).device.type == "meta"
        assert backend.sample(there).device.type == "meta"
    assert mode.waits == []
    with pytest.raises(RuntimeError, match="meta"):
        there[0].sum().item()
