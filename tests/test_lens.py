"""The face: what a user asks, and what a user does wrong."""

import gc
import math
import textwrap
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradlens
from gradlens import fields
from gradlens.errors import (
    ArgumentError,
    ArgumentTypeError,
    ClosedError,
    FindingError,
    GradlensWarning,
    NothingCapturedError,
    StepError,
)
from tests.forks import forked


@pytest.fixture(autouse=True)
def no_lens_is_left():
    """Each test closes what it opens, or the fixture does."""
    yield
    from gradlens.lens import _open_lenses

    for lens in list(_open_lenses):
        lens.close()


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 4, generator=generator), torch.randint(3, (16,), generator=generator)


def train(model, optimizer, lens=None, steps=1, clip=None, accumulate=1):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        for k in range(accumulate):
            x, y = batch(step * accumulate + k)
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            if lens is not None:
                lens.observe(loss=loss)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- the worked examples --------------------------------------------------------------------------------------------


def test_the_gradient_of_x2y_plus_y3():
    """f = x^2 y + y^3 at (2, 3) has the partials 12 and 31: the gradient is both, in one vector."""
    x, y = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    with gradlens.watch({"x": x, "y": y}) as lens:
        (x**2 * y + y**3).backward()
        weights = lens.weights()
        assert weights["partial"].tolist() == [12.0, 31.0]
        assert weights["index"].tolist() == [(), ()]
        assert weights["direction"].tolist() == ["decrease", "decrease"]
        assert lens.gradient().tolist() == [12.0, 31.0]
        assert lens.names() == ["x", "y"]
        table = lens.table().set_index("parameter")
        assert table.loc["x", "sum"] == 12.0
        assert table.loc["y", "max"] == 31.0


