"""Rules over two ranks under DDP, where what backward gave is read after averaging."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradlens
from tests.scaled import clipped

pytestmark = pytest.mark.distributed


def over_ranks(given, right):
    """The loud rules of a loop with a GradScaler that clips in the right order, or before unscaling (minGPT-ddp's)."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    x, y = torch.randn(32, 8), torch.randint(3, (32,))
    lens = clipped(model, x, y, steps=15, given=given, right=right)
    return sorted({f.rule for f in lens.findings() if f.severity != "info"}), lens.diagnosis().verdict


def poisoned():
    """The first finding of a loop in which one rank's data have a NaN at step 4."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lens = gradlens.watch(model, optimizer)
    for step in range(6):
        x = torch.randn(32, 8)
        if step == 4 and torch.distributed.get_rank() == 0:
            x[3, 2] = float("nan")
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    lens.close()
    first = next(f for f in lens.findings() if f.rule == "nonfinite")
    return first.step, " ".join(first.causes)


def zeroed(how):
    """The loud rules of a loop whose gradients are emptied in one of several ways, or never."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    lens = gradlens.watch(model, optimizer)
    for _ in range(14):
        if how != "never":
            optimizer.zero_grad(set_to_none=how == "none")
        x = torch.randn(32, 8, generator=generator)
        y = x[:, :3].argmax(1)
        if how == "accumulated":
            with model.no_sync():
                nn.functional.cross_entropy(model(x), y).backward()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    lens.close()
    return [(f.rule, f.causes[0]) for f in lens.findings() if f.severity != "info"]


def two():
    """All of it in one launch."""
    return {
        **{(given, right): over_ranks(given, right) for given in (True, False) for right in (True, False)},
        "poisoned": poisoned(),
        **{how: zeroed(how) for how in ("never", "none", "zeros", "accumulated")},
    }


@pytest.mark.parametrize("given", [True, False])
def test_clipping_before_unscaling_is_named_over_ranks(launched, given):
    """F21: on each rank, whether the scaler was given or found; the right order is silent."""
    for result in launched(two):
        wrong, verdict = result[given, False]
        assert "clipped_scaled" in wrong
        assert "clip_grad_norm_() before scaler.unscale_" in verdict
        assert result[given, True][0] == []


def test_the_rank_whose_data_were_nan_says_so(launched):
    """The others have NaN after averaging, and a loss that is finite."""
    own, other = (result["poisoned"] for result in launched(two))
    assert own[0] == other[0] == 4
    assert "NaN or infinite values in the data" in own[1]
    assert "values in the data: what" not in other[1]


def test_gradients_that_nobody_empties_are_named_over_ranks(launched):
    """F21's kind: `stale` on each rank, though the local gradients are not read; None, zeros and no_sync() are silent."""
    for result in launched(two):
        assert "zero_grad() is missing" in dict(result["never"])["stale"]
        assert result["none"] == result["zeros"] == result["accumulated"] == []
