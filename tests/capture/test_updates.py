"""Steps: where they open and close, what the optimizer consumed, and what it did."""

import sys
import warnings

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import gradlens
from tests.capture.helpers import grads, same


def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def loss_of(model, k=1.0):
    return (model(torch.ones(4, 3)) * k).pow(2).sum()


@pytest.mark.situation("one optimizer, any number of backwards", stages={"backward": "yes", "used": "yes"})
def test_a_step_is_an_optimizer_step(watched):
    """Each optimizer step closes one step, with one `used` table, whatever the number of backwards."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    for backwards in (1, 3):
        optimizer.zero_grad()
        for _ in range(backwards):
            loss_of(model).backward()
        optimizer.step()
    assert bench.sink.keys("backward") == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert bench.sink.keys("used") == [(0, 0), (1, 2)]
    assert [step for step, _ in bench.sink.closed] == [0, 1]


def test_a_step_without_a_backward_still_has_its_row(watched):
    """optimizer.step() with gradients that were left alone yields one `used` table, its rows `stale`."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    loss_of(model).backward()
    optimizer.step()
    optimizer.step()
    assert bench.sink.keys("used") == [(0, 0), (1, 0)]
    assert set(bench.sink.notes(1, 0, "used").values()) == {"stale"}


@pytest.mark.trap(40)
@pytest.mark.situation("clipping by norm", stages={"backward": "yes: before", "used": "yes: after"})
def test_used_is_what_the_optimizer_consumed(watched):
    """After clipping, `used` has the clipped gradient and `backward` the one before."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    loss_of(model).backward()
    before = grads(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    after = grads(model)
    optimizer.step()
    same(bench.sink.merged(0, 0, "backward"), before)
    same(bench.sink.merged(0, 0, "used"), after)
    assert not bench.sink.readings[-1].unchanged


def test_untouched_gradients_are_known_to_be_unchanged(watched):
    """With one backward and nothing in between, `used` is marked as the gradient that backward left."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    loss_of(model).backward()
    optimizer.step()
    assert bench.sink.readings[-1].unchanged
    optimizer.zero_grad(set_to_none=False)
    loss_of(model).backward()
    optimizer.step()
    assert not bench.sink.readings[-1].unchanged  # it was accumulated onto zeros: not known to be this backward's


def muon(parameters, **given):
    return torch.optim.Muon([p for p in parameters if p.ndim == 2], **given)


CAPTURABLE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.Adadelta,
    torch.optim.ASGD,
)

#: Every optimizer of torch that takes dense gradients, in every way that it steps on a CPU.
OPTIMIZERS = {
    **{
        f"{kind.__name__}, {way}": (kind, given)
        for kind in (
            torch.optim.SGD,
            torch.optim.Adam,
            torch.optim.AdamW,
            torch.optim.NAdam,
            torch.optim.RAdam,
            torch.optim.Adamax,
            torch.optim.RMSprop,
            torch.optim.Rprop,
            torch.optim.Adagrad,
            torch.optim.Adadelta,
            torch.optim.ASGD,
            torch.optim.Adafactor,
        )
        for way, given in {"plain": {"foreach": False}, "foreach": {"foreach": True}}.items()
    },
    **{
        f"{kind.__name__}, fused": (kind, {"fused": True})
        for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
    },
    **{
        f"{kind.__name__}, capturable, {way}": (kind, {"capturable": True, **given})
        for kind in CAPTURABLE
        for way, given in {"plain": {"foreach": False}, "foreach": {"foreach": True}}.items()
    },
    "Muon": (muon, {}),
    "Adam, maximize, amsgrad, weight decay": (torch.optim.Adam, {"maximize": True, "amsgrad": True, "weight_decay": 0.1}),
    "SGD, momentum, weight decay": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "Adam, a tensor as learning rate": (torch.optim.Adam, {"lr": torch.tensor(0.01)}),
}


