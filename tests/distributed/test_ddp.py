"""DistributedDataParallel: this rank's own partials, and their mean over the ranks."""

import warnings
from contextlib import ExitStack, nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gradlens
from gradlens.capture.guards import GUARDED
from gradlens.capture.moves import Moves
from gradlens.watching import tables
from tests.distributed.made import (
    Keep,
    averaged,
    batches,
    bits_equal,
    collectives,
    expected,
    folder,
    gradients,
    loss,
    mine,
    model,
    numbers,
    same,
    train,
    weights,
)
from tests.distributed.shown import replicated

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
        return mean(self.net, own)

    def result(self):
        self.lens.close()
        _after.append(weights(self.net))
        return told(self.keep, self.wanted)


def mean(net, own):
    """The rows of `.grad`, which is the ranks' mean of these tensors, up to the order in which they are added."""
    there = {name: p.grad for name, p in net.named_parameters()}
    for name, wanted in averaged(own).items():
        torch.testing.assert_close(there[name], wanted)
    return expected(there)


def told(keep, wanted):
    """For each stage and moment: the rows seen and those wanted; then the statuses, and the findings' rules."""
    tables = {(str(s.stage), s.step, s.backward): s for s in keep.snapshots}
    seen = {key: numbers(s) for key, s in tables.items()}
    status = {key: dict(zip(s.names, s.status, strict=True)) for key, s in tables.items()}
    return seen, wanted, status, [finding.rule for finding in keep.findings]


_after = []  # the weights that loops have ended with


def bits(*calls):
    """The scenarios; then the weights that their loops end with, watched and not."""
    results, after = {}, []
    for watch in (gradlens.watch, lambda *_, **__: ExitStack()):
        with mock.patch.object(gradlens, "watch", watch):
            _after.clear()
            results = {call.__name__: call() for call in calls} | results
            after.append(list(_after))
    return results | {"after": after}


def views():
    """Both ways of bucket views, watched and not."""
    result = {}
    for view in (False, True):
        for watched in (True, False):
            net = DistributedDataParallel(model().double(), gradient_as_bucket_view=view)
            keep, after = train(net, mine(batches()).double(), ("backward", "reduced", "used"), watched)
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


def unused(view):
    """Each rank uses a head of its own."""
    loop = Loop(Heads(), find_unused_parameters=True, gradient_as_bucket_view=view)
    for step, x in enumerate(mine(batches())):
        loop.optimizer.zero_grad()
        own = gradients(loop.net, x)
        loss(loop.ddp, x).backward()
        loop.wanted["backward", step, 0] = expected(own)
        mean = loop.mean(own)
        loop.wanted["accumulated", step, 0] = loop.wanted["reduced", step, 0] = loop.wanted["used", step, 0] = mean
        loop.optimizer.step()
    return loop.result()


def find_unused():
    return {view: unused(view) for view in (False, True)}


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


def compiled():
    """DDP, compiled."""
    loop = Loop(model())
    run = torch.compile(loop.ddp, backend="aot_eager")
    for step, x in enumerate(mine(batches())):
        loop.optimizer.zero_grad()
        own = gradients(loop.net, x)
        loss(run, x).backward()
        loop.wanted["backward", step, 0] = expected(own)
        loop.wanted["reduced", step, 0] = loop.wanted["used", step, 0] = loop.mean(own)
        loop.optimizer.step()
    return loop.result()


def named():
    """A user's attribute `module`, inside wrappers that have one, too: the names in each answer."""

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.last = checkpoint_wrapper(nn.Linear(6, 5)), nn.Linear(5, 3)

        def forward(self, x):
            return self.last(self.module(x))

    net = torch.compile(DistributedDataParallel(Mine()), backend="eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    keep = Keep()
    with gradlens.watch(net, optimizer, writers=[keep], rules=()) as lens:
        loss(net, mine(batches())[0]).backward()
        optimizer.step()
    return lens.names(), list(keep.snapshots[0].names), lens.table()["parameter"].tolist()


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


def micro_batches():
    torch.manual_seed(1)
    return torch.randn(3, 2, distributed.get_world_size(), 4, 6)[:, :, distributed.get_rank()]


def noise():
    """Accumulation over two micro-batches, clipped: each rank's own gradients, and what the records say of their noise."""
    net = model()
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    own, run = [], folder("noise")
    with gradlens.watch(ddp, optimizer, stage=("backward", "reduced", "used"), run=run, rules=()) as lens:
        for step in micro_batches():
            optimizer.zero_grad()
            for i, x in enumerate(step):
                own.append(torch.cat([g.double().reshape(-1) for g in gradients(net, x).values()]).numpy())
                with ddp.no_sync() if i == 0 else nullcontext():
                    loss(ddp, x).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.05)
            optimizer.step()
        reason = lens.noise_scale().reason
    distributed.barrier()
    found = gradlens.open_run(run).noise_scale(decay=0.0)
    return own, reason, found.frame[["trace", "signal", "backwards"]].to_numpy(), float(found)


