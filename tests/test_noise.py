"""The noise scale from norms alone equals that of the stored gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradlens
from gradlens.errors import ArgumentError
from gradlens.lens import _open_lenses
from gradlens.noise import EMA, Alike, Noise, estimate, measured
from gradlens.writers import tags

from .analysis.made import snapshot
from .writers.reading import accumulated


def gradients(k, n, seed, signal=1.0):
    random = np.random.default_rng(seed)
    return signal * random.normal(size=n) + random.normal(size=(k, n))


@settings(deadline=None, max_examples=60)
@given(k=st.integers(2, 20), n=st.integers(1, 50), seed=st.integers(0, 999), scale=st.floats(1e-6, 1e6))
def test_norms_give_what_stored_gradients_give(k, n, seed, scale):
    """Trace and signal equal the sample covariance's trace and |mean|^2 minus its share, whatever the loss's scale."""
    g = scale * gradients(k, n, seed)
    trace = g.var(axis=0, ddof=1).sum()
    signal = (g.mean(0) ** 2).sum() - trace / k
    squares = (g**2).sum(1)
    for found in (
        estimate(squares, summed=(g.sum(0) ** 2).sum()),
        estimate(squares, averaged=(g.mean(0) ** 2).sum()),
    ):
        assert found.trace == pytest.approx(trace, rel=1e-6)
        assert found.signal == pytest.approx(signal, rel=1e-6, abs=1e-6 * trace)


def test_parameters_add_up():
    """Estimates for each parameter sum to that of the whole model."""
    g = gradients(5, 12, 0)
    parts = np.split(g, [3, 7], axis=1)
    each = estimate(np.stack([(p**2).sum(1) for p in parts], 1), summed=np.array([(p.sum(0) ** 2).sum() for p in parts]))
    whole = estimate((g**2).sum(1), summed=(g.sum(0) ** 2).sum())
    assert each.trace.sum() == pytest.approx(whole.trace)
    assert each.signal.sum() == pytest.approx(whole.signal)


def test_the_smoothed_ratio_approaches_the_true_noise_scale():
    """With |G|^2 = 2 and a noise trace of 50, single steps are all over the place and the smoothed scale is 25."""
    random = np.random.default_rng(0)
    mean = np.full(50, 0.2)
    scale = EMA(decay=0.999)
    single = []
    for _ in range(4000):
        g = mean + random.normal(size=(4, 50))
        noise = estimate((g**2).sum(1), averaged=(g.mean(0) ** 2).sum())
        single.append(noise.signal)
        scale = scale.after(noise)
    assert np.mean(np.array(single) < 0) > 0.2
    assert scale.scale() == pytest.approx(25, rel=0.1)
    assert scale.scale(examples=32) == pytest.approx(32 * scale.scale())


def test_numerator_and_denominator_are_smoothed_apart():
    """The scale is the ratio of the decayed sums, not a decayed ratio."""
    scale = EMA(decay=0.5).after(Noise(1.0, 4.0)).after(Noise(3.0, 2.0))
    assert scale.scale() == (0.25 * 4 + 0.5 * 2) / (0.25 * 1 + 0.5 * 3)
    assert scale.weight == 0.75


def test_one_micro_batch_tells_nothing():
    """K = 1 is empty, and leaves the smoothed values as they were."""
    alone = estimate([4.0], summed=4.0)
    assert np.isnan(alone.signal)
    assert np.isnan(alone.trace)
    before = EMA().after(Noise(1.0, 2.0))
    assert before.after(alone) is before
    assert np.isnan(EMA().scale())


def test_a_negative_signal_has_no_scale():
    """Where noise swamps the signal the scale is empty, not negative; other parameters keep theirs."""
    scale = EMA().after(Noise(np.array([-1.0, 2.0]), np.array([3.0, 4.0]))).scale()
    assert np.isnan(scale[0])
    assert scale[1] == pytest.approx(2)


def test_each_parameter_skips_what_it_does_not_know():
    """A step that is empty for one parameter counts for the others."""
    scale = EMA(decay=0.5).after(Noise(np.array([1.0, np.nan]), np.array([3.0, 1.0])))
    scale = scale.after(Noise(np.array([1.0, 2.0]), np.array([5.0, 8.0])))
    assert scale.weight.tolist() == [0.75, 0.5]
    assert scale.scale().tolist() == pytest.approx([(0.25 * 3 + 0.5 * 5) / 0.75, 4])


def test_bad_input_is_explained():
    """No gradients, both or neither of the common norms, and a decay that is none."""
    for arguments in ({}, {"summed": 1.0, "averaged": 1.0}):
        with pytest.raises(ArgumentError, match="either that of their sum or of their mean"):
            estimate([1.0, 2.0], **arguments)
    with pytest.raises(ArgumentError):
        estimate([], summed=1.0)
    with pytest.raises(ArgumentError, match=r"\[0, 1\)"):
        EMA(decay=1.0)


# --- from what a lens saw ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_lens_is_left():
    """Each test closes what it opens, or the fixture does."""
    yield
    for lens in list(_open_lenses):
        lens.close()


def net(width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 1))


def micro_batches(steps, k, size=8, seed=1):
    torch.manual_seed(seed)
    x = torch.randn(steps, k, size, 6)
    return x, x.sum(-1, keepdim=True) + torch.randn(steps, k, size, 1)


def train(model, k, steps=3, clip=None, scaler=None, size=8, observe=None, **watching):
    """Accumulate over k micro-batches; the lens, and the gradients of each, stored in float64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lens = gradlens.watch(model, optimizer, scaler=scaler, rules=(), **watching)
    stored = []
    for xs, ys in zip(*micro_batches(steps, k, size), strict=True):
        optimizer.zero_grad()
        stored.append([])
        for x, y in zip(xs, ys, strict=True):
            loss = nn.functional.mse_loss(model(x), y) / k
            grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
            stored[-1].append(np.concatenate([g.double().numpy().ravel() for g in grads]))
            (loss if scaler is None else scaler.scale(loss)).backward()
            lens.observe(loss=loss, batch_size=observe)
        if scaler is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
    return lens, np.array(stored)


