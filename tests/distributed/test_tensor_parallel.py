"""Tensor parallel: distributed tensors whose gradients are pieces, copies or summands."""

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import gradlens
from tests.distributed.made import Keep

pytestmark = pytest.mark.distributed


def summands():
    """A replicated parameter whose gradient is a summand of each rank, as a norm layer's is under sequence parallelism."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    net = nn.Linear(4, 1, bias=False)
    net.weight = nn.Parameter(DTensor.from_local(torch.ones(1, 4), mesh, [Replicate()], run_check=False))
    x = DTensor.from_local(torch.full((2, 4), 1.0 + distributed.get_rank()), mesh, [Shard(0)], run_check=False)
    keep = Keep()
    lens = gradlens.watch(net, stage="backward", writers=[keep], rules=(), features=())
    (net(x).sum()).backward()
    partial = net.weight.grad.placements == (Partial(),)
    local = net.weight.grad.to_local().clone()
    lens.close()
    return partial, local.numpy(), keep.records


def group():
    """All scenarios."""
    return {call.__name__: call() for call in (summands,)}


@pytest.mark.trap(21)
@pytest.mark.trap(22)
def test_a_summand_is_marked_and_named(launched):
    """The row of a Partial gradient says that it is of this rank's summand, equals it exactly, and a finding names it."""
    for result in launched(group):
        partial, local, records = result["summands"]
        assert partial
        (snapshot,) = [r for r in records if hasattr(r, "columns")]
        (finding,) = [r for r in records if not hasattr(r, "columns")]
        assert snapshot.parameters.pieces == ("partial",)
        assert snapshot.columns["square_sum"] == np.square(local, dtype=np.float64).sum()
        assert (finding.rule, finding.parameters) == ("partial-gradient", ("weight",))
