"""Rows without detail: no histogram, and quantiles of large tensors from a sample."""

import math

import numpy as np
import pytest
import torch

from gradlens import fields
from gradlens.kernels import batched, native, reference
from tests.kernels.made import HOSTILE, check_identical

KERNEL = native.load()
LARGE = fields.LARGE
RANK_ERROR = 0.05  #: stated in docs/kernels.md: of all entries, how many may lie between a quantile's rank and what it says


def odd(n, dtype=torch.float32, seed=0):
    """Ordinary values, and every fiftieth one hostile."""
    random = torch.Generator().manual_seed(seed)
    tensor = torch.randn(n, generator=random) * 0.01
    at = torch.randperm(n, generator=random)[: n // 50]
    tensor[at] = torch.tensor(HOSTILE)[torch.randint(len(HOSTILE), (len(at),), generator=random)]
    return tensor.to(dtype)


@pytest.mark.parametrize("summarize", [reference.summarize, batched.summarize, KERNEL.summarize])
def test_a_small_tensor_has_the_same_row_without_the_histogram(summarize):
    """Up to 2**16 entries nothing rests on a sample."""
    gradients = [odd(n) for n in (0, 1, 40, 5000, LARGE)]
    full, light = (summarize(gradients, gradients, gradients, None, detail) for detail in (True, False))
    assert light.shape == (5, fields.LIGHT_WIDTH)
    assert torch.equal(light.view(torch.int64), full[:, : fields.LIGHT_WIDTH].contiguous().view(torch.int64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_large_tensor_has_the_same_row_but_for_its_quantiles(dtype):
    """Counts, moments and the largest rest on every entry."""
    gradients = [odd(LARGE + 1, dtype), odd(3 * LARGE + 77, dtype, 1)]
    full, light = (KERNEL.summarize(gradients, None, gradients, None, detail) for detail in (True, False))
    for part in (slice(0, fields.QUANTILE.start), slice(fields.QUANTILE.stop, fields.LIGHT_WIDTH)):
        assert torch.equal(light[:, part].nan_to_num(7), full[:, part].nan_to_num(7))
    assert (light[:, fields.QUANTILE] != full[:, fields.QUANTILE]).any()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_kernel_takes_the_same_sample(dtype, threads):
    """Large and small, contiguous or not, with entries that are not finite, and none that are."""
    square = odd(300 * 300, dtype, 5).view(300, 300)
    nothing = torch.full((LARGE + 9,), math.nan, dtype=dtype)
    gradients = [
        odd(LARGE + 1, dtype),
        odd(5 * LARGE + 1023, dtype, 2),
        square.t(),
        square,
        nothing,
        torch.zeros(2 * LARGE, dtype=dtype),
        odd(100, dtype),
    ]
    weights = [g.flip(0) if g.is_contiguous() else g.t().contiguous().t() for g in gradients]
    weights[3] = square.t().contiguous().t()  # laid out otherwise than its gradient
    wanted = reference.summarize(gradients, weights, detail=False)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_identical(KERNEL.summarize(gradients, weights, detail=False), wanted, fields.SUMMARY)
    finally:
        torch.set_num_threads(before)
    check_identical(batched.summarize(gradients, weights, None, None, False), wanted, fields.SUMMARY)


@pytest.mark.parametrize("variant", range(KERNEL.variant + 1))
def test_every_variant_takes_the_same_sample(variant):
    """Plain C, and what this processor has."""
    gradients = [odd(LARGE + 1000), odd(4 * LARGE, seed=3)]
    kernel = native.Native(KERNEL.library, variant, KERNEL.introspector)
    check_identical(kernel.summarize(gradients, detail=False), reference.summarize(gradients, detail=False), fields.SUMMARY)


def test_a_gradient_that_is_not_contiguous_rests_on_every_entry():
    """Its lines are no stretches of memory."""
    gradient = odd(400 * 400).view(400, 400).t()
    light, full = KERNEL.summarize([gradient], detail=False), KERNEL.summarize([gradient])
    assert torch.equal(light.nan_to_num(7), full[:, : fields.LIGHT_WIDTH].nan_to_num(7))


def shaped(kind):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(1024, 1024, generator=random)
    if kind == "columns of different size":
        return x * torch.linspace(0.001, 1, 1024)
    if kind == "rows of different size":
        return x * torch.linspace(0.001, 1, 1024)[:, None]
    if kind == "one row in twenty":
        return x * (torch.rand(1024, 1, generator=random) < 0.05)
    if kind == "in order":
        return x.flatten().sort().values
    if kind == "a power of two of columns are positive":
        return x.abs() * torch.where(torch.arange(1024) % 128 < 32, 1.0, -1.0)
    return x


KINDS = [
    "normal",
    "columns of different size",
    "rows of different size",
    "one row in twenty",
    "in order",
    "a power of two of columns are positive",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [LARGE + 1, 2**18, 2**20])
def test_the_sample_is_even(kind, size):
    """A quantile's bucket holds an entry of nearly the rank that was asked for, whatever pattern the tensor has."""
    gradient = shaped(kind).flatten()[:size].contiguous()
    ascending = gradient.sort().values.double().numpy()
    row = KERNEL.summarize([gradient], detail=False)[0, fields.QUANTILE].tolist()
    for value, q in zip(row, fields.QUANTILES.values(), strict=True):
        # All entries of the quantile's bucket are said to be there.
        low, high = (
            (0.0, 0.0)
            if value == 0
            else sorted((math.copysign(2.0 ** (math.frexp(value)[1] - 1), value) * f) for f in (1, 2))
        )
        first, last = np.searchsorted(ascending, low, "left") / size, np.searchsorted(ascending, high, "right") / size
        assert first - RANK_ERROR <= q <= last + RANK_ERROR, (q, value, first, last)
