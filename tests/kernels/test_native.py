"""The native kernel equals the reference, whatever variant runs."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradlens import fields
from gradlens.kernels import native, reference

if not native.LIBRARY.exists():
    pytest.skip("the native kernel was not built", allow_module_level=True)

BEST = native.load()
KERNELS = [native.Native(BEST.library, variant) for variant in range(BEST.variant + 1)]
SUMS = [i for i, field in enumerate(fields.SUMMARY) if field.name.endswith(("sum", "dot"))]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
variants = pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: native.VARIANTS[kernel.variant])


def made(n: int, dtype: torch.dtype, seed: int, hostile: bool, stride: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    tensor = torch.randn(n, stride, generator=random).to(dtype)
    if hostile:
        values = [torch.inf, -torch.inf, torch.nan, -0.0, 0.0, torch.finfo(dtype).tiny / 4, torch.finfo(dtype).tiny]
        for value in values:
            tensor[torch.rand(n, stride, generator=random) < 0.1] = value
    return tensor[:, 0]


def check(rows: torch.Tensor, expected: torch.Tensor) -> None:
    """All but the sums are equal. A sum of n doubles in another order differs by at most n eps times the sum of magnitudes,
    which for these tensors is below 1e-11 of n."""
    exact = [i for i in range(rows.shape[1]) if i not in SUMS]
    torch.testing.assert_close(rows[:, exact], expected[:, exact], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(rows[:, SUMS], expected[:, SUMS], rtol=1e-11, atol=1e-8, equal_nan=True)


@variants
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 5000),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
    hostile=st.booleans(),
    stride=st.integers(1, 3),
)
def test_equals_the_reference(kernel, n, dtype, seed, hostile, stride):
    """Every number of a gradient with weight and previous gradient, of any type, size and stride; kept are its bits."""
    g, w, p = (made(n, dtype, seed + i, hostile, stride) for i in range(3))
    for previous in (p.contiguous(), None):
        mine, its = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype)
        columns = [g], [w], None if previous is None else [previous]
        check(kernel.summarize(*columns, [mine]), reference.summarize(*columns, [its]))
        assert torch.equal(mine.view(torch.uint8), g.clone(memory_format=torch.contiguous_format).view(torch.uint8))
    torch.testing.assert_close(
        kernel.compare([g], [w], [p], [g]), reference.compare([g], [w], [p], [g]), rtol=1e-11, atol=1e-8, equal_nan=True
    )
    torch.testing.assert_close(kernel.sample([g]), reference.sample([g]), rtol=0, atol=0, equal_nan=True)


@variants
def test_threads_change_nothing_that_is_counted(kernel, monkeypatch):
    """Tensors shared between three threads give the numbers of one."""
    tensors = [made(n, torch.float32, n, n % 2 == 1, 1) for n in (1, 5000, 0, 70000, 3, 20001)]
    expected = reference.summarize(tensors)
    monkeypatch.setattr(native, "THREADED", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    check(kernel.summarize(tensors), expected)


@variants
def test_keep_may_be_the_previous_one(kernel):
    """The comparison reads what was there before it is overwritten."""
    g, p = made(3000, torch.float32, 1, False, 1), made(3000, torch.float32, 2, False, 1)
    room = p.clone()
    check(kernel.summarize([g], None, [room], [room]), reference.summarize([g], None, [p]))
    assert torch.equal(room, g)


def test_what_is_not_plain_goes_to_the_reference():
    """Views of conjugate parts, expanded, sparse, transposed and inference ones give its rows, in order."""
    z = torch.randn(8, dtype=torch.complex64)
    with torch.inference_mode():
        inference = torch.randn(5)
    tensors = [
        torch.randn(4),
        z.conj().imag,
        z,
        torch.randn(1).expand(6),
        torch.eye(3).to_sparse(),
        inference,
        torch.randn(3, 4).t(),
    ]
    check(BEST.summarize(tensors), reference.summarize(tensors))


def test_a_storage_that_was_freed_is_never_read():
    """A tensor whose storage is smaller than its extent is not taken."""
    tensor = torch.randn(1000)
    tensor.untyped_storage().resize_(0)
    assert native._Work([[tensor]]).taken == []


def test_two_python_threads_call_at_once():
    """Calls share nothing."""
    tensor, rows = made(200_000, torch.float32, 5, True, 1), []
    threads = [threading.Thread(target=lambda: rows.append(BEST.summarize([tensor]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = reference.summarize([tensor])
    assert len(rows) == 2
    for row in rows:
        check(row, expected)


def test_subnormal_numbers_count_under_flush_denormal():
    """The kernel reads bits as they are, and leaves the mode as it was."""
    tensor = torch.full((100,), torch.finfo(torch.float32).tiny / 4)
    expected = reference.summarize([tensor])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor has no such mode")
    try:
        row = BEST.summarize([tensor])
    finally:
        torch.set_flush_denormal(False)
    check(row, expected)
