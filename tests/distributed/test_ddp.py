"""DistributedDataParallel: this rank's own partials, and their mean over the ranks."""

import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gradlens
from gradlens import pipeline
from gradlens.capture.gradients import Gradients
from gradlens.capture.updates import Updates
from tests.distributed.made import (
    Keep,
    averaged,
    batches,
    bits_equal,
    expected,
    gradients,
    loss,
    mine,
    model,
    numbers,
    same,
    train,
    weights,
)

pytestmark = pytest.mark.distributed

STAGES = ("backward", "accumulated", "reduced", "used")


class Loop:
    """A model under DDP that is watched, and what each of its stages should be."""

    def __init__(self, net, stages=STAGES, inner=False, **arguments):
        self.net = net
        self.ddp = DistributedDataParallel(net, **arguments)
        self.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        self.keep = Keep()
        self.lens = gradlens.watch(net if inner else self.ddp, self.optimizer, stage=stages, writers=[self.keep], rules=())
        self.wanted = {}

    def mean(self, own):
        """The rows of `.grad`, which is the ranks' mean of these tensors, up to the order in which they are added."""
        there = {name: p.grad for name, p in self.net.named_parameters()}
        for name, wanted in averaged(own).items():
            torch.testing.assert_close(there[name], wanted)
        return expected(there)

    def result(self):
        """For each stage and moment: the rows seen and those wanted; then the findings' rules."""
        self.lens.close()
        seen = {(str(s.stage), s.step, s.backward): numbers(s) for s in self.keep.snapshots}
        status = {(str(s.stage), s.step, s.backward): dict(zip(s.names, s.status, strict=True)) for s in self.keep.snapshots}
        return seen, self.wanted, status, [finding.rule for finding in self.keep.findings]


def views():
    """Both ways of bucket views, watched and not."""
    result = {}
    for view in (False, True):
        for watched in (True, False):
            net = DistributedDataParallel(model(), gradient_as_bucket_view=view)
            keep, after = train(net, mine(batches()), ("backward", "reduced", "used"), watched)
            result[view, watched] = ([numbers(s) for s in keep.snapshots], after)
    return result


def accumulate(view, inner):
    """Two steps of three micro-batches each; the first two are not synchronised."""
    loop = Loop(model(), inner=inner, gradient_as_bucket_view=view)
    for step in range(2):
        loop.optimizer.zero_grad()
        total = None
        for i, x in enumerate(mine(batches())):
            own = gradients(loop.net, x)
            total = own if total is None else {name: total[name] + own[name] for name in own}
            with loop.ddp.no_sync() if i < 2 else nullcontext():
                loss(loop.ddp, x).backward()
            loop.wanted["backward", step, i] = expected(own)
            loop.wanted["accumulated", step, i] = expected({n: p.grad for n, p in loop.net.named_parameters()})
            if i < 2:
                same(loop.wanted["accumulated", step, i], expected(total))
        mean = loop.mean(total)
        loop.wanted["reduced", step, 2] = loop.wanted["used", step, 2] = mean
        loop.optimizer.step()
    return loop.result()


def no_sync():
    return {(view, inner): accumulate(view, inner) for view in (False, True) for inner in (False, True)}


