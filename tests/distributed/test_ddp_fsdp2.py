"""The right gradient over ranks, on real gloo processes."""

import numpy as np
import pytest
import torch
from torch import nn

import gradlens
from gradlens import fields
from gradlens.pooling import pool
from tests.distributed.ranks import launch

pytestmark = pytest.mark.distributed


class Keep:
    """A writer that keeps what it gets."""

    def __init__(self):
        self.records = []

    def write(self, record):
        self.records.append(record)

    def flush(self):
        pass

    close = flush


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batches():
    torch.manual_seed(1)
    return torch.randn(3, 8, 6)


def train(net, data, stage, watched=True):
    """Three steps; the snapshots, and the final local weights."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    keep = Keep()
    lens = gradlens.watch(net, optimizer, stage=stage, writers=[keep], rules=()) if watched else None
    for x in data:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    if lens is not None:
        lens.close()
    weights = [getattr(p, "_local_tensor", p).detach().numpy().copy() for p in net.parameters()]
    return (
        [r for r in keep.records if hasattr(r, "columns")],
        [str(r) for r in keep.records if not hasattr(r, "columns")],
        weights,
    )


def mine(data):
    """This rank's share of each batch."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return data.chunk(ranks, dim=1)[rank]


def ddp():
    """Both ways of bucket views, watched and not."""
    result = {}
    for view in (False, True):
        for watched in (True, False):
            net = nn.parallel.DistributedDataParallel(model(), gradient_as_bucket_view=view)
            result[view, watched] = train(net, mine(batches()), ("backward", "reduced", "used"), watched)
    return result


def fsdp2():
    """Sharded; the first bias has an empty shard on no rank, the last (3 entries) on the fourth of four."""
    from torch.distributed.fsdp import fully_shard

    result = {}
    for watched in (True, False):
        net = model()
        fully_shard(net[0])
        fully_shard(net)
        result[watched] = train(net, mine(batches()), ("reduced", "used"), watched)
    return result


def same(pooled, whole):
    assert pooled.names == whole.names
    assert pooled.parameters.shapes == whole.parameters.shapes
    for field in fields.COUNTS:
        np.testing.assert_array_equal(pooled.columns[field.name], whole.columns[field.name], err_msg=field.name)
    for name in ("square_sum", "abs_sum", "abs_max"):
        np.testing.assert_allclose(pooled.columns[name], whole.columns[name], rtol=2e-5, err_msg=name)
    np.testing.assert_array_equal(pooled.top.index[:, :3], whole.top.index[:, :3])


def by_moment(snapshots, stage):
    return {s.step: s for s in snapshots if s.stage == stage}


@pytest.mark.trap(16)
def test_ddp_stages_are_what_they_say():
    """`backward` is the local gradient, `reduced` and `used` the mean, bucket views both ways; training is unchanged."""
    ranks = launch(ddp)
    for view in (False, True):
        for rank, result in enumerate(ranks):
            snapshots, findings, weights = result[view, True]
            assert findings == []
            for a, b in zip(weights, result[view, False][2], strict=True):
                assert np.array_equal(a, b)
            assert {s.rank for s in snapshots} == {rank}
            whole, _, _ = train(model(), batches(), ("backward", "used"))
            for stage in ("reduced", "used"):
                for step, snapshot in by_moment(snapshots, stage).items():
                    same(snapshot, by_moment(whole, "backward")[step])
            own, _, _ = train(model(), batches().chunk(2, dim=1)[rank][:1], ("backward",))
            first = by_moment(snapshots, "backward")[0]
            np.testing.assert_array_equal(first.columns["square_sum"], own[0].columns["square_sum"])


@pytest.mark.trap(20)
@pytest.mark.parametrize("count", [2, 4])
def test_fsdp2_pools_to_the_table_of_one_process(count):
    """Shards' tables pool to the table of the whole, top weights by their global index; training is unchanged."""
    ranks = launch(fsdp2, count)
    whole, _, _ = train(model(), batches(), ("backward", "used"))
    for result in ranks:
        assert result[True][1] == []
        for a, b in zip(result[True][2], result[False][2], strict=True):
            assert np.array_equal(a, b)
    for stage in ("reduced", "used"):
        tables = [by_moment(result[True][0], stage) for result in ranks]
        assert sorted(tables[0]) == [0, 1, 2]
        for step in tables[0]:
            pooled = pool([table[step] for table in tables])
            assert pooled.ranks == count
            same(pooled, by_moment(whole, "used")[step])


def summands():
    """A replicated parameter whose gradient is a summand of each rank, as a norm layer's is under sequence parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    net = nn.Linear(4, 1, bias=False)
    net.weight = nn.Parameter(DTensor.from_local(torch.ones(1, 4), mesh, [Replicate()], run_check=False))
    x = DTensor.from_local(torch.full((2, 4), 1.0 + torch.distributed.get_rank()), mesh, [Shard(0)], run_check=False)
    keep = Keep()
    lens = gradlens.watch(net, stage="backward", writers=[keep], rules=(), features=())
    (net(x).sum()).backward()
    partial = net.weight.grad.placements == (Partial(),)
    local = net.weight.grad.to_local().clone()
    lens.close()
    return partial, local.numpy(), keep.records


@pytest.mark.trap(21)
@pytest.mark.trap(22)
def test_a_summand_is_marked_and_named():
    """The row of a Partial gradient says that it is of this rank's summand, equals it exactly, and a finding names it."""
    for partial, local, records in launch(summands):
        assert partial
        (snapshot,) = [r for r in records if hasattr(r, "columns")]
        (finding,) = [r for r in records if not hasattr(r, "columns")]
        assert snapshot.parameters.pieces == ("partial",)
        assert snapshot.columns["square_sum"] == np.square(local, dtype=np.float64).sum()
        assert (finding.rule, finding.parameters) == ("partial-gradient", ("weight",))