def test_two_weights_that_should_both_increase():
    """loss = (w1 - 1)^2 + (w2 + 0.5)^2 at (0.5, -1): both partials are -1, and both weights should increase."""
    w1, w2 = torch.tensor(0.5, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    with gradlens.watch({"w1": w1, "w2": w2}) as lens:
        ((w1 - 1) ** 2 + (w2 + 0.5) ** 2).backward()
        weights = lens.weights()
        assert weights["partial"].tolist() == [-1.0, -1.0]
        assert weights["direction"].tolist() == ["increase", "increase"]
        assert lens.table()["increase_share"].tolist() == [1.0, 1.0]


def test_an_absent_variable_has_partial_zero():
    """A variable that is not in the loss is `absent`, with partial 0."""
    x, y = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    with gradlens.watch({"x": x, "y": y}) as lens:
        (x**2).backward()
        table = lens.table().set_index("parameter")
        assert table["status"].to_dict() == {"x": "ok", "y": "absent"}
        assert (table.loc["y", "zero"], table.loc["y", "numel"]) == (1, 1)
        assert lens.weights("y")["partial"].tolist() == [0.0]
        assert lens.gradient().tolist() == [4.0, 0.0]


def test_explain_one_weight():
    """The text names the weight, its partial and its direction."""
    w1, w2 = torch.tensor(0.5, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    with gradlens.watch({"w1": w1, "w2": w2}) as lens:
        ((w1 - 1) ** 2 + (w2 + 0.5) ** 2).backward()
        text = lens.explain("w1")
    assert "w1" in text
    assert "increase" in text
    assert "-1" in text


# --- tables ---------------------------------------------------------------------------------------------------------


def test_a_table_has_the_columns_of_the_contract():
    """history() has the columns of `fields.FRAME`; table() the same, those that a person looks at first."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        train(model, optimizer, steps=3)
        table, history = lens.table(), lens.history()
    assert list(history.columns) == list(fields.FRAME)
    assert list(table.columns) == list(fields.TABLE)
    assert sorted(fields.TABLE) == sorted(fields.FRAME)
    assert table.columns[:3].tolist() == ["parameter", "status", "rms"]
    assert table["parameter"].tolist() == [n for n, _ in model.named_parameters()]
    assert set(table["stage"]) == {"used"}
    assert set(table["step"]) == {2}
    assert len(history) == 3 * 2 * 4
    assert history.groupby(["step", "stage"]).size().eq(4).all()


def test_a_table_in_the_middle_of_a_step_is_the_backward():
    """Between backward and optimizer.step() the last stage is `backward`; afterwards it is `used`."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        x, y = batch()
        nn.functional.cross_entropy(model(x), y).backward()
        assert set(lens.table()["stage"]) == {"backward"}
        optimizer.step()
        assert set(lens.table()["stage"]) == {"used"}
        assert set(lens.table(stage="backward")["stage"]) == {"backward"}
        with pytest.raises(ArgumentError, match="step 7"):
            lens.table(7)


def test_counts_and_moments_are_those_of_the_gradient():
    """Each number of the table is the number of the gradient, computed apart."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        x, y = batch()
        nn.functional.cross_entropy(model(x), y).backward()
        table = lens.table().set_index("parameter")
        for name, p in model.named_parameters():
            g = p.grad.double()
            row = table.loc[name]
            assert row["numel"] == g.numel()
            assert row["positive"] == int((g > 0).sum())
            assert row["negative"] == int((g < 0).sum())
            assert row["zero"] == int((g == 0).sum())
            assert row["l2"] == pytest.approx(g.norm().item(), rel=1e-12)
            assert row["std"] == pytest.approx(g.std(correction=0).item(), rel=1e-9)
            assert row["dot"] == pytest.approx((g * p.detach().double()).sum().item(), rel=1e-9, abs=1e-15)
            assert row["weight_l2"] == pytest.approx(p.detach().double().norm().item(), rel=1e-12)


def test_updates_say_what_the_optimizer_did():
    """For plain SGD dw = -lr g: alignment 1, no weight against its gradient, loss_change = -lr |g|^2, exact."""
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        x, y = batch()
        nn.functional.cross_entropy(model(x.double()), y).backward()
        squares = {n: p.grad.square().sum().item() for n, p in model.named_parameters()}
        norms = {n: p.detach().norm().item() for n, p in model.named_parameters()}
        optimizer.step()
        table = lens.table().set_index("parameter")
    for name, square in squares.items():
        row = table.loc[name]
        assert row["update_l2"] == pytest.approx(0.1 * math.sqrt(square), rel=1e-9)
        assert row["update_ratio"] == pytest.approx(0.1 * math.sqrt(square) / norms[name], rel=1e-9)
        assert row["alignment"] == pytest.approx(1.0, abs=1e-9)
        assert row["against_share"] == 0.0
        assert row["used_dot_dw"] == pytest.approx(-0.1 * square, rel=1e-9)
        assert row["loss_change"] == pytest.approx(-0.1 * square, rel=1e-9)
        assert row["loss_change_exact"]
        assert row["rounded_away"] == 0


@pytest.mark.parametrize(("accumulate", "features", "exact"), [(1, ("updates", "flips"), True), (3, ("updates",), False)])
def test_loss_change_under_clipping(accumulate, features, exact):
    """Under clipping loss_change is g.dw with the unclipped gradient: exact where it was kept, else by the uniform ratio."""
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer, features=features) as lens:
        for k in range(accumulate):
            x, y = batch(k)
            nn.functional.cross_entropy(model(x.double()), y).backward()
        loss_gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        table = lens.table().set_index("parameter")
    for name, p in model.named_parameters():
        expected = (loss_gradient[name] * (p.detach() - before[name])).sum().item()
        assert table.loc[name, "loss_change"] == pytest.approx(expected, rel=1e-6)
        assert bool(table.loc[name, "loss_change_exact"]) is exact


def test_loss_change_under_accumulation_is_exact_when_nothing_touches_the_gradient():
    """Several backwards and no clipping: the gradient that was used is the loss's own."""
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        for k in range(3):
            x, y = batch(k)
            nn.functional.cross_entropy(model(x.double()), y).backward()
        square = {n: p.grad.square().sum().item() for n, p in model.named_parameters()}
        optimizer.step()
        table = lens.table().set_index("parameter")
    for name, value in square.items():
        assert table.loc[name, "loss_change"] == pytest.approx(-0.1 * value, rel=1e-9)
        assert table.loc[name, "loss_change_exact"]


def test_loss_change_is_empty_where_it_cannot_be_known():
    """Clipping by value under accumulation is not uniform: then the column is empty, not wrong."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        for k in range(2):
            x, y = batch(k)
            nn.functional.cross_entropy(model(x), y).backward()
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        optimizer.step()
        assert lens.table()["loss_change"].isna().all()
        assert lens.table()["used_dot_dw"].notna().all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("features", "backwards"), [(("updates", "flips"), 1), (("updates",), 1), (("updates", "flips"), 2)]
)
def test_a_gradient_that_a_users_hook_replaces(in_place, features, backwards):
    """`backward` is as computed and `used` as replaced; loss_change is of the computed one, empty where it was not kept."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with gradlens.watch(model, optimizer, features=features) as lens:
        for p in model.parameters():
            p.register_hook(lambda g: g.mul_(3) if in_place else 3 * g)
        for _ in range(backwards):
            model(torch.ones(2, 4)).pow(2).sum().backward()
        used = {name: p.grad.double() for name, p in model.named_parameters()}
        optimizer.step()
        rows = lens.history().set_index(["stage", "backward", "parameter"])
        for name, g in used.items():
            assert rows.loc[("used", backwards - 1, name), "l2"] == pytest.approx(g.norm().item(), rel=1e-6)
            assert rows.loc[("backward", 0, name), "l2"] == pytest.approx(g.norm().item() / 3 / backwards, rel=1e-6)
            change = rows.loc[("used", backwards - 1, name), "loss_change"]
            if backwards == 1 and "flips" in features:
                assert change == pytest.approx(-0.01 * (g * g).sum().item() / 3, rel=1e-4)
            else:
                assert math.isnan(change)


def test_a_change_through_data_is_not_overlooked():
    """`p.grad.data.mul_()` leaves no version behind; the samples notice, and `used` is read anew."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        x, y = batch()
        nn.functional.cross_entropy(model(x), y).backward()
        for p in model.parameters():
            p.grad.data.mul_(0.5)
        optimizer.step()
        history = lens.history().set_index(["stage", "parameter"])
        for name, _ in model.named_parameters():
            assert history.loc[("used", name), "l2"] == pytest.approx(0.5 * history.loc[("backward", name), "l2"], rel=1e-6)
        assert not lens.table()["loss_change_exact"].any()


def test_flips_compare_with_the_last_gradient():
    """cosine and flip_share are against the last observed gradient of the stage; the first step has none."""
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    gradients = []
    with gradlens.watch(model, optimizer) as lens:
        for seed in (0, 1):
            optimizer.zero_grad()
            x, y = batch(seed)
            nn.functional.cross_entropy(model(x.double()), y).backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
            optimizer.step()
        first, second = lens.table(0).set_index("parameter"), lens.table(1).set_index("parameter")
    assert first["cosine"].isna().all()
    for name in first.index:
        a, b = gradients[0][name].flatten(), gradients[1][name].flatten()
        assert second.loc[name, "cosine"] == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-9)
        moving = (a != 0) & (b != 0)
        assert second.loc[name, "flip_share"] == pytest.approx((a * b < 0)[moving].double().mean().item())


def test_updates_that_are_rounded_away_are_counted():
    """In bf16 a step that is too small for the storage type is rounded away."""
    w = nn.Parameter(torch.full((8,), 100.0, dtype=torch.bfloat16))
    holder = nn.ParameterList([w])
    optimizer = torch.optim.SGD(holder.parameters(), 1e-6)
    with gradlens.watch(holder, optimizer) as lens:
        w.sum().backward()
        optimizer.step()
        assert lens.table()["rounded_away"].tolist() == [8]


def test_a_learning_rate_of_zero_swallows_nothing():
    """With lr = 0 nothing was meant to move."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with gradlens.watch(model, optimizer) as lens:
        train(model, optimizer)
        assert lens.table()["rounded_away"].eq(0).all()


def test_a_small_allowance_works_on_a_sample_and_says_so():
    """Under a small memory allowance updates and flips rest on a sample, its share is a column, and the estimate is near."""
    torch.manual_seed(0)
    model = nn.Linear(400, 500)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = torch.randn(32, 400)
    tables = {}
    for memory in ("256MiB", "100kB"):
        with gradlens.watch(model, optimizer, memory=memory) as lens:
            for _ in range(2):
                optimizer.zero_grad()
                model(x).pow(2).mean().backward()
                optimizer.step()
            tables[memory] = lens.table().set_index("parameter")
    sampled = tables["100kB"].loc["weight", "sampled"]
    assert 0 < sampled < 0.1
    assert tables["256MiB"]["sampled"].eq(1).all()
    assert tables["100kB"].loc["bias", "sampled"] == 1
    assert tables["100kB"].loc["weight", "update_l2"] == pytest.approx(tables["256MiB"].loc["weight", "update_l2"], rel=0.1)
    assert tables["100kB"].loc["weight", "alignment"] == pytest.approx(1, abs=1e-6)


# --- the scaler -----------------------------------------------------------------------------------------------------


@pytest.mark.trap(23)
@pytest.mark.parametrize("fused", [False, True])
def test_scaled_training_gives_the_unscaled_numbers(fused):
    """With the scaler, every number is that of the unscaled gradient, and `scale` says the scale."""
    tables = []
    for scaled in (False, True):
        model = mlp().double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        with gradlens.watch(model, optimizer, scaler=scaler) as lens:
            for seed in range(2):
                optimizer.zero_grad()
                x, y = batch(seed)
                scaler.scale(nn.functional.cross_entropy(model(x.double()), y)).backward()
                if scaled and seed == 0:
                    scaled_weights = lens.weights()
                elif seed == 0:
                    plain_weights = lens.weights()
                scaler.step(optimizer)
                scaler.update()
            tables.append(lens.history())
    without, with_scaler = tables
    assert set(with_scaler["scale"]) == {1024.0}
    assert set(without["scale"]) == {1.0}
    numbers = [c for c in fields.VALUES if c not in ("loss_change_exact",) and not c.startswith("quantile")]
    pd.testing.assert_frame_equal(without[numbers], with_scaler[numbers], check_dtype=False, rtol=1e-9)
    assert with_scaler.query("stage == 'used'")["loss_change_exact"].all()
    pd.testing.assert_frame_equal(plain_weights, scaled_weights)


@pytest.mark.trap(23)
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_is_a_nonfinite_record(fused):
    """A step that the scaler skipped is a `used` record with status `nonfinite`, at once."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with gradlens.watch(model, optimizer, scaler=scaler) as lens:
        scaler.scale(model(torch.full((2, 4), 1e35)).pow(2).sum()).backward()
        scaler.step(optimizer)
        table = lens.table()
        assert set(table["stage"]) == {"used"}
        assert set(table["status"]) == {"nonfinite"}
        assert table["update_l2"].isna().all()
        scaler.update()
        train(model, optimizer)
        assert set(lens.table()["step"]) == {1}


# --- weights --------------------------------------------------------------------------------------------------------


def test_weights_are_in_model_order_and_read_grad_now():
    """One row a weight; attrs say the step and stage that `.grad` is of."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        x, y = batch()
        nn.functional.cross_entropy(model(x), y).backward()
        frame = lens.weights()
        assert list(frame.columns[:7]) == ["parameter", "index", "value", "partial", "direction", "sensitivity", "saliency"]
        flat = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        assert frame["partial"].tolist() == flat.tolist()
        assert torch.equal(lens.gradient(), flat.float())
        assert frame.attrs == {"step": 0, "stage": "accumulated"}
        row = frame.iloc[5]
        assert row["value"] == pytest.approx(model[0].weight[row["index"]].item())
        assert row["saliency"] == abs(row["value"] * row["partial"])
        optimizer.step()
        assert lens.weights().attrs == {"step": 0, "stage": "used"}


@pytest.mark.parametrize("by", ["sensitivity", "saliency", "value", "partial"])
def test_top_weights_are_exact(by):
    """top=k gives the k largest of all weights, as sorting everything would."""
    model = mlp()
    with gradlens.watch(model) as lens:
        x, y = batch()
        nn.functional.cross_entropy(model(x), y).backward()
        everything = lens.weights()
        order = everything[by].abs().sort_values(ascending=False, kind="stable").index[:7]
        top = lens.weights(top=7, by=by)
        assert top[by].abs().tolist() == everything.loc[order, by].abs().tolist()
        assert len(lens.weights("0.weight", top=3)) == 3


def test_weights_after_zero_grad_answer_from_what_was_kept():
    """With the gradients gone, top=k is answered from the capture, and without top the error names the way out."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        x, y = batch()
        nn.functional.cross_entropy(model(x), y).backward()
        before = lens.weights(top=5)
        optimizer.step()
        optimizer.zero_grad()
        after = lens.weights(top=5)
        assert after["partial"].tolist() == pytest.approx(before["partial"].tolist(), rel=1e-6)
        assert after["index"].tolist() == before["index"].tolist()
        assert after.attrs == {"step": 0, "stage": "used"}
        with pytest.raises(NothingCapturedError, match=r"top=k"):
            lens.weights()


def test_too_many_rows_is_an_error_that_names_both_ways_out():
    """More than a million rows without top or name is refused."""
    big = nn.Linear(1100, 1000)
    with gradlens.watch(big) as lens:
        big(torch.ones(1, 1100)).sum().backward()
        with pytest.raises(ArgumentError, match=r"top=.*name="):
            lens.weights()
        assert len(lens.weights(top=3)) == 3
        assert len(lens.weights("bias")) == 1000


def test_a_scalar_and_a_complex_parameter_have_indices():
    """A scalar has index (); a complex entry is two weights, real and imaginary."""
    target = {"s": torch.tensor(3.0, requires_grad=True), "z": torch.tensor([1 + 2j], requires_grad=True)}
    with gradlens.watch(target) as lens:
        (target["s"] ** 2 + (target["z"].abs() ** 2).sum()).backward()
        frame = lens.weights()
        assert frame["index"].tolist() == [(), (0, 0), (0, 1)]
        assert frame["partial"].tolist() == pytest.approx([6.0, 2.0, 4.0])
        assert lens.table()["numel"].tolist() == [1, 2]


# --- life -----------------------------------------------------------------------------------------------------------


def net_with_everything():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


@pytest.mark.trap(34)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_is_bit_identical(optimizer, tmp_path):
    """200 steps with dropout and BatchNorm: weights, buffers, optimizer state, RNG and losses are the same bits with us."""
    results = []
    for watched in (False, True):
        model = net_with_everything()
        opt = optimizer(model.parameters(), 0.05)
        lens = gradlens.watch(model, opt, run=tmp_path / "run") if watched else None
        losses = train(model, opt, lens, steps=200, clip=1.0, accumulate=2)
        if lens is not None:
            lens.close()
        state = [t for s in opt.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        results.append((losses, list(model.state_dict().values()), state, torch.get_rng_state()))
    (la, wa, sa, ra), (lb, wb, sb, rb) = results
    assert la == lb
    assert all(torch.equal(a, b) for a, b in zip(wa, wb, strict=True))
    assert len(sa) == len(sb)
    assert all(torch.equal(a, b) for a, b in zip(sa, sb, strict=True))
    assert torch.equal(ra, rb)


@pytest.mark.trap(32)
def test_close_leaves_the_model_as_it_was():
    """After close() the hook dictionaries are None again, and the questions still answer."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lens = gradlens.watch(model, optimizer)
    train(model, optimizer, steps=2)
    lens.close()
    lens.close()
    assert all(p._backward_hooks is None and p._post_accumulate_grad_hooks is None for p in model.parameters())
    assert set(lens.table()["step"]) == {1}
    train(model, optimizer)
    assert set(lens.table()["step"]) == {1}
    for call in (lambda: lens.observe(loss=1.0), lens.step):
        with pytest.raises(ClosedError, match="after close"):
            call()


@pytest.mark.trap(31)
def test_a_lens_on_a_dead_model_closes_itself():
    """The package holds the lens, the lens does not hold the model: when the model dies the lens is let go."""
    from gradlens.lens import _open_lenses

    model = mlp()
    gradlens.watch(model)
    before = len(_open_lenses)
    gone = weakref.ref(model)
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    del model
    gc.collect()
    assert gone() is None
    for _ in range(200):
        if len(_open_lenses) < before:
            break
        import time

        time.sleep(0.01)
    assert len(_open_lenses) == before - 1


def test_a_forgotten_close_loses_nothing(tmp_path):
    """A script that ends without close() has all its steps on disk."""
    script = textwrap.dedent(f"""
        import torch, gradlens
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        gradlens.watch(model, optimizer, run={str(tmp_path / "run")!r})
        for _ in range(7):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
    """)
    forked("-c", script, code=0)
    history = gradlens.open_run(tmp_path / "run").history()
    assert sorted(history["step"].unique()) == list(range(7))


@pytest.mark.trap(32)
def test_two_lenses_on_one_model_see_the_same():
    """A second watch on the same model is allowed, and both work."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as a, gradlens.watch(model, optimizer, select="*.weight") as b:
        train(model, optimizer, steps=2)
        both = a.table().set_index("parameter").loc[["0.weight", "2.weight"]]
        pd.testing.assert_frame_equal(both, b.table().set_index("parameter"))


def test_observed_values_are_with_the_step():
    """observe() attaches the loss to the open step, and tensors are taken as they are."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        losses = train(model, optimizer, lens, steps=2)
        lens.flush()
        seen = [s.loss for s in lens._recorder.history if s.stage == "used"]
    assert seen == pytest.approx(losses, rel=1e-6)


def test_a_fault_of_ours_is_a_finding_and_training_goes_on(monkeypatch):
    """When statistics fail, one warning names it, the part is switched off, and weights are bit-identical."""
    from gradlens import kernels

    reference = mlp()
    train(reference, torch.optim.SGD(reference.parameters(), 0.1), steps=5)
    monkeypatch.setattr(kernels, "summarize", lambda *a, **k: 1 / 0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lens = gradlens.watch(model, optimizer)
    with pytest.warns(GradlensWarning, match="ZeroDivisionError") as caught:
        train(model, optimizer, steps=5)
    assert len(caught) == 1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
    assert [f.rule for f in lens.findings()] == ["gradlens-fault"]
    lens.close()


def test_on_finding_raise_raises_after_the_update():
    """on_finding='raise' interrupts in the training thread, after an update, with the finding."""

    def rule(history):
        yield gradlens.Finding(rule="mine", step=history.latest().step, severity=gradlens.Severity.WARNING, seen="always")

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lens = gradlens.watch(model, optimizer, rules=[rule], on_finding="raise")
    before = [p.detach().clone() for p in model.parameters()]

    def loop():
        train(model, optimizer)  # the finding arrives from the background thread
        lens.flush()
        train(model, optimizer)

    with pytest.raises(FindingError, match="mine"):
        loop()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    lens.close()


def test_on_finding_calls_a_callable():
    """A callable gets each finding."""

    def rule(history):
        yield gradlens.Finding(rule="mine", step=history.latest().step, severity=gradlens.Severity.INFO, seen="always")

    seen = []
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer, rules=[rule], on_finding=seen.append) as lens:
        train(model, optimizer)
        lens.flush()
    assert [f.rule for f in seen] == ["mine"]


def test_a_resumed_training_goes_on_counting():
    """first_step is the number of the first step."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer, first_step=100) as lens:
        train(model, optimizer, steps=2)
        assert sorted(lens.history()["step"].unique()) == [100, 101]


def test_report_is_for_a_person():
    """The report names parameters, directions and the cost, and print(lens) gives its first lines."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        train(model, optimizer, steps=5)
        text, brief = lens.report(), str(lens)
    assert "0.weight" in text
    assert "increase" in text
    assert "5 steps, 5 of them observed" in text
    assert "ms each on the training thread" in text
    assert 0 < len(brief) < len(text)


def test_a_budget_that_cannot_be_kept_is_said():
    """The optimizer's hooks alone cost more than a millionth of a step: a finding says so once, and so does the report."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer, budget=1e-6) as lens:
        train(model, optimizer, steps=60)
        (finding,) = [finding for finding in lens.findings() if finding.rule == "budget"]
        assert finding.value > 1e-6
        assert "cannot be kept" in finding.seen
        assert "cannot be kept" in lens.report().replace("\n  ", " ")
        assert lens.overhead().observed < 60
        assert lens.history()["step"].nunique() == lens.overhead().observed


# --- what a user does wrong -----------------------------------------------------------------------------------------


def wrong(*args, **kwargs):
    from gradlens.lens import _open_lenses

    before = len(_open_lenses)
    with pytest.raises(gradlens.GradlensError) as caught:
        gradlens.watch(*args, **kwargs)
    assert len(_open_lenses) == before
    return caught.value


def test_a_model_without_trainable_parameters():
    """Nothing to watch is an error that says what to do, a ValueError too."""
    model = mlp().requires_grad_(False)
    error = wrong(model)
    assert isinstance(error, ValueError)
    assert "requires_grad_(True)" in str(error)
    assert "no parameters" in str(wrong(nn.ReLU()))


def test_the_optimizer_as_the_model():
    """An optimizer passed first, or a model passed second, is named as such."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert "model comes first" in str(wrong(optimizer))
    assert isinstance(wrong(optimizer), TypeError)
    assert "model comes first" in str(wrong(model, model))
    assert isinstance(wrong(model, "adam"), ArgumentTypeError)


def test_a_pattern_that_matches_nothing_names_the_nearest():
    """select='0.wieght' says which names there are."""
    error = wrong(mlp(), select="0.wieght")
    assert "0.weight" in str(error)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"stage": "backwards"}, "backward"),
        ({"stage": ()}, "backward"),
        ({"features": ("update",)}, "updates"),
        ({"on_finding": "log"}, "record"),
        ({"memory": "lots"}, "256MiB"),
        ({"memory": -1}, "negative"),
        ({"schedule": 0}, "at least 1"),
        ({"schedule": "often"}, "schedule"),
        ({"budget": 2}, "budget"),
        ({"first_step": -1}, "first_step"),
        ({"writers": [object()]}, "write"),
        ({"rules": [gradlens.Finding]}, "rule"),
        ({"scaler": object()}, "GradScaler"),
    ],
)
def test_wrong_arguments_are_named(kwargs, word):
    """A wrong word or number says what was expected, and attaches nothing."""
    model = mlp()
    assert word in str(wrong(model, **kwargs))
    assert model[0].weight._backward_hooks is None


