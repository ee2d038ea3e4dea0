"""Tensor parallel: distributed tensors whose gradients are pieces, copies or summands."""

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import gradlens
from gradlens import fields
from gradlens.capture.sharding import _block, piece
from gradlens.errors import ArgumentError
from gradlens.pooling import pool
from tests.distributed.made import Keep, batches, bits_equal, collectives, exact_batches, local, loss, snapshots, train

pytestmark = pytest.mark.distributed


def exact(width=10):
    """In float64; the middle dimension does not divide by four, unless that is asked."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()


PLAN = {"0": ColwiseParallel(), "2": RowwiseParallel()}


def twice(make, x, stages=("backward", "used")):
    """Watched and not: the records, and both runs' weights."""
    (keep, watched), (_, bare) = (train(make(), x, stages, on) for on in (True, False))
    return keep.records, watched, bare


def parallel():
    """One layer by columns, the next by rows, its bias copied."""
    ranks = distributed.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    return twice(lambda: parallelize_module(exact(5 * ranks), mesh, PLAN), exact_batches())


def meshed():
    """The same over one dimension of a mesh, and FSDP2 over the other: both shard the first layer's rows."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size() // 2, 2), mesh_dim_names=("data", "model"))
    x = exact_batches().chunk(mesh["data"].size(), dim=1)[mesh["data"].get_local_rank()]

    def make():
        net = parallelize_module(exact(), mesh["model"], PLAN)
        fully_shard(net[0], mesh=mesh["data"])
        return fully_shard(net, mesh=mesh["data"])

    return twice(make, x, ("reduced", "used"))


def placed():
    """For parameters that hold their own indices: what is said to be here, and what is."""
    ranks = distributed.get_world_size()
    meshes = [init_device_mesh("cpu", (ranks,)), init_device_mesh("cpu", (ranks // 2, 2), mesh_dim_names=("data", "model"))]
    result = []
    for size in (8, 10, 6, 3):
        for number, mesh in enumerate(meshes):
            net = nn.Sequential(nn.Linear(6, size), nn.Tanh(), nn.Linear(size, 4))
            for p in net.parameters():
                p.data = torch.arange(p.numel(), dtype=torch.float32).reshape(p.shape)
            parallelize_module(net, mesh["model"] if number else mesh, PLAN)
            if number:
                fully_shard(net, mesh=mesh["data"])
            for p in net.parameters():
                at = gradlens.records.Parameters(("p",), (tuple(p.shape),), ("float32",), (piece(p),))
                here = local(p).reshape(-1).numpy().astype(int)
                result.append((here, at.whole_index(0, np.arange(len(here))), at.piece(0)))
    return result


def scattered():
    """A split factor that no later placement resolves: rows 0, 1, 4, 5 of 8 are here, and no block."""
    strided = __import__("torch.distributed.tensor.placement_types", fromlist=["_"])._StridedShard
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    return _block((8, 3), mesh, (strided(0, split_factor=2),))


def questions():
    """What a user asks in the middle of a step."""
    ranks, rank = distributed.get_world_size(), distributed.get_rank()
    mesh = init_device_mesh("cpu", (ranks,))
    net = parallelize_module(exact(), mesh, PLAN)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    lens = gradlens.watch(net, optimizer, features=("updates", "flips", "evidence"), stage=("backward", "used"))
    for x in exact_batches()[:2]:
        loss(net, x).backward()
    frame = lens.weights()
    top = lens.weights(top=5)
    said = {}
    for name, ask in {
        "gradient": lens.gradient,
        "elsewhere": lambda: lens.explain("0.weight", (9 if rank == 0 else 0, 0)),
    }.items():
        try:
            said[name] = ask()
        except ArgumentError as error:
            said[name] = str(error)
    said["here"] = lens.explain("0.weight", (0 if rank == 0 else 9, 0))
    optimizer.step()
    optimizer.zero_grad()
    kept = lens.weights(top=5)
    lens.close()
    keep = ["parameter", "index", "value", "partial", "verdict", "t"]
    return frame[keep].to_dict("list"), top[keep[:4]].to_dict("list"), kept[keep[:4]].to_dict("list"), said


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
    here = net.weight.grad.to_local().clone()
    marked = lens.weights().attrs["summands"]
    said = []
    for ask in (lens.gradient, lambda: lens.explain("weight", (0, 1))):
        with pytest.raises(ArgumentError) as error:
            ask()
        said.append(str(error.value))
    lens.close()
    return partial, here.numpy(), keep.records, marked, said


def sequence():
    """A norm layer under sequence parallelism: of its gradients the ranks have summands, of the others' pieces."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 4)).double()
    parallelize_module(net, mesh, {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1))})
    keep = Keep()
    lens = gradlens.watch(net, stage="backward", writers=[keep], rules=(), features=())
    x = distribute_tensor(exact_batches()[:1], mesh, [Shard(1)])
    loss(net, x).backward()
    placements = [str(p.grad.placements) for p in net.parameters()]
    lens.close()
    return keep.records, placements


