"""Several optimizers, and parameters that are frozen or not reached: random programs go down the steady route and the other.

A program is a round of backwards, emptied gradients and optimizers' steps, in any order, that is repeated a few times, so
that its parts go by the book; now and then something comes in between.
"""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from torch import nn

import gradlens
from gradlens import kernels
from gradlens.kernels.prepared import NativePrepared
from gradlens.testing import RecordingWriter
from tests.capture.test_steady import RULES, Worlds, assert_same, world

pytestmark = pytest.mark.skipif(kernels._native() is None, reason="the native kernel was not built")

softplus = nn.functional.softplus


class World:
    """Three nets: one makes what another one tells, from what the third has encoded. A function of the calls made."""

    def __init__(self, kind, shares, features, schedule, scaled):
        torch.manual_seed(0)
        self.nets = nn.ModuleDict(
            {
                "encoder": nn.Linear(4, 6),
                "maker": nn.Sequential(nn.Tanh(), nn.Linear(6, 5)),
                "teller": nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1)),
            }
        )
        classes = [torch.optim.SGD, torch.optim.Adam, torch.optim.SGD]
        self.optimizers = [
            make([p for name in names for p in self.nets[name].parameters()], 0.02)
            for make, names in zip(classes, shares, strict=False)
        ]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5) if scaled else None
        self.generator = torch.Generator().manual_seed(1)
        self.writer, self.lens, self.hook, self.alive = RecordingWriter(), None, None, []
        if kind != "bare":
            options = {"writers": [self.writer], "features": features, "rules": RULES, "schedule": schedule}
            self.lens = gradlens.watch(self.nets, self.optimizers, scaler=self.scaler, **options)
            self.lens._watcher.steady.allowed = kind == "steady"

    @property
    def parts(self):
        """How much of it went by the book: for capture, and for the tables."""
        return self.lens._watcher.steady.parts, self.lens._tables.steady.answered

    def random(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def loss(self, what):
        encoded = self.nets["encoder"](self.random(8, 4))
        made, real, teller = self.nets["maker"](encoded), self.random(8, 5), self.nets["teller"]
        if what == "tell":
            return softplus(-teller(real)).mean() + softplus(teller(made.detach())).mean()
        if what == "tell, attached":
            return softplus(-teller(real)).mean() + softplus(teller(made)).mean()
        if what == "make":
            return softplus(-teller(made)).mean()
        if what == "encode":
            return encoded.square().mean()
        if what == "some":
            return teller[0](real).square().mean()
        if what == "penalty":
            real.requires_grad_()
            (slope,) = torch.autograd.grad(teller(real).sum(), real, create_graph=True)
            return softplus(-teller(real)).mean() + (slope.norm(dim=1) - 1).square().mean()
        return made.square().mean() + teller(real).square().mean()

    def do(self, call, *args):
        """Gradients live on, so that no new one gets the id of one that was seen: then it would not be seen to be new."""
        getattr(self, call)(*args)
        self.alive += [p.grad for p in self.nets.parameters() if p.grad is not None]

    def backward(self, what, only=None):
        loss = self.loss(what)
        if not loss.requires_grad:
            return
        loss = loss if self.scaler is None else self.scaler.scale(loss)
        parameters = [] if only is None else [p for p in self.nets[only].parameters() if p.requires_grad]
        if not parameters:
            loss.backward()
        elif all(p.requires_grad for p in self.nets.parameters()) and what == "all":
            loss.backward(inputs=parameters)

    def empty(self, j, set_to_none):
        if j is None:
            self.nets.zero_grad(set_to_none)
        else:
            self.optimizers[j % len(self.optimizers)].zero_grad(set_to_none)

    def step(self, j):
        optimizer = self.optimizers[j % len(self.optimizers)]
        if self.scaler is None:
            optimizer.step()
        elif self.scaler._scale is not None and any(p.grad is not None for p in self.moved_by(optimizer)):
            if self.scaler._per_optimizer_states[id(optimizer)]["stage"].value == 2:
                self.scaler.update()
            self.scaler.step(optimizer)

    def closure(self, j):
        """A step that calls a closure of its own."""
        optimizer = self.optimizers[j % len(self.optimizers)]

        def closure():
            optimizer.zero_grad()
            loss = self.loss("all")
            if loss.requires_grad:
                loss.backward()
            return loss

        if self.scaler is None:
            optimizer.step(closure)

    def clip(self, name, most):
        if self.scaler is None:
            nn.utils.clip_grad_norm_(self.nets[name].parameters(), most)

    @staticmethod
    def moved_by(optimizer):
        return [p for group in optimizer.param_groups for p in group["params"]]

    def parameter(self, i):
        parameters = list(self.nets.parameters())
        return parameters[i % len(parameters)]

    def wants(self, name, wants):
        self.nets[name].requires_grad_(wants)

    def drop_gradient(self, i):
        self.parameter(i).grad = None

    def other_gradient(self, i):
        p = self.parameter(i)
        p.grad = None if p.grad is None else p.grad.clone()

    def rewrite(self, i):
        """Past the version counter."""
        if self.parameter(i).grad is not None:
            self.parameter(i).grad.data.mul_(0.5)

    def move_weight(self, i):
        with torch.no_grad():
            self.parameter(i).add_(0.125)

    def move_unseen(self, i):
        self.parameter(i).data.view(-1)[0] += 0.125

    def swap_data(self, i):
        p = self.parameter(i)
        p.data = p.data.clone()

    def replace(self, i):
        """Another parameter in the place of this one, in its module and in its optimizers."""
        old = self.parameter(i)
        new = nn.Parameter(old.detach().clone() + 0.25, requires_grad=old.requires_grad)
        for module in self.nets.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is old:
                    setattr(module, name, new)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]

    def leave(self, i):
        """An optimizer gives up a parameter, if it has others."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                if len(group["params"]) > 1:
                    group["params"] = [p for p in group["params"] if p is not self.parameter(i)]

    def take(self, j, i):
        """An optimizer takes a parameter on."""
        optimizer, p = self.optimizers[j % len(self.optimizers)], self.parameter(i)
        if not any(p is other for other in self.moved_by(optimizer)):
            optimizer.add_param_group({"params": [p]})

    def rate(self, j, rate):
        self.optimizers[j % len(self.optimizers)].param_groups[0]["lr"] = rate

    def exchange(self, j):
        """Another optimizer takes the place of one, which is gone."""
        j = j % len(self.optimizers)
        parameters = self.moved_by(self.optimizers[j])
        self.optimizers[j] = torch.optim.SGD(parameters, 0.03)

    def stranger(self, name):
        """An optimizer that the lens was not given."""
        torch.optim.SGD(self.nets[name].parameters(), 0.01).step()

    def listen(self, i):
        """Somebody else hooks a parameter, or takes that hook off."""
        p = self.parameter(i)
        if self.hook is not None:
            self.hook.remove()
            self.hook = None
        elif p.requires_grad:
            self.hook = p.register_hook(lambda g: g * 2)

    def slope(self):
        """`autograd.grad`, which is no backward."""
        loss, parameters = self.loss("all"), [p for p in self.nets.parameters() if p.requires_grad]
        if parameters and loss.requires_grad:
            torch.autograd.grad(loss, parameters, allow_unused=True)

    def look(self):
        """A question in the middle of a step."""
        if self.lens is not None:
            self.lens.table() if self.writer.records else self.lens.findings()

    def state(self):
        states = [v for o in self.optimizers for s in o.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        gradients = [p.grad for p in self.nets.parameters() if p.grad is not None]
        return [*self.nets.state_dict().values(), *states, *gradients, self.generator.get_state()]


NETS = ("encoder", "maker", "teller")
SHARES = (
    [("teller",), ("encoder", "maker")],
    [("encoder", "maker"), ("teller",)],
    [("teller",), ("maker",), ("encoder",)],
    [("encoder", "teller"), ("encoder", "maker")],  # one net is moved by both
    [("teller",), ("maker",)],  # one by none
    [NETS, ("teller",)],
    [NETS],
)

three, rows = st.integers(0, 2), st.integers(0, 7)
losses = st.sampled_from(["tell", "tell, attached", "make", "encode", "some", "penalty", "all"])
usual = st.one_of(
    st.tuples(st.just("backward"), losses),
    st.tuples(st.just("empty"), st.one_of(st.none(), three), st.sampled_from([True, True, False])),
    st.tuples(st.just("step"), three),
)
seldom = st.one_of(
    usual,
    st.tuples(st.just("clip"), st.sampled_from(NETS), st.sampled_from([0.01, 1e9])),
    st.tuples(st.just("wants"), st.sampled_from(NETS), st.booleans()),
    st.tuples(st.sampled_from(["rewrite", "other_gradient", "drop_gradient", "move_weight", "move_unseen"]), rows),
    st.tuples(st.just("slope")),
)
between = st.one_of(
    seldom,
    st.tuples(st.sampled_from(["replace", "leave", "listen", "swap_data"]), rows),
    st.tuples(st.just("take"), three, rows),
    st.tuples(st.just("rate"), three, st.sampled_from([0.0, 0.01])),
    st.tuples(st.sampled_from(["exchange", "closure"]), three),
    st.tuples(st.just("stranger"), st.sampled_from(NETS)),
    st.tuples(st.just("backward"), st.just("all"), st.sampled_from(NETS)),
    st.tuples(st.just("look")),
)


class Programs(Worlds):
    """Three trainings that are told the same."""

    @initialize(
        shares=st.sampled_from(SHARES),
        features=st.sampled_from([("updates", "flips"), ("updates", "flips"), ("updates",), (), ("updates", "evidence")]),
        every=st.sampled_from([1, 1, 1, 2, 3]),
        scaled=st.sampled_from([False, False, False, True]),
    )
    def watch(self, shares, features, every, scaled):
        self.worlds = [World(kind, shares, features, every, scaled) for kind in ("steady", "general", "bare")]

    def all(self, calls):
        for one in self.worlds:
            for call in calls:
                one.do(*call)
        assert self.worlds[1].parts == (0, 0)

    @rule(n=st.integers(1, 5), calls=st.lists(usual, min_size=2, max_size=6))
    def repeated(self, n, calls):
        self.all(n * calls)

    @rule(n=st.integers(1, 4), calls=st.lists(seldom, min_size=3, max_size=8))
    def repeated_with_more(self, n, calls):
        self.all(n * calls)

    @rule(
        n=st.integers(1, 4),
        tells=st.integers(1, 2),
        attached=st.booleans(),
        emptied=st.sampled_from([(0,), (None,), (1,), ()]),
        freeze=st.booleans(),
        within=st.lists(seldom, max_size=1),
    )
    def in_turn(self, n, tells, attached, emptied, freeze, within):
        """One net is trained to tell, then another one to make."""
        tell = [*(("empty", j, True) for j in emptied), ("backward", "tell, attached" if attached else "tell"), ("step", 0)]
        make = [*(("empty", j and 1 - j, True) for j in emptied), ("backward", "make"), ("step", 1)]
        frozen = [("wants", "teller", False), *make, ("wants", "teller", True)]
        self.all(n * [*(tells * tell), *within, *(frozen if freeze else make)])

    @rule(n=st.integers(1, 4), backwards=st.integers(1, 3), order=st.permutations([0, 1, 2]), clip=st.booleans())
    def together(self, n, backwards, order, clip):
        """One loss for all, or its gradients accumulated, and every optimizer steps."""
        clips = [("clip", name, 0.01) for name in NETS] if clip else []
        self.all(n * [("empty", None, True), *(backwards * [("backward", "all")]), *clips, *(("step", j) for j in order)])

    @rule(calls=st.lists(between, min_size=1, max_size=4))
    def changes(self, calls):
        self.all(calls)


Programs.TestCase.settings = settings(
    max_examples=30, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True
)
TestPrograms = pytest.mark.filterwarnings("ignore")(Programs.TestCase)


class Nets:
    """Two nets: one makes what the other is trained to tell. Watched by the steady route, or by the general one."""

    def __init__(self, kind, features=("updates", "flips"), *, reverse=False, schedule=1):
        torch.manual_seed(0)
        self.maker = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        self.teller = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
        self.of_maker = torch.optim.Adam(self.maker.parameters(), 0.01)
        self.of_teller = torch.optim.SGD(self.teller.parameters(), 0.1)
        optimizers = [self.of_teller, self.of_maker]
        self.writer = RecordingWriter()
        self.lens = gradlens.watch(
            {"maker": self.maker, "teller": self.teller},
            optimizers[::-1] if reverse else optimizers,
            writers=[self.writer],
            features=features,
            rules=RULES,
            schedule=schedule,
        )
        self.lens._watcher.steady.allowed = kind == "steady"

    @property
    def parts(self):
        """As of `World`."""
        return self.lens._watcher.steady.parts, self.lens._tables.steady.answered

    def train(self, rounds, *, tells=1, detached=True, freeze=False, whole=False):
        """`tells`: how often one net is trained for each time the other is. `whole`: all gradients are emptied each time."""
        for _ in range(rounds):
            for _ in range(tells):
                self.empty(self.of_teller, whole)
                made = self.maker(torch.randn(8, 4))
                wrong = self.teller(made.detach() if detached else made)
                (nn.functional.softplus(-self.teller(torch.randn(8, 5))) + nn.functional.softplus(wrong)).mean().backward()
                self.of_teller.step()
            self.teller.requires_grad_(not freeze)
            self.empty(self.of_maker, whole)
            nn.functional.softplus(-self.teller(self.maker(torch.randn(8, 4)))).mean().backward()
            self.of_maker.step()
            self.teller.requires_grad_(True)

    def empty(self, optimizer, whole):
        for each in (self.of_teller, self.of_maker) if whole else (optimizer,):
            each.zero_grad()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tells", [1, 3])
@pytest.mark.parametrize("how", [{}, {"detached": False}, {"freeze": True}, {"whole": True}])
@pytest.mark.parametrize("features", [("updates", "flips"), ("updates",), ()])
def test_two_nets_and_two_optimizers_go_by_the_book(reverse, tells, how, features):
    """Each backward and each optimizer's step: whether a backward reaches one net or both, and whatever is left in `.grad`.

    Whichever is listed last ends steps; but for the first, all of them go by the book.
    """
    made = []
    for kind in ("steady", "general"):
        nets = Nets(kind, features, reverse=reverse)
        nets.train(12, tells=tells, **how)
        nets.lens.close()
        made.append(nets)
    captured, prepared = made[0].parts
    rounds = 12 * (tells + 1)  # a backward and an optimizer's step each
    parts = 3 if "updates" in features else 2
    first = 1 if reverse else tells + 1  # of them are in the first step, after which the layout is compiled
    assert captured == 3 * (rounds - first)
    assert prepared >= parts * (rounds - first - tells - 2)
    assert made[1].parts == (0, 0)
    assert_same(made[0].writer, made[1].writer)


@pytest.mark.parametrize("every", [2, 5])
def test_two_nets_go_by_the_book_in_the_steps_that_are_observed(every):
    """The layout waits over the steps in between."""
    made = []
    for kind in ("steady", "general"):
        nets = Nets(kind, schedule=every)
        nets.train(10 * every)
        nets.lens.close()
        made.append(nets)
    assert made[0].parts[0] == 6 * 9
    assert_same(made[0].writer, made[1].writer)


def counted(call, calls):
    """The call, which notes in a list that it was made."""

    def noted(*arguments, **options):
        calls.append(call)
        return call(*arguments, **options)

    return noted


def test_one_backward_for_two_optimizers_goes_by_the_book(monkeypatch):
    """Both are given some of what it reached: neither is read again, and each is measured from the copy it has made."""
    made, calls = [], []
    for kind in ("steady", "general"):
        with world(kind, optimizers=2) as each:
            each.straight(5)
            with monkeypatch.context() as patched:
                patched.setattr(NativePrepared, "read", counted(NativePrepared.read, calls))
                each.straight(5)
        made.append(each)
        assert len(calls) == 5
    assert made[0].parts[0] == 5 * 9
    assert made[0].parts[1] >= 5 * 8
    assert_same(made[0].writer, made[1].writer)


def parted(kind):
    """One backward for an optimizer of the matrices and one of the vectors, step by step; and how many were answered."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizers = [
        torch.optim.SGD([p for p in net.parameters() if (p.dim() == 2) is matrix], 0.1) for matrix in (True, False)
    ]
    writer = RecordingWriter()
    lens = gradlens.watch(net, optimizers, writers=[writer], rules=RULES)
    lens._watcher.steady.allowed = kind == "steady"
    answered = []

    def step():
        before = lens._tables.steady.answered
        net.zero_grad()
        net(torch.randn(6, 4, device="cpu")).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        answered.append(lens._tables.steady.answered - before)

    return net, lens, writer, step, answered