class Heads(nn.Module):
    """A trunk, and one head for each rank."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(6, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 2) for _ in range(distributed.get_world_size()))

    def forward(self, x):
        return self.heads[distributed.get_rank()](self.trunk(x).tanh())


def find_unused():
    """Each rank uses a head of its own."""
    loop = Loop(Heads(), find_unused_parameters=True)
    for step, x in enumerate(mine(batches())):
        loop.optimizer.zero_grad()
        own = gradients(loop.net, x)
        loss(loop.ddp, x).backward()
        loop.wanted["backward", step, 0] = expected(own)
        mean = loop.mean(own)
        loop.wanted["accumulated", step, 0] = loop.wanted["reduced", step, 0] = loop.wanted["used", step, 0] = mean
        loop.optimizer.step()
    return loop.result()


class Checkpointed(nn.Module):
    """The middle is recomputed, in an engine run within the run; `ends` says whether anything is outside it."""

    def __init__(self, ends):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = (nn.Linear(6, 6), nn.Linear(6, 3)) if ends else (nn.Identity(), nn.Identity())
        self.middle = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.reentrant = True

    def forward(self, x):
        x = self.first(x)
        if self.reentrant:
            x = checkpoint(self.middle, x.requires_grad_() if not x.requires_grad else x, use_reentrant=True)
        else:
            x = self.middle(x)
        return self.last(x)


def static(ends, view):
    """The graph is said to be the same at each step, and is run in pieces."""
    loop = Loop(Checkpointed(ends), static_graph=True, gradient_as_bucket_view=view)
    for step, x in enumerate(mine(batches())):
        loop.optimizer.zero_grad()
        loop.net.reentrant = False
        own = gradients(loop.net, x)
        loop.net.reentrant = True
        loss(loop.ddp, x.clone()).backward()
        loop.wanted["backward", step, 0] = expected(own)
        loop.wanted["reduced", step, 0] = loop.wanted["used", step, 0] = loop.mean(own)
        loop.optimizer.step()
    return loop.result()


def static_graph():
    return {(ends, view): static(ends, view) for ends in (True, False) for view in (False, True)}


def comm_hook():
    """The gradients travel in half precision, and come back rounded."""
    loop = Loop(model())
    loop.ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    for step, x in enumerate(mine(batches())):
        loop.optimizer.zero_grad()
        own = gradients(loop.net, x)
        loss(loop.ddp, x).backward()
        loop.wanted["backward", step, 0] = expected(own)
        for name, wanted in averaged(own).items():
            there = loop.net.get_parameter(name).grad
            assert torch.equal(there.half().float(), there)
            torch.testing.assert_close(there, wanted, rtol=2e-3, atol=1e-4)
        mean = expected({name: p.grad for name, p in loop.net.named_parameters()})
        loop.wanted["accumulated", step, 0] = loop.wanted["reduced", step, 0] = loop.wanted["used", step, 0] = mean
        loop.optimizer.step()
    return loop.result()


def by_hand():
    """No wrapper: the user averages after backward()."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    keep, wanted = Keep(), {}
    lens = gradlens.watch(net, optimizer, writers=[keep], rules=())
    for step, x in enumerate(mine(batches())):
        optimizer.zero_grad()
        loss(net, x).backward()
        before = lens.weights(top=1).attrs["stage"]
        mean = averaged({name: p.grad for name, p in net.named_parameters()})
        for name, p in net.named_parameters():
            p.grad.copy_(mean[name])
        wanted["used", step, 0] = expected(mean)
        optimizer.step()
    lens.close()
    seen = {(str(s.stage), s.step, s.backward): numbers(s) for s in keep.snapshots}
    return seen, wanted, before, [finding.rule for finding in keep.findings]


FAULTS = {
    "the tensor hook": (Gradients, "_on_gradient"),
    "the post hook": (Gradients, "_on_accumulated"),
    "the end of backward": (Gradients, "_task_ended"),
    "statistics": (pipeline, "summarize"),
    "before the step": (Updates, "_before"),
    "after the step": (Updates, "_after"),
}


def steps(net, data, stages=None, fault=None):
    """Five steps; in the second one of ours fails, on one rank only."""
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    keep = Keep()
    lens = stages and gradlens.watch(ddp, optimizer, stage=stages, writers=[keep], rules=())
    for step, x in enumerate([*data, *data[:2]]):
        failing = mock.patch.object(*fault, side_effect=RuntimeError("planted")) if fault and step == 1 else nullcontext()
        with failing:
            optimizer.zero_grad()
            loss(ddp, x).backward()
            optimizer.step()
    if lens:
        lens.close()
    return keep, weights(net)


def faults():
    """For each place: the weights, whether the fault was named, and the last step's stages."""
    data = mine(batches())
    rank = distributed.get_rank()
    result = {"": steps(model(), data)[1]}
    for name, place in FAULTS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gradlens.GradlensWarning)
            keep, after = steps(model(), data, ("backward", "reduced", "used"), place if rank == 0 else None)
        last = keep.snapshots[-1].step
        seen = {str(s.stage): set(s.status) for s in keep.snapshots if s.step == last}
        result[name] = (after, [finding.rule for finding in keep.findings], seen)
    return result


def two():
    """All scenarios of two ranks."""
    return {call.__name__: call() for call in (views, no_sync, find_unused, static_graph, comm_hook, by_hand, faults)}


def four():
    """Those in which the number of ranks may matter."""
    return {call.__name__: call() for call in (views, find_unused, comm_hook)}


BOTH = pytest.mark.parametrize(("group", "count"), [(two, 2), (four, 4)], ids=["2", "4"])


def check(result, stages=STAGES, **tolerance):
    """Every row that was seen is what it should be, and there is one for each that should be."""
    seen, wanted, _, _ = result
    assert {key for key in seen if key[0] in stages} == {key for key in wanted if key[0] in stages}
    for key in wanted:
        if key[0] in stages:
            same(seen[key], wanted[key], **tolerance)