def test_an_optimizer_of_another_model_warns():
    """An optimizer whose parameters are not the model's is a warning that names how many."""
    model = mlp()
    with pytest.warns(
        GradlensWarning, match=r"none of the 4 parameters of the optimizer \(SGD\) are the model's: 4 are not"
    ):
        gradlens.watch(model, torch.optim.SGD(mlp().parameters(), 0.1)).close()


def test_step_beside_an_optimizer():
    """lens.step() beside an optimizer is an error."""
    model = mlp()
    with (
        gradlens.watch(model, torch.optim.SGD(model.parameters(), 0.1)) as lens,
        pytest.raises(StepError, match="optimizer"),
    ):
        lens.step()


def test_questions_before_anything_was_captured():
    """table(), weights(), gradient() before a backward say that nothing was captured."""
    model = mlp()
    with gradlens.watch(model, torch.optim.SGD(model.parameters(), 0.1)) as lens:
        for call in (
            lens.table,
            lens.weights,
            lens.gradient,
            lambda: lens.weights(top=3),
            lambda: lens.explain("0.bias", 0),
        ):
            with pytest.raises(NothingCapturedError, match="backward"):
                call()
        assert len(lens.history()) == 0
        assert lens.findings() == []
        assert isinstance(lens.report(), str)


def test_questions_about_what_is_not_there():
    """A wrong name, order, index or top is named."""
    model = mlp()
    with gradlens.watch(model) as lens:
        x, y = batch()
        nn.functional.cross_entropy(model(x), y).backward()
        with pytest.raises(ArgumentError, match=r"0\.weight"):
            lens.weights("0.weigth")
        with pytest.raises(ArgumentError, match="sensitivity"):
            lens.weights(top=3, by="size")
        with pytest.raises(ArgumentError, match="top"):
            lens.weights(top=0)
        with pytest.raises(ArgumentError, match=r"\(8, 4\)"):
            lens.explain("0.weight", (8, 0))
        with pytest.raises(ArgumentError, match=r"stage 'user' is not one of 'backward', .* did you mean 'used'"):
            lens.table(stage="user")


