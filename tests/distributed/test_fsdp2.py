"""FSDP2 (`fully_shard`): each rank reads the shard that it holds of the averaged gradient."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import gradlens
from gradlens import fields
from gradlens.capture.marks import zeroed
from gradlens.pooling import pool
from tests.distributed.made import (
    Keep,
    batches,
    bits_equal,
    collectives,
    exact_batches,
    expected,
    loss,
    mine,
    model,
    numbers,
    records,
    same,
    snapshots,
    train,
    weights,
)
from tests.distributed.sharded import READ, accumulate, check, exact, reference
from tests.distributed.shown import pooled

pytestmark = pytest.mark.distributed


def even():
    """A matrix whose dimensions divide by 2 and 4."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def sharded(net, **arguments):
    """The first layer, and the rest; of four ranks the last has no entry of either bias."""
    fully_shard(net[0], **arguments)
    return fully_shard(net, **arguments)


def twice(shard=sharded, make=exact, steps=train, x=exact_batches):
    """Watched and not: the records, and both runs' weights."""
    (keep, watched), (_, bare) = (steps(shard(make()), mine(x()), READ, on) for on in (True, False))
    return keep.records, watched, bare


def plain():
    return twice()


def single():
    """In float32, as people train."""
    return twice(make=model, x=batches)


def offloaded():
    return twice(lambda net: sharded(net, offload_policy=CPUOffloadPolicy(pin_memory=False)))


def hybrid():
    """Sharded over one dimension of a mesh, copied over the other."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size() // 2, 2), mesh_dim_names=("copies", "shards"))
    return twice(lambda net: sharded(net, mesh=mesh))


def columns():
    """Sharded along the second dimension where that divides by the number of ranks."""
    ranks = distributed.get_world_size()
    return twice(
        lambda net: sharded(net, shard_placement_fn=lambda p: Shard(int(p.dim() > 1 and p.shape[1] % ranks == 0))), even
    )


def no_sync():
    return twice(steps=accumulate)


def mixed():
    """Computed in bf16, averaged and kept in float32: the rows, and those of what FSDP2 left in `.grad`."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    after, seen, wanted = [], [], []
    for watched in (True, False):
        net = sharded(model(), mp_policy=policy)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        keep = Keep()
        lens = gradlens.watch(net, optimizer, stage=READ, writers=[keep], rules=()) if watched else None
        for x in mine(batches()):
            optimizer.zero_grad()
            loss(net, x).backward()
            wanted += [expected({name: p.grad for name, p in net.named_parameters()})] * watched
            optimizer.step()
        if watched:
            lens.close()
            seen = [(str(s.stage), s.step, numbers(s), s.parameters.dtypes) for s in keep.snapshots]
        after.append(weights(net))
    return seen, wanted, *after


def ignored():
    """One weight is left alone: FSDP2 does not average its gradient, and the user does not either."""
    net = model()
    fully_shard(net, ignored_params={net[2].weight})
    keep, _ = train(net, mine(batches())[:1], READ)
    return keep.records


