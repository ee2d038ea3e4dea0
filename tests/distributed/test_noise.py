"""The noise scale over ranks, on real gloo processes."""

import os
import shutil
import tempfile

import numpy as np
import pytest
import torch
from torch import nn

import gradlens
from tests.distributed.ranks import launch

pytestmark = pytest.mark.distributed


def data():
    torch.manual_seed(1)
    return torch.randn(3, 2, 2, 8, 6)  # steps, micro-batches, ranks


def ddp():
    """Accumulation over two micro-batches, the first without synchronisation; this rank's gradients of each."""
    folder = os.path.join(tempfile.gettempdir(), f"gradlens-noise-{os.getppid()}")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    parallel = nn.parallel.DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    stored = []
    with gradlens.watch(parallel, optimizer, stage=("backward", "reduced", "used"), run=folder, rules=()) as lens:
        for micro_batches in data()[:, :, torch.distributed.get_rank()]:
            optimizer.zero_grad()
            for i, x in enumerate(micro_batches):
                grads = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
                stored.append(np.concatenate([g.double().numpy().ravel() for g in grads]))
                with parallel.no_sync() if i == 0 else torch.enable_grad():
                    parallel(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.05)
            optimizer.step()
        reason = lens.noise_scale().reason
    return folder, stored, reason


def test_local_against_averaged_norms_give_what_stored_gradients_give():
    """Two ranks with two micro-batches each are four gradients; one rank alone cannot know, and says so."""
    (folder, *_), _ = results = launch(ddp)
    assert all("ranks whose records are not here" in reason for _, _, reason in results)
    g = np.stack([stored for _, stored, _ in results]).reshape(2, 3, 2, -1).swapaxes(0, 1).reshape(3, 4, -1)
    traces = g.var(axis=1, ddof=1).sum(1)
    signals = (g.mean(1) ** 2).sum(1) - traces / 4
    found = gradlens.open_run(folder).noise_scale(decay=0.0)
    shutil.rmtree(folder)
    np.testing.assert_allclose(found.frame["trace"] / found.frame["signal"], traces / signals, rtol=1e-6)
    assert found.frame["backwards"].tolist() == [4, 4, 4]
    assert float(found) == pytest.approx(traces[-1] / signals[-1], rel=1e-6)
