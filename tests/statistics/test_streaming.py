"""Evidence gathered while training, through a real `watch`: the numbers are those of the stored gradients."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradlens
from gradlens.records import Parameters
from gradlens.statistics.evidence import Evidence
from gradlens.statistics.memory import Plan
from gradlens.statistics.streaming import EvidenceCollector
from tests.capture.helpers import Fails


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 4, generator=generator)
    return x, (x.sum(1) > 0).long()


def gradients(model, seed, scale=1.0):
    x, y = batch(seed)
    loss = nn.functional.cross_entropy(model(x), y) * scale
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()


def train(model, optimizer, *, steps=1, micro=8, seed=0):
    """Some steps of accumulation; gives each step's micro-batch gradients, computed apart."""
    stored = []
    for step in range(steps):
        optimizer.zero_grad()
        stored.append(torch.stack([gradients(model, seed + micro * step + k) for k in range(micro)]))
        for k in range(micro):
            x, y = batch(seed + micro * step + k)
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return torch.stack(stored).numpy()


def watched(features=("updates", "flips", "evidence"), optimizer=torch.optim.SGD, hook=False, **options):
    model = make()
    if hook:
        for p in model.parameters():
            p.register_hook(lambda g: g.clone())
    optimizer = optimizer(model.parameters(), lr=0.1)
    return model, optimizer, gradlens.watch(model, optimizer, features=features, **options)


@pytest.mark.parametrize("hook", [False, True], ids=["at the end of the pass", "inside hooks"])
def test_verdicts_over_micro_batches_are_a_t_test(hook):
    """t and p of each weight are scipy's on the stored gradients of the last step's micro-batches; so is q."""
    model, optimizer, lens = watched(hook=hook)
    with lens:
        stored = train(model, optimizer, steps=3)[-1]
        frame = lens.weights()
    t, p = stats.ttest_1samp(stored, 0.0)
    np.testing.assert_allclose(frame["t"], t, rtol=1e-4)
    np.testing.assert_allclose(frame["p"], p, rtol=1e-3)
    np.testing.assert_allclose(frame["q"], stats.false_discovery_control(p), rtol=1e-3)
    kept = frame["q"] <= 0.1
    assert 0 < kept.sum() < len(frame)
    assert (frame["verdict"][kept] == np.where(stored.mean(0)[kept] < 0, "increase", "decrease")).all()
    assert (frame["verdict"][~kept] == "undecided").all()
    assert frame.attrs["backwards"] == 8


def test_over_steps_only_descriptions():
    """With one backward a step there is no verdict, t, p or q; the flips are those of the signs of the step gradients."""
    model, optimizer, lens = watched()
    with lens:
        stored = train(model, optimizer, steps=6, micro=1)[:, 0]
        frame = lens.weights()
    assert frame["verdict"].isna().all()
    assert frame[["t", "p", "q"]].isna().all().all()
    assert frame.attrs["over_steps"] == ["agree", "flips", "gsnr"]
    weight = 0.98 ** np.arange(5)[::-1]
    turned = np.sign(stored[1:]) != np.sign(stored[:-1])
    np.testing.assert_allclose(frame["flips"], (weight[:, None] * turned).sum(0) / weight.sum(), rtol=1e-5)
    weight = 0.98 ** np.arange(6)[::-1][:, None]
    mean = (weight * stored).sum(0) / weight.sum()
    variance = (weight * stored**2).sum(0) / weight.sum() - mean**2
    np.testing.assert_allclose(frame["gsnr"], mean**2 / variance, rtol=1e-3)


def test_scaled_gradients_are_unscaled():
    """Under a `GradScaler` whose scale changes between steps, the decayed means are those of the gradients without it."""
    model, optimizer, _ = watched(features=())
    _.close()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    plain = []
    with gradlens.watch(model, optimizer, features=("evidence",), scaler=scaler) as lens:
        for step in range(3):
            optimizer.zero_grad()
            plain.append(gradients(model, step))
            x, y = batch(step)
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        streaming = lens._tables.evidence
        joined = torch.cat([steps.mean for steps in streaming._evidence._steps])
        sizes = streaming._evidence.moments.sizes
        parts = joined.split(sizes)  # in the order in which backward reached them
        means = torch.cat([parts[streaming._at[row]] for row in range(len(sizes))])
    expected = sum(0.02 * 0.98 ** (2 - i) * g for i, g in enumerate(plain))
    torch.testing.assert_close(means, expected, rtol=1e-4, atol=1e-9)


