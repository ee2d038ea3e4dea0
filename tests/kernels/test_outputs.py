"""What a module made of a batch: the library and torch say the same, and both what a person works out by hand."""

import math

import pytest
import torch

from gradlens.activations import SUMS
from gradlens.kernels import native
from gradlens.kernels.outputs import readable, sums_by_torch, sums_of

KERNEL = native.load()
AT = {name: i for i, name in enumerate(SUMS)}


def by_library(made, *args):
    """The sums, which the library has to have read."""
    found = sums_of(KERNEL, made, *args)
    assert type(found) is list, "it went to torch"
    return torch.tensor(found, dtype=torch.float64)


def test_a_small_batch_worked_out_by_hand():
    """Three examples of two units, one of which is always 0: every sum has its own number."""
    made = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 6.0]])
    expected = {
        "entries": 6,
        "nonfinite": 0,
        "norm": math.sqrt(41),
        "deviation": math.sqrt(14),
        "units": 2,
        "dead": 1,
        "saturated": 4,
    }
    for found in (by_library(made, 0, 0.0, 6.0), sums_by_torch(made, 0, 0.0, 6.0)):
        assert dict(zip(SUMS, found.tolist(), strict=True)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 5), (2,), (7, 1), (5, 1024), (3, 1025), (64, 3, 9, 9), (4, 5000), (70_000, 6)])
def test_the_library_says_what_torch_says(dtype, shape):
    """Each type and shape, threads too: counts are the same and sums agree."""
    torch.manual_seed(0)
    made = (torch.randn(shape) * 3).relu().to(dtype)
    mine, other = by_library(made, 0, 0.05, 4.0), sums_by_torch(made, 0, 0.05, 4.0)
    for name in ("entries", "nonfinite", "units", "dead", "saturated"):
        assert mine[AT[name]] == other[AT[name]], name
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-9, equal_nan=True)


def test_what_differs_is_not_lost_beside_what_is_shared():
    """Examples that differ by 1e-5 of their size have that deviation, to eight digits."""
    torch.manual_seed(1)
    made = 1000 + 0.01 * torch.randn(32, 100, dtype=torch.float64)
    true = float((made - made.mean(0)).square().sum().sqrt())
    assert by_library(made)[AT["deviation"]] == pytest.approx(true, rel=1e-8)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_and_left_out(bad):
    """It is in no sum of sizes and no saturated entry, and takes away the deviation, which would mean nothing."""
    torch.manual_seed(2)
    made = torch.randn(6, 9)
    made[2, 4] = bad
    made[:, 7] = 0
    mine, other = by_library(made, 0, 0.0, 1.0), sums_by_torch(made, 0, 0.0, 1.0)
    assert mine[AT["nonfinite"]] == 1
    assert mine[AT["dead"]] == 1
    assert math.isnan(mine[AT["deviation"]])
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=0.0, equal_nan=True)
    assert mine[AT["norm"]] == pytest.approx(float(made[made.isfinite()].double().norm()), rel=1e-12)


@pytest.mark.parametrize(
    ("made", "axis"),
    [
        (torch.randn(4, 6, 5, 5).to(memory_format=torch.channels_last), 0),
        (torch.randn(3, 8, 2).transpose(0, 1), 1),
        (torch.randn(8, 3, 2)[2:5], 0),
        (torch.randn(6, 5, 4).transpose(1, 2), 0),
    ],
)
def test_examples_in_any_order_of_memory(made, axis):
    """The order within an example is of no account, as long as there are no gaps."""
    torch.testing.assert_close(by_library(made, axis), sums_by_torch(made, axis), rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    ("made", "axis"), [(torch.randn(4, 6)[:, ::2], 0), (torch.randn(6, 4).T, 0), (torch.randn(1, 6).expand(5, 6), 0)]
)
def test_gaps_and_shared_memory_go_to_torch(made, axis):
    """The library reads examples that lie behind each other, and nothing else."""
    assert sums_of(KERNEL, made, axis) is None
    torch.testing.assert_close(sums_by_torch(made, axis), sums_by_torch(made.contiguous(), axis), equal_nan=True)


def test_one_example_has_no_deviation():
    """A batch of one says nothing of what differs between examples."""
    assert math.isnan(by_library(torch.randn(1, 4))[AT["deviation"]])
    assert math.isnan(sums_by_torch(torch.randn(1, 4))[AT["deviation"]])


def test_what_has_no_such_numbers():
    """Scalars, integers, empty ones and those without memory are not read."""
    there = [torch.tensor(1.0), torch.arange(3), torch.empty(0, 3), torch.empty(2, 2, device="meta")]
    assert not any(map(readable, there))
    assert readable(torch.ones(1))
