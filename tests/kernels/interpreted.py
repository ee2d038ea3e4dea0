"""The GPU programs run by Triton's interpreter, case by case; prints what came of each as JSON.

Triton reads `TRITON_INTERPRET` when it is imported, so this is a process of its own: `python -m tests.kernels.interpreted`.
Tensors and the sizes of the work are small: the interpreter runs about a thousand operations a second.
"""

import itertools
import json
import math
import random
import sys
import traceback
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from gradlens import fields, kernels
from gradlens.errors import ArgumentError, GradlensWarning
from gradlens.kernels import reference, triton
from gradlens.statistics.evidence import Evidence, Moments, _Decayed
from tests.kernels.made import COMPLEX, FLOAT8, FLOATS, HOSTILE, check_identical, check_loss_dots, sparse

SMALL = triton.Sizes(tile=16, chunk=32, programs=8, fan=3, merged=2, settled=2, peaks=4, searched=4)
KERNEL = triton.Triton(SMALL)
CASES = {}


def case(call):
    CASES[call.__name__] = call
    return call


def hostile(n, dtype, seed=0):
    """Ordinary values, and every tenth one odd."""
    random = torch.Generator().manual_seed(seed)
    tensor = torch.randn(n, generator=random)
    at = torch.randperm(n, generator=random)[: n // 10 + 1]
    tensor[at] = torch.tensor(HOSTILE)[torch.randint(len(HOSTILE), (len(at),), generator=random)]
    return tensor.to(dtype)


def summaries_agree(gradients, weights=None, previous=None, kernel=KERNEL, detail=True):
    rows = kernel.summarize(gradients, weights, previous, None, detail)
    check_identical(rows, reference.summarize(gradients, weights, previous, detail=detail), fields.SUMMARY)
    return rows


def updates_agree(used, before, after, loss=None):
    rows, honest = KERNEL.compare(used, before, after, loss), reference.compare(used, before, after, loss)
    check_identical(rows, honest, fields.UPDATES)
    if loss is not None:
        check_loss_dots(rows, honest, before, after, loss)


def samples_agree(tensors):
    torch.testing.assert_close(KERNEL.sample(tensors), reference.sample(tensors), rtol=0, atol=0, equal_nan=True)


@case
def every_type_and_size():
    for dtype in FLOATS:
        gradients = [*(hostile(n, dtype, n) for n in (1, 5, 0, 32, 33, 300)[: 6 if dtype == torch.float32 else 5])]
        gradients.append(torch.tensor(HOSTILE, dtype=torch.float64).to(dtype))
        weights, previous = ([hostile(len(g), dtype, i) for g in gradients] for i in (1, 2))
        summaries_agree(gradients)
        summaries_agree(gradients, weights, previous)
        updates_agree(gradients, weights, previous, weights)
        samples_agree(gradients)


@case
def types_that_differ():
    g = hostile(40, torch.float32)
    for w, p in ((torch.bfloat16, torch.float64), (torch.float64, torch.float16), (torch.float16, torch.bfloat16)):
        summaries_agree([g], [hostile(40, w, 1)], [hostile(40, p, 2)])
        updates_agree([g], [hostile(40, w, 1)], [hostile(40, p, 2)], [g.to(w)])


@case
def holes():
    g, w = hostile(20, torch.float32), hostile(20, torch.float32, 1)
    summaries_agree([g, g, g, g], [w, None, w, None], [None, None, w, w])
    updates_agree([g, None, g, None], [w] * 4, [g] * 4, [None, None, w, w])


@case
def values_at_the_edges():
    big, tiny = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal
    summaries_agree(
        [
            torch.full((50,), math.nan),
            torch.full((50,), -math.inf),
            torch.full((50,), -0.0),
            torch.tensor([big, -big, tiny, -tiny, tiny / 8, 1e-45, -1e-45]),
            torch.tensor([5e-324, -5e-324, 1.7e308, -1.0, 2.0**-96, 2.0**32, 2.0**-97], dtype=torch.float64),
            torch.arange(-127.0, 128).exp2(),
        ]
    )


@case
def every_layout():
    base = torch.randn(3, 4, 5, 2)
    wide = torch.randn(4, 6, dtype=torch.complex64)
    ten = torch.randn([2] * 10).permute(9, 0, 8, 1, 7, 2, 6, 3, 5, 4)  # more axes than the programs know
    views = [
        base.transpose(0, 3),
        base[::2, 1:, ::3],
        base[:1, :, :1, :1].expand(3, 4, 5, 2),
        torch.tensor(2.5).expand(7, 9),
        base.to(memory_format=torch.channels_last),
        base.view(-1)[3:],
        base.permute(3, 1, 0, 2)[:, :2].unsqueeze(0).unsqueeze(3),
        base.flip(0),
        wide,
        wide.t(),
        wide.conj(),
        wide.conj().imag,
        ten,
        torch.tensor(-3.0),
        torch.empty(3, 0),
    ]
    work = triton._Work([views])
    assert work.left == [10, 11, 12], work.left
    assert {group.axes for group in work.groups.values()} == {0, 4}
    others = [torch.randn_like(view) for view in views]
    straight = [torch.randn_like(view, memory_format=torch.contiguous_format) for view in views]
    summaries_agree(views, others, straight)
    updates_agree(views, others, straight, others)
    samples_agree(views)


@case
def whoever_comes_last():
    """The interpreter runs programs one after another; so the chunks are dealt out to them in other orders."""
    g, w, p = (hostile(230, torch.float32, i) for i in range(3))
    tensors = [g, g[:40], g[:0], g[:100], g[:1]]
    lists = [tensors, [w[: len(t)] for t in tensors], [p[: len(t)] for t in tensors]]
    calls = [lambda: KERNEL.summarize(*lists), lambda: KERNEL.compare(*lists)]
    expected = [call() for call in calls]
    check_identical(expected[0], reference.summarize(*lists), fields.SUMMARY)
    check_identical(expected[1], reference.compare(*lists), fields.UPDATES)
    words, last = triton.Group.words, set()
    for order in (reversed, *(random.Random(seed).sample for seed in range(3))):

        def dealt(group, sizes, order=order):
            table, owners, arrivals = words(group, sizes)
            owners = list(order(owners, len(owners)) if order is not reversed else order(owners))
            last.add(next(owner for owner in reversed(owners) if owner >> 32 == 0))
            return table, array("q", owners), arrivals

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton.Group, "words", dealt)
            for call, rows in zip(calls, expected, strict=True):
                assert torch.equal(call().view(torch.int64), rows.view(torch.int64))
    assert len(last) > 2  # chunks of the first tensor whose program merged it