def test_a_sample_where_the_allowance_is_small():
    """The buffers stay within `memory`, and the followed weights have the same t as without a limit."""
    model, optimizer, lens = watched(memory=2500)
    with lens:
        assert lens._plan.taken <= 2500 < lens._plan.needed
        assert "evidence" in lens._plan.describe()
        train(model, optimizer)
        sampled = lens.weights()
    known = sampled["t"].notna()
    assert 0.3 < known.mean() < 0.9
    model, optimizer, lens = watched()
    with lens:
        train(model, optimizer)
        whole = lens.weights()
    np.testing.assert_array_equal(sampled["t"][known], whole["t"][known])


def test_memory_is_what_the_plan_says():
    """Evidence takes 61 bytes a weight: the tensors it holds have that many."""
    model, optimizer, lens = watched(features=("evidence",))
    with lens:
        train(model, optimizer)
        evidence = lens._tables.evidence._evidence
        held = [t for parts in evidence.moments._parts() for t in parts]
        held += [t for steps in evidence._steps for t in vars(steps).values()]
        assert sum(t.numel() * t.element_size() for t in held) == lens._plan.taken == 67 * Evidence.BYTES


def test_off_inside_closures():
    """LBFGS moves the weights between the backwards of a step: no evidence, and a finding that says so, once."""
    model, optimizer, lens = watched(features=("evidence",), optimizer=torch.optim.LBFGS)
    with lens:
        for step in range(2):
            x, y = batch(step)

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        assert lens.weights()["verdict"].isna().all()
        assert [f.rule for f in lens.findings()].count("evidence-left-out") == 1


def test_without_the_backward_stage_it_is_said():
    """Evidence rests on each backward's own partials: without that stage there are no empty columns but a finding."""
    model, optimizer, lens = watched(stage="used", rules=())
    with lens:
        train(model, optimizer)
        assert "verdict" not in lens.weights()
        assert [f.rule for f in lens.findings()] == ["evidence-unavailable"]


def test_training_is_bit_identical():
    """Weights after three accumulated steps are the same with and without evidence."""
    model, optimizer, lens = watched()
    with lens:
        train(model, optimizer, steps=3)
    other, optimizer, lens = watched(features=())
    lens.close()
    train(other, optimizer, steps=3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_parameter_that_a_backward_does_not_reach_counts_as_zero():
    """A branch that every second micro-batch takes: the mean is over all of them, as is the share of zeros in t."""
    a, b = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    with gradlens.watch({"a": a, "b": b}, torch.optim.SGD([a, b], lr=0.1), features=("evidence",)) as lens:
        for k in range(12):
            (a * k + (b * (k + 1) if k % 2 else 0)).backward()
        frame = lens.weights()
    expected = stats.ttest_1samp([k + 1 if k % 2 else 0 for k in range(12)], 0.0)
    assert frame["t"][1] == pytest.approx(expected.statistic)


def test_complex_and_top_and_explain():
    """A complex entry is two weights with a verdict each; `top` carries the columns; `explain` tells the verdict."""
    z = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True)
    with gradlens.watch({"z": z}, torch.optim.SGD([z], lr=0.0), features=("evidence",)) as lens:
        for k in range(8):
            (z.real.sum() * (1 + k) - z.imag.sum() * (1 + k)).backward()
        assert lens.weights()["verdict"].tolist() == ["decrease", "increase"] * 2
        assert lens.weights(top=1)["q"].notna().all()
        assert "the verdict is increase" in lens.explain("z", (1, 1)).replace("\n", " ")


