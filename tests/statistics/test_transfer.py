"""Numbers come to the host as they were, in one copy a step."""

import numpy as np
import pytest
import torch
from torch import nn

import gradlens
from gradlens.statistics import transfer
from gradlens.statistics.table import Table
from gradlens.statistics.transfer import Transfer
from gradlens.watching import batches
from tests.launches import Launches

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def tensors():
    return [
        torch.arange(6.0, dtype=torch.float64).view(2, 3),
        torch.tensor(2.5),
        torch.tensor(True),
        torch.tensor(0.5, dtype=torch.bfloat16),
        torch.empty(0, 4, dtype=torch.float64),
        torch.tensor(3, dtype=torch.int64),
        torch.tensor([1.5], dtype=torch.float16),
    ]


@pytest.mark.parametrize("kind", ["cpu", "another"])
def test_shapes_order_and_values_are_kept(kind, monkeypatch):
    """Tensors of any type arrive as arrays of their shape, whether they are here or had to be packed."""
    monkeypatch.setattr(transfer, "HERE", "cpu" if kind == "cpu" else "nowhere")
    given = tensors()
    arrays = Transfer(given).wait()
    assert [array.shape for array in arrays] == [tuple(tensor.shape) for tensor in given]
    for array, tensor in zip(arrays, given, strict=True):
        np.testing.assert_array_equal(array.astype(np.float64), tensor.double().numpy())


def test_nothing_is_nothing():
    """No tensors, no copy, no arrays."""
    assert Transfer([]).wait() == []


def test_many_tensors_are_packed_once(monkeypatch):
    """What lies on one device is put together there and copied in one go."""
    monkeypatch.setattr(transfer, "HERE", "nowhere")
    copied = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copied.append(tensor.shape) or tensor)
    with Launches() as mode:
        Transfer([torch.zeros(3, 300, dtype=torch.float64) for _ in range(10)])
    assert mode.counts["cat"] == 1
    assert copied == [(9000,)]


def watched(steps, backwards=1, device="cpu", **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(20))).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(4, 8, device=device)
    with gradlens.watch(model, optimizer, **options) as lens:
        for _ in range(steps):
            optimizer.zero_grad()
            for _ in range(backwards):
                loss = model(x).square().mean()
                loss.backward()
            lens.observe(loss=loss)
            optimizer.step()
        lens.flush()
        yield lens


@pytest.mark.parametrize(
    "options",
    [{"features": ()}, {}, {"features": ("updates", "flips", "evidence")}, {"stage": ("backward", "accumulated", "used")}],
    ids=["rows alone", "by default", "all features", "three stages"],
)
def test_a_step_is_one_transfer(options, monkeypatch):
    """However many parameters, features and stages: one transfer a step; one more a backward where they are many.

    Numbers that are on the host already need none, so tables are made to say that theirs are not.
    """
    started = []
    monkeypatch.setattr(Table, "on_host", lambda table: False)
    monkeypatch.setattr(batches, "_HOST", lambda table: False)

    class Counted(Transfer):
        def __init__(self, tensors):
            started.append(len(tensors))
            super().__init__(tensors)

    monkeypatch.setattr(batches, "Transfer", Counted)
    for backwards, expected in ((1, 5), (3, 15)):
        started.clear()
        for _ in watched(5, backwards, **options):
            assert len(started) == expected, started


def test_a_step_on_the_cpu_is_no_transfer(monkeypatch):
    """Its numbers are where they are wanted."""
    monkeypatch.setattr(batches, "Transfer", None)
    for lens in watched(5):
        assert lens.history()["step"].unique().tolist() == list(range(5))


@needs_gpu
@pytest.mark.parametrize("features", [(), ("updates", "flips")])
def test_a_step_on_a_gpu_is_one_copy_to_the_host(features):
    """The profiler sees one copy to the host a step, and it is asynchronous: to pinned memory."""
    from torch.profiler import ProfilerActivity, profile

    for _ in watched(3, device="cuda", features=features):
        pass  # the programs are compiled
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in watched(5, device="cuda", features=features):
            torch.cuda.synchronize()
    copies = [event.name for event in seen.events() if "Memcpy DtoH" in event.name]
    assert len(copies) == 5, copies
    assert all("Pinned" in name for name in copies)
