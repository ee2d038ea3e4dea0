"""The GPU programs run by Triton's interpreter, case by case; prints what came of each as JSON.

Triton reads `TRITON_INTERPRET` when it is imported, so this is a process of its own: `python -m tests.kernels.interpreted`.
Tensors and the sizes of the work are small: the interpreter runs about a thousand operations a second.
"""

import json
import math
import sys
import traceback

import pytest
import torch
from triton.runtime import interpreter

from gradlens import fields
from gradlens.errors import ArgumentError
from gradlens.kernels import reference, triton
from tests.kernels.made import COMPLEX, FLOAT8, FLOATS, HOSTILE, check_identical, check_loss_dots, sparse

SMALL = triton.Sizes(tile=16, chunk=32, programs=8, peaks=4, searched=32, merged=2)
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
def the_largest_wherever_they_are():
    short = triton.Triton(triton.Sizes(tile=8, chunk=8, programs=64, peaks=8, searched=8, merged=16))
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
    member = {"members": [(0, 2**40)], "layouts": [()], "addresses": [(0,) * 4], "strides": [1]}
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
