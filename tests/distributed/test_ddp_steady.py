"""DDP by the steady route and by the general one: random programs go down both, in two ranks, and give the same records."""

import random
import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import gradlens
from gradlens import kernels
from gradlens.capture.guards import GUARDED
from gradlens.testing import RecordingWriter
from tests.capture.test_steady import RULES, assert_same, same_bits
from tests.test_cost import counted_calls

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(kernels._native() is None, reason="the native kernel was not built"),
]

DEFAULT, LOCAL = ("reduced", "used"), ("backward", "reduced", "used")


class Heads(nn.Module):
    """A trunk and two heads; a rank may use only its own."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, x, alone=False):
        x = self.trunk(x)
        return self.heads[distributed.get_rank()](x) if alone else self.heads[0](x) + self.heads[1](x)


class World:
    """One training under DDP, a function of the calls: watched by the steady route, by the general one, or not at all."""

    def __init__(
        self,
        kind,
        stages=None,
        features=("updates", "flips"),
        adam=True,
        comm_hook=False,
        schedule=1,
        scaler=None,
        **arguments,
    ):
        torch.manual_seed(0)
        self.model, self.unused = Heads(), arguments.get("find_unused_parameters", False)
        self.ddp = DistributedDataParallel(self.model, **arguments)
        if comm_hook:
            self.ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(parameters, 0.01) if adam else torch.optim.SGD(parameters, 0.05)
        self.generator = torch.Generator().manual_seed(distributed.get_rank())
        self.writer, self.lens, self.alive = RecordingWriter(), None, []
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5) if scaler else None
        if kind != "bare":
            given = self.scaler if scaler == "given" else None
            options = {"writers": [self.writer], "features": features, "rules": RULES, "schedule": schedule}
            self.lens = gradlens.watch(self.ddp, self.optimizer, stage=stages, scaler=given, **options)
            self.lens._watcher.steady.allowed &= kind == "steady"

    @property
    def parts(self):
        """How much of it went by the book: for capture, and for the tables."""
        return self.lens._watcher.steady.parts, self.lens._tables.steady.answered

    def loss(self, alone=False):
        x = torch.randn(4, 5, generator=self.generator)
        return self.ddp(x, alone and self.unused).square().mean()

    def backward(self, *, alone=False, sync=True):
        with nullcontext() if sync else self.ddp.no_sync():
            loss = self.loss(alone)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self):
        """The optimizer's step. A method `step` of what holds it would be taken for a wrapper that moves weights."""
        if self.scaler is None:
            self.optimizer.step()
        elif self.gradients():  # without any it refuses to step
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def zero(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def gradients(self):
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def parameter(self, i):
        parameters = list(self.model.parameters())
        return parameters[i % len(parameters)]

    # --- what programs are made of; `i` is any number, the same in both ranks ---

    def straight(self, i):
        for _ in range(1 + i % 4):
            self.zero()
            self.backward()
            self.update()

    def zeros(self, i):
        for _ in range(1 + i % 4):
            self.zero(set_to_none=False)
            self.backward()
            self.update()

    def unzeroed(self, i):
        for _ in range(1 + i % 3):
            self.backward()
            self.update()

    def accumulate(self, i):
        """All but the last backward of a step under `no_sync`, or some of them, or none."""
        for _ in range(1 + i % 3):
            self.zero()
            for micro in range(1 + i % 3):
                self.backward(sync=(i >> micro) % 2 == 1)
            self.backward()
            self.update()

    def never_averaged(self, i):
        """The same weights in both ranks no more: the step is of the local gradient."""
        self.zero()
        for micro in range(i % 3):
            self.backward(sync=(i >> micro) % 2 == 0)
        self.backward(sync=False)
        self.update()

    def clipped(self, i):
        for _ in range(1 + i % 3):
            self.zero()
            for micro in range(1 + i % 2):
                self.backward(sync=micro == i % 2)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.01 if i % 5 else 1e9)
            self.update()

    def skipped(self, i):
        self.zero()
        self.backward()

    def step_alone(self, i):
        self.update()

    def alone(self, i):
        """Each rank uses its own head, where DDP is told to expect that."""
        for _ in range(1 + i % 2):
            self.zero(set_to_none=i % 3 > 0)
            self.backward(alone=True, sync=i % 5 > 0)
            self.update()

    def frozen(self, i):
        """A parameter is frozen for a while, where DDP is told to expect that."""
        if self.unused:
            self.parameter(i).requires_grad_(False)
            self.straight(i)
            self.parameter(i).requires_grad_(True)

    def written(self, i):
        """The gradients are written between backward and step: with a rise of their versions or without, or replaced."""
        self.zero()
        self.backward()
        for gradient in self.gradients():
            (gradient.data if i % 2 else gradient).mul_(0.5)
        if i % 3 == 0:
            self.parameter(i).grad = None if i % 2 else self.parameter(i).grad.clone()
        self.update()

    def dropped(self, i):
        self.zero()
        self.backward()
        self.zero()
        self.update()

    def moved(self, i):
        self.zero()
        self.backward()
        with torch.no_grad():
            (self.parameter(i).data if i % 2 else self.parameter(i)).add_(0.125)
        self.update()

    def hooked(self, i):
        """Somebody else's hook, for a step."""
        handle = self.parameter(i).register_hook(lambda g: g * 2)
        self.straight(i)
        handle.remove()

    def partial_derivatives(self, i):
        self.zero()
        self.backward()
        torch.autograd.grad(self.model(torch.ones(2, 5)).sum(), list(self.model.parameters()))
        self.update()

    def closure(self, i):
        def closure():
            self.zero()
            loss = self.loss()
            loss.backward()
            return loss

        if self.scaler is None:
            self.optimizer.step(closure)

    def look(self, i):
        """A question in the middle of a step."""
        self.zero()
        self.backward(sync=i % 2 == 0)
        if self.lens is not None:
            self.lens.table() if self.writer.records else self.lens.findings()
        self.backward()
        self.update()

    def state(self):
        states = [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return [*self.model.state_dict().values(), *states, *self.gradients(), self.generator.get_state()]


CALLS = [name for name, call in vars(World).items() if callable(call) and "i" in call.__code__.co_varnames[1:2]]
CALLS += ["straight", "accumulate", "clipped"] * 3


def program(seed):
    """A training's settings and calls."""
    given = random.Random(seed)
    settings = {
        "stages": given.choice([None, DEFAULT, DEFAULT, LOCAL, LOCAL, ("backward", "accumulated", "reduced", "used")]),
        "features": given.choice([("updates", "flips"), ("updates", "flips"), ("updates",), ("flips",), ()]),
        "adam": given.random() < 0.5,
        "comm_hook": given.random() < 0.2,
        "schedule": given.choice([1, 1, 1, 2, 3]),
        "scaler": given.choice([None, None, None, "given", "found"]),
        "gradient_as_bucket_view": given.random() < 0.5,
        "find_unused_parameters": given.random() < 0.4,
        "bucket_cap_mb": given.choice([25, 0.0001]),
    }
    calls = [(given.choice(CALLS), given.randrange(60)) for _ in range(14)]
    return settings, [("straight", 3), *calls, ("straight", 3)]


def run(seed):
    """The steady route against the general one and no watching; how much of it went by the book."""
    settings, calls = program(seed)
    worlds = []
    for kind in ("steady", "general", "bare"):
        world = World(kind, **settings)
        for name, i in calls:
            getattr(world, name)(i)
        worlds.append(world)
    steady, general, bare = worlds
    for world in (steady, general):
        world.lens.close()
        assert len(world.state()) == len(bare.state())
        assert all(same_bits(a.numpy(), b.numpy()) for a, b in zip(world.state(), bare.state(), strict=True)), seed
    assert general.parts == (0, 0)
    try:
        assert_same(steady.writer, general.writer)
    except AssertionError:
        print(seed, settings, calls)
        raise
    return steady.parts, len(steady.writer.snapshots)


SEEDS = range(16)


def programs():
    """All of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [run(seed) for seed in SEEDS]


def test_both_routes_give_the_same_records(launched):
    """Whatever DDP does and a loop may do with it: the same tables and findings, and the same bits as without us."""
    for rank in launched(programs):
        assert len(rank) == len(SEEDS)
        parts = sum(captured for (captured, _), _ in rank)
        assert parts > 40 * len(SEEDS)
        assert all(answered <= captured for (captured, answered), _ in rank)


def straight():
    """For each way to train: the parts by the book of ten steps, for capture and for the tables."""
    result = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for view in (False, True):
            for name, (stages, call, i) in PLAIN.items():
                world = World("steady", stages, gradient_as_bucket_view=view)
                for _ in range(10):
                    getattr(world, call)(i)
                result[name, view] = world.parts
                world.lens.close()
    return result


#: Name: stages, the call that makes one step, what it is given.
PLAIN = {
    "default": (None, "straight", 0),
    "zeros": (None, "zeros", 0),
    "clipped": (None, "clipped", 6),
    "no_sync": (None, "accumulate", 0),
    "local": (LOCAL, "straight", 0),
    "local, no_sync": (LOCAL, "accumulate", 0),
}
#: Parts of a step: its backwards, by stage; the optimizer's start and its end.
PARTS = {"default": 3, "zeros": 3, "clipped": 3, "no_sync": 4, "local": 4, "local, no_sync": 5}
#: Of these, backwards of which nothing is read: they were not averaged, and local gradients were not asked for.
UNREAD = {"no_sync": 1}


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_step_goes_by_the_book(launched, name, view):
    """From the second step on every part is steady, and prepared calls answer, bucket views both ways."""
    for rank in launched(straight):
        captured, answered = rank[name, view]
        assert captured == 9 * PARTS[name]
        assert answered == 9 * (PARTS[name] - UNREAD.get(name, 0))


def wrapped_late():
    """Averaged from the fifth step on, by a DDP with a static graph, which averages the first time in its own way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for stages in (DEFAULT, LOCAL):
            worlds = []
            for kind in ("steady", "general"):
                world = World(kind, stages)
                world.ddp = world.model
                for step in range(8):
                    if step == 4:
                        world.ddp = DistributedDataParallel(world.model, static_graph=True)
                    world.straight(0)
                world.lens.close()
                worlds.append(world)
            assert worlds[0].parts[0] >= 3 * 6
            assert_same(*(world.writer for world in worlds))


def test_a_model_that_is_wrapped_late(launched):
    """Steps that nobody averages, and then steps that DDP averages: by the book, with the records of the general way."""
    launched(wrapped_late)


def lost():
    """The local gradients of the third of four steps are not read in time; the tables, bucket views both ways."""
    result = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for view in (False, True):
            world = World("steady", LOCAL, gradient_as_bucket_view=view)
            for step in range(4):
                fails = mock.patch.object(GUARDED[BEFORE], "call", side_effect=RuntimeError("planted"))
                with fails if step == 2 else nullcontext():
                    world.straight(0)
            world.lens.close()
            general = World("general", LOCAL, gradient_as_bucket_view=view)
            general.straight(3)
            general.lens.close()
            read = zip(world.writer.snapshots, general.writer.snapshots, strict=True)
            result.append([(a.step, str(a.stage), set(a.status), same_bits(a.top.partial, b.top.partial)) for a, b in read])
    return result


BEFORE = "gradients before they are averaged"


def test_what_was_averaged_before_it_was_read_is_not_called_local(launched):
    """Where a fault of ours lets the moment pass: rows are empty and say so; bucket views leave them as they were."""
    for rank in launched(lost):
        for view, tables in enumerate(rank):
            for step, stage, status, same in tables:
                gone = (step, stage) == (2, "backward") and not view
                assert status == ({"uncaptured"} if gone else {"ok"})
                assert same is not gone


def watched(layers, micro=1, **watch):
    """A training that goes by the book, after its first steps: its lens, and one step of it."""
    torch.manual_seed(0)
    ddp, x = DistributedDataParallel(nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)))), torch.randn(4, 8)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    lens = gradlens.watch(ddp, optimizer, **watch)

    def step():
        optimizer.zero_grad()
        for i in range(micro):
            with ddp.no_sync() if i < micro - 1 else nullcontext():
                ddp(x).square().mean().backward()
        optimizer.step()

    for _ in range(23):  # as in test_cost: what is looked at now and then is looked at in the 22nd
        step()
    return lens, step


WAYS = {
    "default": {},
    "no_sync": {"micro": 3},
    "local": {"stage": LOCAL},
    "left out": {"schedule": lambda step: step < 3},
}


def counted():
    """For each way: the calls of a step with few parameters, and with many."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: [counted_calls(*watched(layers, **way)) for layers in (5, 40)] for name, way in WAYS.items()}


@pytest.mark.parametrize(("way", "backwards", "calls"), [("default", 1, 200), ("no_sync", 3, 400), ("local", 1, 250)])
def test_two_calls_a_parameter(launched, way, backwards, calls):
    """A parameter more is its two hooks more, which only note: whether it was averaged is asked of one."""
    for rank in launched(counted):
        few, many = rank[way]
        assert {name.removeprefix("local_") for name in many - few} == {"on_gradient", "on_accumulated"}
        assert (many - few).total() == 2 * 70 * backwards
        assert few.total() - 20 * backwards <= calls


def test_a_step_that_is_left_out_costs_a_few_calls(launched):
    """Whatever the model and DDP do: the optimizer's two hooks, which count the step and ask the schedule about the next."""
    for rank in launched(counted):
        few, many = rank["left out"]
        assert few == many
        assert few.total() <= 16