def test_a_run_directory_that_cannot_be_used(tmp_path):
    """A file in its place, or a run in use, is an error that names it, and nothing is attached."""
    (tmp_path / "file").write_text("")
    assert "file" in str(wrong(mlp(), run=tmp_path / "file"))
    model = mlp()
    with gradlens.watch(model, run=tmp_path / "run"):
        assert "run" in str(wrong(mlp(), run=tmp_path / "run"))


def test_numpy_is_not_needed_to_ask():
    """gradient() keeps the common dtype; mixed dtypes come as float32."""
    a = torch.ones(2, dtype=torch.float64, requires_grad=True)
    b = torch.ones(2, dtype=torch.float32, requires_grad=True)
    with gradlens.watch({"a": a}) as lens:
        (a**2).sum().backward()
        assert lens.gradient().dtype == torch.float64
    with gradlens.watch({"a": a, "b": b}) as lens:
        a.grad = None
        ((a**2).sum() + (b**3).sum()).backward()
        assert lens.gradient().dtype == torch.float32
        assert np.allclose(lens.gradient().numpy(), [2, 2, 3, 3])


def test_a_weight_is_named_as_reports_print_it():
    """`explain("fc1.weight[3, 1]")` and `weights("fc1.weight[3, 1]")` take one weight, as a pair does."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 5))
    with gradlens.watch(model, rules=()) as lens:
        model(torch.ones(2, 4)).square().sum().backward()
        assert lens.explain("0.weight[3, 1]") == lens.explain("0.weight", (3, 1))
        row = lens.weights("0.weight[3, 1]")
        assert row["index"].tolist() == [(3, 1)]
        assert row["partial"][0] == model[0].weight.grad[3, 1].item()
        assert lens.explain("module.0.weight[3, 1]") == lens.explain("0.weight", (3, 1))
        with pytest.raises(gradlens.errors.ArgumentError, match="not the index"):
            lens.explain("0.weight[7, 1]")


def test_weights_that_are_not_finite_are_counted_before_and_after_the_step():
    """`weight_nonfinite` counts NaN and infinite weights at the backward, `update_nonfinite` those that the step leaves."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        with torch.no_grad():
            model.weight[0, 0], model.weight[1, 2] = math.nan, -math.inf
        (model.weight[1, :2].sum() * 2 + model.bias.sum()).backward()
        with torch.no_grad():
            model.bias.grad[1] = math.inf
        optimizer.step()
        table = lens.table().set_index("parameter")
    assert table["weight_nonfinite"].tolist() == [2, 0]
    assert table["update_nonfinite"].tolist() == [2, 1]


