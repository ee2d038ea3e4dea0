"""The steady route against the general one: random programs go down both, and every record and finding is the same."""

import contextlib
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import gradlens
from gradlens import kernels, rules
from gradlens.analysis.rules.occasional import Occasional
from gradlens.kernels.prepared import NativePrepared
from gradlens.testing import RecordingWriter

pytestmark = pytest.mark.skipif(kernels._native() is None, reason="the native kernel was not built")


#: Rules whose findings are the same however steps fall into blocks, which is a matter of time.
RULES = [each for each in rules.DEFAULT if not isinstance(each, Occasional)]


class World:
    """One training, a function of the calls made: watched by the steady route, by the general one, or not at all."""

    def __init__(self, kind, optimizers, features, schedule=1, scaler=None):
        """`scaler`: the lens is given it, or finds it."""
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
        parameters = list(self.model.parameters())
        if optimizers == 1:
            self.optimizers = [torch.optim.Adam(parameters, 0.01)]
        elif optimizers == "sgd":
            self.optimizers = [torch.optim.SGD([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:]}], 0.05)]
        else:
            self.optimizers = [torch.optim.SGD(parameters[:4], 0.1), torch.optim.Adam(parameters[4:], 0.01)]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5) if scaler else None
        self.writer, self.lens, self.hook, self.alive = RecordingWriter(), None, None, []
        self.generator = torch.Generator().manual_seed(1)
        if kind != "bare":
            options = {"writers": [self.writer], "features": features, "rules": RULES, "schedule": schedule}
            given = self.scaler if scaler == "given" else None
            self.lens = gradlens.watch(self.model, self.optimizers, scaler=given, **options)
            self.lens._watcher.steady.allowed = kind == "steady"

    @property
    def parts(self):
        """How much of it went by the book: for capture, and for the tables."""
        return self.lens._watcher.steady.parts, self.lens._tables.steady.answered

    def loss(self):
        x = torch.randn(4, 5, generator=self.generator)
        return self.model(x).square().mean()

    def zero(self, set_to_none=True):
        if self.alive:
            self.alive += self.gradients()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def backward(self, factor=1.0, **options):
        self.scaled(self.loss() * factor).backward(**options)

    def scaled(self, loss):
        return loss if self.scaler is None else self.scaler.scale(loss)

    def step(self):
        for optimizer in self.optimizers:
            if self.scaler is None:
                optimizer.step()
            elif self.scaler._scale is not None and any(p.grad is not None for p in self.moved_by(optimizer)):
                self.scaler.step(optimizer)  # which refuses to step without any gradient
        if self.scaler is not None and any(state["stage"].value for state in self.scaler._per_optimizer_states.values()):
            self.scaler.update()

    def clip(self, most):
        if self.scaler is not None:
            self.unscale()
        nn.utils.clip_grad_norm_(self.model.parameters(), most)

    @staticmethod
    def moved_by(optimizer):
        return [p for group in optimizer.param_groups for p in group["params"]]

    def unscale(self):
        for optimizer in self.optimizers:
            there = self.scaler._scale is not None and any(p.grad is not None for p in self.moved_by(optimizer))
            if there and not self.scaler._per_optimizer_states[id(optimizer)]["stage"].value:
                self.scaler.unscale_(optimizer)

    def straight(self, n=1):
        for _ in range(n):
            self.zero()
            self.backward()
            self.step()

    def parameter(self, i):
        parameters = list(self.model.parameters())
        return parameters[i % len(parameters)]

    def replace(self, i):
        """Another parameter in the place of this one, in the model and in its optimizer."""
        old = self.parameter(i)
        new = nn.Parameter(old.detach().clone() + 0.25)
        for module in self.model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is old:
                    setattr(module, name, new)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]

    def unzeroed(self, n=1):
        """Steps whose gradients are added to those of the steps before."""
        for _ in range(n):
            self.backward()
            self.step()

    def swap(self, i):
        """Another tensor behind the same parameter, whose hooks are then of no use.

        From then on gradients live on, so that no new one gets the id of one that was seen: then it would not be seen to
        be new.
        """
        p = self.parameter(i)
        if p.requires_grad and self.hook is None:
            self.alive += self.gradients()
            self.zero()
            torch.utils.swap_tensors(p, nn.Parameter(p.detach().clone() + 0.25))

    def gradients(self):
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def state(self):
        states = [v for o in self.optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        states += [] if self.scaler is None or self.scaler._scale is None else [self.scaler._scale]
        return [*self.model.state_dict().values(), *states, *self.gradients(), self.generator.get_state()]


class Middle:
    """What may happen between a backward and the optimizer's step."""

    def __init__(self, world):
        self.world = world

    def nothing(self, i):
        pass

    def clip(self, i):
        self.world.clip(0.01)

    def no_clip(self, i):
        self.world.clip(1e9)

    def rewrite(self, i):
        """Writes past the version counter."""
        for gradient in self.world.gradients():
            gradient.data.mul_(0.5)

    def other_gradient(self, i):
        p = self.world.parameter(i)
        p.grad = None if p.grad is None else p.grad.clone()

    def drop_gradient(self, i):
        self.world.parameter(i).grad = None

    def drop_all(self, i):
        self.world.zero()

    def zero_all(self, i):
        self.world.zero(set_to_none=False)

    def move_weight(self, i):
        with torch.no_grad():
            self.world.parameter(i).add_(0.125)

    def move_one_weight(self, i):
        """One that no sample has: every second of 35 is sampled."""
        with torch.no_grad():
            self.world.parameter(i).view(-1)[1] += 0.125

    def move_one_unseen(self, i):
        """The same, past the version counter."""
        p = self.world.parameter(i)
        p.data.view(-1)[min(1, p.numel() - 1)] += 0.125

    def move_data(self, i):
        self.world.parameter(i).data.add_(0.125)

    def swap_data(self, i):
        p = self.world.parameter(i)
        p.data = p.data.clone() * 0.5

    def replace(self, i):
        self.world.replace(i)

    def freeze(self, i):
        self.world.parameter(i).requires_grad_(False)

    def hook(self, i):
        parameter = self.world.parameter(i)
        if parameter.requires_grad:  # an earlier disturbance may have frozen it
            self.world.hook = self.world.hook or parameter.register_hook(lambda g: g * 2)

    def again(self, i):
        self.world.backward()

    def partial_derivatives(self, i):
        parameters = [p for p in self.world.model.parameters() if p.requires_grad]
        torch.autograd.grad(self.world.loss(), parameters)

    def look(self, i):
        """A question in the middle of a step."""
        if self.world.lens is not None:
            self.world.lens.table() if self.world.writer.records else self.world.lens.findings()


MIDDLES = [name for name in vars(Middle) if not name.startswith("_")]


class Worlds(RuleBasedStateMachine):
    """One training in three worlds: by the steady route, by the general one, and unwatched. A rule makes `worlds`."""

    @invariant()
    def training_is_the_same(self):
        if hasattr(self, "worlds"):
            states = [world.state() for world in self.worlds]
            for state in states[:2]:
                assert len(state) == len(states[2])
                assert all(same_bits(a.numpy(), b.numpy()) for a, b in zip(state, states[2], strict=True))

    def teardown(self):
        if not hasattr(self, "worlds"):
            return
        for world in self.worlds[:2]:
            world.lens.close()
        assert_same(*(world.writer for world in self.worlds[:2]))


class Programs(Worlds):
    """Three trainings that are told the same."""

    @initialize(
        optimizers=st.sampled_from([1, 1, "sgd", 2]),
        features=st.sampled_from([("updates", "flips"), ("updates",), ("flips",), (), ("updates", "flips", "evidence")]),
        every=st.sampled_from([1, 1, 1, 2, 5]),
        scaler=st.sampled_from([None, None, "given", "found"]),
    )
    def watch(self, optimizers, features, every, scaler):
        self.single, self.prepares = optimizers != 2, "evidence" not in features
        self.parts, self.every = 3 if "updates" in features else 2, every
        self.worlds = [World(kind, optimizers, features, every, scaler) for kind in ("steady", "general", "bare")]
        self.hindered = False  # whether steps are not straight, however they are made

    def all(self, call, *args):
        for world in self.worlds:
            call(world, *args)

    @rule(n=st.integers(1, 6))
    def straight(self, n):
        before = self.worlds[0].parts
        self.all(World.straight, n)
        if self.single and not self.hindered and n > 3 and self.every == 1:
            captured, prepared = (b - a for a, b in zip(before, self.worlds[0].parts, strict=True))
            assert captured >= 3 * (n - 3)
            if self.prepares and not self.worlds[0].lens._tables._flips.get("used"):
                assert prepared >= self.parts * (n - 4)  # the buffers are filled by a step that goes the general way
        assert self.worlds[1].parts == (0, 0)

    @rule(what=st.sampled_from(MIDDLES), i=st.integers(0, 5), straight=st.integers(0, 3))
    def disturbed(self, what, i, straight):
        """A step with something between its backward and the optimizer."""

        def call(world):
            world.straight(straight)
            world.zero()
            world.backward()
            getattr(Middle(world), what)(i)
            world.step()

        self.all(call)
        self.hindered |= what in ("freeze", "hook")

    @rule(k=st.integers(2, 4), n=st.integers(1, 3))
    def accumulate(self, k, n):
        def call(world):
            for _ in range(n):
                world.zero()
                for _ in range(k):
                    world.backward()
                world.step()

        self.all(call)

    @rule(n=st.integers(1, 7), micro=st.integers(1, 3), clip=st.sampled_from([None, 0.01, 1e9]))
    def regular(self, n, micro, clip):
        """Steps that are alike: several backwards, and the gradient clipped, or both."""
        before = self.worlds[0].parts

        def call(world):
            for _ in range(n):
                world.zero()
                for _ in range(micro):
                    world.backward()
                if clip is not None:
                    world.clip(clip)
                world.step()

        self.all(call)
        if self.every > 1:
            return
        if not self.single and not self.hindered and n > 4:
            assert self.worlds[0].parts[0] - before[0] >= n - 4  # each first backward
        if self.single and not self.hindered and n > 4:
            captured, prepared = (b - a for a, b in zip(before, self.worlds[0].parts, strict=True))
            assert captured >= (2 + micro) * (n - 4)
            if self.prepares and (micro > 1 or clip is not None or self.worlds[0].scaler is not None):
                assert prepared >= (self.parts + micro - 1) * (n - 4)
        assert self.worlds[1].parts == (0, 0)

    @rule(n=st.integers(1, 3))
    def zeros_instead_of_none(self, n):
        def call(world):
            for _ in range(n):
                world.zero(set_to_none=False)
                world.backward()
                world.step()

        self.all(call)

    @rule()
    def skipped(self):
        """A backward whose step never comes."""

        def call(world):
            world.zero()
            world.backward()

        self.all(call)

    @rule(factor=st.sampled_from([float("inf"), float("nan"), 1e38]), n=st.integers(0, 3))
    def overflows(self, factor, n):
        """A backward that a scaler skips the step of, where there is one, in the midst of others."""

        def call(world):
            if world.scaler is not None:
                world.zero()
                world.backward(factor)
                world.step()
            world.straight(n)

        self.all(call)

    @rule()
    def step_alone(self):
        """An optimizer that steps without a backward."""
        self.all(World.step)

    @rule(i=st.integers(0, 5))
    def inputs(self, i):
        def call(world):
            world.zero()
            chosen = world.parameter(i)
            if chosen.requires_grad:
                world.backward(inputs=[chosen])
            world.step()

        self.all(call)

    @rule(n=st.integers(1, 3))
    def unzeroed(self, n):
        self.all(World.unzeroed, n)

    @rule(i=st.integers(0, 5))
    def swapped(self, i):
        self.all(World.swap, i)

    @precondition(lambda self: self.single and self.worlds[0].scaler is None)
    @rule(n=st.integers(1, 2))
    def closure(self, n):
        def call(world):
            def closure():
                world.zero()
                loss = world.loss()
                loss.backward()
                return loss

            for _ in range(n):
                world.optimizers[0].step(closure)

        self.all(call)

    @rule(i=st.integers(0, 5))
    def between_steps(self, i):
        """A parameter is replaced, another one's memory too."""

        def call(world):
            world.replace(i)
            p = world.parameter(i + 1)
            p.data = p.data.clone()

        self.all(call)

    @rule(rate=st.sampled_from([0.0, 0.003, 0.02]))
    def rate(self, rate):
        def call(world):
            world.optimizers[0].param_groups[-1]["lr"] = rate

        self.all(call)
        self.hindered |= rate == 0.0

    @rule()
    def unhinder(self):
        """Nothing is frozen, hooked by others, or held still any more."""

        def call(world):
            for p in world.model.parameters():
                p.requires_grad_(True)
            if world.hook is not None:
                world.hook.remove()
                world.hook = None
            for optimizer in world.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] or 0.01

        self.all(call)
        self.hindered = False
        self.all(World.straight, 2)

    @rule(dtype=st.sampled_from([torch.float64, torch.float32]))
    def cast(self, dtype):
        """The memory under every parameter is of another type; gradients and the optimizers' states with it."""

        def call(world):
            world.zero()
            for p in world.model.parameters():
                p.data = p.data.to(dtype)
            for optimizer in world.optimizers:
                for state in optimizer.state.values():
                    state.update({k: v.to(dtype) for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim()})
            x = torch.randn(4, 5, generator=world.generator).to(dtype)
            world.scaled(world.model(x).sum()).backward()
            world.step()
            world.zero()
            for p in world.model.parameters():
                p.data = p.data.float()
            for optimizer in world.optimizers:
                for state in optimizer.state.values():
                    state.update({k: v.float() for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim()})

        self.all(call)


