"""Trainings as people write them, from reports of other tools' bugs: what is not known is marked, and nothing is wrong."""

import gc
import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

import gradlens
from gradlens.capture.step import READ_PASSES
from gradlens.errors import ArgumentError
from tests.capture.helpers import Rewriting


def net(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def norm(tensor):
    return tensor.double().norm().item()


def rules(lens):
    return [finding.rule for finding in lens.findings()]


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moves(model, before):
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


def used(lens):
    history = lens.history()
    return history[history["stage"] == "used"]


# --- several optimizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [30, 120])
def test_an_idle_clock_hands_over_and_takes_back(steps):
    """While the optimizer listed last is idle another ends steps, one info says so; then the first ends them again."""
    g, d = net(4, 4), net(4, 4)
    og, od = torch.optim.SGD(g.parameters(), 1e-2), torch.optim.SGD(d.parameters(), 1e-2)
    with gradlens.watch({"G": g, "D": d}, [od, og], rules=()) as lens:
        for _ in range(steps):
            od.zero_grad()
            d(torch.randn(4, 4)).pow(2).mean().backward()
            od.step()
        assert len(lens._tables.open.tables) <= 2  # of the last step, which the idle one may still belong to
        tables = used(lens).groupby(["step", "backward"]).size()
        assert list(tables) == [2] * steps
        assert tables.index.get_level_values("step").max() >= steps - 10
        assert rules(lens) == ["idle-optimizer"]
        for _ in range(3):
            od.zero_grad()
            d(torch.randn(4, 4)).pow(2).mean().backward()
            od.step()
            og.zero_grad()
            d(g(torch.randn(4, 4))).pow(2).mean().backward()
            og.step()
        last = used(lens)
        last = last[last["step"] == last["step"].max()]
        assert set(last["parameter"]) == {"G.0.weight", "G.0.bias", "D.0.weight", "D.0.bias"}
        assert rules(lens) == ["idle-optimizer"]


def test_several_critic_steps_are_no_idle_clock():
    """Five critic steps to one of the generator's: one step, each critic step with a `used` row of its own."""
    g, d = net(4, 4), net(4, 4)
    og, od = torch.optim.SGD(g.parameters(), 1e-2), torch.optim.SGD(d.parameters(), 1e-2)
    with gradlens.watch({"G": g, "D": d}, [od, og], rules=()) as lens:
        for _ in range(4):
            for _ in range(5):
                od.zero_grad()
                d(torch.randn(4, 4)).pow(2).mean().backward()
                od.step()
            og.zero_grad()
            d(g(torch.randn(4, 4))).pow(2).mean().backward()
            og.step()
        assert list(used(lens).groupby("step")["backward"].nunique()) == [6] * 4
        assert lens.findings() == []


@pytest.mark.parametrize("listed", [(0, 1), (1, 0)])
@pytest.mark.parametrize("called", [(0, 1), (1, 0)])
def test_each_used_row_stands_under_its_backwards_step(listed, called):
    """In whatever order optimizers are listed and called, each row is of the step whose backward it consumed."""
    model = net(3, 3, 3)
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in model]
    with gradlens.watch(model, [optimizers[i] for i in listed], rules=()) as lens:
        moved = []
        for _ in range(3):
            model.zero_grad()
            model(torch.randn(2, 3)).pow(2).mean().backward()
            before = weights_of(model)
            for i in called:
                optimizers[i].step()
            moved.append(moves(model, before))
    rows = used(lens).set_index(["step", "parameter"])
    assert len(rows) == 3 * 4
    assert set(rows["status"]) == {"ok"}
    for step in range(3):
        for name, dw in moved[step].items():
            assert rows.loc[(step, name), "update_l2"] == pytest.approx(norm(dw), rel=1e-5)
    assert lens.findings() == []


def test_the_last_critic_step_is_not_lost_at_close():
    """A step that is still open when the lens closes hands over the `used` rows that it has."""
    g, d = net(3, 3), net(3, 3)
    og, od = torch.optim.SGD(g.parameters(), 0.1), torch.optim.SGD(d.parameters(), 0.1)
    with gradlens.watch({"G": g, "D": d}, [od, og], rules=()) as lens:
        d(torch.randn(2, 3)).pow(2).mean().backward()
        od.step()
    assert list(used(lens)["parameter"]) == ["D.0.weight", "D.0.bias"]


