"""FSDP1 (`FullyShardedDataParallel`): no hook on an original parameter fires, so the averaged shard is read at the step."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy

import gradlens
from gradlens import fields
from gradlens.errors import ArgumentError
from tests.distributed.made import (
    Keep,
    batches,
    exact_batches,
    expected,
    gradients,
    loss,
    mine,
    model,
    numbers,
    records,
    same,
    snapshots,
    train,
)
from tests.distributed.sharded import accumulate, check, exact, reference

pytestmark = pytest.mark.distributed

EVERY = ("backward", "accumulated", "reduced", "used")


def wrapped(net, **arguments):
    """The first layer, and the rest; each is cut in two in the middle of a weight."""
    arguments = {"use_orig_params": True, "device_id": torch.device("cpu"), **arguments}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # NO_SHARD is deprecated
        net[0] = FullyShardedDataParallel(net[0], **arguments)
        return FullyShardedDataParallel(net, **arguments)


def twice(steps=train, stages=EVERY, **arguments):
    """Watched and not: the records, and both runs' weights."""
    (keep, watched), (_, bare) = (
        steps(wrapped(exact(), **arguments), mine(exact_batches()), stages, on) for on in (True, False)
    )
    return keep.records, watched, bare


def plain():
    return twice()


def whole():
    return twice(sharding_strategy=ShardingStrategy.NO_SHARD)


def no_sync():
    return twice(accumulate)


def flat():
    """Without original parameters there is one flat parameter a wrapper: the same, and the gradient of this rank alone."""
    records, watched, bare = twice(use_orig_params=False)
    own = gradients(exact(), mine(exact_batches())[0])
    lens = gradlens.watch(net := wrapped(exact(), use_orig_params=False))
    loss(net, mine(exact_batches())[0]).backward()
    frame = lens.weights(top=3)
    lens.close()
    return records, watched, bare, sum(float(g.square().sum()) for g in own.values()), frame["index"].tolist()


def mixed():
    """Computed in bf16: the rows, and those of what FSDP1 left in `.grad`."""
    net = wrapped(model(), mixed_precision=MixedPrecision(param_dtype=torch.bfloat16))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    keep, wanted = Keep(), []
    lens = gradlens.watch(net, optimizer, writers=[keep], rules=())
    names = lens.names()
    for x in mine(batches()):
        optimizer.zero_grad()
        loss(net, x).backward()
        there = [torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()]
        wanted.append(expected(dict(zip(names, there, strict=True))))
        optimizer.step()
    lens.close()
    return [numbers(s) for s in snapshots(keep.records)], wanted


def rescanned():
    """The model is looked at anew in the middle of forward, while its modules show whole tensors that are no leaves."""
    net = wrapped(exact())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    keep, leaves = Keep(), []
    lens = gradlens.watch(net, optimizer, writers=[keep], rules=())

    def look(module, *_):
        leaves.append(module._parameters["weight"].is_leaf)
        net.module[1].register_module(f"extra{len(leaves)}", nn.Identity())
        lens.flush()

    net.module[2].register_forward_hook(look)
    for x in mine(exact_batches()):
        optimizer.zero_grad()
        loss(net, x).backward()
        optimizer.step()
    lens.close()
    return keep.records, leaves


def questions():
    """What a user asks: under no_sync, between backward and step, and after it."""
    net = wrapped(exact())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    lens = gradlens.watch(net, optimizer)
    rank = torch.distributed.get_rank()
    frames = {}
    with net.no_sync():
        loss(net, mine(exact_batches())[0]).backward()
    frames["local"] = lens.weights()
    optimizer.zero_grad()
    loss(net, mine(exact_batches())[0]).backward()
    frames["before"] = lens.weights()
    with pytest.raises(ArgumentError) as whole:
        lens.gradient()
    with pytest.raises(ArgumentError) as elsewhere:
        lens.explain("2.weight", (2 - 2 * rank, 0))
    here = lens.explain("2.weight", (2 * rank, 0))
    with FullyShardedDataParallel.summon_full_params(net, with_grads=True):
        frames["summoned"] = lens.weights()
        flat = lens.gradient()
    optimizer.step()
    frames["after"] = lens.weights()
    optimizer.zero_grad()
    frames["kept"] = lens.weights(top=5)
    lens.close()
    said = {n: (f.attrs, f[["parameter", "index", "partial"]].values.tolist()) for n, f in frames.items()}
    return said, str(whole.value), str(elsewhere.value), here, flat.numpy()


def without():
    """There is no optimizer to read at."""
    net = wrapped(exact())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    keep = Keep()
    with gradlens.watch(net, writers=[keep], rules=()):
        loss(net, mine(exact_batches())[0]).backward()
        optimizer.step()
    return keep.records


def group():
    """All scenarios."""
    calls = (plain, whole, no_sync, flat, mixed, rescanned, questions, without)
    return {call.__name__: call() for call in calls}