@pytest.mark.situation(
    "every optimizer of torch that takes dense gradients: plain, foreach, fused",
    stages={"backward": "yes", "used": "yes", "updates": "yes"},
    note="capturable ones too, whose refusal of a CPU the test lifts: they are for CUDA graphs, in which no hook is called",
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_of_torch(watched, kind, monkeypatch):
    """`used` is the clipped gradient, bit for bit, and the update the exact difference of the weights, at each step."""
    make, given = OPTIMIZERS[kind]
    if "capturable" in given:
        for name in {make.__module__, "torch.optim.adam"}:
            monkeypatch.setattr(
                sys.modules[name], "_get_capturable_supported_devices", lambda *_, **__: ["cpu"], raising=False
            )
    model, plain = linear(), linear()
    optimizer, other = (make(m.parameters(), **{"lr": 0.1, **given}) for m in (model, plain))
    bench = watched(model, optimizer)
    for step in range(3):
        expected, before = {}, [p.detach().clone() for p in model.parameters()]
        for m, o in ((plain, other), (model, optimizer)):
            m.zero_grad()
            for k in (1.0, 0.5):
                loss_of(m, k).backward()
            nn.utils.clip_grad_norm_(m.parameters(), 0.3)
            expected = grads(m)
            o.step()
        same(bench.sink.merged(step, 1, "used"), expected)
        moved = bench.sink.updates[-1][1]
        for i, (p, q) in enumerate(zip(model.parameters(), plain.parameters(), strict=True)):
            assert torch.equal(p, q)
            if i in moved:  # Muon takes matrices only
                assert torch.equal(moved[i], p.detach() - before[i])
        assert len(moved) == sum(len(group["params"]) for group in optimizer.param_groups)


@pytest.mark.trap(24)
@pytest.mark.situation(
    "closures: LBFGS",
    stages={"backward": "yes: one a call of the closure", "used": "yes: the last", "updates": "yes: the whole move"},
)
def test_lbfgs_is_one_step_with_several_backwards(watched):
    """LBFGS calls its closure several times inside one step; `used` is read after it, and the update is the whole move."""
    model = linear()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    bench = watched(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    backwards = bench.sink.keys("backward")
    assert len(backwards) > 1
    assert bench.sink.keys("used") == [backwards[-1]]
    assert [step for step, _ in bench.sink.closed] == [0]
    same(bench.sink.merged(*backwards[-1], "used"), grads(model))
    for i, p in enumerate(model.parameters()):
        assert torch.equal(bench.sink.updates[0][1][i], p.detach() - before[i])


@pytest.mark.trap(24)
@pytest.mark.situation("closures: called once", stages={"backward": "yes", "used": "yes"})
def test_a_closure_that_is_called_once(watched):
    """SGD with a closure: backward and used are of the same step."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    assert bench.sink.keys("backward") == bench.sink.keys("used") == [(0, 0), (1, 0)]


@pytest.mark.trap(25)
@pytest.mark.situation("a subclass whose `step` calls `super().step()`", stages={"used": "yes"})
def test_a_subclass_that_calls_super_steps_once(watched):
    """class My(SGD): step() calling super().step() fires hooks twice and is one step."""

    class My(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = linear()
    optimizer = My(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    for _ in range(2):
        loss_of(model).backward()
        optimizer.step()
    assert bench.sink.keys("used") == [(0, 0), (1, 0)]


@pytest.mark.situation("an optimizer step that raises, then a good one", stages={"used": "yes"})
def test_a_step_that_raises_does_not_confuse_the_next(watched):
    """After an exception inside step() the next step is counted once, and as a step."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)

    def closure():
        raise ValueError("a user's bug")

    with pytest.raises(ValueError, match="a user's bug"):
        optimizer.step(closure)
    loss_of(model).backward()
    optimizer.step()
    assert [step for step, _ in bench.sink.closed] == [0]


def test_another_models_optimizer_is_ignored(watched):
    """Global hooks pass by optimizers that are not ours."""
    model, other = linear(), linear()
    bench = watched(model, torch.optim.SGD(model.parameters(), 0.1))
    stranger = torch.optim.SGD(other.parameters(), 0.1)
    loss_of(other).backward()
    stranger.step()
    assert bench.sink.events == []


@pytest.mark.situation("two optimizers (a GAN)", stages={"backward": "yes", "used": "yes: each of its own parameters"})
def test_a_gan_over_two_optimizers(watched):
    """The last listed optimizer is the clock; each gives `used` rows of its own parameters."""
    g, d = nn.Linear(2, 3), nn.Linear(3, 1)
    og, od = torch.optim.SGD(g.parameters(), 0.1), torch.optim.SGD(d.parameters(), 0.1)
    bench = watched({"G": g, "D": d}, [od, og])
    for _ in range(2):
        od.zero_grad()
        d(g(torch.ones(1, 2)).detach()).sum().backward()
        od.step()
        og.zero_grad()
        d(g(torch.ones(1, 2))).sum().backward()
        og.step()
    assert [step for step, _ in bench.sink.closed] == [0, 1]
    assert bench.sink.keys("used") == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert set(bench.sink.merged(0, 0, "used")) == {"D.weight", "D.bias"}
    assert set(bench.sink.merged(0, 1, "used")) == {"G.weight", "G.bias"}
    assert bench.sink.notes(0, 0, "backward")["G.weight"] == "absent"


@pytest.mark.situation(
    "no optimizer: weights moved by hand", stages={"backward": "yes", "updates": "yes: until the next backward"}
)
def test_without_an_optimizer_each_backward_is_a_step(watched):
    """A manual update between backwards is measured: dw is what moved until the next backward."""
    model = linear()
    bench = watched(model)
    for _ in range(3):
        model.zero_grad()
        loss_of(model).backward()
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-0.1)
    assert bench.sink.keys("backward") == [(0, 0), (1, 0), (2, 0)]
    assert [step for step, _ in bench.sink.closed] == [0, 1]
    gradient = bench.sink.merged(0, 0, "backward")["weight"]
    assert torch.allclose(bench.sink.updates[0][1][0], -0.1 * gradient, atol=1e-6)


@pytest.mark.situation("no optimizer: `lens.step()`", stages={"backward": "yes", "used": "yes"})
def test_lens_step_is_the_boundary(watched):
    """After the first explicit step, backwards accumulate until the next."""
    model = linear()
    bench = watched(model)
    loss_of(model).backward()
    bench.capture.explicit_step()
    for _ in range(2):
        loss_of(model).backward()
    bench.capture.explicit_step()
    assert bench.sink.keys("backward") == [(0, 0), (1, 0), (1, 1)]
    assert [step for step, _ in bench.sink.closed] == [0, 1]
    assert bench.sink.keys("used") == [(0, 0), (1, 1)]


def test_unobserved_steps_have_no_hook_of_ours(watched):
    """Every third step is looked at, and on the others no parameter carries a hook."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer, schedule=3)
    hooked = []
    for _ in range(5):
        hooked.append(bool(model.weight._backward_hooks) or bool(model.weight._post_accumulate_grad_hooks))
        optimizer.zero_grad()
        for _ in range(2):
            loss_of(model).backward()
        optimizer.step()
    assert hooked == [True, False, False, True, False]
    assert bench.sink.keys("used") == [(0, 1), (3, 1)]
    assert bench.sink.keys("backward") == [(0, 0), (0, 1), (3, 0), (3, 1)]


def test_the_schedule_is_asked_once_a_step(watched):
    """A schedule that counts its calls is called once for each step, in order."""
    asked = []

    def schedule(step):
        asked.append(step)
        return step != 1

    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watched(model, optimizer, schedule=schedule)
    for _ in range(3):
        for _ in range(2):
            loss_of(model).backward()
        optimizer.step()
    assert asked == [0, 1, 2, 3]


@pytest.mark.situation(
    "several optimizers over the same parameters",
    stages={"used": "yes: the last one's", "updates": "yes: of all that stepped after one backward"},
)
def test_two_optimizers_that_move_the_same_parameters(watched):
    """After one backward both step: the update is the weights' whole move, from before the first."""
    model = linear()
    optimizers = [torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam([model.weight], 0.01)]
    bench = watched(model, optimizers)
    for step in range(2):
        before = [p.detach().clone() for p in model.parameters()]
        model.zero_grad()
        loss_of(model).backward()
        for optimizer in optimizers:
            optimizer.step()
        moved = {}
        for update, rows in bench.sink.updates:
            if update.key == (step, 0, "used"):
                moved.update(rows)
        for i, p in enumerate(model.parameters()):
            assert torch.equal(moved[i], p.detach() - before[i])
        same(bench.sink.merged(step, 0, "used"), grads(model))
    assert [step for step, _ in bench.sink.closed] == [0, 1]


@pytest.mark.situation(
    "two steps of one optimizer to one of the other (a critic)", stages={"used": "yes: each", "updates": "yes: each"}
)
def test_a_critic_that_steps_twice(watched):
    """Each step after a backward of its own has a `used` row of its own, with its own move."""
    critic, actor = nn.Linear(3, 2), nn.Linear(3, 2)
    oc, oa = torch.optim.SGD(critic.parameters(), 0.1), torch.optim.SGD(actor.parameters(), 0.1)
    bench = watched({"C": critic, "A": actor}, [oc, oa])
    for model, optimizer in ((critic, oc), (critic, oc), (actor, oa)):
        before = [p.detach().clone() for p in model.parameters()]
        model.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        moved = bench.sink.updates[-1][1].values()
        for dw, p, old in zip(moved, model.parameters(), before, strict=True):
            assert torch.equal(dw, p.detach() - old)
    assert bench.sink.keys("used") == [(0, 0), (0, 1), (0, 2)]
    assert [step for step, _ in bench.sink.closed] == [0]


@pytest.mark.situation(
    "`.grad` of some parameters set to None before the step", stages={"backward": "yes", "used": "marked: status `excluded`"}
)
def test_a_gradient_that_is_taken_away_before_the_step(watched):
    """What the optimizer does not get is `excluded`: not zero, and not absent from the loss."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    loss_of(model).backward()
    bias = model.bias.grad.clone()
    model.weight.grad = None
    optimizer.step()
    assert set(bench.sink.merged(0, 0, "backward")) == {"weight", "bias"}
    same(bench.sink.merged(0, 0, "used"), {"bias": bias})
    assert bench.sink.notes(0, 0, "used") == {"weight": "excluded", "bias": None}


@pytest.mark.situation("gradients made in inference mode, and a step in it", stages={"used": "yes", "updates": "yes"})
def test_gradients_that_were_made_in_inference_mode(watched):
    """Such tensors have no version to tell writes by; they are read all the same."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        with torch.inference_mode():
            for p in model.parameters():
                p.grad = p.grad * 0.5
            optimizer.step()
        same(bench.sink.merged(step, 0, "used"), grads(model))
    assert [step for step, _ in bench.sink.closed] == [0, 1]


# --- the gradient scaler --------------------------------------------------------------------------------------------


def scaled_step(model, optimizer, scaler, k=1.0, unscale=False):
    optimizer.zero_grad()
    scaler.scale(loss_of(model, k)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.trap(23)
@pytest.mark.situation(
    "GradScaler, with `scaler=`",
    stages={"backward": "yes: unscaled, `scale` says by what", "used": "yes"},
    note="with and without `unscale_`, with and without fused kernels",
)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_scaled_gradients_say_their_scale(watched, fused, unscale):
    """Under a scaler `backward` carries the scale of its time, and `used` is unscaled, fused kernels included."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, fused=fused)
    scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    twin = linear()
    loss_of(twin).backward()
    true = grads(twin)
    bench = watched(model, optimizer, scaler=scaler)
    scaled_step(model, optimizer, scaler, unscale=unscale)
    first = next(r for r in bench.sink.readings if r.key[2] == "backward")
    assert (first.divisor, first.scale) == (1024.0, 1024.0)
    same({n: g / 1024 for n, g in first.partials.items()}, true)
    used = next(r for r in bench.sink.readings if r.key[2] == "used")
    assert (used.divisor, used.scale) == (1.0, 1024.0)
    same(used.partials, true)
    scaled_step(model, optimizer, scaler)
    assert next(r for r in bench.sink.readings if r.key == (1, 0, "backward")).scale == 2048.0


@pytest.mark.trap(23)
@pytest.mark.situation("GradScaler, a skipped step", stages={"used": "marked: status `nonfinite`"})
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skipped_is_closed(watched, fused):
    """An overflow: the step is a `used` record marked skipped, and the next step has the next number."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, fused=fused)
    scaler = GradScaler("cpu", init_scale=1024.0)
    bench = watched(model, optimizer, scaler=scaler)
    scaled_step(model, optimizer, scaler, k=1e25)
    bench.capture.close_skipped_step()
    assert [step for step, _ in bench.sink.closed] == [0]
    assert bool(bench.sink.readings[-1].skipped)
    scaled_step(model, optimizer, scaler)
    assert bench.sink.keys("used") == [(0, 0), (1, 0)]
    assert not bench.sink.readings[-1].skipped


@pytest.mark.situation("GradScaler, a skipped step", stages={"backward": "yes"})
def test_a_skipped_step_is_noticed_by_the_next_backward(watched):
    """Without any question in between, the next backward opens step 1, after update() replaced the scaler's books."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = GradScaler("cpu", init_scale=1024.0)
    bench = watched(model, optimizer, scaler=scaler)
    scaled_step(model, optimizer, scaler, k=1e25)
    scaled_step(model, optimizer, scaler)
    assert bench.sink.keys("backward") == [(0, 0), (1, 0)]
    assert bench.sink.keys("used") == [(0, 0), (1, 0)]


@pytest.mark.situation(
    "GradScaler over two optimizers, of which it skips one", stages={"used": "marked: status `nonfinite`, of that one"}
)
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("which", [0, 1])
def test_the_scaler_skips_one_of_two_optimizers(which, apart):
    """The one that was skipped has its row, be it the clock or not; the other's are those of a step as any.

    `apart`: each has its own backward and its own `scaler.update()`, as a GAN has.
    """
    model = nn.ModuleList([linear(), linear()])
    optimizers = [torch.optim.SGD(part.parameters(), 0.01) for part in model]
    scaler = GradScaler("cpu", init_scale=1024.0)
    bad = [f"{which}.weight", f"{which}.bias"]
    with gradlens.watch(model, optimizers, scaler=scaler) as lens:
        for step in range(3):
            model.zero_grad()
            for part, optimizer in enumerate(optimizers):
                scaler.scale(loss_of(model[part], k=1e25 if step == 1 and part == which else 1.0)).backward()
                if apart:
                    scaler.step(optimizer)
                    scaler.update()
            if not apart:
                for optimizer in optimizers:
                    scaler.step(optimizer)
                scaler.update()
        history = lens.history()
        assert sorted(history["step"].unique()) == [0, 1, 2]
        used = history[history["stage"] == "used"].set_index(["step", "parameter"])
        assert len(used) == 3 * 4
        for (step, name), row in used.iterrows():
            skipped = step == 1 and name in bad
            assert row["status"] == ("nonfinite" if skipped else "ok"), (step, name)
            assert (row["update_l2"] > 0) != skipped, (step, name)
        (finding,) = lens.findings()
        assert (finding.rule, finding.step) == ("skipped", 1)


def test_a_disabled_scaler_is_no_scaler(watched):
    """GradScaler(enabled=False) leaves everything as without one."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    bench = watched(model, optimizer, scaler=GradScaler("cpu", enabled=False))
    loss_of(model).backward()
    optimizer.step()
    assert {r.scale for r in bench.sink.readings} == {1.0}


# --- models that change ---------------------------------------------------------------------------------------------


def train(model, optimizer):
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


@pytest.mark.trap(10)
@pytest.mark.situation(
    "frozen, then unfrozen", stages={"backward": "yes: from the first backward that reaches another parameter first"}
)
def test_unfreezing_is_noticed_in_the_very_backward(watched):
    """A layer that is unfrozen between steps is read in its first backward, as far as it is reached after another's hook."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    train(model, optimizer)
    assert bench.sink.notes(0, 0, "backward")["0.weight"] == "frozen"
    model[0].requires_grad_(True)
    train(model, optimizer)
    assert set(bench.sink.merged(1, 0, "backward")) == {n for n, _ in model.named_parameters()}


@pytest.mark.situation("frozen while watched", stages={"used": "marked: status `frozen`"})
def test_freezing_is_noticed(watched):
    """A layer that is frozen while watched is `frozen`, whatever lies in its `.grad`."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    loss_of(model).backward()
    optimizer.step()
    model[0].requires_grad_(False)
    loss_of(model).backward()
    optimizer.step()
    assert bench.sink.notes(1, 0, "used")["0.weight"] == "frozen"
    assert "0.weight" not in bench.sink.merged(1, 0, "used")


@pytest.mark.trap(11)
@pytest.mark.situation("a parameter replaced by assignment", stages={"backward": "yes"})
def test_a_replaced_parameter_is_watched_again(watched):
    """model.weight = new Parameter: the new one is read in its first backward."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    train(model, optimizer)
    model[0].weight = nn.Parameter(torch.ones(3, 3))
    train(model, optimizer)
    same(bench.sink.merged(1, 0, "backward"), grads(model))


@pytest.mark.situation(
    "`.grad` written by hand",
    stages={"backward": "no: no backward reached it", "used": "marked: status `uncaptured`, the numbers are right"},
)
def test_a_parameter_that_only_the_step_reveals_is_uncaptured(watched):
    """Where no hook could fire, `.grad` that changed is read at the step and noted `uncaptured`."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.ones(2)
    optimizer.step()
    assert set(bench.sink.notes(0, 0, "used").values()) == {"uncaptured"}
    assert set(bench.sink.merged(0, 0, "used")) == {"weight", "bias"}


@pytest.mark.situation("a module added later", stages={"backward": "yes"})
def test_added_parameters_get_rows(watched):
    """A module that is added later is watched from its first backward on."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    train(model, optimizer)
    model.append(nn.Linear(2, 2))
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, optimizer)
    train(model, optimizer)
    assert "2.weight" in bench.sink.merged(2, 0, "backward")


@pytest.mark.trap(43)
def test_names_lose_wrappers_but_keep_a_users_module_attribute(watched):
    """compile's prefix is stripped; an attribute that a user called `module` is not."""

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(3, 2)

        def forward(self, x):
            return self.module(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = nn.DataParallel(torch.compile(Mine(), backend="eager"))
    bench = watched(wrapped, torch.optim.SGD(wrapped.parameters(), 0.1))
    assert bench.capture.attachment.parameters.names == ("module.weight", "module.bias")


# --- optimizers that the lens was not given -------------------------------------------------------------------------


class SAM(torch.optim.Optimizer):
    """As everybody writes it: the user calls both halves of a step, and never `step()` itself."""

    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=self.param_groups[0]["rho"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()


@pytest.mark.situation(
    "an optimizer that steps through another, inside it: SAM",
    stages={"backward": "yes: of both backwards", "used": "yes: the second's", "updates": "yes"},
)
def test_the_inner_optimizer_of_one_that_never_steps(watched):
    """SAM's own step() is never called; the optimizer inside it makes the step."""
    model = linear()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.01)
    bench = watched(model, optimizer)
    for step in range(2):
        loss_of(model).backward()
        optimizer.first_step()
        loss_of(model).backward()
        second = grads(model)
        optimizer.second_step()
        same(bench.sink.merged(step, 1, "used"), second)
        for i, p in enumerate(model.parameters()):
            assert torch.allclose(bench.sink.updates[step][1][i], -0.01 * list(second.values())[i], atol=1e-6), p.shape
    assert bench.sink.keys("backward") == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [step for step, _ in bench.sink.closed] == [0, 1]


@pytest.mark.situation("an optimizer made anew", stages={"used": "yes", "updates": "yes"})
def test_a_new_optimizer_stands_in_for_one_that_is_gone(watched):
    """The optimizer is thrown away and another made, as at a change of phase: its steps count from the first."""
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    bench = watched(model, optimizer)
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        optimizer = kind(model.parameters(), 0.1)
        loss_of(model).backward()
        expected = grads(model)
        optimizer.step()
        step = bench.sink.closed[-1][0]
        same(bench.sink.merged(step, 0, "used"), expected)
        optimizer.zero_grad()
    assert [step for step, _ in bench.sink.closed] == [0, 1, 2]
    assert bench.sink.keys("backward") == bench.sink.keys("used") == [(0, 0), (1, 0), (2, 0)]


def test_an_optimizer_that_watch_was_not_given_is_named(watched):
    """One of two is given: the other moves watched weights unseen, and a finding says so, once."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    given, other = (torch.optim.SGD(part.parameters(), 0.1) for part in model)
    bench = watched(model, given)
    for _ in range(3):
        loss_of(model).backward()
        other.step()
        given.step()
    (finding,) = [event for event in bench.sink.events if hasattr(event, "rule")]
    assert finding.rule == "unknown-optimizer"
    assert set(finding.parameters) == {"1.weight", "1.bias"}
    assert [step for step, _ in bench.sink.closed] == [0, 1, 2]


def test_an_optimizer_inside_another_that_steps_is_part_of_it(watched):
    """Lookahead's step calls the inner one's: the step is the outer one, its update the whole move."""

    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        @torch.no_grad()
        def step(self):
            self.inner.step()
            for group in self.inner.param_groups:
                for p in group["params"]:
                    p.add_(1.0)

    model = linear()
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), 0.1))
    bench = watched(model, optimizer)
    for _ in range(2):
        model.zero_grad()
        loss_of(model).backward()
        expected = grads(model)
        optimizer.step()
    assert bench.sink.keys("used") == [(0, 0), (1, 0)]
    moved = bench.sink.updates[1][1]
    for i, g in enumerate(expected.values()):
        assert torch.allclose(moved[i], 1.0 - 0.1 * g, atol=1e-5)
    assert not [event for event in bench.sink.events if hasattr(event, "rule")]