def counted():
    """Every layer by columns."""

    def wrap(net):
        mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
        return parallelize_module(
            net, mesh, {name: ColwiseParallel(output_layouts=Replicate()) for name, _ in net.named_children()}
        )

    return collectives(wrap, ("backward", "used"), batches())


def observed():
    """What `observe` makes of a number that every rank has, and of one of which each has a part."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    net = exact()
    with gradlens.watch(net) as lens:
        lens.observe(loss=DTensor.from_local(torch.tensor(2.0), mesh, [Replicate()]))
        number = float(lens._watcher.step.scalars["loss"])
        try:
            lens.observe(loss=DTensor.from_local(torch.tensor(2.0), mesh, [Partial()]))
        except ArgumentError as error:
            return number, str(error)


def two():
    """All scenarios but that of two meshes."""
    calls = (parallel, placed, scattered, questions, summands, sequence, counted, observed)
    return {call.__name__: call() for call in calls}


def four():
    """Those in which the number of ranks may matter."""
    return {call.__name__: call() for call in (meshed, parallel, placed, summands, sequence)}


def check(ranks, name, stages, width=10):
    """The ranks' tables, pooled, are those of one process; training is unchanged."""
    whole, _ = train(exact(width), exact_batches(), ("backward", "used"))
    tables = []
    for result in ranks:
        records, watched, bare = result[name]
        bits_equal(watched, bare)
        tables.append({(str(s.stage), s.step): s for s in snapshots(records)})
    assert set(tables[0]) == {(stage, step) for stage in stages for step in range(3)}
    for stage, step in tables[0]:
        pooled, wanted = pool([table[stage, step] for table in tables]), whole.at("used")[step, 0]
        assert pooled.parameters == wanted.parameters
        for field in fields.SCALARS if stage == "used" else fields.SUMMARY:
            seen, real = pooled.columns[field.name], wanted.columns[field.name]
            np.testing.assert_allclose(seen, real, rtol=1e-9 * (field.dtype != "int64"), atol=1e-12, err_msg=field.name)
        np.testing.assert_array_equal(pooled.top.index, wanted.top.index)


BOTH = pytest.mark.parametrize(("group", "count"), [(two, 2), (four, 4)], ids=["2", "4"])


@BOTH
@pytest.mark.situation(
    "tensor parallel: sharded by columns and by rows (Shard), copied (Replicate)",
    stages={"backward": "yes", "used": "yes", "updates": "yes"},
    note="with indices into the whole; pooled over ranks it is the table of one process",
)
def test_pieces_and_copies_pool_to_the_table_of_one_process(launched, group, count):
    """Shard and Replicate of a parameter of its own each."""
    check(launched(group, count), "parallel", ("backward", "used"), width=5 * count)


@pytest.mark.situation(
    "tensor parallel and FSDP2 over a 2-D mesh", stages={"reduced": "yes", "used": "yes", "updates": "yes"}
)
def test_a_mesh_of_two_dimensions(launched):
    """Where FSDP2 shards anew what tensor parallel has sharded, the tables and the places of weights are right, too."""
    check(launched(four, 4), "meshed", ("reduced", "used"))