def of_stored(stored, decay):
    """The smoothed scale, by the textbook: the sample covariance's trace over |mean|^2 less its share."""
    signal = trace = 0.0
    for g in stored:
        noise = g.var(axis=0, ddof=1).sum()
        trace = decay * trace + noise
        signal = decay * signal + (g.mean(0) ** 2).sum() - noise / len(g)
    return trace / signal


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"clip": 0.1},
        {"clip": 0.1, "stage": ("backward", "accumulated"), "features": ()},
        {"clip": 0.1, "memory": "100B"},
        {"clip": 0.1, "scaler": True},
        {"features": (), "stage": ("backward", "accumulated", "used")},
    ],
    ids=str,
)
def test_what_is_watched_gives_what_stored_gradients_give(k, given, tmp_path):
    """To 1e-6, clipped, scaled or neither; the run directory says the same."""
    given = dict(given)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if given.pop("scaler", False) else None
    lens, stored = train(net(), k, scaler=scaler, run=tmp_path / "run", **given)
    found = lens.noise_scale(decay=0.5)
    assert float(found) == pytest.approx(of_stored(stored, 0.5), rel=1e-6)
    assert found.unit == "micro-batches"
    assert found.frame["backwards"].tolist() == [k] * 3
    assert found.frame["share"].tolist() == [1.0] * 3
    lens.close()
    recorded = gradlens.open_run(tmp_path / "run").noise_scale(decay=0.5)
    assert float(recorded) == pytest.approx(float(found), rel=1e-12)
    assert recorded.frame.equals(found.frame)


def test_parameters_have_their_own_scale():
    """Signals and traces by parameter add up to those of the model."""
    model = net()
    lens, stored = train(model, 4)
    found = lens.noise_scale()
    assert found.table["parameter"].tolist() == lens.names()
    assert found.table["trace"].sum() == pytest.approx(found.trace)
    assert found.table["signal"].sum() == pytest.approx(found.signal)
    weight = stored[:, :, :96]  # of the first layer
    ratio = found.table["trace"][0] / found.table["signal"][0]
    assert ratio == pytest.approx(of_stored(weight, 0.95), rel=1e-6)
    assert found.table["noise_scale"][0] == pytest.approx(ratio)


def test_the_unit_is_examples_where_the_batch_size_was_observed():
    """Micro-batches of 8 examples: eight times the number, in text too; steps without a size do not count in it."""
    lens, stored = train(net(), 4, observe=8)
    found = lens.noise_scale()
    assert found.unit == "examples"
    assert found.value == pytest.approx(8 * of_stored(stored, 0.95), rel=1e-6)
    assert "examples (over 3 steps, the last of 4 micro-batches of 8 examples)" in str(found)