def test_weights_that_move_in_memory_are_read_by_the_book_again():
    """From the next step on, each optimizer's of what one backward has reached."""
    writers = []
    for kind in ("steady", "general"):
        net, lens, writer, step, answered = parted(kind)
        for i in range(12):
            step()
            if i == 5:
                for p in net.parameters():
                    p.data = p.data.clone()
        lens.close()
        writers.append(writer)
        assert answered[7:] == [5 if kind == "steady" else 0] * 5
    assert_same(*writers)


def test_a_default_device_is_not_where_places_are_kept():
    """Rows that are not side by side are taken from the host's, wherever the user makes tensors."""
    writers = []
    for kind in ("steady", "general"):
        _, lens, writer, step, answered = parted(kind)
        with torch.device("meta"):
            for _ in range(8):
                step()
        lens.close()
        writers.append(writer)
        assert answered[3:] == [5 if kind == "steady" else 0] * 5
        assert not [finding for finding in writer.findings if finding.rule == "gradlens-fault"]
    assert_same(*writers)


class Growing(nn.Module):
    """A net that gets a parameter past registration."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.second(self.first(x)) * self._parameters.get("scale", 1.0)


def test_a_parameter_that_a_scan_finds_is_hooked_at_once():
    """It was written past registration: from the scan on its partials are read, though all others went by the book."""
    writers = []
    for kind in ("steady", "general"):
        torch.manual_seed(0)
        net, writer = Growing(), RecordingWriter()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        lens = gradlens.watch(net, optimizer, writers=[writer], rules=RULES)
        lens._watcher.steady.allowed = kind == "steady"
        for i in range(24):
            optimizer.zero_grad()
            net(torch.randn(6, 4)).square().mean().backward()
            optimizer.step()
            if i == 14:
                net._parameters["scale"] = nn.Parameter(torch.ones(3))
                optimizer.add_param_group({"params": [net._parameters["scale"]]})
        lens.close()
        writers.append(writer)
        assert {row for snapshot in writer.snapshots for row in snapshot.status.tolist()} == {"ok"}
    assert_same(*writers)