def assert_same(one, other):
    """The same records, but for their time."""
    first, second = ([comparable(finding) for finding in each.findings] for each in (one, other))
    assert first == second, [pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]]
    assert not [finding for finding in one.findings if finding.rule == "gradlens-fault"]
    for a, b in zip(one.snapshots, other.snapshots, strict=True):
        where = (a.step, a.backward, a.stage)
        assert where == (b.step, b.backward, b.stage)
        assert a.parameters == b.parameters, where
        assert repr(a.scalars) == repr(b.scalars), where
        assert a.status.tolist() == b.status.tolist(), where
        assert a.columns.keys() == b.columns.keys()
        for name in a.columns:
            assert same_bits(a.columns[name], b.columns[name]), (*where, name, a.columns[name], b.columns[name])
        for name in ("index", "partial", "value"):
            assert same_bits(getattr(a.top, name), getattr(b.top, name)), (*where, name)
        assert same_bits(a.scale, b.scale)
        assert (a.histogram is None) == (b.histogram is None), where
        assert a.histogram is None or same_bits(a.histogram, b.histogram), where


def comparable(finding):
    """The finding, and its value as a text: NaN is not equal to itself."""
    return replace(finding, value=None), repr(finding.value)


def same_bits(a, b):
    """Whether two arrays are equal, NaN and signs of zero included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


Programs.TestCase.settings = settings(
    max_examples=30, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
TestPrograms = pytest.mark.filterwarnings("ignore")(Programs.TestCase)


@contextlib.contextmanager
def world(kind="steady", optimizers=1, features=("updates", "flips"), schedule=1, scaler=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = World(kind, optimizers, features, schedule, scaler)
    try:
        yield made
    finally:
        made.lens.close()


def test_a_straight_training_goes_by_the_book():
    """From the second step on every part of a step is steady, and from the third on prepared calls answer."""
    with world() as made:
        made.straight(10)
        assert made.parts[0] == 3 * 9
        assert made.parts[1] >= 3 * 8


@pytest.mark.parametrize("every", [2, 10])
def test_the_route_waits_for_the_next_observed_step(every):
    """Steps in between that are not observed leave it as it was: each observed one goes by the book but for the first."""
    with world(schedule=every) as made:
        made.straight(10 * every)
        assert made.parts == (3 * 9, 3 * 9)


@pytest.mark.parametrize("clip", [None, 0.01])
@pytest.mark.parametrize("scaler", ["given", "found"])
def test_scaled_steps_go_by_the_book(scaler, clip):
    """Under a scaler that the lens was given, or finds, as without one: whether gradients are clipped or not."""
    made = []
    for kind in ("steady", "general"):
        with world(kind, scaler=scaler) as each:
            for _ in range(10):
                each.zero()
                each.backward()
                if clip is not None:
                    each.clip(clip)
                each.step()
        made.append(each)
    assert made[0].parts[0] == 3 * 9
    assert made[0].parts[1] >= 3 * 8
    assert made[0].scaler.get_scale() > 64
    assert_same(made[0].writer, made[1].writer)


@pytest.mark.parametrize("scaler", ["given", "found"])
def test_a_step_that_the_scaler_skips_leaves_the_route_as_it_was(scaler):
    """Its backward goes by the book, what it was not given the general way, and the next steps by the book again."""
    made = []
    for kind in ("steady", "general"):
        with world(kind, scaler=scaler) as each:
            for _ in range(3):
                each.straight(5)
                each.zero()
                each.backward(float("inf"))
                each.step()
            each.straight(3)
        made.append(each)
    assert made[0].parts[0] == 3 * (4 + 5 + 5 + 3) + 3
    used = [snapshot for snapshot in made[0].writer.snapshots if snapshot.stage == "used"]
    assert [s.step for s in used if "nonfinite" in s.status.tolist()] == [5, 11, 17]
    assert_same(made[0].writer, made[1].writer)


def test_the_steady_route_is_not_taken_where_it_is_not_allowed():
    """The switch that tests have works: without it they would compare a thing with itself."""
    with world("general") as made:
        made.straight(5)
        assert made.parts == (0, 0)


@pytest.mark.parametrize("what", MIDDLES)
def test_each_disturbance_gives_the_same_records(what):
    """One after the other in a straight training, each of what may happen before an optimizer's step."""
    made = []
    for kind in ("steady", "general"):
        with world(kind) as each:
            for i in (0, 3):
                each.straight(4)
                each.zero()
                each.backward()
                getattr(Middle(each), what)(i)
                each.step()
            each.straight(2)
        made.append(each)
    assert made[0].parts[0] >= 3 * 3
    assert_same(made[0].writer, made[1].writer)