FAULTS = {
    "the tensor hook": (GUARDED["gradient hook"], "call"),
    "the post hook": (GUARDED["accumulation hook"], "call"),
    "before averaging": (GUARDED["gradients before they are averaged"], "call"),
    "the end of backward": (GUARDED["end of backward"], "call"),
    "statistics": (tables, "summarize"),
    "before the step": (GUARDED["before the optimizer's step"], "call"),
    "after the step": (Moves, "_read_after"),
}


def steps(net, data, stages=None, fault=None):
    """Five steps; in the first, the general way, and in the second, by the book, one of ours fails on one rank only."""
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    keep = Keep()
    lens = stages and gradlens.watch(ddp, optimizer, stage=stages, writers=[keep], rules=())
    for step, x in enumerate([*data, *data[:2]]):
        failing = mock.patch.object(*fault, side_effect=RuntimeError("planted")) if fault and step < 2 else nullcontext()
        with failing:
            optimizer.zero_grad()
            loss(ddp, x).backward()
            optimizer.step()
    if lens:
        lens.close()
    return keep, weights(net)


class PlantedError(Exception):
    """What a user's own code raises in backward."""


class Raises(torch.autograd.Function):
    """Passes through; its backward raises."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise ctx.error


class Failing(nn.Sequential):
    """Two layers; what is set as `error` is raised in the backward of the second step, before or between the layers'."""

    def __init__(self, place):
        super().__init__(*model())
        self.place, self.error = place, None

    def forward(self, x):
        x = self[1](self[0](x))
        x = Raises.apply(x, self.error) if self.error and self.place == "between" else x
        x = self[2](x)
        return Raises.apply(x, self.error) if self.error and self.place == "before" else x


def raising(place, error, watched):
    """Six steps, one of which fails on every rank. Where DDP does not go on after that, the user wraps anew."""
    net, keep = Failing(place), Keep()
    ddp, optimizer = DistributedDataParallel(net), torch.optim.AdamW(net.parameters(), lr=0.1)
    lens = gradlens.watch(net, optimizer, stage=STAGES, writers=[keep], rules=()) if watched else None
    said, wanted, step = [], {}, 0
    for i, x in enumerate([*mine(batches())] * 2):
        net.error = error if i == 1 and place != "hook" else None
        hook = net[0].weight.register_hook(_raiser(error)) if i == 1 and place == "hook" else None
        optimizer.zero_grad()
        try:
            loss(ddp, x).backward()
        except (PlantedError, KeyboardInterrupt) as caught:
            said.append((i, repr(caught)))
            continue
        except RuntimeError as caught:  # DDP waits for what the failed backward has left undone
            said.append((i, str(caught)[:40]))
            ddp = DistributedDataParallel(net)
            continue
        finally:
            if hook is not None:
                hook.remove()
        own = gradients(net, x)
        wanted["backward", step, 0] = expected(own)
        wanted["accumulated", step, 0] = wanted["reduced", step, 0] = wanted["used", step, 0] = mean(net, own)
        optimizer.step()
        step += 1
    if watched:
        lens.close()
    return said, weights(net), told(keep, wanted)


def _raiser(error):
    def hook(g):
        raise error

    return hook


ERRORS = (PlantedError("planted"), KeyboardInterrupt())
PLACES = [(place, error) for place in ("before", "between", "hook") for error in ERRORS]


def raised():
    """Whatever the user raises: what is heard of it and the weights, watched and not."""
    return [(raising(*case, True), raising(*case, False)) for case in PLACES]


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


def counted():
    return collectives(DistributedDataParallel, ("backward", "accumulated", "reduced", "used"), mine(batches()))


def two():
    """All scenarios."""
    others = (views, noise, replicated, named, by_hand, counted, faults, raised)
    return bits(*LOOPS, compiled) | {call.__name__: call() for call in others}


def four():
    """Those in which the number of ranks may matter."""
    return bits(*LOOPS) | {call.__name__: call() for call in (views, noise, replicated)}


LOOPS = (no_sync, find_unused, static_graph, comm_hook)
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
    whole, _ = train(model().double(), batches().double(), ("backward", "used"))
    for rank, result in enumerate(ranks):
        own, _ = train(model().double(), batches().double().chunk(count, dim=1)[rank][:1], ("backward",))
        for view in (False, True):
            snapshots, after = result["views"][view, True]
            bits_equal(after, result["views"][view, False][1])
            assert len(snapshots) == 9
            for step, (backward, reduced, used) in enumerate(zip(*[iter(snapshots)] * 3, strict=True)):
                for seen in (reduced, used):
                    same(seen, numbers(whole.at("used")[step, 0]), rtol=1e-9, atol=1e-12)
                if step == 0:
                    same(backward, numbers(own.snapshots[0]))