def told(records):
    return [record.rule for record in records if isinstance(record, gradlens.Finding)]


@pytest.mark.parametrize("name", ["plain", "whole", "no_sync", "rescanned"])
@pytest.mark.situation(
    "FSDP1 with original parameters, `no_sync`, `NO_SHARD`",
    stages={
        "backward": "no: FSDP1 lets no hook fire",
        "reduced": "no: FSDP1 lets no hook fire",
        "used": "marked: the finding `read-at-step`",
        "updates": "yes: but for `loss_change`, which needs the gradient before clipping",
    },
    note="of this rank's stretch, with indices into the whole; pooled over ranks it is the table of one process",
)
def test_stretches_pool_to_the_table_of_one_process(launched, name):
    """Counts exactly and sums to 1e-9, also where the model is looked at anew while its modules show whole tensors."""
    ranks = launched(group)
    if name == "rescanned":
        assert [result[name][1] for result in ranks] == [[False] * 3] * 2
        found = [result[name][0] for result in ranks]
    else:
        found = records(ranks, name)
    whole = reference(steps=accumulate if name == "no_sync" else train)
    check(found, whole, rtol=1e-9, stages=("used",), used=[f for f in fields.SCALARS if "loss" not in f.name])
    assert np.isnan(snapshots(found[0])[0].column("loss_change")).all()
    assert [told(part) for part in found] == [["read-at-step"]] * 2
    pieces = [snapshots(part)[0].parameters.pieces for part in found]
    assert pieces == [(), ()] if name == "whole" else [("@0:18", "@0:0", "@0:10", "@0:0"), ("@18:30", "", "@10:15", "")]


def test_mixed_precision(launched):
    """The rows are exactly those of what FSDP1 left in `.grad`."""
    for result in launched(group):
        seen, wanted = result["mixed"]
        assert len(seen) == 3
        for rows, real in zip(seen, wanted, strict=True):
            same(rows, real)


@pytest.mark.situation(
    "FSDP1 without original parameters",
    stages={
        "backward": "marked: flat, of this rank's whole; the finding `flat-parameters`",
        "reduced": "marked: flat, of this rank's part",
        "used": "marked: flat, of this rank's part",
    },
)
def test_flat_parameters_are_named(launched):
    """A finding says that no row is of a parameter of the user's; over ranks and rows the sums are those of one process."""
    ranks, whole = launched(group), reference()
    parts = records(ranks, "flat")
    for result, part in zip(ranks, parts, strict=True):
        assert told(part) == ["flat-parameters"]
        assert snapshots(part)[0].names == ("_flat_param", "0._flat_param")
        assert snapshots(part)[0].parameters.pieces == ("~9", "~18")
        assert snapshots(part)[0].columns["square_sum"].sum() == pytest.approx(result["flat"][3], rel=1e-9)
        assert result["flat"][4] == [None] * 3
    for stage in ("accumulated", "reduced", "used"):
        for step in whole:
            rows = [s.columns["square_sum"] for part in parts for s in snapshots(part) if (s.stage, s.step) == (stage, step)]
            assert np.sum(rows) == pytest.approx(whole[step].columns["square_sum"].sum(), rel=1e-9)


def test_questions_are_answered_by_the_index_in_the_whole(launched):
    """Of what this rank has, at any time; what is elsewhere is an error that names the way out."""
    net = exact()
    loss(net, exact_batches()[0]).backward()
    mean = {name: p.grad for name, p in net.named_parameters()}
    for rank, result in enumerate(launched(group)):
        said, whole, elsewhere, here, flat = result["questions"]
        own = gradients(exact(), exact_batches()[0].chunk(2)[rank])
        stages = {"local": "accumulated", "before": "reduced", "summoned": "accumulated", "after": "used", "kept": "used"}
        for name, (attrs, rows) in said.items():
            assert attrs == {"step": 0, "stage": stages[name]}, name
            assert len(rows) == {"summoned": 53, "kept": 5}.get(name, 25 + 3 * (rank == 0))
            for parameter, index, partial in rows:
                wanted = own if name == "local" else mean
                assert partial == pytest.approx(wanted[parameter][index].item(), rel=1e-9)
        assert "this rank holds a part of " in whole
        assert "summon_full_params(model, with_grads=True)" in whole
        assert "is on another rank; this one holds @" in elsewhere
        assert f"2.weight[{2 * rank}, 0]" in here
        np.testing.assert_allclose(flat, torch.cat([g.reshape(-1) for g in mean.values()]), rtol=1e-9)


def test_without_an_optimizer_there_is_nothing_to_read_at(launched):
    """No hook fires and no step is known: one finding says so."""
    for result in launched(group):
        (finding,) = result["without"]
        assert finding.rule == "read-at-step"
        assert "give watch() the optimizer" in finding.remedy
