"""What evidence adds up: one pass of the native kernel gives what torch's operations give."""

import math

import pytest
import torch

from gradlens import kernels
from gradlens.statistics.evidence import Evidence, Moments
from tests.kernels.made import FLOATS, HOSTILE

SIZES = [(), (0,), (7,), (50, 41), (3000,)]


def hostile(shape, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    tensor = torch.randn(shape, generator=random)
    odd = torch.tensor(HOSTILE)[torch.randint(len(HOSTILE), shape, generator=random)]
    return torch.where(torch.rand(shape, generator=random) < 0.1, odd, tensor).to(dtype)


def by_torch(monkeypatch):
    monkeypatch.setattr(kernels, "add_moments", lambda *a: False)
    monkeypatch.setattr(kernels, "fold_decayed", lambda *a: False)


def close(mine, theirs):
    """Float64 by size; float32 are shares, at most 1."""
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        wide = a.dtype == torch.float64
        assert torch.allclose(a, b, rtol=1e-12 if wide else 0, atol=1e-30 if wide else 1e-6, equal_nan=True)


def moments(dtype, divisor):
    made = Moments([torch.empty(size) for size in SIZES])
    for step in range(6):
        made.begin(weight=1.0 + step % 3)
        made.add({i: hostile(size, dtype, 10 * step + i) for i, size in enumerate(SIZES)}, divisor)
    return [tensor for tensors in made._parts() for tensor in tensors]


@pytest.mark.parametrize("divisor", [1.0, 3.0, torch.tensor(1024.0)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_moments_are_those_of_torch(dtype, divisor, monkeypatch):
    """Means, squared deviations and signs, of weighted gradients under a scale, with entries that are not finite."""
    mine = moments(dtype, divisor)
    by_torch(monkeypatch)
    close(mine, moments(dtype, divisor))


def over_time(decay):
    evidence = Evidence([torch.empty(size) for size in SIZES], decay=decay)
    for step in range(8):
        for micro in range(1 + step % 2):
            evidence.update([hostile(size, torch.float32, 100 * step + 10 * micro + i) for i, size in enumerate(SIZES)])
        evidence.step_done()
    (steps,) = evidence._steps
    return [steps.mean, steps.square, steps.sign, steps.seen, steps.flips, steps.moving, steps.steps, steps.last]


@pytest.mark.parametrize("decay", [0.98, 0.6, 0.3])
def test_decayed_means_are_those_of_torch(decay, monkeypatch):
    """Agreement, flips and signal to noise over steps; a partial that was not finite leaves a weight as it was."""
    mine = over_time(decay)
    by_torch(monkeypatch)
    close(mine, over_time(decay))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_share_the_weights(threads):
    """Each entry is added once, whoever adds it."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        made, g = Moments([torch.empty(2**18 + 77)]), torch.arange(2**18 + 77.0)
        made.update([g])
        made.update([-g])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made.positive[0], made.negative[0])
    assert made.mean[0].abs().max() == 0
    assert torch.equal(made.squares[0], 2 * g.double() ** 2)


def test_equal_gradients_have_no_spread():
    """Not even from rounding: `constant` and `identical batches` rest on it."""
    made, g = Moments([torch.empty(1000)]), torch.randn(1000)
    for weight in (3.0, 1.0, 7.0):
        made.update([g], weight)
    assert made.squares[0].abs().max() == 0
    assert torch.equal(made.mean[0], g.double())


@pytest.mark.parametrize("kind", ["strided", "subclass", "sparse", "no kernel"])
def test_what_the_kernel_does_not_take_is_left_to_torch(kind, monkeypatch):
    """It says so, and has added nothing."""
    g = {"strided": torch.randn(8)[::2], "sparse": torch.randn(4).to_sparse()}.get(kind, torch.randn(4))
    g = g.as_subclass(type("Odd", (torch.Tensor,), {})) if kind == "subclass" else g
    if kind == "no kernel":
        monkeypatch.setattr(kernels, "_native", lambda: None)
    kept = [torch.zeros(4, dtype=dtype) for dtype in (torch.float64, torch.float64, torch.int32, torch.int32)]
    assert not kernels.add_moments(g, kept, 1.0, 1.0, 1.0)
    assert all(tensor.abs().max() == 0 for tensor in kept)
    assert math.isfinite(kept[0].sum())