@case
def counters_are_set_back():
    shipped, shipments = triton._Work.shipped, []

    def watched(work, sizes):
        shipments.extend(shipped(work, sizes))
        return shipments[-1:]

    tensors = [torch.randn(230), torch.randn(40), torch.randn(5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton._Work, "shipped", watched)
        KERNEL.summarize(tensors)
        KERNEL.compare(tensors, tensors, tensors)
    for shipment in shipments:
        assert len(shipment.more) == 2  # blocks of the first tensor
        assert not shipment.more.any()
        assert not shipment.table.view(-1, shipment.group.width)[:, triton.programs.ARRIVED].any()


@case
def any_lists():
    sizes = st.lists(st.integers(0, 150), min_size=1, max_size=3)

    @settings(max_examples=10, derandomize=True, deadline=None, database=None)
    @given(sizes, st.sampled_from(FLOATS), st.integers(0, 2**32), st.booleans(), st.booleans())
    def agree(sizes, dtype, seed, ties, detail):
        lists = [[hostile(n, dtype, seed + 10 * i + j) for i, n in enumerate(sizes)] for j in range(3)]
        if ties:
            lists[0] = [g.sign() for g in lists[0]]
        summaries_agree(*lists, detail=detail)
        updates_agree(*lists, lists[0])

    agree()


def kept_like(sizes, types):
    """Room for what is known of some weights, in the middle of others, and some numbers in it."""
    random = torch.Generator().manual_seed(3)
    ones = [(n, 3 * (i % 2), torch.randint(-1, 2, (n + 3,), generator=random)) for i, n in enumerate(sizes)]
    return [[made.to(dtype)[first : first + n] for dtype in types] for n, first, made in ones]


def copies(kept):
    return [[tensor.clone() for tensor in group] for group in kept]


def are_close(mine, theirs):
    """Float64 and counts as the definition; float32 are shares, at most 1."""
    for a, b in zip(itertools.chain(*mine), itertools.chain(*theirs), strict=True):
        wide = a.dtype != torch.float32
        torch.testing.assert_close(a, b, rtol=1e-12 if wide else 0, atol=0 if wide else 1e-7, equal_nan=True)


MOMENTS = [torch.float64, torch.float64, torch.int32, torch.int32]
DECAYED = [torch.float64] * 2 + [torch.float32] * 4 + [torch.int32, torch.int8]


@case
def moments_are_those_of_torch():
    sizes = [1, 0, 33, 100]
    for dtype, divisor in zip(FLOATS, (1.0, 3.0, torch.tensor(1024.0), torch.tensor(0.7, dtype=torch.float64)), strict=True):
        gradients = [hostile(n, dtype, n) for n in sizes]
        kept = kept_like(sizes, MOMENTS)
        mine, left = copies(kept), set(range(4))
        KERNEL.add_moments(gradients, mine, divisor, 0.25, 3.0, left)
        assert left == set()
        for g, group in zip(gradients, kept, strict=True):
            moments = Moments([group[0]])
            moments.mean, moments.squares, moments.positive, moments.negative = ([tensor] for tensor in group)
            moments.weight, moments._latest = 12.0, 3.0
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "add_moments", lambda *a: False)
                moments.add({0: g}, divisor)
        are_close(mine, kept)