def test_a_model_that_dies_right_before_exit_loses_no_record(tmp_path):
    """Its lens is closed by a thread of its own; the interpreter's exit waits for that, and all steps are on disk."""
    code = f"""
import torch, gradlens
def train():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    gradlens.watch(model, optimizer, run={str(tmp_path / "run")!r})
    for _ in range(40):
        optimizer.zero_grad()
        model(torch.ones(4, 3)).sum().backward()
        optimizer.step()
train()
"""
    forked("-c", code, code=0)
    assert gradlens.open_run(tmp_path / "run").steps("used") == list(range(40))


def test_close_names_the_command_where_there_is_a_run(capsys, tmp_path):
    """Who ran a script by `gradlens run` has no lens to ask; the records can be asked from anywhere."""
    case = gradlens.testing.dead_relu()
    with gradlens.watch(case.model, case.optimizer, run=tmp_path / "run"):
        case.train(20)
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "most likely" in line]
    assert said.endswith(f"% sure, gradlens report {tmp_path / 'run'} says what to do")


def test_the_records_of_two_optimizers_have_the_verdict_of_the_lens(tmp_path):
    """Their losses fall each for itself: neither the lens nor the run on disk takes them for progress."""
    one, other = nn.Linear(4, 1), nn.Linear(4, 1)
    optimizers = [torch.optim.SGD(each.parameters(), 0.05) for each in (one, other)]
    x = torch.randn(64, 4)
    with gradlens.watch({"one": one, "other": other}, optimizers, run=tmp_path / "run") as lens:
        for _ in range(40):
            for model, optimizer in zip((one, other), optimizers, strict=True):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
                optimizer.step()
    verdict = lens.diagnosis().verdict
    assert "the losses of several optimizers" in verdict
    assert gradlens.open_run(tmp_path / "run").diagnosis().verdict == verdict


def test_close_says_the_verdict_in_one_line(capsys):
    """On standard error, once, and nothing where nothing was seen."""
    model = nn.Sequential(mlp(), nn.Softmax(dim=1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gradlens.watch(model, optimizer) as lens:
        for _ in range(30):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(3, (16,))).backward()
            optimizer.step()
    lens.close()
    said = [line for line in capsys.readouterr().err.splitlines() if "most likely" in line]
    assert len(said) == 1
    assert said[0].startswith("gradlens: most likely a softmax before cross_entropy")
    assert said[0].endswith("% sure, print(lens.diagnosis()) says what to do")
    gradlens.watch(model, optimizer).close()
    assert "looks ill" not in capsys.readouterr().err