def test_the_scale_does_not_depend_on_the_size_of_micro_batches():
    """In examples it is a property of the data and the weights: micro-batches of 8 and of 32 tell about the same."""
    scales = [float(train(net(), 8, steps=30, size=n, observe=n)[0].noise_scale(decay=0.99)) for n in (8, 32)]
    assert scales[0] == pytest.approx(scales[1], rel=0.5)


def lbfgs(model):
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    lens = gradlens.watch(model, optimizer, rules=())
    x, y = micro_batches(1, 1)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x[0, 0]), y[0, 0])
        loss.backward()
        return loss

    optimizer.step(closure)
    return lens


def two_losses(model):
    """A loss for each layer: no parameter is reached by both."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lens = gradlens.watch(model, optimizer, rules=())
    x, _ = micro_batches(1, 1)
    hidden = model[1](model[0](x[0, 0]))
    hidden.square().mean().backward()
    model[2](hidden.detach()).square().mean().backward()
    optimizer.step()
    return lens


def cleared(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lens = gradlens.watch(model, optimizer, rules=())
    for x in micro_batches(1, 3)[0][0]:
        optimizer.zero_grad()
        model(x).square().mean().backward()
    optimizer.step()
    return lens


def by_value(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    lens = gradlens.watch(model, optimizer, rules=())
    for x in micro_batches(1, 3)[0][0]:
        model(x).square().mean().backward()
    torch.nn.utils.clip_grad_value_(model.parameters(), 1e-2)
    optimizer.step()
    return lens


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda m: train(m, 1)[0], "one backward a step"),
        (lambda m: train(m, 3, stage="used")[0], "add 'backward'"),
        (by_value, "add 'accumulated'"),
        (lambda m: train(m, 3, features=())[0], "add 'accumulated'"),
        (lbfgs, "do not add up"),
        (two_losses, "do not add up"),
        (cleared, "do not add up"),
        (lambda m: gradlens.watch(m), "nothing was captured"),
    ],
)
def test_what_cannot_be_known_is_empty_and_says_why(make, reason):
    """No micro-batches, no norms, backwards that do not add up: NaN, no rows, and the reason."""
    found = make(net()).noise_scale()
    assert np.isnan(float(found))
    assert len(found.frame) == len(found.rows) == 0
    assert reason in found.reason
    assert reason in str(found)


def test_a_parameter_that_some_micro_batches_miss_is_left_out():
    """The others' scale stands, and `share` says on how many weights."""
    model = nn.ModuleDict({"a": nn.Linear(6, 1), "b": nn.Linear(6, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradlens.watch(model, optimizer, rules=()) as lens:
        for i, x in enumerate(micro_batches(1, 3)[0][0]):
            (model["a"](x) + (model["b"](x) if i else 0)).square().mean().backward()
        optimizer.step()
        found = lens.noise_scale()
    assert found.frame["share"].tolist() == [0.5]
    assert np.isnan(found.table["trace"][2:]).all()
    assert (found.table["trace"][:2] > 0).all()


def test_the_report_and_tensorboard_have_the_number(tmp_path):
    """A line on the page, and a scalar a step that is the smoothed scale up to there; neither without accumulation."""
    lens, _ = train(net(), 4, observe=8, run=tmp_path / "a")
    assert "NOISE\n  noise scale: " in lens.report()
    expected = lens.noise_scale().frame
    lens.close()
    assert values(tmp_path / "a", f"{tags.HEALTH}/noise_scale") == pytest.approx(
        dict(zip(expected["step"], expected["noise_scale"], strict=True)), rel=1e-6
    )
    lens, _ = train(net(), 1, run=tmp_path / "b")
    assert "NOISE" not in lens.report()
    lens.close()
    assert values(tmp_path / "b", f"{tags.HEALTH}/noise_scale") == {}


def values(folder, tag):
    """By step, the numbers of a tag in a run's event files."""
    found = accumulated(folder)
    return {event.step: event.value for event in found.Scalars(tag)} if tag in found.Tags()["scalars"] else {}


def of_gradient(g, stage, rank=0, **given):
    """A snapshot of one parameter whose gradient is `g`."""
    sums = {"sum": g.sum(), "abs_sum": np.abs(g).sum(), "square_sum": (g**2).sum()}
    return replace(snapshot(names=("w",), stage=stage, numel=len(g), **sums, **given), rank=rank)


def test_ranks_are_summands_too():
    """Two ranks with two micro-batches each, averaged: four gradients, of which the mean is known."""
    g = gradients(4, 10, 3)
    snapshots = [of_gradient(g[i], "backward", backward=i % 2, rank=i // 2) for i in range(4)]
    snapshots.append(of_gradient(g.sum(0) / 2, "reduced", backward=1))
    trace = g.var(axis=0, ddof=1).sum()
    found = measured(snapshots, ranks=2)
    assert found.trace / found.signal == pytest.approx(trace / ((g.mean(0) ** 2).sum() - trace / 4))
    alone = measured([s for s in snapshots if s.rank == 0])
    assert "ranks whose records are not here" in alone.reason


# --- micro-batches that are not equal -----------------------------------------------------------------------------------


def unequal(steps, sizes, weighted, observe=True, **watching):
    """Train over micro-batches of these sizes; the lens, and the true scale in examples, from single examples' gradients."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    lens = gradlens.watch(model, optimizer, rules=(), **watching)
    torch.manual_seed(1)
    x = torch.randn(4096, 6)
    y = x.sum(-1, keepdim=True) + torch.randn(4096, 1)
    random = torch.Generator().manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        for n in sizes:
            rows = torch.randint(len(x), (n,), generator=random)
            loss = nn.functional.mse_loss(model(x[rows]), y[rows])
            (loss * n / sum(sizes) if weighted else loss / len(sizes)).backward()
            lens.observe(batch_size=n if observe else None)
        optimizer.step()
    each = torch.func.vmap(
        torch.func.grad(lambda p, a, b: nn.functional.mse_loss(torch.func.functional_call(model, p, a), b)),
        in_dims=(None, 0, 0),
    )({name: p.detach() for name, p in model.named_parameters()}, x, y)
    g = torch.cat([part.reshape(len(x), -1) for part in each.values()], 1)
    return lens, (g.var(0).sum() / g.mean(0).square().sum()).item()


@pytest.mark.parametrize("sizes", [(30, 2), (16, 16), (20, 8, 4)])
def test_micro_batches_of_unequal_size_have_the_scale_of_the_data(sizes):
    """Told by observe() at each backward, 30 + 2 examples give the scale that 16 + 16 give, and the true one."""
    lens, true = unequal(300, sizes, weighted=False)
    found = lens.noise_scale(decay=0.999)
    assert found.unit == "examples"
    assert found.value == pytest.approx(true, rel=0.35)


def test_losses_that_count_by_size_are_said_to():
    """With sizes= and weighted= the scale is right where each loss is weighted by its examples."""
    lens, true = unequal(300, (24, 8), weighted=True, observe=False)
    found = lens.noise_scale(decay=0.999, sizes=[24, 8], weighted=True)
    assert found.unit == "examples"
    assert found.value == pytest.approx(true, rel=0.35)


def test_backwards_that_are_not_alike_have_no_scale():
    """30 + 2 examples of which nobody said so, or two losses, are refused with a reason and not given a number."""
    lens, _ = unequal(100, (30, 2), weighted=False, observe=False)
    found = lens.noise_scale()
    assert np.isnan(found.value)
    assert "not alike" in found.reason
    assert "give sizes=" in str(found)
    known = lens.noise_scale(sizes=[30, 2])
    assert known.value > 0
    with pytest.raises(ArgumentError, match="above 0"):
        lens.noise_scale(sizes=[30, 0])
    assert "a step had 2 micro-batches" in lens.noise_scale(sizes=[8, 8, 8]).reason


def test_the_two_losses_of_a_gan_are_no_micro_batches():
    """A discriminator's losses on real and on generated data differ in their gradients, step after step."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3)
    with gradlens.watch(critic, optimizer, rules=()) as lens:
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.softplus(-critic(3 + torch.randn(32, 6))).mean().backward()
            nn.functional.softplus(critic(torch.randn(32, 6))).mean().backward()
            optimizer.step()
        assert "not alike" in lens.noise_scale().reason


def test_equal_micro_batches_are_alike():
    """In 20 trainings of 40 steps no pair of equal micro-batches is taken for two losses."""
    for seed in range(20):
        alike, random = Alike(), np.random.default_rng(seed)
        for _ in range(40):
            alike.take(random.chisquare(3, size=4))
        assert alike.ratio == 1