@case
def decayed_means_are_those_of_torch():
    sizes = [1, 0, 33, 100]
    gradients = [hostile(n, torch.float64, n) for n in sizes]
    kept = kept_like(sizes, DECAYED)
    mine, left = copies(kept), set(range(4))
    KERNEL.fold_decayed(gradients, mine, 0.02, left)
    assert left == set()
    for g, group in zip(gradients, kept, strict=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "fold_decayed", lambda *a: False)
            decayed = _Decayed(g)
            names = "mean", "square", "sign", "seen", "flips", "moving", "steps", "last"
            vars(decayed).update(zip(names, group, strict=True))
            decayed.fold(g, 0.02)
    are_close(mine, kept)


@case
def evidence_goes_through_the_programs():
    """As on a GPU, where the choice of a backend asks for one."""
    shapes = [(40,), (), (6, 5), (0,), (7, 3)]

    def evidence():
        made = Evidence([torch.empty(shape) for shape in shapes], indices=[None, None, None, None, torch.arange(0, 21, 2)])
        for step in range(3):
            gradients = [hostile(math.prod(shape), torch.float32, 7 * step).view(shape) for shape in shapes]
            gradients[2] = gradients[2].t().contiguous().t()  # another layout
            made.update(gradients)
            made.update([*gradients[:3], None, gradients[4].to_sparse()])
            made.step_done()
        return made

    expected = evidence()
    changed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "changes_together", lambda tensor: True)
        patch.setattr(kernels, "_triton", lambda: kernels.Standby(KERNEL, reference))
        patch.setattr(kernels, "add_moments", lambda *a: changed.append(a))
        patch.setattr(kernels, "fold_decayed", lambda *a: changed.append(a))
        mine = evidence()
    assert not changed
    are_close(mine.moments._parts(), expected.moments._parts())
    are_close([steps.kept for steps in mine._steps], [steps.kept for steps in expected._steps])


@case
def what_no_program_takes_is_left_as_it_was():
    gradients = [torch.randn(8), torch.randn(8).as_subclass(type("Odd", (torch.Tensor,), {})), torch.randn(2).to_sparse()]
    kept = kept_like([8, 8, 2], MOMENTS)
    mine, left = copies(kept), {0, 1, 2}
    KERNEL.add_moments(gradients, mine, 1.0, 1.0, 1.0, left)
    assert left == {1, 2}
    are_close(mine[1:], kept[1:])
    left = {0}
    KERNEL.fold_decayed([torch.randn(8)], kept_like([8], DECAYED), 0.02, left)  # of float32
    KERNEL.fold_decayed([torch.randn(8).double()], kept_like([8], DECAYED), 0.5, left)
    assert left == {0}