def before():
    """Watched before it is sharded, which replaces every parameter: without an optimizer, since that is made later."""
    net = exact()
    keep = Keep()
    lens = gradlens.watch(net, stage="reduced", writers=[keep], rules=())
    sharded(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x in mine(exact_batches()):
        optimizer.zero_grad()
        loss(net, x).backward()
        optimizer.step()
    lens.close()
    return keep.records


def rescanned():
    """The model is looked at anew between forward and backward, while the modules show whole parameters."""
    net = sharded(exact())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    keep, whole = Keep(), []
    lens = gradlens.watch(net, optimizer, stage=READ, writers=[keep], rules=())
    for step, x in enumerate(mine(exact_batches())):
        optimizer.zero_grad()
        out = loss(net, x)
        whole.append(type(net[2].weight) is nn.Parameter)
        net[1].register_module(f"extra{step}", nn.Identity())
        lens.flush()
        out.backward()
        optimizer.step()
        with torch.no_grad():
            net(x)  # they are shown after this, too
        lens.flush()
    lens.close()
    return keep.records, whole


def counted():
    return collectives(fully_shard, READ, mine(batches()))


def emptied():
    """What is left of gradients whose shards are uneven, a rank's alone zeroed; and how many collectives that took."""
    mesh, rank = init_device_mesh("cpu", (distributed.get_world_size(),)), distributed.get_rank()
    whole = [torch.zeros(shape) for shape in ((3, 10), (5,))]
    for tensor in whole:
        tensor[:1] = 1
    shards = [distribute_tensor(tensor, mesh, [Shard(0)]) for tensor in whole]
    count = distributed.group.WORLD._get_sequence_number_for_group
    first = count()
    seen = [zeroed(shard) for shard in shards] if rank else []  # one that does not take part would hang the others
    return (
        seen,
        [shard.to_local().numel() for shard in shards],
        distributed.group.WORLD._get_sequence_number_for_group() - first,
    )


def group():
    """All scenarios; collectives are counted where there are two ranks."""
    calls = (plain, single, offloaded, hybrid, columns, no_sync, mixed, ignored, before, rescanned, pooled, emptied)
    return {call.__name__: call() for call in calls + (counted,) * (distributed.get_world_size() == 2)}


COUNTS = pytest.mark.parametrize("count", [2, 4])


@COUNTS
@pytest.mark.trap(20)
@pytest.mark.parametrize("name", ["plain", "offloaded", "hybrid"])
@pytest.mark.situation(
    "sharded, empty shards, CPU offload, HSDP",
    stages={
        "backward": "no: FSDP2 calls hooks with the averaged shard only",
        "reduced": "yes",
        "used": "yes",
        "updates": "yes",
    },
    note="of this rank's shard, with indices into the whole; pooled over ranks it is the table of one process",
)
def test_shards_pool_to_the_table_of_one_process(launched, count, name):
    """Counts exactly and sums to 1e-9, with an empty shard, offloaded to the CPU, and with copies of shards."""
    check(records(launched(group, count), name), reference(), rtol=1e-9)


@COUNTS
def test_float32_differs_by_the_order_of_addition_alone(launched, count):
    """In float32 the averaging itself rounds by the order in which ranks add: the same counts, sums to 1e-6."""
    ranks, whole = records(launched(group, count), "single"), reference(model, batches)
    for stage in READ:
        for step in whole:
            tables = [next(s for s in snapshots(rank) if (s.stage, s.step) == (stage, step)) for rank in ranks]
            pooled = pool(tables)
            for field in fields.COUNTS:
                np.testing.assert_array_equal(pooled.columns[field.name], whole[step].columns[field.name])
            for name in ("abs_sum", "square_sum", "abs_max"):
                np.testing.assert_allclose(pooled.columns[name], whole[step].columns[name], rtol=1e-6, err_msg=name)
            apart = np.abs(pooled.columns["sum"] - whole[step].columns["sum"])
            assert (apart <= 1e-6 * whole[step].columns["abs_sum"]).all()  # of what was added, before it cancels


@COUNTS
@pytest.mark.situation("sharded along another dimension", stages={"reduced": "yes", "used": "yes", "updates": "yes"})
def test_columns_pool_to_the_table_of_one_process(launched, count):
    """A shard that is not contiguous in the whole has the whole's indices, too."""
    check(records(launched(group, count), "columns"), reference(even), rtol=1e-9)


@COUNTS
@pytest.mark.trap(20)
@pytest.mark.situation(
    "accumulation under `set_requires_gradient_sync(False)`",
    stages={
        "backward": "no: FSDP2 keeps the sums to itself",
        "reduced": "yes: of the backward that synchronises",
        "used": "yes",
    },
)
def test_accumulation_is_read_when_it_is_averaged(launched, count):
    """Of three micro-batches there is one `reduced` row, with all of them in it."""
    check(records(launched(group, count), "no_sync"), reference(steps=accumulate), rtol=1e-9)


@COUNTS
@pytest.mark.situation("mixed precision", stages={"reduced": "yes: as averaged, in the parameters' dtype", "used": "yes"})
def test_mixed_precision_is_read_as_it_is_averaged(launched, count):
    """The rows are exactly those of what FSDP2 left in `.grad`; training is unchanged."""
    for result in launched(group, count):
        seen, wanted, watched, bare = result["mixed"]
        bits_equal(watched, bare)
        assert [key[:2] for key in seen] == [(stage, step) for step in range(3) for stage in READ]
        for _, step, rows, dtypes in seen:
            assert set(dtypes) == {"float32"}
            same(rows, wanted[step])


@COUNTS
@pytest.mark.situation(
    "parameters that FSDP2 is told to ignore",
    stages={"reduced": "no: their gradients are each rank's own, and a finding names them", "used": "yes"},
)
def test_what_fsdp2_ignores_is_not_called_reduced(launched, count):
    """A gradient of this rank alone has no `reduced` row; the one that the optimizer consumed is this rank's own."""
    for rank, result in enumerate(launched(group, count)):
        reduced, used = snapshots(result["ignored"])
        (finding,) = [record for record in result["ignored"] if isinstance(record, gradlens.Finding)]
        assert reduced.names == ("0.weight", "0.bias", "2.bias")
        assert (finding.rule, finding.parameters) == ("not-averaged", ("2.weight",))
        own, _ = train(model(), batches().chunk(count, dim=1)[rank][:1], ("used",))
        same({"2.weight": numbers(used)["2.weight"]}, {"2.weight": numbers(own.snapshots[0])["2.weight"]})


@COUNTS
@pytest.mark.situation(
    "watched before `fully_shard`, which replaces the parameters", stages={"reduced": "marked: from the second step"}
)
def test_watched_before_it_is_sharded(launched, count):
    """Nothing says that the parameters were replaced; the first optimizer's step has us look again."""
    whole = reference()
    ranks = [[replace(r, step=r.step + 1) for r in result["before"]] for result in launched(group, count)]
    check(ranks, {step: whole[step] for step in (1, 2)}, 1e-9, ("reduced",), fields.COUNTS + fields.MOMENTS + fields.WEIGHTS)


@COUNTS
@pytest.mark.trap(20)
def test_a_scan_between_forward_and_backward(launched, count):
    """The modules show whole parameters then; the shards are read all the same."""
    ranks = launched(group, count)
    for result in ranks:
        assert result["rescanned"][1] == [True] * 3
    check([result["rescanned"][0] for result in ranks], reference(), rtol=1e-9)


@COUNTS
def test_whether_a_gradient_was_zeroed_is_a_question_of_this_rank(launched, count):
    """Torch gathers an uneven shard to count what is in it: a rank that asked alone waited for ever."""
    for rank, result in enumerate(launched(group, count)):
        seen, sizes, collectives = result["emptied"]
        assert collectives == 0
        assert seen == [size > 0 for size in sizes] * (rank > 0)


@pytest.mark.situation("FSDP2: no collective is ours", note="of 2 parameters and of 100, live dashboard included")
def test_no_collective_is_ours(launched):
    """The process groups count as many with us as without, however many parameters there are and whatever is asked."""
    for result in launched(group):
        for watched, bare in result["counted"]:
            assert watched == bare > 0