@pytest.mark.parametrize("how", ["excluded", "frozen"])
def test_what_a_backward_does_not_compute_is_left_out(how):
    """A parameter that one micro-batch left out has no verdict for that step, and is not counted among the tests."""
    a, b = (torch.tensor(1.0, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([a, b], lr=0.0)
    random = np.random.default_rng(0)

    def step(left_out):
        values = random.normal(1, 1, (8, 2))
        for k, (x, y) in enumerate(values):
            b.requires_grad_(not (left_out and how == "frozen" and k == 0))
            (a * x + b * y).backward(inputs=[a] if left_out and how == "excluded" and k == 0 else None)
        optimizer.step()
        return values

    with gradlens.watch({"a": a, "b": b}, optimizer, features=("evidence",), rules=()) as lens:
        for left_out in (False, True, False):
            values = step(left_out)
            frame = lens.weights()
            expected = stats.ttest_1samp(values, 0.0)
            tested = [0] if left_out else [0, 1]
            np.testing.assert_allclose(frame["t"][tested], expected.statistic[tested], rtol=1e-6)
            np.testing.assert_allclose(frame["q"][tested], stats.false_discovery_control(expected.pvalue[tested]), rtol=1e-6)
            assert frame["verdict"].isna().tolist() == [False, left_out]
            assert frame["q"].isna().tolist() == [False, left_out]
        streaming = lens._tables.evidence
        counted = [int(streaming._evidence._steps[0].steps[streaming._at[row]]) for row in range(2)]
        assert counted == [3, 2]


def test_a_step_with_a_failed_backward_is_left_out_and_said():
    """What hooks took before the failure cannot be taken back: no verdicts for the step, and the next one is as ever."""
    model, optimizer, lens = watched(features=("evidence",), hook=True, rules=())
    with lens:
        train(model, optimizer, steps=2)
        optimizer.zero_grad()
        for k in range(4):
            x, y = batch(k)
            if k == 2:
                with pytest.raises(RuntimeError, match="out of memory"):
                    nn.functional.cross_entropy(model[2](Fails.apply(model[1](model[0](x)))), y).backward()
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert lens.weights()["verdict"].isna().all()
        assert lens.weights()["gsnr"].notna().all()
        (finding,) = [f for f in lens.findings() if f.rule == "evidence-left-out"]
        assert "failed" in finding.seen
        stored = train(model, optimizer)[-1]
        np.testing.assert_allclose(lens.weights()["t"], stats.ttest_1samp(stored, 0.0).statistic, rtol=1e-4)


def test_a_failed_backward_whose_partials_were_not_taken_costs_nothing():
    """Where gradients are read at the end of a pass, a pass that fails is as if it had not been."""
    model, optimizer, lens = watched(features=("evidence",), rules=())
    with lens:
        stored = torch.stack([gradients(model, k) for k in range(4)]).numpy()
        for k in range(4):
            x, y = batch(k)
            if k in (0, 2):
                with pytest.raises(RuntimeError, match="out of memory"):
                    nn.functional.cross_entropy(model[2](Fails.apply(model[1](model[0](x)))), y).backward()
                for p in model.parameters() if k == 0 else ():
                    p.grad = None
            nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        frame = lens.weights()
        assert frame.attrs["backwards"] == 4
        np.testing.assert_allclose(frame["t"][:40], stats.ttest_1samp(stored, 0.0).statistic[:40], rtol=1e-4)
        assert not [f for f in lens.findings() if f.rule == "evidence-left-out"]


def test_backwards_beside_each_other_are_left_out():
    """Parts of two passes in turn cannot be told apart afterwards: the step has no verdicts, and says so."""
    plan = Plan([(3,)] * 2, [4] * 2, 1 << 20, 0, more=Evidence.BYTES)
    streaming = EvidenceCollector(plan)
    parameters = Parameters(("a", "b"), ((3,), (3,)), ("float32",) * 2)
    for backward, row in ((0, 0), (1, 0), (0, 1), (1, 1)):
        streaming.add(parameters, backward, [row], [torch.ones(3)], 1.0)
    assert streaming.of("a") is None
    streaming.step_done()
    assert "beside each other" in streaming.left_out
    assert pd.isna(streaming.of("a").verdict).all()
    for backward in range(3):
        streaming.add(parameters, backward, [0, 1], [torch.ones(3) * (backward + 1)] * 2, 1.0)
    streaming.step_done()
    np.testing.assert_allclose(streaming.of("b").t, stats.ttest_1samp([1, 2, 3], 0.0).statistic)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation made (views make none)."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("reached", [True, False])
def test_temporaries_do_not_grow_with_the_parameter(reached):
    """What is made besides the buffers is of 1 MiB at most, however large a parameter is."""
    n = 1_000_003
    evidence = Evidence([torch.empty(n, dtype=torch.bfloat16)])
    gradient = torch.ones(n, dtype=torch.bfloat16) if reached else None
    with Largest() as largest:
        for _ in range(2):
            evidence.update([gradient])
        evidence.step_done()
    assert 0 < largest.bytes <= 1 << 20
    assert evidence.moments.positive[0].unique().tolist() == [2 if reached else 0]