@case
def a_failure_between_two_launches_adds_nothing_twice():
    gradients = [torch.randn(8), torch.randn(8).double(), torch.randn(8).bfloat16()]
    kept = kept_like([8, 8, 8], MOMENTS)
    mine, failing = copies(kept), iter([None, ValueError("no memory"), None])

    class Failing(triton.Triton):
        def _change(self, work, launch, *rest):
            def sometimes(shipment):
                error = next(failing)
                if error is not None:
                    raise error
                launch(shipment)

            super()._change(work, sometimes, *rest)

    left, backend = {0, 1, 2}, kernels.Standby(Failing(SMALL), reference)
    with pytest.warns(GradlensWarning, match="no memory"):
        backend.change("add_moments", left, gradients, mine, 1.0, 1.0, 1.0)
    assert left == {1, 2}
    assert torch.equal(mine[0][0], gradients[0].double())
    are_close(mine[1:], kept[1:])
    backend.change("add_moments", left, gradients, mine, 1.0, 1.0, 1.0)
    assert left == {1, 2}


@case
def many_axes():
    g = torch.randn([2] * 7).permute(6, 0, 5, 1, 4, 2, 3)
    assert triton._Work([[g]]).groups.popitem()[1].axes == 8
    summaries_agree([g], [torch.randn_like(g)])
    samples_agree([g])


@case
def odd_tensors_among_others():
    g = torch.randn(6, 3)
    odd = [g, sparse(6, [3, 1, 3], torch.randn(3, 3)), g.to(FLOAT8[0]), g.to(COMPLEX[1]), g]
    weights = [torch.randn(6, 3, dtype=t.dtype) if t.is_complex() else torch.randn(6, 3) for t in odd]
    assert triton._Work([odd]).left == [1, 2]
    summaries_agree(odd, weights)
    updates_agree(odd, weights, [w + 1 for w in weights])
    samples_agree(odd)
    samples_agree([odd[1]])


@case
def ties_over_chunks():
    g = torch.ones(700)
    g[5::2] = -1.0
    rows = summaries_agree([g], [torch.randn(700)])
    assert rows[0, fields.TOP_INDEX].tolist() == list(range(16))
    g[-1] = 2.0
    assert summaries_agree([g])[0, fields.TOP_INDEX].tolist() == [699, *range(15)]


@case
def ties_in_strips():
    """More lanes than places, and what comes first in one lane comes again in it after others."""
    wide = triton.Triton(triton.Sizes(tile=32, chunk=128, programs=8, fan=3, merged=2, peaks=4, searched=8))
    g = torch.zeros(200)
    g[:16], g[96:112], g[48:64], g[130:] = 1.0, -1.0, -1.0, 1.0
    assert summaries_agree([g], kernel=wide)[0, fields.TOP_INDEX].tolist() == list(range(16))
    g[3], g[131] = 0.0, 2.0
    expected = [131, 0, 1, 2, *range(4, 16)]
    assert summaries_agree([g], kernel=wide)[0, fields.TOP_INDEX].tolist() == expected
    random = torch.Generator().manual_seed(0)
    for _ in range(3):
        summaries_agree([torch.randint(-2, 3, (500,), generator=random).float()], kernel=wide)


@case
def the_largest_wherever_they_are():
    short = triton.Triton(triton.Sizes(tile=8, chunk=8, programs=64, fan=4, merged=16, peaks=8, searched=8))
    rising = torch.arange(150.0)
    for g in (rising, -rising.flip(0), hostile(150, torch.float64), hostile(150, torch.float16).round()):
        summaries_agree([g], kernel=short)


