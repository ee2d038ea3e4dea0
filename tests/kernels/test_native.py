"""The native kernel equals the reference, whatever variant runs, and touches no memory that is not a plain tensor's."""

import contextlib
import threading
import time
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gradlens import fields
from gradlens.errors import ArgumentError
from gradlens.kernels import native, reference
from tests.kernels.made import FLOATS, HOSTILE, check_identical, check_row, check_update, reals, values

if not native.LIBRARY.exists():
    pytest.skip("the native kernel was not built", allow_module_level=True)

BEST = native.load()
# The plain one asks tensors by `map`, as where torch has no table of functions.
KERNELS = [
    native.Native(BEST.library, variant, BEST.introspector if variant else None) for variant in range(BEST.variant + 1)
]
introspectors = pytest.mark.parametrize("introspector", [BEST.introspector, None], ids=["by table", "by map"])
variants = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: native.VARIANTS[kernel.variant])
BITS = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def made(n, dtype=torch.float32, seed=0, *, hostile=False):
    random = torch.Generator().manual_seed(seed)
    tensor = torch.randn(n, generator=random).to(dtype)
    if hostile and n:
        pool = torch.tensor(HOSTILE, dtype=torch.float64).to(dtype)
        at = torch.randint(4 * len(pool), (n,), generator=random)
        tensor = torch.where(at < len(pool), pool[at % len(pool)], tensor)
    return tensor


def check(rows, expected):
    """Everything is equal but sums, which are within 1e-12 of the size of what they add up.

    A block of 1,024 doubles and then n / 1,024 blocks are added one after another at worst, so a sum is off by less than
    (1,024 + n / 1,024) 2^-53 of that: 1.2e-12 for ten million entries, 1.2e-13 for a few thousand.
    """
    check_identical(rows, expected, fields.SUMMARY)


def bits(tensor):
    return tensor.detach().clone(memory_format=torch.contiguous_format).view(BITS[tensor.dtype])


@contextlib.contextmanager
def spied(monkeypatch):
    """How many rows each function of the reference is asked for."""
    asked = []
    with monkeypatch.context() as patch:
        for name in ("summarize", "compare", "sample"):
            honest = getattr(reference, name)

            def spy(first, *others, honest=honest, **options):
                asked.append(len(first))
                return honest(first, *others, **options)

            patch.setattr(reference, name, spy)
        yield asked


# --- the same numbers ------------------------------------------------------------------------------------------


@variants
@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.lists(values, max_size=40))
def test_every_number_is_right(kernel, data, dtype, weight_dtype, entries):
    """What one entry at a time in plain Python gives, with sums rounded once."""
    others = st.lists(values, min_size=len(entries), max_size=len(entries))
    g, w, p = (torch.tensor(x, dtype=torch.float64) for x in (entries, data.draw(others), data.draw(others)))
    g, w, p = g.to(dtype), w.to(weight_dtype), p.to(dtype)
    lists = [reals(x) for x in (g, w, p)]
    check_row(kernel.summarize([g])[0], lists[0])
    check_row(kernel.summarize([g], [w])[0], *lists[:2])
    check_row(kernel.summarize([g], [w], [p])[0], *lists)
    check_row(kernel.summarize([g], None, [p])[0], lists[0], None, lists[2])
    rows = kernel.compare([g, None, None, g], [w] * 4, [p] * 4, [None, None, g, p])
    check_update(rows[0], *lists)
    check_update(rows[1], None, *lists[1:])
    check_update(rows[2], None, *lists[1:], lists[0])
    check_update(rows[3], *lists, lists[2])


@variants
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([1023, 1024, 1025, 4095, 4096, 4097]) | st.integers(0, 9000),
    st.sampled_from(FLOATS),
    st.integers(0, 99),
    st.booleans(),
    st.integers(1, 3),
)
def test_sizes_around_blocks_equal_the_reference(kernel, n, dtype, seed, hostile, stride):
    """Any size and stride, finite or not; what is kept are the gradient's bits."""
    g, w, p = (made(n * stride, dtype, seed + i, hostile=hostile)[::stride] for i in range(3))
    for previous in (p, None):
        room = torch.empty(n, dtype=dtype)
        check(kernel.summarize([g], [w], [previous], [room]), reference.summarize([g], [w], [previous]))
        assert torch.equal(bits(room), bits(g))
    check_identical(kernel.compare([g], [w], [p]), reference.compare([g], [w], [p]), fields.UPDATES)
    torch.testing.assert_close(kernel.sample([g]), reference.sample([g]), rtol=0, atol=0, equal_nan=True)