# --- optimizers that rewrite and wrap -------------------------------------------------------------------------------


class Rewrites(Rewriting):
    """Weight decay is written into `.grad`, in one of three ways."""

    def move(self, p):
        if self.way == "data":
            p.grad.data.add_(p.data, alpha=0.5)
        elif self.way == "new tensor":
            p.grad = p.grad + 0.5 * p
        else:
            p.grad.mul_(3.0)
        p.data.add_(p.grad, alpha=-0.05)


@pytest.mark.parametrize("way", ["data", "new tensor", "in place"])
@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_a_gradient_that_the_optimizer_wrote_over(way, closure, flips, clip):
    """What rests on the gradient is of the one that was given, where a copy was kept; else it is empty, and marked."""
    model, x = net(6, 4), torch.randn(16, 6)
    optimizer = Rewrites(model.parameters(), way)
    features = ("updates", "flips") if flips else ("updates",)
    given, own = {}, {}

    def backward():
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        own.update({n: p.grad.clone() for n, p in model.named_parameters()})
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        given.update({n: p.grad.clone() for n, p in model.named_parameters()})
        return loss

    with gradlens.watch(model, optimizer, features=features, rules=()) as lens:
        for _ in range(3):
            before = weights_of(model)
            if closure:
                optimizer.step(backward)
            else:
                backward()
                optimizer.step()
        table = lens.table(stage="used").set_index("parameter")
    for name, dw in moves(model, before).items():
        row = table.loc[name]
        assert row["l2"] == pytest.approx(norm(given[name]), rel=1e-6)
        assert row["update_l2"] == pytest.approx(norm(dw), rel=1e-5)
        if flips:
            assert row["used_dot_dw"] == pytest.approx((given[name] * dw).sum().item(), rel=1e-4)
            assert row["loss_change"] == pytest.approx((own[name] * dw).sum().item(), rel=1e-4)
            assert row["loss_change_exact"]
        else:
            assert torch.tensor([row["used_dot_dw"], row["alignment"], row["loss_change"]]).isnan().all()
            assert not row["loss_change_exact"]
    assert lens.findings() == []


class Lookahead(torch.optim.Optimizer):
    """Without `super().__init__()`, as timm has it: torch tells nobody of its steps."""

    def __init__(self, base, moves_before=False):
        self.base, self.param_groups, self.state, self.defaults = base, base.param_groups, {}, {}
        self.moves_before = moves_before

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.mul_(0.9 if self.moves_before else 1.0)
        self.base.step()
        for p in self.param_groups[0]["params"]:
            p.mul_(1.1)


@pytest.mark.parametrize("moves_before", [False, True])
@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("given", ["wrapper", "inner"])
def test_the_update_is_that_of_the_outermost_step(moves_before, asked, given):
    """A wrapper moves weights around the inner step: the move is the whole one, by the next sign of life at the latest."""
    model, x = net(6, 4), torch.randn(8, 6)
    base = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = Lookahead(base, moves_before)
    with gradlens.watch(model, optimizer if given == "wrapper" else base, rules=()) as lens:
        moved = []
        for _ in range(4):
            model.zero_grad()
            model(x).pow(2).mean().backward()
            before, g = weights_of(model), {n: p.grad.clone() for n, p in model.named_parameters()}
            optimizer.step()
            moved.append(moves(model, before))
            if asked:
                assert lens.table()["step"].iloc[0] == len(moved) - 1
    rows = used(lens).set_index(["step", "parameter"])
    assert len(rows) == 4 * 2
    first = 1 if given == "inner" and moves_before else 0  # its first step shows that something is around it
    for step in range(first, 4):
        for name, dw in moved[step].items():
            assert rows.loc[(step, name), "update_l2"] == pytest.approx(norm(dw), rel=1e-5)
    for name, dw in moved[3].items():
        assert rows.loc[(3, name), "loss_change"] == pytest.approx((g[name] * dw).sum().item(), rel=1e-4, abs=1e-9)
    assert lens.findings() == []


class Slotted:
    """Holds its optimizers in slots."""

    __slots__ = ("first", "second")

    def __init__(self, first, second):
        self.first, self.second = first, second

    def step(self):
        shrink_after([self.first, self.second])