@BOTH
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
def test_no_sync(launched, group, count):
    """Of three micro-batches the last is averaged, with what the others accumulated; the others have no `reduced` row."""
    for result in launched(group, count):
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
        for loop in result["find_unused"].values():
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


@BOTH
@pytest.mark.trap(19)
@pytest.mark.situation(
    "DDP, `static_graph` with reentrant checkpoints", stages={"backward": "yes", "reduced": "yes", "used": "yes"}
)
def test_static_graph_with_reentrant_checkpoints(launched, group, count):
    """The recomputed part is read with the rest, and averaged, also where nothing is outside it, bucket views both ways."""
    for result in launched(group, count):
        for loop in result["static_graph"].values():
            check(loop, ("backward", "reduced", "used"))
            assert loop[3] == []


@BOTH
@pytest.mark.trap(34)
@pytest.mark.situation(
    "DDP: bit-identical", note="`no_sync`, `find_unused_parameters`, `static_graph`, a comm hook, compiled"
)
def test_training_is_bit_identical(launched, group, count):
    """Every loop ends with the weights that it has without us."""
    for result in launched(group, count):
        watched, bare = result["after"]
        assert len(watched) == len(bare) == 4 + 2 + 4 + 1 + (count == 2)
        for a, b in zip(watched, bare, strict=True):
            bits_equal(a, b)


@pytest.mark.trap(43)
def test_names_lose_wrappers(launched):
    """Those of compile, DDP and checkpoints; an attribute that a user called `module` stays."""
    for result in launched(two):
        asked, recorded, pooled = result["named"]
        assert asked == recorded == pooled == ["module.weight", "module.bias", "last.weight", "last.bias"]


@pytest.mark.situation("DDP, compiled", stages={"backward": "yes", "reduced": "yes", "used": "yes"})
def test_compiled(launched):
    """The graph is cut at buckets, and hooks see what they see in eager training."""
    for result in launched(two):
        check(result["compiled"], ("backward", "reduced", "used"), rtol=1e-4, atol=1e-7)
        assert result["compiled"][3] == []


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


@BOTH
@pytest.mark.situation("the gradient noise scale, of the spread over ranks and micro-batches", stages={"backward": "yes"})
def test_the_spread_of_the_ranks_is_noise(launched, group, count):
    """Ranks with two micro-batches each give what their stored gradients give; one rank alone cannot know, and says so."""
    ranks = [result["noise"] for result in launched(group, count)]
    g = np.stack([own for own, *_ in ranks]).reshape(count, 3, 2, -1).swapaxes(0, 1).reshape(3, 2 * count, -1)
    traces = g.var(axis=1, ddof=1).sum(1)
    signals = (g.mean(1) ** 2).sum(1) - traces / (2 * count)
    for _, reason, found, newest in ranks:
        assert "ranks whose records are not here" in reason
        np.testing.assert_allclose(found[:, 0] / found[:, 1], traces / signals, rtol=1e-6)
        assert found[:, 2].tolist() == [2 * count] * 3
        assert newest == pytest.approx(traces[-1] / signals[-1], rel=1e-6)


@pytest.mark.situation("DDP: no collective is ours", note="of 2 parameters and of 100, live dashboard, all stages")
def test_no_collective_is_ours(launched):
    """The process groups count as many with us as without, however many parameters there are."""
    for result in launched(two):
        for watched, bare in result["counted"]:
            assert watched == bare > 0


@pytest.mark.trap(14)
@pytest.mark.parametrize("place", FAULTS)
def test_a_fault_of_ours_leaves_training_alone(launched, place):
    """Where one of ours fails on one rank: no rank's weights differ, it is named once, and later steps are read again."""
    for rank, result in enumerate(launched(two)):
        after, found, seen = result["faults"][place]
        bits_equal(after, result["faults"][""])
        assert found == ([] if rank else ["gradlens-fault"])
        assert seen == {"backward": {"ok"}, "reduced": {"ok"}, "used": {"ok"}}


@pytest.mark.trap(14, 15, 44)
@pytest.mark.situation(
    "DDP, a backward that raises, then a good one",
    stages={"backward": "yes", "reduced": "yes", "used": "yes"},
    note="in an autograd function before or between the layers, or in a user's hook; KeyboardInterrupt too. Where DDP does "
    "not go on after that, it does not without gradlens",
)
def test_what_the_user_raises_comes_through(launched):
    """Each rank hears the same with gradlens as without, has the same bits, and the steps that succeed are read exactly."""
    for result in launched(two):
        for (place, error), ((said, after, loop), (bare_said, bare, _)) in zip(PLACES, result["raised"], strict=True):
            assert said == bare_said
            assert said[0] == (1, repr(error))
            assert len(said) == (1 if place == "before" else 2)
            bits_equal(after, bare)
            check(loop)
            assert loop[3] == []