#: Of a long tensor, the power of two that its entries have, by the number of their block and by chance from 0 to 1.
PROFILES = {
    "of one size": lambda block, chance: 0 * block,
    "rising": lambda block, chance: block // 3,
    "falling": lambda block, chance: -block // 2,
    "up and down": lambda block, chance: 40.0 * (block % 2),
    "up once": lambda block, chance: 30.0 * (block > 20),
    "wide": lambda block, chance: -90 * chance,
    "some far below": lambda block, chance: -60.0 * (chance < 0.01),
    "tiny": lambda block, chance: -100 - 40 * chance,
    "huge": lambda block, chance: 125 - 40 * chance,
}


@variants
@pytest.mark.parametrize("profile", PROFILES)
@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from(FLOATS), st.integers(0, 99), st.sampled_from([0.0, 0.02, 0.6]), st.booleans(), st.sampled_from([1, 3])
)
def test_a_long_tensor_has_each_entry_in_its_bucket(kernel, profile, dtype, seed, zeros, hostile, threads):
    """Whatever way exponents go from block to block, with zeros of both signs and NaN here and there, on any threads."""
    n = native.THREADED + 1234 if threads > 1 else 45 * 1024 + 77
    random = torch.Generator().manual_seed(seed)
    chance = torch.rand(n, generator=random, dtype=torch.float64)
    power = PROFILES[profile]((torch.arange(n) // 1024).to(torch.float64), chance)
    g = torch.randn(n, generator=random, dtype=torch.float64) * torch.exp2(power)
    g = torch.where(torch.rand(n, generator=random) < zeros, torch.copysign(torch.zeros(()), g), g).to(dtype)
    if hostile:
        g[5 * 1024 :: 7 * 1024] = torch.nan
        g[3 * 1024 + 5] = -torch.inf
    with mock.patch.object(torch, "get_num_threads", return_value=threads):
        rows = kernel.summarize([g], [made(n)], [made(n, dtype)])
    check(rows, reference.summarize([g], [made(n)], [made(n, dtype)]))


@variants
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_nan_is_a_nan(kernel, dtype):
    """Quiet or signalling, of either sign and any payload; kept with its bits."""
    mantissa = {torch.float32: 23, torch.float64: 52, torch.bfloat16: 7, torch.float16: 10}[dtype]
    width = torch.finfo(dtype).bits
    infinity = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    payloads = [1, 2, (1 << mantissa) - 1, 1 << (mantissa - 1), (1 << (mantissa - 1)) - 1]
    patterns = [infinity | payload for payload in payloads]
    patterns += [pattern - (1 << (width - 1)) for pattern in patterns] + [infinity, infinity - (1 << (width - 1)), 0]
    g = torch.tensor(patterns, dtype=torch.int64).to(BITS[dtype]).view(dtype)
    room = torch.empty_like(g)
    row = kernel.summarize([g], None, None, [room])[0]
    assert [row[fields.AT[name]].item() for name in ("nan", "inf", "zero", "positive", "negative")] == [10, 2, 1, 0, 0]
    assert torch.equal(room.view(BITS[dtype]), g.view(BITS[dtype]))


@variants
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("offset", [1, 3, 4])
def test_memory_off_its_type_s_boundary(kernel, dtype, offset):
    """A tensor over somebody's bytes may begin at any of them, and so may its room."""
    n, size = 1500, torch.finfo(dtype).bits // 8
    g, room = (torch.frombuffer(bytearray(n * size + 8), dtype=dtype, count=n, offset=offset) for _ in range(2))
    g.copy_(made(n, dtype, hostile=True))
    check(kernel.summarize([g], [g], [room], [room]), reference.summarize([g.clone()], [g.clone()], [torch.zeros_like(g)]))
    assert torch.equal(bits(room), bits(g))


def odd():
    """Views in which memory order is not logical order, or entries share memory."""
    base = made(720, hostile=True)
    cube = base.view(2, 3, 4, 5, 6)
    return {
        "transposed": base.view(20, 36).t(),
        "channels last": base.view(4, 5, 6, 6).to(memory_format=torch.channels_last),
        "permuted": cube.permute(3, 0, 4, 2, 1),
        "every third": base[::3],
        "a column": base.view(72, 10)[:, 3],
        "expanded": base[:36].view(6, 1, 6).expand(6, 5, 6),
        "one value": base[:1].expand(50),
        "overlapping windows": base[:40].unfold(0, 7, 2),
        "a diagonal": base[:400].view(20, 20).diagonal(),
        "eight axes": base[:384].view(2, 2, 2, 2, 2, 2, 2, 3).permute(7, 0, 6, 1, 5, 2, 4, 3),
        "axes of one": base[:60].view(1, 5, 1, 12).transpose(1, 3),
        "empty": base.view(720, 1)[:, :0].t(),
        "a number": base[7],
    }


@variants
@pytest.mark.parametrize("kind", odd())
def test_any_layout_is_read_in_logical_order(kernel, kind, monkeypatch):
    """Beside contiguous ones or alike ones, and kept in a room of either layout; never by the reference."""
    g = odd()[kind]
    straight = g.clone(memory_format=torch.contiguous_format)
    expected = reference.summarize([straight], [straight], [straight])
    with spied(monkeypatch) as asked:
        for others in (g, straight):
            for room in (torch.empty_like(straight), torch.empty_like(g)):
                check(kernel.summarize([g], [others], [others], [room]), expected)
                assert torch.equal(bits(room), bits(g))
        sampled = kernel.sample([g])
        compared = kernel.compare([g], [straight], [g], [straight])
        assert asked == []
    torch.testing.assert_close(sampled, reference.sample([straight]), rtol=0, atol=0, equal_nan=True)
    check_identical(compared, reference.compare([straight], [straight], [straight], [straight]), fields.UPDATES)


@variants
def test_the_largest_are_found_whatever_the_order(kernel):
    """Rising, falling, constant and tied magnitudes, in memory order and across it."""
    n = 5000
    rising = torch.arange(1.0, n + 1)
    tied = (torch.arange(n) % 7 - 3).float()
    tensors = [rising, rising.flip(0), -rising, torch.ones(n), torch.zeros(n), tied]
    tensors += [tensor.view(50, 100).t() for tensor in tensors]
    check(kernel.summarize(tensors, tensors), reference.summarize(tensors, tensors))


@variants
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_threads_change_nothing_that_is_counted(kernel, threads, monkeypatch):
    """Tensors cut between threads give the numbers of one thread, and are kept whole."""
    monkeypatch.setattr(native, "THREADED", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    tensors = [made(n, seed=n, hostile=n % 2 == 1) for n in (1, 5000, 0, 70000, 3, 20001)]
    for chosen in (tensors, tensors[3:4], tensors[:1], [made(0)] * 3, [tensors[3].view(280, 250).t()]):
        rooms = [torch.empty_like(tensor) for tensor in chosen]
        check(kernel.summarize(chosen, chosen, None, rooms), reference.summarize(chosen, chosen))
        assert all(torch.equal(bits(room), bits(tensor)) for room, tensor in zip(rooms, chosen, strict=True))
        others = [tensor.flip(0) for tensor in chosen]
        rows, expected = (backend.compare(chosen, chosen, others) for backend in (kernel, reference))
        check_identical(rows, expected, fields.UPDATES)


@pytest.mark.slow
@variants
def test_ten_million_entries(kernel, monkeypatch):
    """Counts and extremes are exact, sums as good as in 80 bits, on any number of threads."""
    n = 10**7
    g, w, p = (made(n, seed=seed) * scale for seed, scale in ((1, 1e-3), (2, 1.0), (3, 1e-3)))
    g[::1000], g[5] = 0.0, 7.0
    x, y, z = (tensor.numpy().astype(np.longdouble) for tensor in (g, w, p))
    sums = {"sum": x, "abs_sum": abs(x), "square_sum": x * x, "weight_square_sum": y * y, "dot": x * y, "flip_dot": x * z}
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        row = kernel.summarize([g], [w], [p])[0]
        for name, terms in sums.items():
            assert abs(row[fields.AT[name]].item() - terms.sum()) <= 1.2e-12 * abs(terms).sum(), name
        counts = [row[fields.AT[name]].item() for name in ("numel", "positive", "negative", "zero", "flip_count")]
        moving = (x != 0) & (z != 0)
        assert counts == [n, (x > 0).sum(), (x < 0).sum(), (x == 0).sum(), (moving & ((x < 0) != (z < 0))).sum()]
        assert [row[fields.AT[name]].item() for name in ("min", "max")] == [x.min(), 7.0]
        assert row[fields.HISTOGRAM].sum() == (x != 0).sum()
        assert row[fields.TOP_INDEX][0] == 5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ten_million_entries_of_every_type(dtype, monkeypatch):
    """Hostile ones, on two threads, in memory order or across it."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    g, w = (made(10**7, dtype, seed, hostile=True) for seed in (1, 2))
    if dtype in (torch.bfloat16, torch.float64):
        g, w = g.view(2500, 4000).t(), w.view(4000, 2500)
    check(BEST.summarize([g], [w]), reference.summarize([g], [w]))


# --- rooms ------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("kind", ["plain", "channels last", "every third"])
def test_keep_may_be_the_previous_one(kernel, kind, monkeypatch):
    """The comparison reads what was there before it is overwritten; so the buffer of the last gradient is one."""
    g, p = (made(7200, seed=seed) for seed in (1, 2))
    view = {
        "plain": lambda tensor: tensor,
        "channels last": lambda tensor: tensor.view(10, 20, 6, 6).to(memory_format=torch.channels_last),
        "every third": lambda tensor: tensor[::3],
    }[kind]
    g, p = view(g), view(p)
    expected = reference.summarize([g], None, [p.clone()])
    with spied(monkeypatch) as asked:
        check(kernel.summarize([g], None, [p], [p]), expected)
        assert asked == []
    assert torch.equal(p, g)


def aliased():
    """Lists of gradients, previous ones and rooms, in which a room overlaps something that is read."""
    memory = made(12_000, seed=3)
    a, b, c = memory[:4000], memory[4000:8000], memory[8000:]
    middle = memory[2000:6000]
    return {
        "another row's gradient": ([a, b], [c, c], [b.clone(), a]),
        "a later row's gradient": ([a, b], [c, c], [b, a.clone()]),
        "its own gradient": ([a], [c], [a]),
        "half of a gradient": ([a, b], [c, c], [middle, torch.empty(4000)]),
        "the previous one shifted": ([c], [memory[:4000]], [memory[1:4001]]),
        "the previous one in another order": ([c.view(50, 80)], [a.view(50, 80)], [a.view(80, 50).t()]),
        "another room": ([a, a], [None, None], [b, memory[7000:11_000]]),
        "itself": ([a.view(40, 100)], [c.view(40, 100)], [b[:100].expand(40, 100)]),
        "another type": ([a], [c], [torch.empty(4000, dtype=torch.float64)]),
        "what the other backend reads": ([a, torch.complex(b[:2000], b[2000:])], [c, None], [torch.empty(4000), None]),
    }


@pytest.mark.parametrize("kind", aliased())
def test_rooms_that_overlap_what_is_read_are_refused(kind, monkeypatch):
    """The reference then reads the rows one after another, in order."""
    results = []
    with spied(monkeypatch) as asked, contextlib.suppress(RuntimeError):
        gradients, *others = aliased()[kind]
        BEST.summarize(gradients, None, *others)
    assert asked, "the kernel took them"
    for backend in (BEST, reference):
        gradients, previous, keep = aliased()[kind]
        try:
            rows = backend.summarize(gradients, None, previous, keep)
        except RuntimeError as error:  # torch refuses to write where entries share memory
            results.append((str(error), None))
        else:
            results.append((rows, [None if room is None else room.clone() for room in keep]))
    (rows, rooms), (expected, expected_rooms) = results
    if isinstance(rows, str):
        assert rows == expected
        return
    check(rows, expected)
    for room, other in zip(rooms, expected_rooms, strict=True):
        assert room is other is None or torch.equal(room, other)


@pytest.mark.parametrize("mine", [True, False])
def test_rooms_shared_between_the_two_backends_are_left_to_one(mine, monkeypatch):
    """A room in the memory of a tensor that the other backend reads: the rows are read in order by one."""
    shared = torch.randn(8, dtype=torch.complex64)
    flat = torch.view_as_real(shared).reshape(-1)
    gradients = [torch.randn(16), shared] if mine else [shared.clone(), flat]
    keep = [flat, None] if mine else [shared, None]
    expected = [t.clone() for t in gradients]
    with spied(monkeypatch) as asked:
        rows = BEST.summarize(gradients, None, None, keep)
        assert asked == [2]
    first = reference.summarize(expected[:1])
    check(rows[:1], first)
    check(rows[1:], reference.summarize(gradients[1:]))


# --- what is not plain ------------------------------------------------------------------------------------------


def strange():
    z = torch.randn(8, dtype=torch.complex64)
    return {
        "negative bit": z.conj().imag,
        "conjugate": z.conj(),
        "complex": z,
        "sparse": torch.eye(3).to_sparse(),
        "float8": torch.randn(4).to(torch.float8_e5m2),
        "a subclass": torch.randn(4).as_subclass(type("Own", (torch.Tensor,), {})),
        "nine axes": torch.randn(2, 2, 2, 2, 2, 2, 2, 2, 3).permute(8, 7, 6, 5, 4, 3, 2, 1, 0),
        "zeros without memory": torch._efficientzerotensor((4,)),
    }


@introspectors
@pytest.mark.parametrize("kind", strange())
def test_what_is_not_plain_goes_to_the_reference_alone(kind, introspector, monkeypatch):
    """One odd tensor among many takes its own row there, and the rows keep their order."""
    kernel = native.Native(BEST.library, BEST.variant, introspector)
    tensors = [made(n, seed=n) for n in (3, 9, 5, 4)]
    tensors.insert(2, strange()[kind])
    expected = reference.summarize(tensors)
    with spied(monkeypatch) as asked:
        check(kernel.summarize(tensors), expected)
        assert asked == [1]
        kernel.sample(tensors)
        kernel.compare([None] * 5, tensors, tensors)
        assert asked == [1, 1, 1]


@introspectors
def test_gaps_stay_with_the_kernel(introspector, monkeypatch):
    """Tensors that are not there send no row to the reference."""
    kernel = native.Native(BEST.library, BEST.variant, introspector)
    g, w, p = ([made(n, seed=n + i) for n in (3, 9, 5)] for i in range(3))
    weights, previous = [w[0], None, w[2]], [None, p[1], None]
    expected = reference.summarize(g, weights, previous)
    compared = reference.compare([None, g[1], None], w, p, [g[0], None, None])
    with spied(monkeypatch) as asked:
        check(kernel.summarize(g, weights, previous, [None, torch.empty(9), None]), expected)
        check_identical(kernel.compare([None, g[1], None], w, p, [g[0], None, None]), compared, fields.UPDATES)
        assert asked == []


def test_inference_tensors_and_parameters_are_plain(monkeypatch):
    """Their memory is like any other; the rows are ordinary tensors."""
    with torch.inference_mode():
        inside, room = torch.randn(5), torch.empty(5)
    weight = torch.nn.Parameter(torch.randn(5))
    with spied(monkeypatch) as asked, torch.inference_mode():
        rows = BEST.summarize([inside], [weight], None, [room])
        assert asked == []
    assert torch.equal(room, inside)
    assert not rows.is_inference()
    assert not rows.requires_grad


@introspectors
def test_a_storage_that_is_too_small_is_never_read(introspector):
    """FSDP frees storages under tensors; a shrunken one is not taken either, in any layout."""
    for left in (0, 3996):
        for view in (lambda t: t, lambda t: t.view(10, 100).t()):
            tensor = view(torch.randn(1000))
            tensor.untyped_storage().resize_(left)
            assert native._Work([[tensor]], introspector).taken == []
    begins_later = torch.randn(1000)[10:]
    begins_later.untyped_storage().resize_(3996)
    assert native._Work([[begins_later], [None], [begins_later[:-1]]], introspector).taken == []
    assert native._Work([[begins_later[:-1]]], introspector).taken == [0]
    assert native._Work([[torch.empty(3, device="meta")]], introspector).taken == []


class Noted(TorchDispatchMode):
    """A user's mode."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_under_a_user_s_mode_no_memory_is_touched(monkeypatch):
    """A mode may make tensors that only look like plain ones: nothing asks where they lie."""
    g = torch.randn(7)
    expected = reference.summarize([g])
    monkeypatch.setattr(native, "_Work", lambda *_: pytest.fail("a tensor was asked for its memory"))
    with Noted():
        check(BEST.summarize([g]), expected)
    seen = []

    def inside(x):
        seen.append(x)
        BEST.summarize([g])
        return x.sum()

    torch.func.grad(inside)(g)
    torch.func.vmap(inside)(g.expand(2, 7))
    assert len(seen) == 2


@introspectors
def test_what_escaped_from_a_transform_is_not_taken(introspector):
    """It has the class of a tensor and no memory."""
    escaped = []
    for transform in (torch.func.grad, torch.func.vmap):
        argument = torch.randn(7) if transform is torch.func.grad else torch.randn(2, 7)
        transform(lambda x: (escaped.append(x), x.sum())[1])(argument)
    assert {type(tensor) for tensor in escaped} == {torch.Tensor}
    assert native._Work([escaped], introspector).taken == []


def test_torch_s_table_of_functions_is_used_where_there_is_one(monkeypatch):
    """It asks a thousand tensors in the time in which one after the other asks four hundred."""
    assert (BEST.introspector is not None) == hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    assert native.load().introspector is None


def test_a_default_device_s_mode_changes_nothing(monkeypatch):
    """`torch.set_default_device` is a mode too, over functions: it is not asked."""
    g = torch.randn(7)
    expected = reference.summarize([g])
    with spied(monkeypatch) as asked, torch.device("meta"):
        check(BEST.summarize([g]), expected)
        assert asked == []


@pytest.mark.parametrize(
    "call",
    [
        lambda x: BEST.summarize([x], [x[:2]]),
        lambda x: BEST.summarize([x, x], [x]),
        lambda x: BEST.summarize([x], None, None, [x[:2]]),
        lambda x: BEST.summarize([x.t()], [x[:2]]),
        lambda x: BEST.compare([x], [x], [x[:2]]),
    ],
)
def test_sizes_that_do_not_match_are_refused(call):
    """As by the reference, and before anything is read."""
    with pytest.raises(ArgumentError, match="give"):
        call(torch.ones(3, 4))


def test_no_tensors_give_no_rows():
    """An empty list is no reason to call anybody."""
    assert BEST.summarize([], [], [], []).shape == (0, fields.WIDTH)
    assert BEST.compare([], [], []).shape == (0, len(fields.UPDATES))
    assert BEST.sample([]).shape == (0, reference.SAMPLES)


# --- surroundings ------------------------------------------------------------------------------------------


def test_two_python_threads_call_at_once(monkeypatch):
    """Calls share nothing, each on two threads of its own."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    tensors = [made(400_000, seed=seed, hostile=True) for seed in range(2)]
    expected = [reference.summarize([tensor]) for tensor in tensors]
    rows = [[], []]

    def work(at):
        rows[at] += [BEST.summarize([tensors[at]]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, honest in zip(rows, expected, strict=True):
        assert len(mine) == 20
        check(mine[0], honest)
        assert all(torch.equal(row.nan_to_num(), mine[0].nan_to_num()) for row in mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_subnormal_numbers_count_under_flush_denormal(dtype):
    """The kernel reads bits as they are, and leaves the mode as it was."""
    tensor = torch.full((100,), torch.finfo(dtype).tiny / 4, dtype=dtype)
    half = torch.tensor([torch.finfo(torch.float32).tiny])
    expected = reference.summarize([tensor]), reference.sample([tensor])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        rows = BEST.summarize([tensor]), BEST.sample([tensor])
        assert (half * 0.5).item() == 0
    finally:
        torch.set_flush_denormal(False)
    check(rows[0], expected[0])
    assert torch.equal(rows[1], expected[1])


def test_python_runs_while_the_kernel_reads():
    """The call holds no lock of the interpreter: another thread of Python goes on in the middle of it."""
    big, ticks, over = torch.ones(2 * 10**7), [], threading.Event()

    def tick():
        while not over.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(50):
            start = time.perf_counter()
            BEST.summarize([big])
            third = (time.perf_counter() - start) / 3
            if sum(start + third < at < start + 2 * third for at in ticks) > 1:
                return
            ticks.clear()
    finally:
        over.set()
        thread.join()
    pytest.fail("no other thread ran during fifty calls")