class Paired:
    """Holds its optimizers in attributes."""

    def __init__(self, first, second):
        self.first, self.second = first, second

    def step(self):
        shrink_after([self.first, self.second])


@torch.no_grad()
def shrink_after(optimizers):
    for each in optimizers:
        each.step()
    for each in optimizers:
        for p in each.param_groups[0]["params"]:
            p.mul_(0.9)


@pytest.mark.parametrize("kind", [Slotted, Paired])
@pytest.mark.parametrize("order", [1, -1])
def test_a_wrapper_of_several_optimizers_moves_the_weights_of_all(kind, order):
    """Each update is whole, that of the first one too, though the second steps before the wrapper is done."""
    model, x = net(4, 4, 4), torch.randn(8, 4)
    inner = [torch.optim.Adam(model[0].parameters(), 0.01), torch.optim.SGD(model[1].parameters(), 0.1)]
    optimizer = kind(*inner)
    with gradlens.watch(model, inner[::order], rules=()) as lens:
        moved = []
        for _ in range(4):
            model.zero_grad()
            model(x).pow(2).mean().backward()
            before = weights_of(model)
            optimizer.step()
            moved.append(moves(model, before))
    rows = used(lens).set_index(["step", "parameter"])
    assert len(rows) == 4 * 4
    for step in range(4):
        for name, dw in moved[step].items():
            assert rows.loc[(step, name), "update_l2"] == pytest.approx(norm(dw), rel=1e-5)
    assert lens.findings() == []


def test_a_closures_gradient_is_read_when_it_returns():
    """An optimizer that calls its closure several times is one step: the last call's gradient is the used one."""
    model, x = net(6, 4), torch.randn(8, 6)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        seen.append(norm(model[0].weight.grad))
        return loss

    with gradlens.watch(model, optimizer, rules=()) as lens:
        for _ in range(2):
            optimizer.step(closure)
            rows = used(lens)
            assert rows[rows["parameter"] == "0.weight"]["l2"].iloc[-1] == pytest.approx(seen[-1], rel=1e-6)
        assert len(used(lens)) == 2 * 2


def test_an_optimizer_that_torch_tells_nobody_of_is_an_error():
    """A subclass that never ran `Optimizer.__init__`, with nothing inside that did, cannot be seen."""

    class Mute(torch.optim.Optimizer):
        def __init__(self, parameters):
            self.param_groups = [{"params": list(parameters), "lr": 0.1}]

        def step(self, closure=None):
            pass

    model = net(2, 2)
    with pytest.raises(ArgumentError, match=r"never ran Optimizer.__init__.*super\(\).__init__"):
        gradlens.watch(model, Mute(model.parameters()))
    assert all(p._backward_hooks is None for p in model.parameters())


def test_copies_of_the_weights_are_said_to_be_copies():
    """An optimizer over float32 copies of half-precision weights: what can and cannot be measured is said."""
    model = net(3, 3).bfloat16()
    copies = [p.detach().float() for p in model.parameters()]
    with pytest.warns(gradlens.errors.GradlensWarning, match="what it does to the weights is not measured"):
        lens = gradlens.watch(model, torch.optim.SGD(copies, 0.1))
    lens.close()
    assert rules(lens) == ["foreign-parameters"]
    assert "copies of the weights" in lens.findings()[0].causes[0]


def test_layers_that_were_replaced_after_the_optimizer_was_made():
    """F17: said once, as the cause, in the findings; what the optimizer no longer empties is no missing zero_grad()."""
    torch.manual_seed(0)
    model = net(4, 8, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model[0], model[-1] = nn.Linear(4, 6), nn.Linear(6, 2)
    with pytest.warns(gradlens.errors.GradlensWarning, match="none of the 4 parameters of the optimizer"):
        lens = gradlens.watch(model, optimizer)
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).pow(2).mean().backward()
        optimizer.step()
    lens.close()
    loud = [f for f in lens.findings() if f.severity != "info"]
    assert {f.rule for f in loud} == {"foreign-parameters"}
    assert "before the model's layers were replaced" in loud[0].causes[0]
    assert lens.diagnosis().origin.rule == "foreign-parameters"