@BOTH
@pytest.mark.trap(16)
@pytest.mark.situation(
    "DDP, bucket views both ways", stages={"backward": "yes: this rank's own, on request", "reduced": "yes", "used": "yes"}
)
def test_stages_are_what_they_say(launched, group, count):
    """`backward` is the local gradient, `reduced` and `used` the mean, bucket views both ways; training is unchanged."""
    ranks = launched(group, count)
    whole, _ = train(model(), batches(), ("backward", "used"))
    for rank, result in enumerate(ranks):
        own, _ = train(model(), batches().chunk(count, dim=1)[rank][:1], ("backward",))
        for view in (False, True):
            snapshots, after = result["views"][view, True]
            bits_equal(after, result["views"][view, False][1])
            assert len(snapshots) == 9
            for step, (backward, reduced, used) in enumerate(zip(*[iter(snapshots)] * 3, strict=True)):
                for seen in (reduced, used):
                    same(seen, numbers(whole.at("used")[step, 0]), rtol=2e-4, atol=1e-8)
                if step == 0:
                    same(backward, numbers(own.snapshots[0]))


@pytest.mark.trap(17)
@pytest.mark.situation(
    "DDP, accumulation under `no_sync()`",
    stages={
        "backward": "yes: each one's own",
        "accumulated": "yes: local until the backward that synchronises",
        "reduced": "yes: of the backward that synchronises",
        "used": "yes",
    },
)
def test_no_sync(launched):
    """Of three micro-batches the last is averaged, with what the others accumulated; the others have no `reduced` row."""
    for result in launched(two):
        for loop in result["no_sync"].values():
            check(loop)
            assert loop[3] == []


@BOTH
@pytest.mark.trap(18)
@pytest.mark.situation(
    "DDP, `find_unused_parameters`, other parameters on each rank",
    stages={"backward": "yes: `absent` where this rank does not use it", "reduced": "yes", "used": "yes"},
)
def test_find_unused_parameters(launched, group, count):
    """A head that another rank uses is absent from this rank's own partials, and is in the mean like any other."""
    for rank, result in enumerate(launched(group, count)):
        loop = result["find_unused"]
        check(loop, ("accumulated", "reduced", "used"))
        seen, wanted, status, found = loop
        others = {f"heads.{i}.{leaf}" for i in range(count) for leaf in ("weight", "bias") if i != rank}
        for key in wanted:
            absent = {name for name, word in status[key].items() if word == "absent"}
            assert absent == (others if key[0] == "backward" else set())
            assert set(status[key].values()) <= {"ok", "absent"}
            mine = {name: row for name, row in seen[key].items() if name not in absent}
            same(mine, {name: row for name, row in wanted[key].items() if name not in absent})
        assert found == []


@pytest.mark.trap(19)
@pytest.mark.situation(
    "DDP, `static_graph` with reentrant checkpoints", stages={"backward": "yes", "reduced": "yes", "used": "yes"}
)
def test_static_graph_with_reentrant_checkpoints(launched):
    """The recomputed part is read with the rest, and averaged, also where nothing is outside it, bucket views both ways."""
    for result in launched(two):
        for loop in result["static_graph"].values():
            check(loop, ("backward", "reduced", "used"))
            assert loop[3] == []


@BOTH
@pytest.mark.situation("DDP, a comm hook", stages={"backward": "yes", "reduced": "yes: as the hook left it", "used": "yes"})
def test_comm_hook(launched, group, count):
    """What a comm hook rounds is rounded in `reduced`, and not in this rank's own partials."""
    for result in launched(group, count):
        check(result["comm_hook"])


@pytest.mark.situation(
    "gradients averaged by hand after backward",
    stages={"reduced": "no: a finding says so", "used": "yes"},
    note="an all-reduce leaves no trace that tells it from clipping",
)
def test_averaged_by_hand(launched):
    """Nothing that is local is called `reduced`: there is a finding instead, once, and `used` is the mean."""
    for result in launched(two):
        seen, wanted, before, found = result["by_hand"]
        check((seen, wanted, {}, found))
        assert before == "accumulated"
        assert found == ["not-averaged"]


@pytest.mark.trap(14)
@pytest.mark.parametrize("place", FAULTS)
def test_a_fault_of_ours_leaves_training_alone(launched, place):
    """Where one of ours fails on one rank: no rank's weights differ, it is named once, and later steps are read again."""
    for rank, result in enumerate(launched(two)):
        after, found, seen = result["faults"][place]
        bits_equal(after, result["faults"][""])
        assert found == ([] if rank else ["gradlens-fault"])
        assert seen == {"backward": {"ok"}, "reduced": {"ok"}, "used": {"ok"}}