@pytest.mark.parametrize("between", ["unzeroed", "swap", "replace"])
def test_each_change_between_steps_gives_the_same_records(between):
    """Gradients that are left, and parameters that are exchanged in one way or the other."""
    made = []
    for kind in ("steady", "general"):
        with world(kind) as each:
            for i in (2, 3):
                each.straight(4)
                getattr(each, between)(i)
            each.straight(3)
        made.append(each)
    assert made[0].parts[0] >= 3 * 3
    assert_same(made[0].writer, made[1].writer)


def test_the_route_goes_with_the_model():
    """What the route refers to is freed with the model, and by close()."""
    import gc
    import weakref

    with world() as made:
        made.straight(5)
        parameter = weakref.ref(made.model[0].weight)
        made.lens.close()
        made.optimizers = made.model = None
        gc.collect()
        assert parameter() is None


@pytest.mark.parametrize("call", ["read", "unchanged", "compare"])
def test_the_general_way_stands_in_for_a_call_that_fails(monkeypatch, call):
    """A fault of a prepared call is named once, and costs no row."""
    made = []
    for kind in ("steady", "general"):
        with world(kind) as each:
            each.straight(5)
            if kind == "steady":

                def fails(self, *arguments):
                    raise MemoryError("no room")

                with monkeypatch.context() as patched:
                    patched.setattr(NativePrepared, call, fails)
                    each.straight(1)
            else:
                each.straight(1)
            each.straight(5)
        made.append(each.writer)
    faults = [finding for finding in made[0].findings if finding.rule == "gradlens-fault"]
    assert [fault.seen.count("prepared calls: MemoryError") for fault in faults] == [1]
    made[0].records = [record for record in made[0].records if record not in faults]
    assert_same(*made)