def test_a_part_of_a_model_and_an_optimizer_of_all():
    """To watch the encoder with the whole model's optimizer is no mistake: an info, and no warning."""
    model = net(3, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lens = gradlens.watch(model[0], torch.optim.SGD(model.parameters(), 0.1))
    lens.close()
    assert [(f.rule, f.severity) for f in lens.findings()] == [("foreign-parameters", "info")]


# --- scalers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
def test_a_scaler_that_was_not_given_is_found_on_the_stack(unscale):
    """Its first step shows it: from that very step on, gradients are unscaled and the change of the loss is right."""
    model, x = net(6, 4), torch.randn(8, 6)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), GradScaler("cpu", init_scale=1024.0)
    with gradlens.watch(model, optimizer) as lens:
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(x).pow(2).mean()).backward()
            if unscale:
                scaler.unscale_(optimizer)
            own = {n: p.grad / (1 if unscale else 1024) for n, p in model.named_parameters()}
            nn.utils.clip_grad_norm_(model.parameters(), 0.5 if unscale else 512.0)
            before = weights_of(model)
            scaler.step(optimizer)
            scaler.update()
    history = lens.history().set_index(["stage", "step", "parameter"])
    assert set(history["scale"]) == {1024.0}
    change = sum((own[name] * dw).sum().item() for name, dw in moves(model, before).items())
    assert history.sort_index().loc[("used", 2)]["loss_change"].sum() == pytest.approx(change, rel=1e-3)
    assert history.loc[("backward", 0, "0.weight"), "l2"] < 10
    assert [(f.rule, f.severity) for f in lens.findings()] == [("scaler-found", "info")]


# --- gradients and weights by hand ----------------------------------------------------------------------------------