@BOTH
def test_a_piece_says_what_is_there(launched, group, count):
    """Every rank's indices, worked out from its piece, are those that its weights carry; together they are the whole."""
    ranks = launched(group, count)
    for found in zip(*(result["placed"] for result in ranks), strict=True):
        for here, said, _ in found:
            np.testing.assert_array_equal(said, here)
        assert len(found) == count
    assert any("," in text for result in ranks for *_, text in result["placed"])


def test_entries_that_are_no_block_have_no_places(launched):
    """Nothing is made up where a rank's entries are scattered."""
    for result in launched(two):
        assert result["scattered"] == "~4,0:3"


def test_questions_about_weights_are_answered_by_the_index_in_the_whole(launched):
    """weights() has what is here, with its verdicts; gradient() and a weight elsewhere are errors that name the way out."""
    net = exact()
    for x in exact_batches()[:2]:
        loss(net, x).backward()
    partials = {name: p.grad for name, p in net.named_parameters()}
    values = dict(net.named_parameters())
    seen = set()
    for rank, result in enumerate(launched(two)):
        frame, top, kept, said = result["questions"]
        for part in (frame, top, kept):
            for name, index, value, partial in zip(
                *(part[c] for c in ("parameter", "index", "value", "partial")), strict=True
            ):
                assert partial == pytest.approx(partials[name][index].item(), rel=1e-9, abs=1e-14)
                if part is not kept:
                    assert value == pytest.approx(values[name][index].item(), rel=1e-12)
        seen |= set(zip(frame["parameter"], frame["index"], strict=True))
        assert not np.isnan(frame["t"]).any()
        assert "this rank holds a part of 3 parameters (0.weight, 0.bias, 2.weight)" in said["gradient"]
        assert f"is on another rank; this one holds {5 * rank}:{5 * rank + 5},0:6" in said["elsewhere"]
        assert f"0.weight[{9 * rank}, 0]" in said["here"]
    assert len(seen) == sum(p.numel() for p in net.parameters())


@BOTH
@pytest.mark.trap(21)
@pytest.mark.trap(22)
@pytest.mark.situation(
    "a gradient that is placed `Partial`",
    stages={"backward": "marked: of this rank's summand", "used": "marked: of this rank's summand"},
)
def test_a_summand_is_marked_and_named(launched, group, count):
    """The row of a Partial gradient says that it is of this rank's summand, equals it exactly, and a finding names it."""
    for result in launched(group, count):
        partial, here, records, marked, said = result["summands"]
        assert partial
        (snapshot,) = snapshots(records)
        (finding,) = [r for r in records if isinstance(r, gradlens.Finding)]
        assert snapshot.parameters.pieces == ("partial",)
        assert snapshot.columns["square_sum"] == np.square(here, dtype=np.float64).sum()
        assert (finding.rule, finding.parameters) == ("partial-gradient", ("weight",))
        assert marked == ["weight"]
        assert all("full_tensor()" in text for text in said)


@BOTH
def test_sequence_parallel_norms_are_marked_and_stay_marked(launched, group, count):
    """Pooling leaves the norm's rows as what they are, and merges the others'."""
    ranks = [result["sequence"] for result in launched(group, count)]
    tables = [snapshots(records)[0] for records, _ in ranks]
    assert "Partial" in ranks[0][1][0]
    pooled = pool(tables)
    assert pooled.parameters.pieces[:2] == ("partial", "partial")
    assert pooled.parameters.pieces[2:] == ("", "")
    np.testing.assert_array_equal(pooled.columns["square_sum"][:2], tables[0].columns["square_sum"][:2])
    assert pooled.column("numel").tolist() == [6, 6, 24, 4]


def test_a_number_of_which_each_rank_has_a_part_is_refused(launched):
    """`observe` takes what every rank has, and says what to give instead of a part: to add up takes all ranks."""
    for result in launched(two):
        number, error = result["observed"]
        assert number == 2.0
        assert "observe(loss=...) got a distributed tensor of which each rank has a part" in error
        assert "loss.full_tensor()" in error


@pytest.mark.situation("tensor parallel: no collective is ours", note="of 2 parameters and of 100")
def test_no_collective_is_ours(launched):
    """The process groups count as many with us as without, however many parameters there are."""
    for result in launched(two):
        for watched, bare in result["counted"]:
            assert watched == bare > 0