@case
def quantiles_of_large_tensors_rest_on_the_sample_of_the_reference():
    patch = pytest.MonkeyPatch()
    patch.setattr(fields, "LARGE", 100)  # the programs are told the strides alone
    patch.setattr(fields, "STRATA", 5)
    try:
        square = hostile(400, torch.float32, 3).view(20, 20)
        gradients = [
            hostile(300, torch.float32),
            hostile(1000, torch.float64, 1),
            hostile(50, torch.bfloat16),
            square,
            square.t(),
        ]
        light = summaries_agree(gradients, gradients, gradients, detail=False)
        full = reference.summarize(gradients)
    finally:
        patch.undo()
    differs = (light[:, fields.QUANTILE] != full[:, fields.QUANTILE]).any(dim=1)
    assert differs.tolist() == [True, True, False, True, False]


@case
def a_chunk_is_never_too_long_for_its_counters():
    sizes = triton.Sizes(tile=16, chunk=16, programs=1)
    member = {"members": [(0, 2**40)], "layouts": [[()] * 5], "addresses": [(0,) * 4], "strides": [1]}
    group = triton.Group((None,) * 4, 0, True, **member)
    group.words(sizes)
    assert group.length / sizes.tile < 2**16


@case
def kept_bit_for_bit():
    g, p = hostile(100, torch.float32), hostile(100, torch.float32, 1)
    grid = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for gradient, previous in ((g, p), (grid, torch.randn_like(grid))):
        expected = reference.summarize([gradient], None, [previous])
        room = previous.clone()
        assert triton._Work([[gradient], None, [room], [room]], keeps=True).left == []
        check_identical(KERNEL.summarize([gradient], None, [room], [room]), expected, fields.SUMMARY)
        assert torch.equal(room.view(torch.int32), gradient.view(torch.int32))
        assert room.stride() == gradient.stride()


@case
def rooms_that_overlap_what_is_read():
    base = torch.randn(60)
    for g, p, keep in (
        (base[:40], None, base[20:]),
        (torch.randn(40), base[:40], base[20:]),
        (torch.randn(40), None, torch.empty(40, dtype=torch.float64)),
    ):
        assert triton._Work([[g], None, [p], [keep]], keeps=True).left == [0]


@case
def sizes_that_do_not_match():
    x = torch.ones(3)
    for call in (
        lambda: KERNEL.summarize([x], [x[:2]]),
        lambda: KERNEL.summarize([x], [x, x]),
        lambda: KERNEL.summarize([x], None, [x.to(torch.complex64)]),
        lambda: KERNEL.summarize([x], None, None, [x[:1]]),
        lambda: KERNEL.compare([x], [x], [x[:1]]),
        lambda: KERNEL.compare([x, x], [x], [x]),
    ):
        with pytest.raises(ArgumentError, match="give"):
            call()


@case
def surroundings_change_nothing():
    g, w = torch.randn(40), torch.nn.Parameter(torch.randn(40))
    expected = KERNEL.summarize([g], [w])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        rows = KERNEL.summarize([g.clone()], [w])
    assert torch.equal(rows.nan_to_num(7), expected.nan_to_num(7))
    assert not rows.is_inference()
    assert not rows.requires_grad
    torch.set_default_dtype(torch.float16)
    with torch.device("meta"):
        assert torch.equal(KERNEL.summarize([g.requires_grad_() * 1.0], [w]).nan_to_num(7), expected.nan_to_num(7))
    torch.set_default_dtype(torch.float32)


@case
def no_tensors():
    assert KERNEL.summarize([]).shape == (0, fields.WIDTH)
    assert KERNEL.compare([], [], []).shape == (0, len(fields.UPDATES))
    assert KERNEL.sample([]).shape == (0, reference.SAMPLES)
    summaries_agree([torch.empty(0), torch.empty(0, dtype=torch.float64)])


def patch_once():
    """The interpreter patches Triton's language anew at each call of a helper, which takes most of its time."""
    patch, patched = interpreter._patch_lang, set()

    class Kept:
        def restore(self):
            pass

    def once(function):
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch(function)
        return Kept()

    interpreter._patch_lang = once


def main(names):
    patch_once()
    outcomes = {}
    for name in names:
        torch.manual_seed(0)
        try:
            CASES[name]()
            outcomes[name] = ""
        except BaseException:
            outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