def test_columns_of_nothing_stay_empty():
    """A gradient that the optimizer overwrites inside its step is not taken for the one that it was given."""

    class Greedy(torch.optim.SGD):
        def step(self, closure=None):
            result = super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.zero_()
            return result

    writers = []
    for kind in ("steady", "general"):
        with world(kind) as each:
            each.straight(3)
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer, writer = Greedy(model.parameters(), 0.1), RecordingWriter()
        with gradlens.watch(model, optimizer, writers=[writer], rules=RULES) as lens:
            lens._watcher.steady.allowed = kind == "steady"
            for _ in range(5):
                optimizer.zero_grad()
                model(torch.ones(2, 3)).square().sum().backward()
                optimizer.step()
        writers.append(writer)
    assert_same(*writers)
    assert np.isfinite(writers[0].snapshots[-1].columns["update_dot"]).all()


@pytest.mark.parametrize("optimizers", [1, 2])
def test_a_gradient_that_is_freed_inside_a_backward_is_read_in_the_hook_by_the_next_one(optimizers):
    """The next backward of the very same step, though the one before went the general way by itself."""
    writers = []
    for kind in ("steady", "general"):
        with world(kind, optimizers) as each:
            each.straight(4)
            freed = each.model[2].weight
            for _ in range(2):
                each.zero()
                for _ in range(3):
                    x = torch.randn(4, 5, generator=each.generator, requires_grad=True)
                    x.register_hook(lambda g, freed=freed: setattr(freed, "grad", None))
                    each.model(x).square().mean().backward()
                for optimizer in each.optimizers:
                    optimizer.step()
        writers.append(each.writer)
    assert_same(*writers)
    read = {(s.step, s.backward): s.status[2] for s in writers[0].snapshots if s.stage == "backward" and s.step >= 4}
    assert [key for key, status in read.items() if status != "ok"] == [(4, 0)]