def test_gradients_that_are_written_by_hand_have_a_steady_status():
    """No backward reaches anything: each step's rows are `uncaptured`, and one info says why."""
    model = net(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        for _ in range(20):
            optimizer.zero_grad()
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
    assert set(used(lens)["status"]) == {"uncaptured"}
    assert [(f.rule, f.severity) for f in lens.findings()] == [("written-by-hand", "info")]


@pytest.mark.parametrize("clear", ["none", "nothing", "zero"])
@pytest.mark.parametrize("explicit", [False, True])
def test_without_an_optimizer_used_is_what_the_loop_consumed(clear, explicit, tmp_path):
    """Clipped and then dropped: known. Zeroed in place before we could look: empty, marked, and an info says what to do."""
    model, x = net(6, 4), 10 * torch.randn(8, 6)
    consumed = []
    with gradlens.watch(model, run=tmp_path) as lens:
        for _ in range(4):
            model(x).pow(2).mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            consumed.append(norm(model[0].weight.grad))
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(0.01 * p.grad)
            if explicit:
                lens.step()
            if clear == "none":
                model.zero_grad()
            elif clear == "zero":
                model.zero_grad(set_to_none=False)
    rows = used(lens)
    rows = rows[rows["parameter"] == "0.weight"].set_index("step")
    for step, row in rows.iterrows():
        if clear == "zero" and not explicit:
            assert row["status"] == "uncaptured"
            assert not row["loss_change_exact"]
            assert row[["l2", "rms", "mean", "max", "quantile_50", "hold_share", "increase_share"]].isna().all()
            assert row["numel"] == 24
            assert row["update_l2"] > 0
        elif clear != "nothing":
            assert row["l2"] == pytest.approx(consumed[step], rel=1e-5)
            assert row["status"] == "ok"
    assert {f.rule for f in lens.findings()} <= {"used-unknown"}
    assert "the whole model" in lens.report()
    stored = gradlens.open_run(tmp_path).history()
    assert stored["l2"].isna().sum() == lens.history()["l2"].isna().sum() == (8 if clear == "zero" and not explicit else 0)


# --- memory, containers, many backwards -----------------------------------------------------------------------------


def test_a_released_weight_costs_its_own_columns_only():
    """Storage resized to 0 while backward ends: that row has no weight columns, and the next steps are as any."""
    model, x = net(6, 4, 4), torch.randn(8, 6)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        for step in range(9):
            optimizer.zero_grad()
            loss = model(x).pow(2).mean()
            weight = model[0].weight
            if 3 <= step < 6:
                kept = weight.detach().clone()
                weight.untyped_storage().resize_(0)
                loss.backward()
                weight.untyped_storage().resize_(kept.numel() * 4)
                weight.data.copy_(kept)
            else:
                loss.backward()
            optimizer.step()
    history = lens.history()
    rows = history[history["stage"] == "backward"].set_index(["parameter", "step"])
    assert set(rows["status"]) == {"ok"}
    assert list(rows.loc["0.weight"]["weight_l2"].isna()) == [3 <= step < 6 for step in range(9)]
    assert not rows.loc["1.weight"]["weight_l2"].isna().any()
    assert not used(lens)["update_l2"].isna().any()
    assert lens.findings() == []


@pytest.mark.parametrize(
    "make",
    [
        lambda g, d: nn.ModuleDict({"G": g, "D": d}),
        lambda g, d: nn.Sequential(nn.Sequential(g, d)),
        lambda g, d: nn.ParameterList([*g.parameters(), *d.parameters()]),
        lambda g, d: nn.ParameterDict({"g": g[0].weight, "d": d[0].weight}),
    ],
)
def test_a_container_that_is_made_in_the_call(make):
    """The container ends with the call; what is in it is watched under the same names until it is gone itself."""
    g, d = net(3, 3), net(3, 3)
    optimizer = torch.optim.SGD([*g.parameters(), *d.parameters()], 0.1)
    container = make(g, d)
    names = [name for name, _ in container.named_parameters()]
    lens = gradlens.watch(container, optimizer, rules=())
    del container
    gc.collect()
    for _ in range(40):
        optimizer.zero_grad()
        d(g(torch.randn(2, 3))).sum().backward()
        optimizer.step()
    assert list(lens.table()["parameter"]) == names
    assert lens.table()["step"].iloc[0] == 39
    lens.close()


def test_a_thousand_backwards_without_a_step():
    """So many are read, the rest only counted, and that is said once; the step after is as any."""
    model, x = net(4, 4), torch.randn(1, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def step():
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        optimizer.step()

    with gradlens.watch(model, optimizer, rules=()) as lens:
        step()
        for _ in range(READ_PASSES + 200):
            model.zero_grad()
            model(x).sum().backward()
        hooked = [bool(p._post_accumulate_grad_hooks) for p in model.parameters()]
        assert hooked.count(True) == 1
        step()
        step()
    read = lens.history()
    read = read[read["stage"] == "backward"].groupby("step")["backward"].nunique()
    assert list(read) == [1, READ_PASSES, 1]
    assert list(used(lens).groupby("step")["backward"].first()) == [0, READ_PASSES + 200, 0]
    assert [(f.rule, f.severity) for f in lens.findings()] == [("many-backwards", "info")]


# --- a model that is watched already --------------------------------------------------------------------------------


def test_a_notebook_cell_that_runs_again(capsys):
    """The second lens says that there is a first, and how to close it; with `replace=True` it takes its place."""
    model = net(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    first = gradlens.watch(model, optimizer, rules=())
    assert "another open lens" not in capsys.readouterr().err
    second = gradlens.watch(model, optimizer, rules=())
    assert "another open lens watches parameters of this model" in capsys.readouterr().err
    (finding,) = second.findings()
    assert (finding.rule, finding.severity) == ("watched-already", "info")
    assert "replace=True" in finding.remedy
    assert finding.parameters == ("0.weight", "0.bias")
    assert first.findings() == []
    third = gradlens.watch({"other name": model}, optimizer, rules=(), replace=True)
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in model.parameters())
    assert third.findings() == []
    for lens in (first, second):
        with pytest.raises(gradlens.errors.ClosedError):
            lens.observe(x=1.0)
    third.close()
    assert all(p._post_accumulate_grad_hooks is None for p in model.parameters())


def test_a_failed_call_replaces_nothing():
    """An argument that cannot be meant leaves the open lens as it is."""
    model = net(3, 3)
    with gradlens.watch(model, rules=()) as lens:
        with pytest.raises(ArgumentError):
            gradlens.watch(model, rules=(), replace=True, features=("updaets",))
        model(torch.randn(2, 3)).sum().backward()
        assert len(lens.table()) == 2
